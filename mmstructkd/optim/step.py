"""The step of a distiller: each part clipped by its own norm, idle parts at rest, nothing taken that is not finite.

:func:`extend_wrapper` gives it to any optim wrapper of mmengine, so that precision, scaling and accumulation stay those
of the wrapper that the config names.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.logging import print_log
from mmengine.optim import ApexOptimWrapper, OptimWrapper, OptimWrapperDict
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from mmstructkd.errors import ConfigError

__all__ = ['DistillStep', 'Slot', 'extend_wrapper']

STUDENT = 'student.'
TERMS = 'terms.'
TEACHER = 'teacher'
# A scaler begins at 2**16 and halves: what overflows at a scale of 2**-20 is no overflow of float16.
PATIENCE = 32
SMALLEST_SCALE = 2.0**-20
# What moves with a forward pass (running statistics) is small; memories of a term are not, and change by copies.
LARGEST_BUFFER = 2**16


@dataclass(frozen=True)
class Slot:
    """Where a parameter belongs.

    Attributes:
        name: its name, as an error shows it.
        term: the term that it belongs to; empty for the student.
        part: what is clipped together: the student, what a term shares with the
            student's optimiser, and each optimiser of its own.
    """

    name: str
    term: str
    part: tuple[str, int]


class _Unheard:
    """Stands in for the message hub where a norm is not the student's."""

    def update_scalar(self, *args: Any, **kwargs: Any) -> None:
        """Take no note."""


