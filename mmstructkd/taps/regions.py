"""The regions that a two-stage head pools: recorded in one network, pooled again by another.

Shape shorthand: R regions, each (image, x1, y1, x2, y2) in pixels of the input.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmstructkd.errors import TapError
from mmstructkd.taps.tap import Tap

__all__ = [
    'RegionRecorder',
    'Regions',
    'in_region_head',
    'pair_stages',
    'pool_regions',
    'probe_regions',
    'shows_regions',
]

REGION_HEAD = 'roi_head'
BOX, MASK = 'bbox', 'mask'
#: Parts of a RoI head that look at the whole image, with what they are to its branches.
WHOLE = {'semantic_head': 'semantic_feat', 'glbctx_head': 'glbctx_feat'}

#: By branch and stage of the teacher the stage of the student whose regions it pools.
Stages = Mapping[tuple[str, int], int]


@dataclass(frozen=True, eq=False)
class Regions:
    """What a RoI head pooled in one forward pass.

    Attributes:
        boxes: for each stage of the box branch its regions, shape (R, 5): the
            number of the image, then ``xyxy`` in pixels of the padded input.
        masks: the same of the mask branch; empty where there is none.
        rows: for each tap of the recorded network the regions of each call.
        stages: see :func:`pair_stages`; what is not in it pools those of its own
            number.
        branches: of how many copies of the batch the recorded network numbers
            the images (TridentNet in training), one after the other.
    """

    boxes: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    rows: dict[Tap, list[Tensor | None]] = field(default_factory=dict)
    stages: Stages = field(default_factory=dict)
    branches: int = 1

    def of(self, branch: str) -> list[Tensor]:
        """Regions of a branch by stage."""
        return self.masks if branch == MASK else self.boxes

    def behind(self, tap: Tap, call: int, calls: int) -> Tensor | None:
        """The regions that the rows of one tensor belong to.

        Args:
            tap: of the recorded network.
            call: number of the tensor.
            calls: how many the tap has shown.

        Returns:
            Shape (R, 5); ``None`` where it is not known.
        """
        rows = self.rows.get(tap)
        if rows:
            return rows[call * len(rows) // calls]
        stages = self.of(_branch(tap))
        return stages[min(_stage(tap), len(stages) - 1)] if stages else None


def in_region_head(tap: Tap) -> bool:
    """Whether a tap lies in a two-stage detector's RoI head."""
    return tap.module.split('.')[0] == REGION_HEAD


def shows_regions(tap: Tap) -> bool:
    """Whether the rows of what a tap shows are regions, as in all parts of a RoI head but those for whole images."""
    return in_region_head(tap) and _part(tap) not in WHOLE


def _part(tap: Tap) -> str:
    """Name of the part of a RoI head that a tap lies in."""
    return tap.module.partition('.')[2].partition('.')[0]


def _branch(tap: Tap) -> str:
    """The branch of a RoI head that a tap lies in."""
    return MASK if _part(tap).startswith(MASK) else BOX


def _stage(tap: Tap) -> int:
    """Number of the stage that a tap lies in, as ``roi_head.bbox_head.2.fc_cls`` names it."""
    names = tap.module.split('.')
    return int(names[2]) if len(names) > 2 and names[2].isdecimal() else 0


