"""Contrast between regions: class centres, boxes or cells as instances."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from mmstructkd.errors import (
    MAX_CLASSES,
    ConfigError,
    ShapeError,
    check_count,
    check_finite_number,
    check_ndim,
    check_one_of,
    check_same,
)
from mmstructkd.functional.core.nodes import cell_nodes, check_grid, unit_vectors
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import mean_of_sum
from mmstructkd.functional.core.regions import box_average, class_centers
from mmstructkd.functional.core.sampling import draw
from mmstructkd.functional.region_contrast import region_contrast_loss, sinkhorn_loss, wasserstein_contrast_loss
from mmstructkd.losses.seeding import check_seed, seeded
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.memories import ClassQueue
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['LipschitzCritic', 'RegionContrastLoss']

#: Widths, instances and keys; more would fill the memory.
MAX_KEYS = 2**16
_MODES = ('nce', 'wasserstein')
_REGIONS = ('classes', 'boxes', 'cells')
_FIRST_ITERATIONS = 10


class LipschitzCritic(nn.Module):
    r"""Score of a pair of embeddings, of slope at most 1: two layers of spectral norm 1.

    .. math:: g(s, t) = v' \mathrm{relu}(W_s s + W_t t + b)

    The norms come from one power iteration a training step, as in spectral
    normalisation; written out, because what torch offers cannot be pickled.

    Args:
        width: of an embedding.
        hidden: of the layer between.
    """

    left: Tensor

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, 2 * width) / (2 * width) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.score = nn.Parameter(torch.randn(hidden) / hidden**0.5)
        self.register_buffer('left', torch_functional.normalize(torch.randn(hidden), dim=0))
        with torch.no_grad():
            for _ in range(_FIRST_ITERATIONS):
                self._iterate()

    @torch.no_grad()
    def _iterate(self) -> None:
        right = torch_functional.normalize(self.weight.T @ self.left, dim=0)
        self.left.copy_(torch_functional.normalize(self.weight @ right, dim=0))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the scores of all pairs, (n, n), of embeddings (n, D) each."""
        if self.training:
            self._iterate()
        # Copies: the buffer moves on before the backward pass.
        left = self.left.clone()
        right = torch_functional.normalize(self.weight.detach().T @ left, dim=0)
        weight = self.weight / (left @ self.weight @ right).clamp(min=1e-12)
        first, second = weight.chunk(2, dim=1)
        hidden = torch.relu((student @ first.T)[:, None] + (teacher @ second.T) + self.bias)
        return hidden @ torch_functional.normalize(self.score, dim=0)


