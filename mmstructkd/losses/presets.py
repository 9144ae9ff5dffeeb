"""Named settings of a loss: a paper's, its released code's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmstructkd.errors import ConfigError, check_one_of

__all__ = ['settle']


def settle(
    owner: str,
    preset: str | None,
    given: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Fill in what was not given, from a preset or the defaults.

    Args:
        owner: who asks, for messages.
        preset: name of the preset, ``None`` for the defaults.
        given: the arguments as they were passed; ``None`` where left out.
        defaults: a value for each argument.
        presets: for each preset, the values it fixes.

    Returns:
        A value for each argument.

    Raises:
        ConfigError: there is no such preset, or an argument contradicts it: a
            preset that gives other numbers than its source's is no preset.

    Example:
        >>> settle('doc', 'paper', dict(a=None), defaults=dict(a=1), presets=dict(paper=dict(a=2)))
        {'a': 2}
    """
    fixed: Mapping[str, Any] = {}
    if preset is not None:
        check_one_of(owner, 'preset', preset, tuple(presets))
        fixed = presets[preset]
        for name, value in fixed.items():
            if given[name] is not None and given[name] != value:
                raise ConfigError(
                    f'{owner}: `{name}` must be {value!r} with preset={preset!r}, got {given[name]!r}. '
                    f'Leave `{name}` out, or the preset, and name every argument.'
                )
    return {**defaults, **{name: value for name, value in given.items() if value is not None}, **fixed}
