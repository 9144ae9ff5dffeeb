"""Collects what a batch's data samples know into :class:`~mmstructkd.structures.Targets`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmstructkd.distillers.normalization import valid_area
from mmstructkd.structures import Targets

__all__ = ['collect_targets', 'head_of']


def head_of(network: nn.Module) -> nn.Module | None:
    """The head that knows the classes: the last decode head, or the box head."""
    head = getattr(network, 'decode_head', None)
    if isinstance(head, nn.ModuleList):
        head = head[-1]
    if head is None:
        head = getattr(network, 'bbox_head', None)
    if head is None:
        head = getattr(getattr(network, 'roi_head', None), 'bbox_head', None)
    return head


def collect_targets(network: nn.Module, inputs: Tensor, data_samples: Sequence[Any] | None) -> Targets:
    """Gather labels and the area that counts.

    Args:
        network: the student: its head says which label is ignored.
        inputs: the preprocessed batch, shape (B, 3, H, W).
        data_samples: one per image; those of unlabelled images have no
            ``gt_sem_seg``.

    Returns:
        The targets, on the device of ``inputs``.
    """
    head = head_of(network)
    ignore_index = getattr(head, 'ignore_index', 255)
    labels = None
    if data_samples and all(hasattr(sample, 'gt_sem_seg') for sample in data_samples):
        labels = torch.cat([sample.gt_sem_seg.data for sample in data_samples]).to(inputs.device, torch.int64)
    valid = valid_area(inputs, data_samples)
    if labels is not None:
        known = labels != ignore_index
        valid = known if valid is None else known & valid
    return Targets(
        labels=labels,
        valid=valid,
        ignore_index=ignore_index,
        num_classes=getattr(head, 'num_classes', None),
        images=inputs,
        input_size=tuple(inputs.shape[-2:]),
    )
