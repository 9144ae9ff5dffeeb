"""Datasets that mmseg and mmdet lack."""

from mmstructkd.datasets.camvid import CamVidDataset

__all__ = ['CamVidDataset']
