"""The members of a family by name: an idea is one file and one line in a registry."""

from __future__ import annotations

import difflib
from typing import NoReturn, TypeVar

from valdi_jax.errors import UsageError

T = TypeVar("T")


class Registry(dict[str, T]):
    """Members by name. A name that is not there is answered with those that are.

    Args:
        option: that chooses a member, such as ``--model.dynamics``.
        members: that come with the package; others may be added like to any dict.

    Raises:
        UsageError: where a name that is not there is looked up.
    """

    def __init__(self, option: str, members: dict[str, T]):
        super().__init__(members)
        self._option = option

    def __missing__(self, name: str) -> NoReturn:
        near = difflib.get_close_matches(name, self, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(self)}"
        raise UsageError(f"{self._option}: unknown {name!r}; {hint}")