@MODELS.register_module()
class RegionContrastLoss(SoftenedLoss):
    r"""The student's embedding of a region shall single out the teacher's of the same one.

    Contrastive distillation, CRD (arXiv:1910.10699), with regions in the place
    of images, and its Wasserstein form, WCoRD (arXiv:2012.08674). Both networks'
    regions are embedded by a linear layer each, which are trained with the
    student and dropped from its checkpoint. Tap features; widths may differ.
    The default weight is CRD's, for images of a classifier.

    - ``mode='nce'``: :func:`~mmstructkd.functional.region_contrast.region_contrast_loss`,
      with a queue of the teacher's regions for more negatives.
    - ``mode='wasserstein'``: global,
      :func:`~mmstructkd.functional.region_contrast.wasserstein_contrast_loss` with a
      critic of slope at most 1 that is trained along; plus local,
      :func:`~mmstructkd.functional.region_contrast.sinkhorn_loss`. The paper's weights
      were not read.

    Regions of an image:

    - ``'classes'``: the centres of the classes in its labels. Other classes are
      negatives.
    - ``'boxes'``: averages over its boxes. Those of other classes are negatives.
    - ``'cells'``: the cells of a grid. All others are negatives; no queue.

    What is drawn where there are too many depends on a step counter alone, which
    is saved with the queue, so that a resumed run goes on exactly. In eval mode
    nothing is remembered.

    With several processes what is remembered is gathered, so that one queue
    serves all, and each must have as many images; besides the queue, a region is
    compared with those of its own process (in ``'wasserstein'`` with these alone).

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        mode: ``'nce'`` or ``'wasserstein'``.
        regions: ``'classes'``, ``'boxes'`` or ``'cells'``.
        num_classes: of labels or boxes; needed for ``'classes'`` and for the
            queue.
        temperature: of the contrast: a number from 0.001 to 1000, or the config of a registered
            temperature.
        channels: width of the embeddings.
        max_instances: regions of a batch that are compared, drawn at random.
        queue_size: slots a class for regions of earlier batches; 0 for none.
        queue_keys: slots a class that are drawn at a time.
        local_weight: weight of the transport distance in ``'wasserstein'``.
        grid: cells in each direction, or (h, w).
        seed: of the initial weights. ``None``: drawn from the global generator
            when they are built.

    Shape:
        - student: :math:`(B, D_s, H, W)`; teacher: :math:`(B, D_t, H, W)`, detached.
        - output: scalar, mean over regions, 0 with a graph where no region has a
          negative. Not 0 where both networks agree.

    Pixels without a label count in boxes and cells (``where='inside'``; the
    published code takes whole images), with ``regions='classes'`` labelled ones
    only. Padding is no part of any region.

    Raises:
        ConfigError: an argument is out of range, the batch lacks labels or
            boxes, or the loss runs before :meth:`bind`.
        ShapeError: the maps do not fit each other or the embeddings.

    Example:
        >>> loss = RegionContrastLoss(num_classes=3, seed=0)
        >>> student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)
        >>> loss.bind(student, teacher)
        >>> loss(student, teacher, Targets(labels=torch.randint(0, 3, (2, 8, 8)))).item() > 0
        True
    """

    needs_equal_channels = False
    softened_axes = None
    tasks = ('seg', 'det')
    transfers = 'which region is which, among regions of other classes'
    paper = 'Contrastive Representation Distillation (arXiv:1910.10699)'

    step: Tensor

    def __init__(
        self,
        loss_weight: float = 0.8,
        *,
        mode: str = 'nce',
        regions: str = 'classes',
        num_classes: int | None = None,
        temperature: Any = 0.07,
        channels: int = 128,
        max_instances: int = 256,
        queue_size: int = 64,
        queue_keys: int = 16,
        local_weight: float = 1.0,
        grid: int | tuple[int, int] = 8,
        seed: int | None = None,
    ) -> None:
        super().__init__(loss_weight, temperature)
        owner = type(self).__name__
        check_one_of(owner, 'mode', mode, _MODES)
        check_one_of(owner, 'regions', regions, _REGIONS)
        check_finite_number(owner, 'local_weight', local_weight, minimum=0)
        check_seed(owner, seed)
        for name, value, least in (
            ('channels', channels, 1),
            ('max_instances', max_instances, 1),
            ('queue_size', queue_size, 0),
            ('queue_keys', queue_keys, 1),
        ):
            check_count(owner, name, value, least, maximum=MAX_KEYS)
        self.queue_size = queue_size if mode == 'nce' and regions != 'cells' else 0
        if num_classes is None and (regions == 'classes' or self.queue_size):
            raise ConfigError(
                f'{owner}: `num_classes` must be given for regions={regions!r} with queue_size={queue_size}, got None.'
            )
        if num_classes is not None:
            check_count(owner, 'num_classes', num_classes, maximum=MAX_CLASSES)
        self.mode = mode
        self.region_kind = regions
        self.needs_labels = regions == 'classes'
        self.where = 'labelled' if self.needs_labels else 'inside'
        self.num_classes = num_classes
        self.channels = channels
        self.max_instances = max_instances
        self.queue_keys = queue_keys
        self.local_weight = float(local_weight)
        self.grid = check_grid(owner, grid)
        self.seed = seed
        self.widths: tuple[int, int] | None = None
        self.embed_student: nn.Module | None = None
        self.embed_teacher: nn.Module | None = None
        self.critic: nn.Module | None = None
        self.queue: ClassQueue | None = None
        self.register_buffer('step', torch.zeros((), dtype=torch.int64))

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Build embeddings, critic and queue for the widths of the probed maps.

        A second call with the same widths keeps them.

        Args:
            student: a probed map of the student, (B, D_s, H, W).
            teacher: the probed map of the teacher, (B, D_t, H, W).

        Raises:
            ShapeError: the maps are not 4-D, or have other widths than before.
        """
        self._check_maps(student, teacher)
        widths = (student.shape[1], teacher.shape[1])
        if self.widths is not None:
            self._check_widths(widths)
            return
        device = self.step.device
        with seeded(self.seed):
            self.embed_student = nn.Linear(widths[0], self.channels).to(device)
            self.embed_teacher = nn.Linear(widths[1], self.channels).to(device)
            if self.mode == 'wasserstein':
                self.critic = LipschitzCritic(self.channels).to(device).train(self.training)
        if self.queue_size and self.num_classes is not None:
            self.queue = ClassQueue(self.num_classes, self.queue_size, widths[1]).to(device)
        self.widths = widths

    @full_precision
    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        embed_s, embed_t = self.embed_student, self.embed_teacher
        if embed_s is None or embed_t is None:
            raise ConfigError(
                f'{type(self).__name__}: `bind` must be called before the loss, got no call yet. '
                'Hand it one probed pair of maps: it builds the embeddings for their widths.'
            )
        self._check_maps(student, teacher)
        self._check_widths((student.shape[1], teacher.shape[1]))
        dtype = next(embed_s.parameters()).dtype
        region_s, region_t, classes, valid = self._regions(student.to(dtype), teacher.detach().to(dtype), targets)

        queue = self.queue
        keys = key_classes = keys_there = None
        if queue is not None and classes is not None:
            # What earlier batches left: this one's regions are negatives of each other already.
            drawn, there = queue.sample(self.queue_keys, self.step)
            keys, keys_there = embed_t(drawn.flatten(0, 1)), there.flatten()
            key_classes = torch.arange(drawn.shape[0], device=drawn.device).repeat_interleave(drawn.shape[1])
            if self.training:
                self._remember(queue, region_t, classes, valid, student.shape[0])
        if region_s.shape[0] > self.max_instances:
            index, valid = draw(valid, self.max_instances, self.step)
            region_s, region_t = region_s[index], region_t[index]
            classes = None if classes is None else classes[index]
        if self.training:
            self.step += 1

        made_s, made_t = embed_s(region_s), embed_t(region_t)
        if self.mode == 'nce':
            return region_contrast_loss(
                made_s,
                made_t,
                classes=classes,
                valid=valid,
                memory=keys,
                memory_classes=key_classes,
                memory_valid=keys_there,
                temperature=self.soften(made_s, made_t).temperature,
                detach_teacher=False,
            )
        critic = self.critic
        if critic is None:
            raise ConfigError(f'{type(self).__name__}: `critic` must have been built by `bind`, got None.')
        scores = critic(unit_vectors(made_s, 1), unit_vectors(made_t, 1))
        loss = wasserstein_contrast_loss(scores, classes=classes, valid=valid)
        return loss + self.local_weight * sinkhorn_loss(made_s, made_t, valid=valid, detach_teacher=False)

    def _regions(
        self, student: Tensor, teacher: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Regions of all images of both networks (n, D), their classes, and which are there."""
        owner = type(self).__name__
        if self.region_kind == 'classes' and self.num_classes is not None:
            if targets.labels is None:
                raise ConfigError(
                    f"{owner}: `targets.labels` must be the class of each pixel for regions='classes', got None. "
                    "Use regions='boxes' or 'cells'."
                )
            labels, ignored = targets.labels, targets.ignore_index
            region_s, count = class_centers(
                student, labels, self.num_classes, ignore_index=ignored, valid=targets.valid
            )
            region_t, _ = class_centers(teacher, labels, self.num_classes, ignore_index=ignored, valid=targets.valid)
            classes = torch.arange(self.num_classes, device=student.device).repeat(student.shape[0])
            return region_s.flatten(0, 1), region_t.flatten(0, 1), classes, (count > 0).flatten()
        valid = self.counting(student, targets)
        if self.region_kind == 'boxes':
            if targets.boxes is None or targets.box_labels is None or targets.input_size is None:
                raise ConfigError(
                    f"{owner}: `targets.boxes`, `box_labels` and `input_size` must be given for regions='boxes', "
                    "got None. Use regions='classes' or 'cells'."
                )
            region_s, covered = box_average(student, targets.boxes, targets.input_size, valid=valid)
            region_t, _ = box_average(teacher, targets.boxes, targets.input_size, valid=valid)
            return region_s, region_t, torch.cat(targets.box_labels).to(student.device), covered
        cells_s, some = cell_nodes(student, self.grid, valid)
        cells_t, _ = cell_nodes(teacher, self.grid, valid)
        if some is None:
            some = torch.ones(cells_s.shape[:2], dtype=torch.bool, device=student.device)
        return cells_s.flatten(0, 1), cells_t.flatten(0, 1), None, some.flatten()

    def _remember(self, queue: ClassQueue, regions: Tensor, classes: Tensor, valid: Tensor, batch: int) -> None:
        """Append one vector a class and image (of boxes: their mean over the batch, a class)."""
        if self.region_kind == 'classes':
            queue.push(regions.unflatten(0, (batch, -1)).transpose(0, 1), valid.unflatten(0, (batch, -1)).T)
            return
        # As many vectors in every process and every step, however many boxes there are.
        index = torch.arange(queue.num_classes, device=regions.device)[:, None]
        members = (classes == index) & valid
        count = members.sum(dim=1, keepdim=True)
        mean = mean_of_sum(members.to(regions.dtype) @ regions, count)
        queue.push(mean[:, None], count > 0)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return (
            f'{super().extra_repr()}, mode={self.mode!r}, regions={self.region_kind!r}, '
            f'channels={self.channels}, queue_size={self.queue_size}'
        )

    def _check_maps(self, student: Tensor, teacher: Tensor) -> None:
        owner = type(self).__name__
        check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
        check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
        check_same(owner, student, teacher, (0, 2, 3), 'B, H and W', 'Resize the teacher with resize_map.')

    def _check_widths(self, widths: tuple[int, int]) -> None:
        if widths != self.widths:
            raise ShapeError(
                f'{type(self).__name__}: `student` and `teacher` must have the widths {self.widths} that the '
                f'embeddings were built for, got {widths}. Use one term for each pair of widths.'
            )
