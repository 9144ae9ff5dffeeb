"""Compares what a class is built with against the names and annotations of its own constructor.

A config is full of values that Python takes without a word: the string ``'no'``
is true, ``True`` is one, a number in quotes fails ten calls further down. The
signature of a constructor says already what it takes; here it is held to it.
What a number may be beyond its kind (a range, a choice) each constructor checks
itself, with the helpers of :mod:`mmstructkd.errors`.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

from mmstructkd.errors import ArgumentError, ConfigError, is_count, is_finite_number, shown, suggest

__all__ = ['check_call', 'checked', 'fits', 'rule_of']

T = TypeVar('T')

_FLAGS = (bool, bool | None)
_MARK = '__checks_arguments__'
_LISTS = (list, tuple, Sequence, Collection, Iterable)
_NOUNS = {bool: 'True or False', int: 'an integer', float: 'a finite number', str: 'a string', type(None): 'None'}
_PLURALS = {bool: 'flags (True or False)', int: 'integers', float: 'finite numbers', str: 'strings'}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that an annotation names.

    Stricter than Python where configs go wrong in silence: a flag is ``True`` or
    ``False`` and nothing else, an integer is no flag and no float, a number is
    finite. Laxer where configs cannot be exact: a list stands for a tuple and
    a tuple for a list, an integer for a number.

    Args:
        value: the value.
        hint: the annotation, resolved. What is not understood fits everything.

    Returns:
        The answer.

    Example:
        >>> fits('no', bool), fits(True, int), fits([1, 2], tuple[int, int]), fits(2, float)
        (False, False, True, True)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return is_count(value)
    if hint is float:
        return is_finite_number(value)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    kind = origin or hint
    if kind in _LISTS:
        return _fits_sequence(value, kind, arguments)
    if isinstance(kind, type) and issubclass(kind, Mapping):
        inner = arguments if len(arguments) == 2 else (Any, Any)
        return isinstance(value, Mapping if kind is Mapping else kind) and all(
            fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items()
        )
    if kind is Callable:
        return callable(value)
    if kind is type:
        return isinstance(value, type)
    try:
        return not isinstance(kind, type) or isinstance(value, kind)
    except TypeError:  # a protocol that cannot be asked at run time
        return True


def _fits_sequence(value: Any, kind: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a value is a list or tuple of what an annotation names."""
    wanted = kind if kind in (Collection, Iterable) else Sequence
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, wanted):
        return False
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    return not arguments or all(fits(item, arguments[0]) for item in value)


def rule_of(hint: Any) -> str:
    """Say in words what an annotation asks for.

    Args:
        hint: the annotation, resolved.

    Returns:
        What follows ``must be``.

    Example:
        >>> rule_of(int | tuple[int, int] | None), rule_of(bool)
        ('an integer, 2 integers or None', 'True or False')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _FLAGS:
        return _NOUNS[bool]
    if hint in _NOUNS:
        return _NOUNS[hint]
    if hint is None:
        return 'None'
    if origin in (Union, types.UnionType):
        rules = list(dict.fromkeys(rule_of(option) for option in arguments))
        return rules[0] if len(rules) == 1 else ', '.join(rules[:-1]) + ' or ' + rules[-1]
    if origin is Literal:
        return 'one of ' + ', '.join(map(repr, arguments))
    if origin is typing.Annotated:
        return rule_of(arguments[0])
    kind = origin or hint
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return f'{len(arguments)} {_PLURALS.get(arguments[0], "values")}'
    if kind in _LISTS:
        item = arguments[0] if arguments else Any
        return f'a list of {_PLURALS[item]}' if item in _PLURALS else 'a list'
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return 'a dict'
    if kind is Callable:
        return 'something to call'
    name = getattr(kind, '__name__', str(kind))
    return f'an instance of {name}'


@dataclass(frozen=True)
class _Takes:
    """What a constructor takes, those included to which it hands its ``**kwargs``.

    Attributes:
        positional: names that may come without a name, in order.
        required: names without a default.
        hints: by name the annotation, for those that have one.
        defaults: by name the default.
        anything: other names are taken as well.
        many: any number of values without a name is taken.
        misplaced: by name where it belongs, for names that configs put here by mistake: the class's own
            ``misplaced_arguments``.
        also: what its config may have besides, which whoever builds it takes out: the class's own
            ``config_options``.
    """

    positional: tuple[str, ...]
    required: tuple[str, ...]
    hints: dict[str, Any]
    defaults: dict[str, Any]
    known: tuple[str, ...]
    anything: bool
    many: bool
    misplaced: Mapping[str, str]
    also: tuple[str, ...]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, each resolved by itself: one that cannot be leaves the others."""
    plain = inspect.unwrap(function)
    space = getattr(plain, '__globals__', {})
    found = {}
    for name, hint in getattr(plain, '__annotations__', {}).items():
        if isinstance(hint, str):
            try:
                hint = eval(hint, space)  # as typing.get_type_hints does, for all of them or none
            except (AttributeError, NameError, SyntaxError, TypeError):
                continue
        found[name] = hint
    return found


