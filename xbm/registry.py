"""Names of losses and miners, registered where the classes are defined."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(dict[str, Callable[..., T]], Generic[T]):
    """From a name to a class, or to a class with some options."""

    def register(self, *names: str, **options: Any) -> Callable[[C], C]:
        """Decorate a class: it gets these names, with the given options where it has any."""

        def decorate(kind: C) -> C:
            for name in names:
                if name in self:
                    raise ValueError(f"{name!r} is registered already, for {self[name]!r}")
                self[name] = partial(kind, **options) if options else kind
            return kind

        return decorate


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, given its name and `__path__`, so that each registers its classes."""
    for module in iter_modules(path):
        import_module(f"{package}.{module.name}")
