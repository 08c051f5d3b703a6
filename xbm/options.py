"""Options: declared once, as dataclass fields with a default, a check and a description.

`option` declares one, and `Options` checks and converts all of them when an object is made. Whoever passes options on,
such as an adapter in `**options`, gets the signature, the documentation and the error for a misspelt name from
`accepts`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from difflib import get_close_matches
from functools import wraps
from textwrap import dedent, fill, indent
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from xbm import checks

Check = Callable[[str, Any], Any]
"""From an option's name and value to the value that is kept; raises a TypeError or a ValueError that names both."""

T = TypeVar("T")

WIDTH = 116


def option(default: Any, check: Check, description: str = "") -> Any:
    """Return a dataclass field that is an option.

    Parameters
    ----------
    default : object
        Value if left out. None is never checked: it stands for "not given".
    check : callable
        See `Check`.
    description : str
        What it does, its range and its units, for the documentation.
    """
    return field(default=default, metadata={"check": check, "description": description})


class Options:
    """Base of dataclasses whose fields are options: a new object has checked and converted values."""

    def __post_init__(self) -> None:
        declared: Any = self
        for one in fields(declared):
            value = getattr(self, one.name, None)
            if "check" in one.metadata and not (value is None and one.default is None):
                self.derive(**{one.name: one.metadata["check"](one.name, value)})

    def derive(self, **values: Any) -> None:
        """Set fields of a frozen object that follow from its options; only while it is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def values(self) -> dict[str, Any]:
        """Return {name: value} of all options."""
        return {name: getattr(self, name) for name in declared(type(self))}


def declared(owner: type) -> dict[str, Field[Any]]:
    """Return {name: field} of the options of a dataclass, in the order of their declaration."""
    kind: Any = owner
    return {one.name: one for one in fields(kind) if "check" in one.metadata}


def number(*, at_least: float | None = None) -> Check:
    """Return the check of a finite number."""
    return lambda name, value: checks.number(name, value, at_least=at_least)


def whole(*, at_least: int) -> Check:
    """Return the check of a whole number."""
    return lambda name, value: checks.whole_number(name, value, at_least=at_least)


def choice(*accepted: str) -> Check:
    """Return the check of one of some names."""
    return lambda name, value: checks.choice(name, value, accepted)


def instance(kind: type, called: str) -> Check:
    """Return the check of an object of a class."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {called}, got {value!r:.80}")
        return value

    return check


def function(arguments: str) -> Check:
    """Return the check of a callable, with the arguments it is called with."""

    def check(name: str, value: Any) -> Any:
        if not callable(value):
            raise TypeError(f"{name} must be callable as {name}({arguments}), got {value!r:.80}")
        return value

    return check


def described(owner: type, *, only: tuple[str, ...] | None = None) -> str:
    """Return the options of a dataclass as entries of a numpydoc section."""
    kinds = get_type_hints(owner)
    entries = []
    for name, one in declared(owner).items():
        if only is None or name in only:
            text = fill(" ".join(one.metadata["description"].split()), WIDTH)
            entries.append(f"{name} : {kind_of(kinds[name])}\n{indent(text, '    ')}")
    return "\n".join(entries)


def kind_of(annotation: Any) -> str:
    """Return a type annotation in numpydoc's words: `{"a", "b"}`, `float, optional`, `str or callable`."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = list(dict.fromkeys(kind_of(one) for one in get_args(annotation) if one is not type(None)))
        text = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)
        return f"{text}, optional" if type(None) in get_args(annotation) else text
    if get_origin(annotation) is Literal:
        return "{" + ", ".join(repr(one).replace("'", '"') for one in get_args(annotation)) + "}"
    origin = get_origin(annotation) or annotation
    if origin in (Callable, get_origin(Callable[..., Any])):
        return "callable"
    return "list" if origin is get_origin(list[Any]) or origin.__name__ == "Sequence" else str(origin.__name__)


def documented(owner: type[T]) -> type[T]:
    """Decorate a dataclass of keyword options: describe them in its docstring, and check their names.

    `{options}` in the docstring becomes their descriptions, and the error for an unknown name suggests the nearest
    option.
    """
    init: Any = owner.__init__

    @wraps(init)
    def checked(self: Any, **given: Any) -> None:
        check_names(owner.__name__, given, tuple(inspect.signature(init).parameters)[1:])
        init(self, **given)

    setattr(owner, "__init__", checked)  # noqa: B010  (a type checker forbids the assignment)
    return _with_docs(owner, owner)


def accepts(source: type) -> Callable[[type[T]], type[T]]:
    """Decorate a class whose `__init__` passes `**options` on to a dataclass, `source`.

    The signature shows the options one by one, `{options}` in the docstring becomes their descriptions, and the error
    for an unknown name suggests the nearest option.
    """

    def decorate(owner: type[T]) -> type[T]:
        init: Any = owner.__init__
        own = [one for one in inspect.signature(init).parameters.values() if one.kind is not one.VAR_KEYWORD]
        known = [one.name for one in own[1:]]  # without `self`
        taken = [_parameter(one) for name, one in declared(source).items() if name not in known]
        names = tuple(one.name for one in taken)

        @wraps(init)
        def checked(self: Any, *arguments: Any, **given: Any) -> None:
            check_names(owner.__name__, given, (*known, *names))
            init(self, *arguments, **given)

        checked.__signature__ = inspect.Signature([*own, *taken])  # type: ignore[attr-defined]
        setattr(owner, "__init__", checked)  # noqa: B010  (a type checker forbids the assignment)
        return _with_docs(owner, source, only=names)

    return decorate


def check_names(owner: str, given: Mapping[str, Any], accepted: tuple[str, ...]) -> None:
    """Raise a TypeError if a keyword is not an option, with the nearest one."""
    for name in given:
        if name not in accepted:
            near = get_close_matches(name, accepted, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted({*accepted}))}"
            raise TypeError(f"{owner} has no option {name!r}: {hint}")


def _parameter(one: Field[Any]) -> inspect.Parameter:
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)


def _with_docs(owner: type[T], source: type, *, only: tuple[str, ...] | None = None) -> type[T]:
    if owner.__doc__:
        text = dedent("    " + owner.__doc__)
        owner.__doc__ = text.replace("{options}", described(source, only=only))
    return owner
