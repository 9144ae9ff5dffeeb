"""What a temperature is to a loss, and how a loss gets one from its config."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmstructkd.errors import (
    ConfigError,
    check_count,
    check_one_of,
    check_positive,
    suggest,
)
from mmstructkd.registry import MODELS, look_up

__all__ = ['Progress', 'Softened', 'Temperature', 'build_temperature', 'check_temperature_range']

#: Iterations of any training.
MAX_STEPS = 10**12

#: The range of temperatures, see :func:`check_temperature_range`.
LOWEST, HIGHEST = 1e-3, 1e3


class Softened(NamedTuple):
    """Scores and the temperature that the loss divides them by.

    Attributes:
        student: the student's scores.
        teacher: the teacher's.
        temperature: a number, or a scalar tensor where it is learned; one for each
            position or image, shape (B, 1, H, W), (B, 1, 1, 1) or (M, 1), of a
            temperature that says so, see :attr:`Temperature.per`.
    """

    student: Tensor
    teacher: Tensor
    temperature: float | Tensor


class Temperature(nn.Module):
    """Softens the scores of student and teacher.

    A loss divides by the temperature that :meth:`forward` returns and multiplies
    by its square, so a subclass that only chooses the number returns the scores
    as they are.

    Two attributes tell the training what a subclass needs: ``set_progress(step,
    last)``, where there is one, is called before each iteration, with epochs if
    ``by_epoch``; parameters named in ``no_weight_decay`` are optimised without.

    Attributes:
        reshapes: whether :meth:`forward` changes the scores. Then it needs the
            axes of their distribution, and a loss whose scores have none refuses
            it.
        per: whom a temperature is for: ``'all'``, or each ``'position'`` or ``'image'``.
            Losses say which of these have a meaning to them.
        no_weight_decay: names of own parameters.
    """

    reshapes: bool = False
    per: str = 'all'
    no_weight_decay: tuple[str, ...] = ()

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Build what depends on the width of the scores, once; the default needs nothing.

        Args:
            student: probed scores, shape (B, C, H, W) or (M, C).
            teacher: probed scores, same shape.
        """

    def forward(
        self, student: Tensor, teacher: Tensor, *, dim: int | tuple[int, ...] = 1, valid: Tensor | None = None
    ) -> Softened:
        """Return the scores and the temperature.

        Args:
            student: scores, shape (B, C, H, W) or (M, C).
            teacher: scores, same shape.
            dim: axes of the distribution that the loss makes of the scores.
            valid: positions that count, bool, shape (B, H, W) or (M,).

        Returns:
            Scores to be divided by the temperature, and the temperature.
        """
        raise NotImplementedError(f'{type(self).__name__} must implement `forward`.')


class Progress:
    """A window of the training, and how far it has come.

    Args:
        owner: who asks, for messages.
        begin: first iteration or epoch of the window.
        end: the one after its last; ``None``: the share of the training given
            to :meth:`set`.
        by_epoch: count epochs instead of iterations.
        share: of the training at which the window ends for ``end=None``.
    """

    def __init__(self, owner: str, begin: int, end: int | None, *, share: float = 1.0) -> None:
        check_count(owner, 'begin', begin, 0, maximum=MAX_STEPS)
        if end is not None:
            check_count(owner, 'end', end, 0, maximum=MAX_STEPS)
            if end <= begin:
                raise ConfigError(f'{owner}: `end` must lie after `begin`={begin}, got {end}.')
        self.begin, self.end, self.share = begin, end, share
        self.ratio = 0.0

    def set(self, step: int, last: int) -> float:
        """Note that ``step`` of ``last`` iterations (or epochs) are done.

        Args:
            step: done so far.
            last: of the whole training.

        Returns:
            How far the window is through, from 0 to 1.
        """
        end = self.share * last if self.end is None else self.end
        self.ratio = min(max((step - self.begin) / max(end - self.begin, 1e-9), 0.0), 1.0)
        return self.ratio


def check_temperature_range(owner: str, argument: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a temperature that float32 can compute with.

    Within :data:`LOWEST` and :data:`HIGHEST`. Divided by more than that, scores
    differ by less than float32 can tell beside the logarithm of the number of
    classes; divided by less, a softmax is 0 or 1 everywhere. Either way what is
    left of the gradient is rounding. Published values lie between 0.05 and 21.

    Args:
        owner: who asks, for the message.
        argument: name of the argument.
        value: the value.
    """
    check_positive(owner, argument, value)
    if not LOWEST <= value <= HIGHEST:
        raise ConfigError(
            f'{owner}: `{argument}` must lie between {LOWEST:g} and {HIGHEST:g}, got {value!r}: beyond them float32 '
            'leaves no gradient. Published values lie between 0.05 and 21; loss_weight=0 switches a loss off.'
        )


def build_temperature(owner: str, value: Any) -> float | Temperature:
    """Read the ``temperature`` of a loss.

    Args:
        owner: the loss, for messages.
        value: a number from 0.001 to 1000, a config with a ``type``, or a temperature.

    Returns:
        The number, or the module.

    Raises:
        ConfigError: anything else, or a config that cannot be built.
    """
    if isinstance(value, Temperature):
        return value
    if isinstance(value, Real) or not isinstance(value, (Mapping, nn.Module)):
        check_temperature_range(owner, 'temperature', value)
        return float(value)
    if isinstance(value, nn.Module) or 'type' not in value:
        shown = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
        raise ConfigError(
            f'{owner}: `temperature` must be a number above 0 or a registered temperature, got {shown}. '
            "Write e.g. temperature=dict(type='mmstructkd.LearnableTemperature')."
        )
    kind = value['type']
    if not callable(kind) and (not isinstance(kind, str) or look_up(MODELS, kind) is None):
        known = [
            name for name, cls in MODELS.module_dict.items() if isinstance(cls, type) and issubclass(cls, Temperature)
        ]
        check_one_of(owner, "temperature['type']", kind, [f'mmstructkd.{name}' for name in known])
    try:
        built = MODELS.build(dict(value))
    except Exception as err:  # whatever a temperature of others trips over
        raise ConfigError(f'{owner}: `temperature` cannot be built. {err}') from err
    if not isinstance(built, Temperature):
        raise ConfigError(
            f'{owner}: `temperature` must be a temperature, got {type(built).__name__}. '
            f'{suggest(type(built).__name__, ["LearnableTemperature", "ScheduledTemperature"])}'
        )
    return built
