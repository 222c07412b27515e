"""Registries of interchangeable components: a component is one file and one entry."""

from __future__ import annotations

import difflib
from typing import NoReturn, TypeVar

from valdi_jax.errors import UsageError

T = TypeVar("T")


class Registry(dict[str, T]):
    """Components by name, selected with the command-line ``option``.

    Raises:
        UsageError: on look-up of an unknown name, suggesting or listing known ones.
    """

    def __init__(self, option: str, members: dict[str, T]):
        super().__init__(members)
        self._option = option

    def __setitem__(self, name: str, member: T) -> None:
        if name in self and self[name] is not member:
            import jax

            jax.clear_caches()  # compiled programs know members by name alone
        super().__setitem__(name, member)

    def __missing__(self, name: str) -> NoReturn:
        near = difflib.get_close_matches(name, self, n=1)
        known = f"choose one of {', '.join(self)}, or --env.import the module that registers it"
        hint = f"did you mean {near[0]!r}?" if near else known
        raise UsageError(f"{self._option}: unknown {name!r}; {hint}")
