"""Prototype contrast: class centres of other images, within the student and against the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmstructkd.connectors import build_connector
from mmstructkd.errors import MAX_CLASSES, ConfigError, check_count, check_ndim, check_some_weight
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.prototype_contrast import prototype_contrast_loss
from mmstructkd.losses.seeding import check_seed, seeded
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.temperatures import check_temperature_range

__all__ = ['PrototypeContrastLoss']

EMBEDDING = {'type': 'mmstructkd.DeepProjectorConnector'}


@MODELS.register_module()
class PrototypeContrastLoss(SoftenedLoss):
    r"""Contrast of embedded class centres of different images, within a network and across two.

    Mutual contrastive learning, MCL (AAAI 2022), with the centre of each class in each
    image in the place of an image. See
    :func:`~mmstructkd.functional.prototype_contrast.prototype_contrast_loss` for the
    formula of the four parts; their published weights 0.1, 0.1, 1 and 1 are the
    defaults here times ``loss_weight``. Positives are centres of the same class in
    other images, so a class must be in two images of the batch; with one image a
    process nothing is learned. Needs labels.

    Each side has an embedding of its own. The student's is the term's connector, e.g.
    ``connector=dict(type='mmstructkd.DeepProjectorConnector', out_channels=128)``. The
    teacher's belongs to the loss and learns from the contrast among the teacher's own
    centres (the first part, logged as ``loss_kd_<term>_embedding``); nothing of it
    reaches the teacher. The authors train one embedding a peer, also by the parts
    across; here each direction has its own pair, so that the teacher may as well be
    frozen. For two peers that learn, each has this loss with the other as its teacher.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        within_weight: of the contrast among the student's centres.
        across_weight: of the contrast of the student's centres with the teacher's.
        soft_within_weight: of the divergence of the student's similarities from the
            teacher's.
        soft_across_weight: of the divergence of the similarities across, seen from
            the student, from the same seen from the teacher.
        temperature: of the similarities: a number from 0.001 to 1000, or the config
            of a registered temperature.
        kd_temperature: divides once more in the soft parts, which are multiplied by its
            square.
        num_classes: of the labels. ``None``: the number the task has.
        embedding: config of a connector for the teacher's side; its ``out_channels`` is
            the width of the student's embedding. ``None``: none, for equal widths.
        seed: of the embedding's initial weights. ``None``: drawn from the global
            generator when it is built.

    Shape:
        - student: :math:`(B, D, H, W)`; teacher: :math:`(B, D_t, H, W)`, detached.
        - output: the student's part, a scalar in nats, mean over centres, 0 with a
          graph where there is none; and the embedding's objective.

    Raises:
        ConfigError: an argument is out of range, the batch has no labels or no number
            of classes, or the loss runs before :meth:`bind`.
        ShapeError: the maps do not fit each other.

    Example:
        >>> loss = PrototypeContrastLoss(num_classes=3, seed=0)
        >>> student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)
        >>> loss.bind(student, teacher)
        >>> sorted(loss(student, teacher, Targets(labels=torch.randint(0, 3, (2, 8, 8)))))
        ['', 'embedding']
    """

    needs_equal_channels = False
    where = 'labelled'
    needs_labels = True
    softened_axes = None
    tasks = ('seg',)
    transfers = 'likeness of the centres of classes in different images'
    paper = 'Mutual Contrastive Learning for Visual Representation Learning (AAAI 2022, 2104.12565)'

    def __init__(
        self,
        loss_weight: float = 0.1,
        *,
        within_weight: float = 1.0,
        across_weight: float = 1.0,
        soft_within_weight: float = 10.0,
        soft_across_weight: float = 10.0,
        temperature: Any = 0.1,
        kd_temperature: float = 3.0,
        num_classes: int | None = None,
        embedding: Mapping[str, Any] | None = EMBEDDING,
        seed: int | None = None,
    ) -> None:
        super().__init__(loss_weight, temperature)
        owner = type(self).__name__
        weights = {
            'within_weight': within_weight,
            'across_weight': across_weight,
            'soft_within_weight': soft_within_weight,
            'soft_across_weight': soft_across_weight,
        }
        check_some_weight(owner, **weights)
        check_temperature_range(owner, 'kd_temperature', kd_temperature)
        check_seed(owner, seed)
        if num_classes is not None:
            check_count(owner, 'num_classes', num_classes, maximum=MAX_CLASSES)
        self.weights = tuple(float(weight) for weight in weights.values())
        self.kd_temperature = float(kd_temperature)
        self.num_classes = num_classes
        self.embedding_config = None if embedding is None else dict(embedding)
        self.seed = seed
        self.embedding: nn.Module | None = None

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Build the teacher's embedding for the widths of the probed maps.

        A second call keeps it.

        Args:
            student: a probed embedding of the student, (B, D, H, W).
            teacher: the probed map of the teacher, (B, D_t, H, W).

        Raises:
            ShapeError: a map is not 4-D.
            ConfigError: the embedding cannot be built.
        """
        owner = type(self).__name__
        check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
        check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
        if self.embedding is not None:
            return
        if self.embedding_config is None:
            self.embedding = nn.Identity()
            return
        with seeded(self.seed):
            self.embedding = build_connector(
                owner, self.embedding_config, [teacher.shape[1]], [student.shape[1]], 'embedding'
            ).train(self.training)

    @full_precision
    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the student's part, and the objective of the teacher's embedding."""
        owner = type(self).__name__
        if self.embedding is None:
            raise ConfigError(
                f'{owner}: `bind` must be called before the loss, got no call yet. '
                'Hand it one probed pair of maps: it builds the embedding for their widths.'
            )
        if targets.labels is None:
            raise ConfigError(
                f'{owner}: `targets.labels` must be the class of each pixel, got None. '
                'Use it on a segmentation task, or SimilarityPreservingLoss, which needs no labels.'
            )
        classes = targets.num_classes if self.num_classes is None else self.num_classes
        if classes is None:
            raise ConfigError(f'{owner}: `num_classes` must be given where the task does not tell it, got None.')
        valid = self.counting(student, targets)
        shown = teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32))
        if valid is not None:  # so that whatever stands where nothing counts, NaN included, goes nowhere
            shown = torch.where(valid[:, None], shown, 0)
        embedded = self.embedding(shown)
        settings: dict[str, Any] = dict(
            labels=self.labels_at(targets, (student.shape[2], student.shape[3])),
            num_classes=classes,
            temperature=self.soften(student, teacher).temperature,
            kd_temperature=self.kd_temperature,
            ignore_index=targets.ignore_index,
            valid=valid,
        )
        out = {'': prototype_contrast_loss(student, embedded, weights=self.weights, **settings)}
        if isinstance(self.embedding, nn.Identity):
            return out
        temperature = settings['temperature']
        settings['temperature'] = temperature.detach() if isinstance(temperature, Tensor) else temperature
        own = prototype_contrast_loss(embedded, embedded, weights=(1.0, 0.0, 0.0, 0.0), **settings)
        return {**out, 'embedding': self.loss_weight * own}

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, weights={self.weights}, num_classes={self.num_classes}'
