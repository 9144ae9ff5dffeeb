"""The regions that a two-stage head pools: recorded in one network, pooled again by another.

Shape shorthand: R regions, each (image, x1, y1, x2, y2) in pixels of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmstructkd.errors import TapError
from mmstructkd.taps.tap import Tap

__all__ = ['RegionRecorder', 'Regions', 'in_region_head', 'pool_regions', 'probe_regions']

REGION_HEAD = 'roi_head'


@dataclass(frozen=True, eq=False)
class Regions:
    """What a RoI head pooled in one forward pass.

    Attributes:
        boxes: for each stage of the box branch its regions, shape (R, 5): the
            number of the image, then ``xyxy`` in pixels of the padded input.
        masks: the same of the mask branch; empty where there is none.
    """

    boxes: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)


def in_region_head(tap: Tap) -> bool:
    """Whether a tap lies in a two-stage detector's RoI head."""
    return tap.module.split('.')[0] == REGION_HEAD


def probe_regions(images: int, size: tuple[int, int]) -> Regions:
    """Two regions an image, to try a network with.

    Args:
        images: number of images.
        size: (H, W) of the input.

    Returns:
        The same regions for box and mask branch, for any number of stages.

    Example:
        >>> probe_regions(1, (64, 128)).boxes[0].tolist()
        [[0.0, 0.0, 0.0, 128.0, 64.0], [0.0, 0.0, 0.0, 64.0, 32.0]]
    """
    height, width = size
    rows = [[i, 0.0, 0.0, width * scale, height * scale] for i in range(images) for scale in (1.0, 0.5)]
    return Regions(boxes=[torch.tensor(rows)] * 8, masks=[torch.tensor(rows)] * 8)


def _stages(module: Any) -> list[nn.Module]:
    """The modules of a branch, one a stage."""
    if module is None:
        return []
    return list(module) if isinstance(module, nn.ModuleList) else [module]


class RegionRecorder:
    """Context manager that notes which regions a network's RoI head pools.

    A network without such a head is left alone.

    Args:
        network: the detector.

    Attributes:
        regions: what was pooled inside the block, without graph.
    """

    def __init__(self, network: nn.Module) -> None:
        self.regions = Regions()
        self._head = getattr(network, REGION_HEAD, None)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> RegionRecorder:
        boxes = _stages(getattr(self._head, 'bbox_roi_extractor', None))
        masks = _stages(getattr(self._head, 'mask_roi_extractor', None))
        for modules, kept in ((boxes, self.regions.boxes), (masks, self.regions.masks)):
            for module in modules:
                if modules is masks and any(module is other for other in boxes):
                    continue  # shared: the mask branch takes the features of the boxes
                self._handles.append(module.register_forward_pre_hook(self._hook(kept), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @staticmethod
    def _hook(kept: list[Tensor]) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kept.append((args[1] if len(args) > 1 else kwargs['rois']).detach())

        return hook


def pool_regions(network: nn.Module, features: Sequence[Tensor], regions: Regions, taps: Sequence[Tap]) -> None:
    """Run the branches of a RoI head on given regions, as far as taps ask for it.

    Args:
        network: a two-stage detector.
        features: of its neck.
        regions: of this input, from any network.
        taps: those that lie in the RoI head.

    Raises:
        TapError: the network has fewer stages, or the regions are missing.
    """
    head = getattr(network, REGION_HEAD)
    branches = {tap.module.split('.')[1] for tap in taps if '.' in tap.module}
    masks = any(name.startswith('mask') for name in branches)
    for wanted, name, forward, boxes in (
        (not masks or len(branches) > 1, 'bbox_roi_extractor', '_bbox_forward', regions.boxes),
        (masks, 'mask_roi_extractor', '_mask_forward', regions.masks),
    ):
        if not wanted:
            continue
        extractor = getattr(head, name, None)
        if extractor is None or not boxes:
            raise TapError(
                f'{type(network).__name__}: taps in {REGION_HEAD!r} need regions of the same branch in student and '
                f'teacher, got none for {name!r}. Tap the neck instead.'
            )
        if isinstance(extractor, nn.ModuleList):
            for stage, rois in zip(range(len(extractor)), boxes, strict=False):
                getattr(head, forward)(stage, features, rois)
        else:
            getattr(head, forward)(features, boxes[0])
