"""What a tap names: a module of a network, its output or input, one of several."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import TapError, suggest

__all__ = ['Tap']

_PATTERN = re.compile(r'^(?P<side>in:)?(?P<module>[A-Za-z_][\w.]*)(?P<keys>(\[[^\[\]]+\])*)$')


@dataclass(frozen=True)
class Tap:
    """A place in a network.

    Attributes:
        module: dotted name of a module, as in ``named_modules()``.
        side: ``'output'``, or ``'input'`` (its first positional argument).
        keys: path into a sequence or dict, e.g. ``(2,)`` for ``'neck[2]'``.

    Example:
        >>> Tap.parse('in:decode_head.conv_seg')
        Tap(module='decode_head.conv_seg', side='input', keys=())
        >>> str(Tap.parse('neck[2]'))
        'neck[2]'
    """

    module: str
    side: str = 'output'
    keys: tuple[int | str, ...] = ()

    @classmethod
    def parse(cls, text: Any, owner: str = 'Tap') -> Tap:
        """Read a tap as a config writes it.

        Args:
            text: ``[in:]dotted.name[index]...``.
            owner: who asks, for the message.

        Returns:
            The tap.

        Raises:
            TapError: ``text`` is no string of this form.
        """
        match = _PATTERN.match(text) if isinstance(text, str) else None
        if match is None:
            raise TapError(
                f"{owner}: `tap` must read '[in:]dotted.module.name[index]', got {text!r}. "
                "Examples: 'decode_head.conv_seg', 'neck[2]', 'in:decode_head.conv_seg'."
            )
        keys = re.findall(r'\[([^\[\]]+)\]', match['keys'])
        return cls(
            module=match['module'].rstrip('.'),
            side='input' if match['side'] else 'output',
            keys=tuple(int(k) if re.fullmatch(r'-?\d+', k) else k.strip('\'"') for k in keys),
        )

    def __str__(self) -> str:
        keys = ''.join(f'[{k}]' for k in self.keys)
        return ('in:' if self.side == 'input' else '') + self.module + keys

    def resolve(self, network: nn.Module, owner: str) -> nn.Module:
        """Return the module of ``network`` that this tap names.

        Args:
            network: the network that is tapped.
            owner: who asks, for the message.

        Returns:
            The module.

        Raises:
            TapError: there is none of that name; the message has the nearest.
        """
        modules = dict(network.named_modules())
        if self.module not in modules:
            raise TapError(
                f'{owner} must name a module of {type(network).__name__}, got {self.module!r}. {self._nearest(modules)}'
            )
        return modules[self.module]

    def _nearest(self, modules: Iterable[str]) -> str:
        """Suggest names: near ones, else the children of the deepest part that exists."""
        names = [name for name in modules if name]
        hint = suggest(self.module, names)
        if hint.startswith('Did'):
            return hint
        known = set(names)
        parts = self.module.split('.')
        for length in range(len(parts) - 1, -1, -1):
            prefix = '.'.join(parts[:length])
            if prefix in known or not prefix:
                start = prefix + '.' if prefix else ''
                children = {n[len(start) :].split('.')[0] for n in names if n.startswith(start)}
                where = f'{prefix!r} has' if prefix else 'It has'
                return f'{where}: ' + ', '.join(repr(start + c) for c in sorted(children)) + '.'
        return hint

    def pick(self, value: Any) -> Tensor:
        """Return the tensor this tap names inside what a module got or gave.

        Args:
            value: output of the module, or its first argument.

        Returns:
            The tensor.

        Raises:
            TapError: a key does not exist, or what it names is no tensor.
        """
        for key in self.keys:
            try:
                value = value[key]
            except (IndexError, KeyError, TypeError) as err:
                what = f'{type(value).__name__} of {len(value)}' if hasattr(value, '__len__') else type(value).__name__
                raise TapError(f'Tap {str(self)!r}: `[{key}]` must exist in the {self.side}, got {what}.') from err
        if not isinstance(value, Tensor):
            several = isinstance(value, (tuple, list, dict))
            keys = list(value) if isinstance(value, dict) else range(len(value)) if several else ()
            way_out = ' Pick one: ' + ', '.join(f"'{self}[{k}]'" for k in keys) + '.' if several else ''
            raise TapError(f'Tap {str(self)!r}: the {self.side} must be a tensor, got {type(value).__name__}.{way_out}')
        return value
