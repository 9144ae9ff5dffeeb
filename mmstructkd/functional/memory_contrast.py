r"""Contrast of anchors with the keys of a memory.

Shape shorthand: n anchors with D entries, M keys of a memory.
"""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import ShapeError, check_ndim, check_positive, check_same
from mmstructkd.functional.core.nodes import similarity_kl_sum, unit_vectors
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import mean_of_sum
from mmstructkd.functional.core.softening import check_temperature
from mmstructkd.functional.core.valid import zero_elsewhere

__all__ = ['memory_kl_loss']


@full_precision
def memory_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    memory: Tensor,
    temperature: float | Tensor = 0.1,
    kd_temperature: float = 1.0,
    valid: Tensor | None = None,
    memory_valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of how like the keys of a memory an anchor is.

    .. math::
        L = \frac{T_k^2}{n} \sum_i \mathrm{KL}(p^t_i \| p^s_i), \quad
        p_i = \mathrm{softmax}_m \frac{\cos(f_i, k_m)}{T \, T_k}

    Memory terms of Cross-Image Relational distillation, CIRKD (CVPR 2022): the
    same place of both networks against the same keys, which are the teacher's.
    Same value as the authors' code where every key is filled.

    The gradient reaches ``student`` only. The value does not change when an
    anchor is scaled by a positive number.

    Args:
        student: anchors, shape (n, D), any float dtype, projected to the
            teacher's width.
        teacher: anchors at the same places, the same shape. Detached here.
        memory: keys, shape (M, D). Detached here.
        temperature: T, above 0, a number or a scalar tensor.
        kd_temperature: T_k, above 0; the loss is multiplied by its square.
        valid: anchors that count, bool (n,). ``None``: all.
        memory_valid: keys there are, bool (M,). ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over anchors that count, 0
        with a graph if there is none, or no key. Time O(n M D); of the n M
        similarities only blocks of 2^22 are in memory, computed again in the
        backward pass.

    Raises:
        ShapeError: an input is not 2-D, or shapes differ.
        ConfigError: a temperature is not above 0.

    Example:
        >>> import torch
        >>> x = torch.eye(2)
        >>> memory_kl_loss(3 * x, x, memory=x).item()
        0.0
        >>> round(memory_kl_loss(torch.ones(2, 2), x, memory=x, temperature=1).item(), 4)
        0.1109
    """
    owner = 'memory_kl_loss'
    check_temperature(owner, temperature)
    check_positive(owner, 'kd_temperature', kd_temperature)
    for name, tensor in (('student', student), ('teacher', teacher), ('memory', memory)):
        check_ndim(owner, name, tensor, 2, '(n, D)')
    check_same(owner, student, teacher, (0, 1), 'n and D', 'Project the student to the width of the teacher.')
    if memory.shape[1] != teacher.shape[1]:
        raise ShapeError(f'{owner}: `memory` must have width {teacher.shape[1]}, got {tuple(memory.shape)}.')
    if student.shape[0] == 0 or memory.shape[0] == 0:
        return student.sum() * 0
    student, teacher = zero_elsewhere(student, valid), zero_elsewhere(teacher, valid)
    keys = memory.detach()
    keys = zero_elsewhere(keys, memory_valid)
    keys = unit_vectors(keys, 1)[None]
    total, count = similarity_kl_sum(
        (unit_vectors(student, 1), keys),
        (unit_vectors(teacher.detach(), 1), keys),
        temperature=temperature * kd_temperature,
        rows_valid=valid,
        keys_valid=None if memory_valid is None else memory_valid[None],
    )
    return kd_temperature**2 * mean_of_sum(total, count)
