"""A registry from names to factories: one class for adapters, losses and whatever a user adds."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fgd_hooks.errors import UnknownNameError

FEW = 20  # names that fit on a screen

Factory = TypeVar("Factory", bound=Callable[..., Any])


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known names; where none is near, all of them if they are few."""
    known = list(known)
    containing = [each for each in known if len(name) > 2 and name in each][:3]
    if near := difflib.get_close_matches(name, known, n=3, cutoff=0.6) or containing:
        return "Did you mean " + " or ".join(repr(n) for n in near) + "?"
    return (
        "Known are: " + (", ".join(known) or "none") + "."
        if len(known) <= FEW
        else f"None of the {len(known)} is near."
    )


class Registry:
    """Names to factories (classes or functions) of one kind of thing.

    Args:
        kind: what the entries are, for error messages ("adapter", "loss").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Decorator that enters a class or function under ``name`` and returns it unchanged."""

        def decorate(factory: Factory) -> Factory:
            present = self._factories.get(name)
            if present is not None and present is not factory:
                raise ValueError(f"The {self.kind} name {name!r} is taken by {present!r}; choose another name.")
            self._factories[name] = factory
            return factory

        return decorate

    def get(self, name: str) -> Callable[..., Any]:
        """The factory entered under ``name``."""
        if name not in self._factories:
            raise UnknownNameError(f"There is no {self.kind} {name!r}. {suggestion(name, self.names())}")
        return self._factories[name]

    def create(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the factory entered under ``name`` with the given arguments."""
        return self.get(name)(*args, **kwargs)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._factories)

    def __contains__(self, name: object) -> bool:
        return name in self._factories