def pair_stages(terms: Iterable[tuple[str, Sequence[Tap], Sequence[Tap]]]) -> Stages:
    """Find out which regions each stage of the teacher's RoI head must pool.

    Each stage of a cascade pools the boxes that the one before has made of its
    own. A pair of taps must pool the same, so that the teacher's stage takes the
    regions of the student's stage that the term puts beside it.

    Args:
        terms: of each its name, the student's taps and the teacher's.

    Returns:
        By branch and stage of the teacher the stage of the student.

    Raises:
        TapError: a stage of the teacher would need the regions of several.
    """
    paired: dict[tuple[str, int], int] = {}
    owners: dict[tuple[str, int], str] = {}
    for name, of_student, of_teacher in terms:
        for branch in (BOX, MASK):
            sides = [
                list(dict.fromkeys(_stage(tap) for tap in taps if shows_regions(tap) and _branch(tap) == branch))
                for taps in (of_student, of_teacher)
            ]
            students, teachers = sides
            if not students or not teachers:
                continue
            if len(students) == 1:
                students = students * len(teachers)
            if len(students) != len(teachers):
                raise TapError(
                    f'term {name!r}: `tap` must name as many stages of the {branch} branch in the teacher as in the '
                    f'student, got {teachers} and {students}. Each stage pools regions of its own: tap one stage of '
                    'both.'
                )
            for stage, wanted in zip(teachers, students, strict=True):
                key = branch, stage
                if paired.setdefault(key, wanted) != wanted:
                    raise TapError(
                        f'term {name!r}: stage {stage} of the {branch} branch of the teacher must be put beside one '
                        f'stage of the student, got {wanted} here and {paired[key]} in term {owners[key]!r}, which '
                        'pool other regions. Leave one of the two terms out.'
                    )
                owners.setdefault(key, name)
    return paired


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
        taps: places of which it is noted what regions were pooled last when they
            are passed.
        stages: handed on, see :func:`pair_stages`.

    Attributes:
        regions: what was pooled inside the block, without graph.
    """

    def __init__(self, network: nn.Module, taps: Iterable[Tap] = (), stages: Stages | None = None) -> None:
        branches = getattr(getattr(network, 'backbone', None), 'num_branch', 1)
        self.regions = Regions(stages=dict(stages or {}), branches=branches)
        self._network = network
        self._taps = [tap for tap in dict.fromkeys(taps) if shows_regions(tap)]
        self._head = getattr(network, REGION_HEAD, None)
        self._latest: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> RegionRecorder:
        boxes = _stages(getattr(self._head, f'{BOX}_roi_extractor', None))
        masks = _stages(getattr(self._head, f'{MASK}_roi_extractor', None))
        for modules, branch in ((boxes, BOX), (masks, MASK)):
            for stage, module in enumerate(modules):
                if modules is masks and any(module is other for other in boxes):
                    continue  # shared: the mask branch takes the features of the boxes
                self._handles.append(module.register_forward_pre_hook(self._pooling(branch, stage), with_kwargs=True))
        modules = dict(self._network.named_modules()) if self._taps else {}
        for tap in self._taps:  # after the extractors: one that is tapped itself has pooled already
            self.regions.rows[tap] = []
            self._handles.append(modules[tap.module].register_forward_pre_hook(self._passing(tap)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _pooling(self, branch: str, stage: int) -> Any:
        kept = self.regions.of(branch)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            rois = (args[1] if len(args) > 1 else kwargs['rois']).detach()
            self._latest[branch] = self._latest[''] = rois
            if stage == len(kept):  # a head of two parts pools the same twice
                kept.append(rois)

        return hook

    def _passing(self, tap: Tap) -> Any:
        # a part that serves both branches has got what was pooled last
        own = next((branch for branch in (BOX, MASK) if _part(tap).startswith(branch)), '')

        def hook(module: nn.Module, args: tuple) -> None:
            self.regions.rows[tap].append(self._latest.get(own))

        return hook


def pool_regions(network: nn.Module, features: Sequence[Tensor], regions: Regions, taps: Sequence[Tap]) -> None:
    """Run the branches of a RoI head on given regions, as far as taps ask for it.

    Args:
        network: a two-stage detector.
        features: of its neck.
        regions: of this input, from any network.
        taps: those that lie in the RoI head.

    Raises:
        TapError: the regions are missing, or the head takes more than features
            and regions.
    """
    head = getattr(network, REGION_HEAD)
    parts = {_part(tap) for tap in taps}
    masks = any(part.startswith(MASK) for part in parts)
    # what is tapped beside the branches is passed by both
    beside = {part for part in parts if not part.startswith((BOX, MASK)) and part not in WHOLE}
    wanted = {
        BOX: bool(beside) or any(part.startswith(BOX) for part in parts) or parts == {''},
        MASK: masks or (bool(beside) and _pools_masks(head)),
    }
    whole = {}
    for part, name in WHOLE.items():
        if getattr(head, part, None) is not None and (part in parts or any(wanted.values())):
            whole[name] = getattr(head, part)(features)[1]
    relayed = None
    if wanted[BOX]:
        relayed = _pool_branch(network, features, regions, BOX, whole)
    if wanted[MASK]:
        if getattr(head, 'feat_relay_head', None) is not None:
            whole = {**whole, 'relayed_feat': _relay(network, features, regions, whole, relayed)}
        _pool_branch(network, features, regions, MASK, whole)


def _pools_masks(head: nn.Module) -> bool:
    """Whether a RoI head has a mask branch that pools for itself."""
    extractor = getattr(head, f'{MASK}_roi_extractor', None)
    return extractor is not None and not getattr(head, 'share_roi_extractor', False)


def _pool_branch(
    network: nn.Module, features: Sequence[Tensor], regions: Regions, branch: str, more: Mapping[str, Tensor]
) -> Any:
    """Run all stages of a branch; return what the last gave."""
    head, pooled = getattr(network, REGION_HEAD), regions.of(branch)
    extractor = getattr(head, f'{branch}_roi_extractor', None)
    if extractor is None or not pooled or (branch == MASK and not _pools_masks(head)):
        raise TapError(
            f'{type(network).__name__}: taps in {REGION_HEAD!r} need regions of the same branch in student and '
            f"teacher, got none for '{branch}_roi_extractor'. Tap the neck instead."
        )
    out = None
    for stage in range(len(_stages(extractor))):
        source = regions.stages.get((branch, stage), stage)
        if source < len(pooled):
            out = _pool_stage(network, features, regions, branch, stage, pooled[source], more)
    return out


def _pool_stage(
    network: nn.Module,
    features: Sequence[Tensor],
    regions: Regions,
    branch: str,
    stage: int,
    rois: Tensor,
    more: Mapping[str, Tensor],
) -> Any:
    """Run one stage of a branch on given regions."""
    forward = getattr(getattr(network, REGION_HEAD), f'_{branch}_forward')
    parameters = inspect.signature(forward).parameters
    given = {'x': features, 'rois': _numbered(rois, features, regions), **more}
    if 'stage' in parameters:
        given['stage'] = stage
    absent = [name for name, one in parameters.items() if one.default is one.empty and name not in given]
    if absent:
        raise TapError(
            f'{type(network).__name__}: taps in {REGION_HEAD!r} need a head that takes features and regions, got '
            f'{type(forward.__self__).__name__}, which also takes {absent}. Tap the neck instead.'
        )
    return forward(**{name: value for name, value in given.items() if name in parameters})


def _numbered(rois: Tensor, features: Sequence[Tensor], regions: Regions) -> Tensor:
    """Regions of several copies of a batch, for the features of one."""
    if regions.branches == 1:
        return rois
    return torch.cat([rois[:, :1].remainder(len(features[0])), rois[:, 1:]], dim=1)


def _relay(
    network: nn.Module, features: Sequence[Tensor], regions: Regions, whole: Mapping[str, Tensor], last: Any
) -> Tensor:
    """What SCNet's mask branch gets from the last stage of its box branch, for the regions of masks."""
    head, rois = getattr(network, REGION_HEAD), regions.masks[regions.stages.get((MASK, 0), 0)]
    stages = len(_stages(head.bbox_roi_extractor))
    if last is None:  # nobody listens to the boxes, so that they can be run on these regions
        last = _pool_stage(network, features, regions, BOX, stages - 1, rois, whole)
        return head.feat_relay_head(last['relayed_feat'])
    boxes = regions.boxes[regions.stages.get((BOX, stages - 1), stages - 1)]
    images = rois[:, 0].contiguous()
    # of each image the first regions of the box branch are those that have masks
    place = torch.arange(len(rois), device=rois.device) - torch.searchsorted(images, images)
    place = place + torch.searchsorted(boxes[:, 0].contiguous(), images)
    return head.feat_relay_head(last['relayed_feat'][place.clamp(max=len(boxes) - 1)])
