"""A teacher that says masks and their classes, read as the classes of each pixel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmstructkd.connectors.base import Connector, check_widths
from mmstructkd.errors import ShapeError, check_flag, check_ndim, check_one_of, check_positive
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.functional.query_marginals import RULES, pool_probabilities, query_marginals
from mmstructkd.registry import MODELS

__all__ = ['QueryMarginals']


@MODELS.register_module()
class QueryMarginals(Connector):
    r"""Turn a teacher's queries into class scores of each pixel, for a student that predicts these.

    For teachers that say a set of masks and a class for each (MaskFormer,
    Mask2Former): see :func:`~mmstructkd.functional.query_marginals.query_marginals`
    for the formula. The dense reading of structural knowledge distillation
    (arXiv:2010.05010), whose student has finer factors than its teacher. The
    student stays as it is; nothing is trained.

    Tap the class scores of the student, and of the teacher the head itself, of
    which the last layer is read:
    ``tap=dict(student='decode_head.conv_seg', teacher='decode_head')``. That is
    short for the two outputs by name, in any order:
    ``teacher=['decode_head[0][last]', 'decode_head[1][last]']``. (K-Net of mmseg has a
    query for each class and shows scores of each pixel, at
    ``decode_head.kernel_update_head.2[0]``: it needs no connector.)

    Masks that are coarser than the student's map are resized to it before the
    sigmoid, as these heads do for their predictions; of finer ones the
    probabilities are averaged.

    What comes out are log-probabilities, whose softmax is the teacher's
    distribution. They stand for logits in any loss that makes distributions over
    the classes, such as ``PixelwiseKLLoss``, and are refused by others, such as
    ``BinaryKLLoss``. Its temperature should be 1, the default: another one raises
    the probabilities of the student and of the sum over queries to 1 / T, which is
    the usual softening of two networks that score pixels, but not what the queries
    would say if they were softened.

    Args:
        in_channels: widths of the student, one a level; not used.
        out_channels: widths of the teacher's tensors; not used.
        rule: ``'sum'`` over queries, or ``'noisy_or'`` where several instances of a
            class may cover a pixel, each with a query of its own.
        background: whether the last class of the queries is "no object".
        eps: evidence that each class has in any case, above 0.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: not one map of the student, class scores (B, Q, K) and masks
            (B, Q, h, w).

    Example:
        >>> import torch
        >>> classes, masks = torch.tensor([[[9.0, 0.0, 0.0]]]), torch.full((1, 1, 2, 2), 9.0)
        >>> _, (scores,) = QueryMarginals([2], [3, 1])([torch.zeros(1, 2, 2, 2)], [classes, masks])
        >>> scores.softmax(1)[0, :, 0, 0].round(decimals=2)
        tensor([1., 0.])
    """

    joint = True
    keeps_width = True
    gives_log_probabilities = True
    teacher_outputs = ((0, 'last'), (1, 'last'))
    paper = (
        'Structural Knowledge Distillation: Tractably Distilling Information for Structured Predictor '
        '(arXiv:2010.05010)'
    )

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        rule: str = 'sum',
        background: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_widths(owner, 'in_channels', in_channels)
        check_widths(owner, 'out_channels', out_channels)
        check_one_of(owner, 'rule', rule, RULES)
        check_flag(owner, 'background', background)
        check_positive(owner, 'eps', eps)
        self.rule, self.background, self.eps = rule, bool(background), float(eps)

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the student's map, and the teacher's log-probabilities (B, C, H, W) at its size."""
        owner = type(self).__name__
        if len(students) != 1:
            raise ShapeError(f'{owner}: `student` must tap one map of class scores, got {len(students)} tensors.')
        check_ndim(owner, 'student', students[0], 4, '(B, C, H, W)')
        if sorted(tensor.dim() for tensor in teachers) != [3, 4]:
            raise ShapeError(
                f'{owner}: `teacher` must tap class scores (B, Q, K) and masks (B, Q, h, w) of the queries, got '
                f"{[tuple(t.shape) for t in teachers]}. Tap the whole head, teacher='decode_head', or both outputs of "
                "one layer, ['decode_head[0][last]', 'decode_head[1][last]']. Scores of each pixel need no connector."
            )
        classes, masks = sorted(teachers, key=Tensor.dim)
        size = (students[0].shape[2], students[0].shape[3])
        grid = (max(size[0], masks.shape[2]), max(size[1], masks.shape[3]))
        scores = query_marginals(
            classes.detach(),
            resize_map(masks.detach(), grid),
            rule=self.rule,
            background=self.background,
            eps=self.eps,
        )
        return students, [scores if grid == size else pool_probabilities(scores, size)]

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'rule={self.rule!r}, background={self.background}, eps={self.eps:g}'
