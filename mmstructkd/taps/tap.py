"""What a tap names: a module of a network, its output or input, one of several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import TapError, suggest

__all__ = ['Tap']

_KEY = r'-?\d+|\*|\d*:\d*|[A-Za-z_][\w.]*|\'[^\'\[\]]+\'|"[^"\[\]]+"'
_PATTERN = re.compile(rf'(?P<side>in:)?(?P<module>[A-Za-z_]\w*(?:\.\w+)*)(?P<keys>(?:\[(?:{_KEY})\])*)')
_SPAN = re.compile(r'(?:\*|(?P<start>\d*):(?P<stop>\d*))')

#: The last layer of a decoder, as a key.
LAST = 'last'


def _corrected(text: Any) -> str:
    """Suggest what a tap of the wrong form may have meant."""
    if not isinstance(text, str):
        return ''
    tidy = re.sub(r'\s+', '', text)
    tidy = re.sub(r'\[(\d+)\](?=\.)', r'.\1', tidy)  # an entry of a ModuleList is a name: heads.0, not heads[0]
    tidy = re.sub(r'\.+', '.', tidy).replace('.[', '[').strip('.')
    return f'Did you mean {tidy!r}? ' if tidy != text and _PATTERN.fullmatch(tidy) else ''


@dataclass(frozen=True)
class Span:
    """Several entries of a sequence, as a slice; hashable, which a slice is not."""

    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        if self == Span():
            return '*'
        return ':'.join('' if end is None else str(end) for end in (self.start, self.stop))


@dataclass(frozen=True)
class Tap:
    """A place in a network.

    Attributes:
        module: dotted name of a module, as in ``named_modules()``.
        side: ``'output'``, or ``'input'`` (its first positional argument).
        keys: path into a sequence or dict, e.g. ``(2,)`` for ``'neck[2]'``; the
            last one may be a :class:`Span`, for several tensors: ``'neck[*]'``,
            ``'neck[1:]'``, ``'neck[:4]'``. The word ``last`` is the last layer of a
            decoder, whether its layers come as a list or along the first axis of one
            tensor: ``'decode_head[0][last]'``.

    Example:
        >>> Tap.parse('in:decode_head.conv_seg')
        Tap(module='decode_head.conv_seg', side='input', keys=())
        >>> str(Tap.parse('neck[2]'))
        'neck[2]'
    """

    module: str
    side: str = 'output'
    keys: tuple[int | str | Span, ...] = ()

    @classmethod
    def parse(cls, text: Any, owner: str = 'Tap') -> Tap:
        """Read a tap as a config writes it.

        Args:
            text: ``[in:]dotted.name[index]...``; ``[*]``, ``[1:]`` or ``[:4]`` at
                the end for several.
            owner: who asks, for the message.

        Returns:
            The tap.

        Raises:
            TapError: ``text`` is no string of this form.
        """
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise TapError(
                f"{owner}: `tap` must read '[in:]dotted.module.name[index]', got {text!r}. {_corrected(text)}"
                "Examples: 'decode_head.conv_seg', 'neck[2]', 'in:decode_head.conv_seg'."
            )
        keys = [cls._key(key) for key in re.findall(r'\[([^\[\]]+)\]', match['keys'])]
        if any(isinstance(key, Span) for key in keys[:-1]):
            raise TapError(f'{owner}: `tap` must have a range only as its last index, got {text!r}.')
        return cls(
            module=match['module'],
            side='input' if match['side'] else 'output',
            keys=tuple(keys),
        )

    @staticmethod
    def _key(text: str) -> int | str | Span:
        """Read what stands in one pair of brackets."""
        span = _SPAN.fullmatch(text)
        if span is not None:
            return Span(*(int(end) if end else None for end in (span['start'], span['stop'])))
        return int(text) if re.fullmatch(r'-?\d+', text) else text.strip('\'"')

    @property
    def several(self) -> bool:
        """Whether one pass gives a list of tensors."""
        return bool(self.keys) and isinstance(self.keys[-1], Span)

    def __str__(self) -> str:
        keys = ''.join(f'[{k!r}]' if isinstance(k, str) and not k.isidentifier() else f'[{k}]' for k in self.keys)
        return ('in:' if self.side == 'input' else '') + self.module + keys

    def names(self, count: int) -> list[str]:
        """Name the tensors of one forward pass.

        Args:
            count: how many it gave.

        Returns:
            Entries of a range by their index, calls of a module by their number.

        Example:
            >>> Tap.parse('neck[1:]').names(2)
            ['neck[1]', 'neck[2]']
            >>> Tap.parse('bbox_head.cls').names(2)
            ['bbox_head.cls #0', 'bbox_head.cls #1']
        """
        last = self.keys[-1] if self.keys else None
        if isinstance(last, Span):
            one = Tap(self.module, self.side, self.keys[:-1])
            return [f'{one}[{place + (last.start or 0)}]' for place in range(count)]
        return [str(self)] if count == 1 else [f'{self} #{call}' for call in range(count)]

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
        module = modules[self.module]
        if '.losses' in type(module).__module__:
            raise TapError(
                f'{owner} must name a module that runs on images or features, got {self.module!r}, which is a loss '
                f'({type(module).__name__}). {self._nearest(modules)}'
            )
        return module

    def _nearest(self, modules: Mapping[str, nn.Module]) -> str:
        """Suggest names: near ones, else the children of the deepest part that exists.

        Losses and the data preprocessor are modules too, but nothing to listen to.
        """
        names = [
            name
            for name, module in modules.items()
            if name
            and name.split('.')[0] != 'data_preprocessor'
            and '.losses' not in type(module).__module__
            and not any(part.startswith('loss') for part in name.split('.'))
        ]
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

    def pick(self, value: Any) -> list[Tensor]:
        """Return what this tap names inside what a module got or gave.

        Args:
            value: output of the module, or its first argument.

        Returns:
            The tensor, or the tensors of a range.

        Raises:
            TapError: a key does not exist, or what it names is no tensor.
        """
        for place, key in enumerate(self.keys):
            if isinstance(value, Tensor) and key == LAST and place and value.dim() > 3:
                value = value[-1]
                continue
            if isinstance(value, Tensor):
                whole = Tap(self.module, self.side, self.keys[:place])
                queries = ' It shows no queries: leave out the connector that reads them.' if LAST in self.keys else ''
                raise TapError(
                    f'Tap {str(self)!r}: `[{key}]` must pick one of several {self.side}s, got one tensor of shape '
                    f'{tuple(value.shape)}; an index would pick an image. Write {str(whole)!r}.{queries}'
                )
            value = self._entry(value, key)
        entries = value if self.several else [value]
        for entry in entries:
            if not isinstance(entry, Tensor):
                raise TapError(
                    f'Tap {str(self)!r}: the {self.side} must be a tensor, got {type(entry).__name__}.'
                    f'{self._way_out(entry)}'
                )
        return list(entries)

    def _entry(self, value: Any, key: int | str | Span) -> Any:
        """One step down into a sequence or dict."""
        try:
            if not isinstance(key, Span):
                return value[-1 if key == LAST and isinstance(value, (tuple, list)) else key]
            found = list(value[key.start : key.stop]) if isinstance(value, (tuple, list)) else []
            if not found:
                raise IndexError(key)
        except (IndexError, KeyError, TypeError) as err:
            what = f'{type(value).__name__} of {len(value)}' if hasattr(value, '__len__') else type(value).__name__
            raise TapError(f'Tap {str(self)!r}: `[{key}]` must exist in the {self.side}, got {what}.') from err
        return found

    def _way_out(self, value: Any) -> str:
        """Name what could be picked instead."""
        if not isinstance(value, (tuple, list, dict)) or self.several:
            return ''
        keys = list(value) if isinstance(value, dict) else [*range(len(value)), '*']
        return ' Pick one: ' + ', '.join(f"'{self}[{k}]'" for k in keys) + '.'
