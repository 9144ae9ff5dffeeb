"""Logs now and then on how many pixels the teacher works against the label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mmstructkd.errors import ConfigError, check_count
from mmstructkd.functional.core.precision import promote
from mmstructkd.functional.regularization_share import regularization_share
from mmstructkd.losses import DecoupledKLLoss, PixelwiseKLLoss, WeightedSoftLabelLoss
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import HOOKS
from mmstructkd.structures import Targets

__all__ = ['RegularizationShareHook', 'share_of']

#: Losses whose gradient by the scores of a pixel is the difference of the two probabilities, or has its sign
#: for the labelled class.
KINDS = (PixelwiseKLLoss, DecoupledKLLoss, WeightedSoftLabelLoss)


@HOOKS.register_module()
class RegularizationShareHook(Hook):
    """Logs for each divergence from the teacher's classes the share of pixels whose label it makes less likely.

    The regularization samples of weighted soft labels (arXiv:2102.00650), see
    :func:`~mmstructkd.functional.regularization_share.regularization_share`: a number
    to look at. It is logged as ``stat_<term>_regularization_share``, for terms with
    ``PixelwiseKLLoss``, ``DecoupledKLLoss`` or ``WeightedSoftLabelLoss`` in tasks with
    labels: the mean over levels, and over the batch and those streams of it that have
    labels. Between the steps that are logged it does nothing, and the host waits for
    no value. Off unless it is named in ``custom_hooks``.

    Args:
        interval: log at every so many iterations; best that of the ``LoggerHook``, 50,
            which shows the newest value.

    Raises:
        ConfigError: ``interval`` is no number of iterations, or no term has such a loss.
    """

    # Before mmengine's logger, which shows the newest value.
    priority = 'NORMAL'

    def __init__(self, interval: int = 50) -> None:
        check_count(type(self).__name__, 'interval', interval, maximum=10**9)
        self.interval = int(interval)
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, list[Tensor]] = {}

    def before_train(self, runner: Runner) -> None:
        """Look whether there is anything to log.

        Args:
            runner: the runner.

        Raises:
            ConfigError: no term has a loss that this says something about.
        """
        if not self._terms(runner):
            raise ConfigError(
                f'{type(self).__name__}: a term of the model must have one of {[kind.__name__ for kind in KINDS]} as '
                'its loss, got none. Leave the hook out of `custom_hooks`.'
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Listen to the losses in an iteration that is logged.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
        """
        self._stop()
        if not self.every_n_train_iters(runner, self.interval):
            return
        for name, term in self._terms(runner).items():
            for loss in term.losses:
                self._handles.append(loss.register_forward_hook(self._noting(name)))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Log what was seen.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
            outputs: unused.
        """
        for name, shares in self._seen.items():
            share = torch.stack(shares).mean()
            if get_world_size() > 1:
                all_reduce(share, op='mean')
            runner.message_hub.update_scalar(f'train/stat_{name}_regularization_share', share.item())
        self._stop()

    def _noting(self, name: str) -> Callable[..., None]:
        """A forward hook that keeps the share of one call."""

        def note(loss: SoftenedLoss, given: tuple[Any, ...], output: Any) -> None:
            share = share_of(loss, *given)
            if share is not None:
                self._seen.setdefault(name, []).append(share)

        return note

    def _stop(self) -> None:
        """Listen no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}

    @staticmethod
    def _terms(runner: Runner) -> dict[str, Any]:
        """The terms that there is something to say about."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        return {name: term for name, term in getattr(model, 'terms', {}).items() if isinstance(term.loss, KINDS)}


@torch.no_grad()
def share_of(loss: SoftenedLoss, student: Tensor, teacher: Tensor, targets: Targets | None = None) -> Tensor | None:
    """Share of pixels whose label a loss makes less likely, as it stands.

    Args:
        loss: one of a divergence of classes.
        student: what it is given of the student, shape (B, C, H, W) or (M, C).
        teacher: of the teacher.
        targets: what it knows of the batch.

    Returns:
        Scalar in [0, 1]; ``None`` where there are no labels of these positions.
    """
    if targets is None or targets.labels is None:
        return None
    labels = targets.labels
    if labels.dim() != (3 if student.dim() == 4 else 1) or len(labels) != len(student):
        return None
    counts = loss.counting(student, targets)
    classes = student.shape[1]
    class_map = getattr(loss, 'class_map', None)
    if class_map is not None:
        student, teacher = class_map(student, teacher)
        if len(class_map.known) < max(classes, 2):
            # Labels are among the classes that both know; others are no class here.
            table = torch.full((max(classes, 2),), -1, device=labels.device)
            table[class_map.known] = torch.arange(len(class_map.known), device=labels.device)
            known = (labels >= 0) & (labels < len(table)) & (labels != targets.ignore_index)
            labels = torch.where(known, table[torch.where(known, labels, 0)], targets.ignore_index)
            labels = torch.where(labels < 0, targets.ignore_index, labels)
    student, teacher, temperature = loss.soften(student, teacher, targets)
    student, teacher = promote(student) / temperature, promote(teacher) / temperature
    return regularization_share(student, teacher, labels=labels, ignore_index=targets.ignore_index, valid=counts)
