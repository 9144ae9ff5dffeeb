"""Memory contrast: how like the pixels and regions of earlier images a pixel is."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from mmstructkd.errors import (
    MAX_CLASSES,
    ConfigError,
    ShapeError,
    check_count,
    check_ndim,
    check_same,
    check_some_weight,
)
from mmstructkd.functional.core.nodes import unit_vectors
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.regions import class_centers
from mmstructkd.functional.core.sampling import draw
from mmstructkd.functional.core.valid import labelled_pixels, zero_elsewhere
from mmstructkd.functional.memory_contrast import memory_kl_loss
from mmstructkd.layers import check_layers
from mmstructkd.losses.presets import settle
from mmstructkd.losses.seeding import check_seed, seeded
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.memories import ClassQueue
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.temperatures import check_temperature_range

__all__ = ['MemoryContrastLoss']

#: Keys that are kept or drawn; more would fill the memory.
MAX_KEYS = 10**7

_DEFAULTS: dict[str, Any] = {
    'loss_weight': 0.1,
    'pixel_capacity': 2000,
    'region_capacity': 200,
    'max_anchors': 4096,
}
_PRESETS: dict[str, dict[str, Any]] = {
    'code': {'loss_weight': 0.1, 'pixel_capacity': 20000, 'region_capacity': 2000, 'max_anchors': 0},
}


@MODELS.register_module()
class MemoryContrastLoss(SoftenedLoss):
    r"""Divergence of how like remembered pixels and regions a pixel is, from the teacher's.

    .. math:: L = \lambda_p L_{pixel} + \lambda_r L_{region}

    Memory terms of Cross-Image Relational distillation, CIRKD (CVPR 2022). See
    :func:`~mmstructkd.functional.memory_contrast.memory_kl_loss` for a term, and
    :class:`~mmstructkd.memories.ClassQueue` for the queues: of each image, some
    pixels of each class and the mean of each class, of the teacher's unit
    features. The student is projected to the teacher's width by a 1x1
    convolution, BatchNorm, ReLU and another convolution, which are trained with
    it and dropped from its checkpoint. Tap features, e.g. the last ones before
    the classifier. Needs labels. The mini-batch term is
    :class:`~mmstructkd.losses.CrossImageKLLoss`.

    ===============  =======  ==========
    argument         default  ``'code'``
    ===============  =======  ==========
    loss_weight      0.1      0.1
    pixel_capacity   2000     20000
    region_capacity  200      2000
    max_anchors      4096     0 (all)
    ===============  =======  ==========

    The default weight of 0.1, for both terms, is the authors'.

    The published queues take 4 C D (20000 + 2000) bytes, 0.9 GB for 19 classes
    and 512 channels, on every device and in every checkpoint. Differs from the
    released code: it fills the queues of pixels with wrong ones, and begins with
    random vectors; here a pixel goes to its own class, and only what is filled
    counts.

    In training the batch's own keys are appended first, then keys are drawn. In
    eval mode nothing is appended; the batch's keys stand beside those drawn.
    What is drawn depends on a step counter alone, which is saved, so that a
    resumed run goes on exactly and all processes draw alike.

    With several processes keys are gathered, so that one memory serves all, and
    each must have as many images; the anchors are a process's own pixels, and so
    are the statistics of the projection's BatchNorm unless ``norm_cfg`` says
    SyncBN.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        num_classes: C, of the labels.
        temperature: of the softmax over cosines: a number from 0.001 to 1000, or the
            config of a registered temperature.
        kd_temperature: divides once more; the loss is multiplied by its square.
        pixel_weight: :math:`\lambda_p`, at least 0.
        region_weight: :math:`\lambda_r`, at least 0.
        pixel_capacity: slots a class for pixels.
        region_capacity: slots a class for regions.
        pixels_per_image: pixels of a class that an image adds, at most.
        pixel_keys: keys that are drawn, over all classes: ``pixel_keys // C + 1``
            a class.
        region_keys: likewise.
        max_anchors: pixels of a batch that are compared, drawn at random; 0 for
            all.
        norm_cfg: normalisation in the projection. With several processes,
            ``dict(type='SyncBN')`` is the published one.
        seed: of the projection's initial weights. ``None``: drawn from the
            global generator when it is built.
        preset: ``'code'`` or ``None``. A preset fixes the values of its column;
            an argument that says otherwise is an error.

    Shape:
        - student: :math:`(B, D_s, H, W)`; teacher: :math:`(B, D_t, H, W)`, detached.
        - output: scalar, in nats, mean over anchors, 0 with a graph where no
          pixel counts.

    Only labelled pixels count (``where='labelled'``): a pixel is remembered by its
    class. Pixels without a label and padding are 0 before the projection (and so have
    a part in its BatchNorm), are no anchors, and are not remembered.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset, the
            batch has no labels, or the loss runs before :meth:`bind`.
        ShapeError: the maps do not fit each other or the projection.

    Example:
        >>> loss = MemoryContrastLoss(num_classes=3, seed=0)
        >>> student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)
        >>> loss.bind(student, teacher)
        >>> loss(student, teacher, Targets(labels=torch.randint(0, 3, (2, 8, 8)))).item() > 0
        True
    """

    needs_equal_channels = False
    where = 'labelled'
    needs_labels = True
    softened_axes = None
    tasks = ('seg',)
    transfers = 'likeness of pixels to remembered pixels and regions'
    paper = 'Cross-Image Relational Knowledge Distillation for Semantic Segmentation (CVPR 2022)'

    step: Tensor

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        num_classes: int,
        temperature: Any = 0.1,
        kd_temperature: float = 1.0,
        pixel_weight: float = 1.0,
        region_weight: float = 1.0,
        pixel_capacity: int | None = None,
        region_capacity: int | None = None,
        pixels_per_image: int = 16,
        pixel_keys: int = 4096,
        region_keys: int = 1024,
        max_anchors: int | None = None,
        norm_cfg: dict | None = None,
        seed: int | None = None,
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {
            'loss_weight': loss_weight,
            'pixel_capacity': pixel_capacity,
            'region_capacity': region_capacity,
            'max_anchors': max_anchors,
        }
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(settings['loss_weight'], temperature)
        check_temperature_range(owner, 'kd_temperature', kd_temperature)
        check_some_weight(owner, pixel_weight=pixel_weight, region_weight=region_weight)
        numbers = {
            'num_classes': num_classes,
            'pixel_capacity': settings['pixel_capacity'],
            'region_capacity': settings['region_capacity'],
            'pixels_per_image': pixels_per_image,
            'pixel_keys': pixel_keys,
            'region_keys': region_keys,
        }
        for name, value in numbers.items():
            check_count(owner, name, value, maximum=MAX_CLASSES if name == 'num_classes' else MAX_KEYS)
        check_count(owner, 'max_anchors', settings['max_anchors'], 0)
        check_seed(owner, seed)
        self.preset = preset
        self.num_classes = num_classes
        self.kd_temperature = float(kd_temperature)
        self.pixel_weight = float(pixel_weight)
        self.region_weight = float(region_weight)
        self.pixel_capacity: int = settings['pixel_capacity']
        self.region_capacity: int = settings['region_capacity']
        self.pixels_per_image = pixels_per_image
        self.pixel_keys = pixel_keys
        self.region_keys = region_keys
        self.max_anchors: int = settings['max_anchors']
        self.norm_cfg = dict(type='BN') if norm_cfg is None else dict(norm_cfg)
        self.seed = seed
        self.channels: tuple[int, int] | None = None
        self.projection: nn.Module | None = None
        self.pixels: ClassQueue | None = None
        self.regions: ClassQueue | None = None
        self.register_buffer('step', torch.zeros((), dtype=torch.int64))

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Build the projection and the queues for the widths of the probed maps.

        A second call with the same widths keeps them.

        Args:
            student: a probed map of the student, (B, D_s, H, W).
            teacher: the probed map of the teacher, (B, D_t, H, W).

        Raises:
            ShapeError: the maps are not 4-D, or have other widths than before.
        """
        self._check_maps(student, teacher)
        widths = (student.shape[1], teacher.shape[1])
        if self.channels is not None:
            self._check_widths(widths)
            return
        check_layers(type(self).__name__, widths[1], norm_cfg=self.norm_cfg)
        with seeded(self.seed):
            projection = nn.Sequential(
                ConvModule(widths[0], widths[1], 1, bias=False, norm_cfg=self.norm_cfg),
                ConvModule(widths[1], widths[1], 1, bias=False, norm_cfg=None, act_cfg=None),
            )
        self.projection = projection.to(self.step.device).train(self.training)
        self.pixels = ClassQueue(self.num_classes, self.pixel_capacity, widths[1]).to(self.step.device)
        self.regions = ClassQueue(self.num_classes, self.region_capacity, widths[1]).to(self.step.device)
        self.channels = widths

    @full_precision
    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        owner = type(self).__name__
        projection, pixels, regions = self.projection, self.pixels, self.regions
        if projection is None or pixels is None or regions is None:
            raise ConfigError(
                f'{owner}: `bind` must be called before the loss, got no call yet. '
                'Hand it one probed pair of maps: it builds the projection for their widths.'
            )
        self._check_maps(student, teacher)
        self._check_widths((student.shape[1], teacher.shape[1]))
        labels = self.labels_at(targets, (student.shape[2], student.shape[3]))
        if labels is None:
            raise ConfigError(
                f'{owner}: `targets.labels` must be the class of each pixel, got None. '
                'Use it on a segmentation task, or CrossImageKLLoss, which needs no labels.'
            )
        valid = self.counting(student, targets)
        labels, inside = labelled_pixels(
            owner, student, labels, num_classes=self.num_classes, ignore_index=-1, valid=valid
        )

        units = unit_vectors(zero_elsewhere(teacher.detach(), inside), 1).to(pixels.slots)
        pixel_keys, pixel_there = self._pixels_of(units, labels, inside)
        centers, count = class_centers(units, labels, self.num_classes, valid=inside, ignore_index=-1)
        region_keys, region_there = unit_vectors(centers, 2).transpose(0, 1), (count > 0).T
        anchors_s, anchors_t, valid = self._anchors(projection, student, units, inside)

        temperature = self.soften(anchors_s, anchors_t).temperature
        loss = anchors_s.sum() * 0
        for weight, queue, keys, there, drawn in (
            (self.pixel_weight, pixels, pixel_keys, pixel_there, self.pixel_keys),
            (self.region_weight, regions, region_keys, region_there, self.region_keys),
        ):
            if self.training:
                queue.push(keys, there)
            memory, filled = queue.sample(drawn // self.num_classes + 1, self.step)
            if not self.training:
                memory, filled = torch.cat([memory, keys], dim=1), torch.cat([filled, there], dim=1)
            loss = loss + weight * memory_kl_loss(
                anchors_s,
                anchors_t,
                memory=memory.flatten(0, 1),
                temperature=temperature,
                kd_temperature=self.kd_temperature,
                valid=valid,
                memory_valid=filled.flatten(),
            )
        if self.training:
            self.step += 1
        return loss

    def _pixels_of(self, units: Tensor, labels: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Some pixels of each class of each image, (C, B p, D), and which are there."""
        classes = torch.arange(self.num_classes, device=units.device)[:, None]
        members = (labels.flatten(1)[:, None] == classes) & inside.flatten(1)[:, None]
        index, there = draw(members, self.pixels_per_image, self.step)
        width = units.shape[1]
        flat = index.flatten(1)[:, None].expand(-1, width, -1)
        picked = units.flatten(2).gather(2, flat).unflatten(2, index.shape[1:])
        return picked.permute(2, 0, 3, 1).flatten(1, 2), there.transpose(0, 1).flatten(1)

    def _anchors(
        self, projection: nn.Module, student: Tensor, units: Tensor, inside: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected pixels of the student, the teacher's at the same places, and which count."""
        # Before the projection, so that whatever stands where nothing counts, NaN included, goes nowhere.
        student = zero_elsewhere(student, inside).to(units.dtype)
        anchors_s = projection(student).flatten(2).mT.flatten(0, 1)
        anchors_t = units.flatten(2).mT.flatten(0, 1)
        valid = inside.flatten()
        if 0 < self.max_anchors < valid.shape[0]:
            index, valid = draw(valid, self.max_anchors, self.step)
            anchors_s, anchors_t = anchors_s[index], anchors_t[index]
        return anchors_s, anchors_t, valid

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return (
            f'{super().extra_repr()}, num_classes={self.num_classes}, '
            f'pixel_weight={self.pixel_weight:g}, region_weight={self.region_weight:g}, max_anchors={self.max_anchors}'
        )

    def _check_maps(self, student: Tensor, teacher: Tensor) -> None:
        owner = type(self).__name__
        check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
        check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
        check_same(owner, student, teacher, (0, 2, 3), 'B, H and W', 'Resize the teacher with resize_map.')

    def _check_widths(self, widths: tuple[int, int]) -> None:
        if widths != self.channels:
            raise ShapeError(
                f'{type(self).__name__}: `student` and `teacher` must have the widths {self.channels} that the '
                f'projection was built for, got {widths}. Use one term for each pair of widths.'
            )