class DistillStep(OptimWrapper):
    """What a distiller adds to an optim wrapper; see :func:`extend_wrapper`.

    - **Clipping.** The student is clipped by its own norm, as in plain training,
      which is what ``train/grad_norm`` logs; what a term trains, and each
      optimiser of its own (a critic's), by norms of their own.
    - **Rest.** A term that was not computed since the last update (its schedule,
      ``every=k``) has no gradient in the update: neither momentum nor decay
      nor a step counter moves. In the backward pass all its parameters still
      take part, so that DDP waits for none.
    - **Frozen.** What a stage of the training freezes has no gradient in the update
      either: it does not move, and has no share in the norm that is clipped.
    - **Finite.** Losses, gradients and running statistics are looked at before
      each update, in all processes together. On a CPU an error is raised at once.
      Elsewhere the host does not wait: the gradients of a bad step become 0 on
      the device, and :meth:`check_last_step` reads the verdict where the losses are read
      anyway. A gradient scaler goes on skipping steps that overflow, until
      nothing but skipping is left.
    """

    def attach(self, model: nn.Module) -> None:
        """Learn what belongs to whom. Called once, by :func:`extend_wrapper`.

        Args:
            model: the distiller, without a wrapper.

        Raises:
            ConfigError: a term has parameters that no optimiser has.
        """
        self._model = model
        self._terms = {**model.terms, **{f'teacher.{name}': term for name, term in model.teacher.terms.items()}}
        terms = {id(p): name for name, term in self._terms.items() for p in term.parameters()}
        beside = {id(p) for p in model.companion.parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        self._slots: list[list[list[Slot]]] = []
        for number, optimizer in enumerate(_parts(self.optimizer)):
            groups = []
            for group in optimizer.param_groups:
                slots = []
                for parameter in group['params']:
                    term = terms.get(id(parameter), '')
                    name = _shown(names.get(id(parameter), 'a parameter'), term)
                    owner = term or (TEACHER if id(parameter) in beside else '')
                    slots.append(Slot(name, term, (owner, number)))
                groups.append(slots)
            self._slots.append(groups)
        known = {id(p) for group in self.optimizer.param_groups for p in group['params']}
        for name, term in self._terms.items():
            if any(p.requires_grad and id(p) not in known for p in term.parameters()):
                raise ConfigError(
                    f'term {name!r}: `optim_wrapper` must train what the term trains, got one without its parameters. '
                    'Give optim_wrapper as a config: then the distiller adds them.'
                )
        # Constants may be infinite (a mask); what becomes so later moved.
        self._moving = [
            (f'{prefix}{path}{"." if path else ""}{key}', module._buffers, key)
            for prefix, network in (
                ('', model.student),
                ('teacher: ', model.companion),
                *((f'term {n!r}: ', term) for n, term in model.terms.items()),
            )
            for path, module in network.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
            and buffer.is_floating_point()
            and 0 < buffer.numel() <= LARGEST_BUFFER
            and bool(buffer.isfinite().all())
        ]
        self._pending: _Verdict | None = None
        self._skipped: Tensor | None = None

    # --- parts -----------------------------------------------------------------------------------------------

    def _parameters(self) -> Iterator[tuple[Slot, nn.Parameter]]:
        """Every parameter, in the order of the optimiser's groups, with its place."""
        for number, optimizer in enumerate(_parts(self.optimizer)):
            known = self._slots[number]
            for place, group in enumerate(optimizer.param_groups):
                slots = known[place] if place < len(known) else []
                for index, parameter in enumerate(group['params']):
                    yield slots[index] if index < len(slots) else Slot('a parameter', '', ('', 0)), parameter

    def _clip_grad(self) -> None:
        """Clip each part as the wrapper clips a whole optimiser; only the student's norm is logged."""
        parts: dict[tuple[str, int], list[nn.Parameter]] = {('', 0): []}
        for slot, parameter in self._parameters():
            parts.setdefault(slot.part, []).append(parameter)
        optimizer, hub = self.optimizer, self.message_hub
        try:
            for (term, _), parameters in parts.items():
                self.optimizer = SimpleNamespace(param_groups=[{'params': parameters}])
                self.message_hub = _Unheard() if term else hub
                super()._clip_grad()
        finally:
            self.optimizer, self.message_hub = optimizer, hub

    def step(self, **kwargs: Any) -> None:
        """Update what was used since the last update.

        Args:
            **kwargs: for the optimiser.
        """
        terms = self._terms
        for slot, parameter in self._parameters():
            if slot.term and not terms[slot.term].used:
                parameter.grad = None
        super().step(**kwargs)
        for term in terms.values():
            term.used = False

    # --- finite ----------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Differentiate, and look at what came out.

        Args:
            loss: the sum of all losses.
            **kwargs: for the wrapper.

        Raises:
            FloatingPointError: on a CPU, at once, if something is not finite;
                elsewhere if it was so in the step before and nobody has asked.
        """
        self.check_last_step()
        super().backward(loss, **kwargs)
        for parameter in self._model.frozen_parameters():
            parameter.grad = None
        self._examine(loss.detach())

    @property
    def _scaler(self) -> Any:
        """The gradient scaler, where there is one that skips steps."""
        scaler = getattr(self, 'loss_scaler', None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def _skips(self) -> bool:
        """Whether the wrapper itself leaves out steps whose gradients overflowed."""
        return self._scaler is not None or isinstance(self, ApexOptimWrapper)

    @torch.no_grad()
    def _examine(self, loss: Tensor) -> None:
        """Find out, without waiting for the device, whether the step is sound."""
        updates = self.should_update()
        held = [(slot, p.grad) for slot, p in self._parameters() if p.grad is not None] if updates else []
        grads = [grad._values() if grad.is_sparse else grad for _, grad in held]
        norms = _norms(grads, 2.0, loss)
        moving = [(name, buffers[key]) for name, buffers, key in self._moving if buffers.get(key) is not None]
        peaks = _norms([buffer for _, buffer in moving], float('inf'), loss)
        bad = torch.stack([(~values.isfinite()).any() for values in (loss, norms, peaks)]).float()
        if get_world_size() > 1:
            distributed.all_reduce(bad, distributed.ReduceOp.MAX)
        if self._skips and updates:
            before = torch.zeros_like(bad[1]) if self._skipped is None else self._skipped
            self._skipped = (before + 1) * bad[1]
        self._pending = _Verdict(bad, self._skipped, [slot for slot, _ in held], norms, [n for n, _ in moving], peaks)
        if _free_to_read(bad):
            self.check_last_step()
        elif not self._skips:
            spoilt = bad.amax() > 0
            for grad in grads:
                # a product would leave nan
                grad.masked_fill_(spoilt, 0)

    def check_last_step(self) -> None:
        """Read the verdict over the last step, once.

        Raises:
            FloatingPointError: a loss, a gradient or a running statistic was not
                finite in some process; all of them say the same.
        """
        verdict, self._pending = self._pending, None
        if verdict is None:
            return
        loss, gradient, buffer, skipped = verdict.read()
        reason = ''
        if gradient and self._skips and not (loss or buffer):
            scaler = self._scaler
            scale = None if scaler is None else float(scaler.get_scale())
            if skipped < PATIENCE and (scale is None or scale >= SMALLEST_SCALE):
                self._model.last_step = None
                return
            shown = '' if scale is None else f', at a loss scale of {scale:.3g}'
            reason = f'{int(skipped)} updates in a row were left out because gradients overflow{shown}: '
        if not (loss or gradient or buffer):
            self._model.last_step = None
            return
        raise FloatingPointError(self._report(verdict, reason))

    def _report(self, verdict: _Verdict, reason: str) -> str:
        """Write what is wrong, as the processes that know most about it see it."""
        gradients, buffers = verdict.not_finite_parts()
        record = self._model.last_step
        alone = get_world_size() == 1
        finite = record is not None and all(bool(v.isfinite().all()) for v in record.losses.values())
        culprits = self._culprits(set(gradients)) if alone and gradients and finite else []
        fault = self._model.explain(gradients=gradients, buffers=buffers, culprits=culprits)
        self._model.last_step = None
        iteration = self.message_hub.get_info('iter', None)
        head = 'this step: ' if iteration is None else f'iteration {int(iteration) + 1}: '
        if alone:
            return f'{head}{reason}{fault}'
        faults = all_gather_object(fault)
        most = max(found.evidence for found in faults)
        if most == 0:  # reduced gradients are the same everywhere
            return f'{head}{reason}{faults[0]}'
        named = [f'rank {rank}: {found}' for rank, found in enumerate(faults) if found.evidence == most]
        return f'{head}{reason}{" ".join(named)}'

    def _culprits(self, gradients: set[str]) -> list[str]:
        """Losses that alone make such gradients: the step is run again and each loss differentiated.

        None where every loss that reaches these parameters does: then it is none of the losses.
        """
        model = self._model
        record = model.last_step
        weights = [p for slot, p in self._parameters() if slot.name in gradients]
        found: list[str] = []
        reach = 0
        try:
            with torch.enable_grad():
                with self.optim_context(model):
                    losses = model(record.images, record.samples, mode='loss')
                _, values = model.parse_losses(losses)
                names = [name for name in values if 'loss' in name and name != 'loss' and values[name].requires_grad]
                for name in names:
                    grads = torch.autograd.grad(values[name], weights, retain_graph=True, allow_unused=True)
                    reach += any(grad is not None for grad in grads)
                    if not all(bool(grad.isfinite().all()) for grad in grads if grad is not None):
                        found.append(name)
        except Exception as err:
            # A batch may have been changed by its first step. The fault is known without this, only less well.
            print_log(
                f'Which loss has the gradient that is not finite could not be found out ({type(err).__name__}: {err}).',
                'current',
                level=logging.WARNING,
            )
            return []
        finally:
            model.last_step = record
        return [] if len(found) == reach > 1 else found


@dataclass(frozen=True)
class _Verdict:
    """What a step came to, still on the device."""

    bad: Tensor
    skipped: Tensor | None
    slots: list[Slot]
    norms: Tensor
    buffers: list[str]
    peaks: Tensor

    def read(self) -> list[float]:
        """Whether losses, gradients and buffers are bad, and how many updates in a row were; waits for the device."""
        skipped = torch.zeros_like(self.bad[:1]) if self.skipped is None else self.skipped.view(1)
        return [float(number) for number in torch.cat([self.bad, skipped]).tolist()]

    def not_finite_parts(self) -> tuple[dict[str, str], dict[str, str]]:
        """Gradients and buffers that are not finite, each with ``'nan'`` or ``'inf'``."""
        gradients, buffers = (
            {name: str(v) for name, v in zip(names, values.tolist(), strict=True) if abs(v) == float('inf') or v != v}
            for names, values in (([slot.name for slot in self.slots], self.norms), (self.buffers, self.peaks))
        )
        return gradients, buffers


def extend_wrapper(wrapper: OptimWrapper, model: nn.Module) -> OptimWrapper:
    """Give a built optim wrapper the step of a distiller.

    Its class becomes a subclass of :class:`DistillStep` and of what it was, in
    this order, whoever built it: the constructor of another package may well
    not ask the config for the class.

    Args:
        wrapper: of any class that derives from mmengine's ``OptimWrapper``.
        model: the distiller, without a wrapper.

    Returns:
        The wrapper itself.

    Raises:
        ConfigError: it is no single ``OptimWrapper``, or it does not train what
            the terms train.
    """
    if not isinstance(wrapper, OptimWrapper) or isinstance(wrapper, OptimWrapperDict):
        raise ConfigError(
            f'StructuredDistiller: `optim_wrapper` must be one OptimWrapper of mmengine, got a '
            f'{type(wrapper).__name__}. Terms that need settings of their own have them: HolisticLoss(optimizer=...).'
        )
    if not isinstance(wrapper, DistillStep):
        wrapper.__class__ = _extended(type(wrapper))
    wrapper.attach(model)
    return wrapper


@functools.cache
def _extended(kind: type[OptimWrapper]) -> type[OptimWrapper]:
    """The class with the step of a distiller before it."""
    return type(f'Distill{kind.__name__}', (DistillStep, kind), {'__doc__': kind.__doc__, '__module__': __name__})


def _parts(optimizer: Any) -> list[Optimizer]:
    """The optimisers that an optimiser is made of."""
    return list(getattr(optimizer, 'parts', [optimizer]))


def _shown(name: str, term: str) -> str:
    """A parameter's name for an error: the student's own, or with the term."""
    prefix = f'{TERMS}{term}.'
    return f'term {term!r}: {name.removeprefix(prefix)}' if term else name.removeprefix(STUDENT)


def _norms(tensors: list[Tensor], order: float, like: Tensor) -> Tensor:
    """Norm of each tensor, shape (n,), float32: not finite where an entry is not, or where it overflows."""
    if not tensors:
        return torch.zeros(0, device=like.device)
    low = [t.dtype in (torch.float16, torch.bfloat16) for t in tensors]
    # in half precision the norm of sound entries overflows; there are fused kernels for lists of one dtype
    norms = torch._foreach_norm([t.float() if half else t for t, half in zip(tensors, low, strict=True)], order)
    return torch.stack([norm.to(like.device, torch.float32) for norm in norms])


def _free_to_read(tensor: Tensor) -> bool:
    """Whether reading a value costs nothing: on a CPU there is no queue to wait for."""
    return tensor.device.type == 'cpu'
