"""Datasets that mmseg and mmdet lack: embedded scenes for all three tasks, CamVid, and depth in files.

Each half is there if the package it builds on is: without mmdet there is no
``SceneDetDataset``, without mmseg only that.
"""

from importlib.util import find_spec

from mmstructkd.datasets.depth_transforms import BottomCrop, DepthWindow
from mmstructkd.datasets.finite_augmentation import FiniteAugmentation
from mmstructkd.datasets.image_folder import ImageFolderDataset
from mmstructkd.datasets.paired import PairedDataset
from mmstructkd.datasets.scenes import Scene, render_scene
from mmstructkd.datasets.transforms import LoadScene, LoadSceneAnnotations
from mmstructkd.datasets.turn_view import TurnView

__all__ = [
    'BottomCrop',
    'DepthWindow',
    'FiniteAugmentation',
    'ImageFolderDataset',
    'LoadScene',
    'LoadSceneAnnotations',
    'PairedDataset',
    'Scene',
    'TurnView',
    'render_scene',
]

if find_spec('mmseg') is not None:
    from mmstructkd.datasets.camvid import CamVidDataset
    from mmstructkd.datasets.depth_folder import DepthFolderDataset, KITTIEigenDataset
    from mmstructkd.datasets.scene_seg import SceneDepthDataset, SceneSegDataset

    __all__ += ['CamVidDataset', 'DepthFolderDataset', 'KITTIEigenDataset', 'SceneDepthDataset', 'SceneSegDataset']

if find_spec('mmdet') is not None:
    from mmstructkd.datasets.scene_det import SceneDetDataset

    __all__ += ['SceneDetDataset']
