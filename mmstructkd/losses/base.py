"""Base of the registered losses: weight, one signature, targets at a map's size."""

from __future__ import annotations

from torch import Tensor, nn

from mmstructkd.errors import ConfigError, check_finite_number, check_one_of
from mmstructkd.functional.core.resize import resize_labels
from mmstructkd.losses.positions import PLACES, counting_positions
from mmstructkd.structures import Targets

__all__ = ['DistillLoss']


class DistillLoss(nn.Module):
    """A loss between one tensor of the student and one of the teacher.

    A subclass implements :meth:`compute`, which returns the *unweighted*
    scalar; this class multiplies by ``loss_weight``. Schedules multiply once
    more, outside.

    Args:
        loss_weight: factor of the loss, finite and at least 0.

    Attributes:
        tasks: what it serves, of ``'seg'``, ``'depth'`` and ``'det'``.
        transfers: what is transferred, in a few words.
        paper: title and arXiv number of where it comes from.
        needs_equal_channels: the term puts a connector in front where the
            widths differ.
        needs_equal_size: the term resizes the teacher to the student's grid.
        needs_images: the term hands over the input images in the targets.
        over_classes: its distributions run over the channels as classes. One
            channel then is the score of a sigmoid, see
            :mod:`~mmstructkd.functional.core.binary`.
        binary_pairs: it takes one channel beside two for the scores of two classes,
            though widths must be equal otherwise.
        by_class: it compares channel k of the student with channel k of the
            teacher although nothing is a distribution over the channels.
        where: which positions count: ``'inside'`` the image, whether labelled
            or not, or only the ``'labelled'`` ones. What the method's published
            code does, unless a term says otherwise; see :meth:`restrict`.
        needs_labels: it compares with the label of each position, and means
            nothing where there is none.
        needs_views: it compares turned copies of a batch with the upright one, and
            belongs on a stream that holds both.
        own_optimizer: config of the optimiser for this loss's own parameters
            (a critic's); ``None``: they go with the student's.
    """

    tasks: tuple[str, ...] = ('seg', 'depth', 'det')
    transfers: str = ''
    paper: str = ''
    needs_equal_channels: bool = True
    needs_equal_size: bool = True
    needs_images: bool = False
    over_classes: bool = False
    binary_pairs: bool = False
    by_class: bool = False
    where: str = 'inside'
    needs_labels: bool = False
    needs_views: bool = False
    own_optimizer: dict | None = None

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        check_finite_number(type(self).__name__, 'loss_weight', loss_weight, minimum=0)
        self.loss_weight = float(loss_weight)

    def restrict(self, where: str) -> None:
        """Say which positions count.

        Args:
            where: ``'inside'`` the image, or only the ``'labelled'`` ones.

        Raises:
            ConfigError: it is neither, or the loss needs the labels.
        """
        owner = type(self).__name__
        check_one_of(owner, 'where', where, PLACES)
        if where == 'inside' and self.needs_labels:
            raise ConfigError(
                f"{owner}: `where` must be 'labelled', got 'inside'. The loss compares with the label of each "
                'position: leave `where` out, or take a loss (or a setting of this one) that needs no labels.'
            )
        self.where = where

    def counting(self, reference: Tensor, targets: Targets) -> Tensor | None:
        """Which positions of a tensor count, by the targets and :attr:`where`.

        Args:
            reference: a tensor of the loss, shape (B, D, H, W) or (M, C).
            targets: what the batch knows besides.

        Returns:
            Bool, shape (B, H, W) or (M,); ``None``: all.
        """
        return counting_positions(type(self).__name__, reference, targets, where=self.where)

    def check_heads(self, student: nn.Module | None, teacher: nn.Module | None) -> list[str]:
        """Refuse heads whose output the loss cannot be about. The default takes any.

        The term calls this once, before :meth:`bind`.

        Args:
            student: the head that the student's tap lies in, or the one that
                knows its classes; ``None``: there is none.
            teacher: the teacher's.

        Returns:
            What should be known and is no error, in sentences.

        Raises:
            ConfigError: a head does not predict what the loss compares.
        """
        return []

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Build what depends on sizes, once, before the optimiser is made.

        The term calls this with one probed pair of tensors (already made
        comparable, on the CPU). The default needs nothing.

        Args:
            student: a probed tensor of the student.
            teacher: the probed tensor of the teacher.
        """

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor | dict[str, Tensor]:
        """Return the unweighted loss.

        Args:
            student: the student's tensor.
            teacher: the teacher's tensor, made comparable by the term.
            targets: what the batch knows besides; :meth:`counting` says which
                positions count.

        Returns:
            A scalar, or a dict: the key ``''`` is the student's part, any other
            key an objective of the loss's own modules (a critic), which already
            carries its weight and which no schedule scales.
        """
        raise NotImplementedError(f'{type(self).__name__} must implement `compute`.')

    def forward(self, student: Tensor, teacher: Tensor, targets: Targets | None = None) -> Tensor | dict[str, Tensor]:
        """Return :meth:`compute` times ``loss_weight``."""
        value = self.compute(student, teacher, Targets() if targets is None else targets)
        if isinstance(value, dict):
            return {name: part * self.loss_weight if name == '' else part for name, part in value.items()}
        return value * self.loss_weight

    @staticmethod
    def labels_at(targets: Targets, size: tuple[int, int]) -> Tensor | None:
        """Labels on a grid of ``size``, nearest; ``None`` if there are none."""
        return None if targets.labels is None else resize_labels(targets.labels, size)

    def extra_repr(self) -> str:
        """Show the weight, and where the loss counts, in the model's print-out."""
        return f'loss_weight={self.loss_weight:g}, where={self.where!r}'