def _chain(cls: type) -> list[Callable[..., Any]]:
    """The constructors of a class: its own, and those behind it to which ``**kwargs`` go on."""
    chain: list[Callable[..., Any]] = []
    for base in cls.__mro__:
        init = base.__dict__.get('__init__')
        if init is None:
            continue
        if inspect.unwrap(init) is object.__init__:
            return chain
        chain.append(init)
        if not _takes_any_name(init):
            return chain
    return chain


def _package(thing: Any) -> str:
    """Name of the package that something is defined in."""
    return str(getattr(thing, '__module__', '')).partition('.')[0]


def _takes_any_name(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


@functools.cache
def _takes(cls: type) -> _Takes:
    """Read the signature of a class."""
    chain = _chain(cls)
    positional: list[str] = []
    known: dict[str, None] = {}
    required: list[str] = []
    hints: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    anything = many = False
    misplaced: Mapping[str, str] = getattr(cls, 'misplaced_arguments', {})
    for depth, init in enumerate(chain):
        own = _hints(init)
        trusted = _package(init) in (_package(cls), __name__.partition('.')[0])
        anything = many = False
        for parameter in list(inspect.signature(init).parameters.values())[1:]:
            name = parameter.name
            if parameter.kind is parameter.VAR_POSITIONAL:
                many = True
            elif parameter.kind is parameter.VAR_KEYWORD:
                anything = True
            elif name not in known:
                known[name] = None
                # Annotations of other packages do not always say all that is taken; of a flag they do.
                if name in own and (trusted or own[name] in _FLAGS):
                    hints[name] = own[name]
                if parameter.default is not parameter.empty:
                    defaults[name] = parameter.default
                elif depth == 0:
                    # What the ones behind it need, the first may give them itself.
                    required.append(name)
                if depth == 0 and parameter.kind is not parameter.KEYWORD_ONLY:
                    positional.append(name)
    also = tuple(getattr(cls, 'config_options', ()))
    return _Takes(tuple(positional), tuple(required), hints, defaults, tuple(known), anything, many, misplaced, also)


def check_call(
    owner: str, cls: type, args: Sequence[Any], kwargs: Mapping[str, Any], *, filled: Collection[str] = ()
) -> None:
    """Raise unless a class takes these arguments.

    Args:
        owner: who is built, for messages.
        cls: the class.
        args: values without a name.
        kwargs: values by name.
        filled: names that will be added by whoever builds it; they may be left out here.

    Raises:
        ArgumentError: a name is unknown, missing, or given twice.
        ConfigError: a value is not of the kind that the annotation names.
    """
    takes = _takes(cls)
    given = _named(owner, takes, args, kwargs, filled)
    name = _misfit(takes, given)
    if name is not None:
        raise ConfigError(_refusal(owner, takes, name, given[name]))


def _named(
    owner: str, takes: _Takes, args: Sequence[Any], kwargs: Mapping[str, Any], filled: Collection[str] = ()
) -> dict[str, Any]:
    """Give each value its name, none of them unknown and none that is needed missing."""
    if len(args) > len(takes.positional) and not takes.many:
        names = ', '.join(f'`{name}`' for name in takes.positional) or 'none'
        raise ArgumentError(
            f'{owner}: there must be at most {len(takes.positional)} arguments without a name ({names}), '
            f'got {len(args)}. Write name=value.'
        )
    given = dict(zip(takes.positional, args, strict=False))
    for name, value in kwargs.items():
        if name in given:
            raise ArgumentError(f'{owner}: `{name}` must be given once, got {shown(given[name])} and {shown(value)}.')
        if name not in takes.known and not takes.anything:
            way_out = takes.misplaced.get(name) or suggest(name, (*takes.known, *takes.also)) or 'It takes none.'
            raise ArgumentError(f'{owner}: an argument must be one that it takes, got {name!r}. {way_out}')
        given[name] = value
    for name in takes.required:
        if name not in given and name not in filled:
            only = 'only ' + ', '.join(f'`{known}`' for known in given) if given else 'no argument'
            raise ArgumentError(f'{owner}: `{name}` must be given, got {only}.')
    return given


def _misfit(takes: _Takes, given: Mapping[str, Any]) -> str | None:
    """Name an argument whose value is not of the kind that its annotation names, a flag before others."""
    wrong = [
        name
        for name, value in given.items()
        # A default is right whatever its annotation says: `x: int = None` is an old way to write an optional one.
        if not (name in takes.defaults and value is takes.defaults[name])
        and not fits(value, takes.hints.get(name, Any))
    ]
    return next((name for name in wrong if takes.hints[name] in _FLAGS), wrong[0] if wrong else None)


def _refusal(owner: str, takes: _Takes, name: str, value: Any) -> str:
    """Say what an argument must be."""
    return f'{owner}: `{name}` must be {rule_of(takes.hints[name])}, got {shown(value)}.'


def checked(cls: type[T]) -> type[T]:
    """Let a class check its arguments before its constructor runs.

    The constructor keeps its signature, docstring and meaning. A subclass
    without a constructor of its own is checked like its base.

    Args:
        cls: the class; changed in place.

    Returns:
        The class.

    Example:
        >>> @checked
        ... class Blur:
        ...     def __init__(self, radius: int = 1) -> None:
        ...         self.radius = radius
        >>> Blur(radius='2')
        Traceback (most recent call last):
        mmstructkd.errors.ConfigError: Blur: `radius` must be an integer, got '2'.
    """
    if not isinstance(cls, type) or hasattr(cls.__init__, _MARK):
        return cls  # a function, or a class that is checked already
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # A subclass with a constructor of its own calls this one with what it makes of its arguments.
        kind = type(self) if type(self).__init__ is __init__ else cls
        owner, takes = type(self).__name__, _takes(kind)
        given = _named(owner, takes, args, kwargs)
        name = _misfit(takes, given)
        if name is None:
            init(self, *args, **kwargs)
            return
        cause: Exception | None = None
        if takes.hints[name] not in _FLAGS:
            # The constructor's own refusal says more (a range, a way out), so it is asked first. Not for a flag:
            # there is no more to say, and what it guards must not happen.
            try:
                init(self, *args, **kwargs)
            except ConfigError as err:
                if f'`{name}' in str(err):
                    raise
                cause = err
            except Exception as err:  # it tripped over the value: the refusal says over which, and names this as cause
                cause = err
        raise ConfigError(_refusal(owner, takes, name, given[name])) from cause

    setattr(__init__, _MARK, True)
    cls.__init__ = __init__  # type: ignore[misc]
    return cls
