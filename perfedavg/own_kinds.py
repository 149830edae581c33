"""Choices to which users bring classes of their own, such as methods. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perfedavg.fields import MISSING, Kinds, flags_of, setting, setting_of
from perfedavg.own_module import import_own


class OpenKinds(Kinds):
    """This project's, and those of users' own, named as `package.module:Class`, once they have been named.

    base: what all of them are.  flag: what they are named with, without dashes.  built_in: names of this project's.
    needed: the method that a user's own must have in place of the base's.
    """

    def __init__(self, kinds: Mapping[str, type], base: type, flag: str, needed: str) -> None:
        super().__init__(kinds)
        self.base = base
        self.flag = flag
        self.built_in = frozenset(kinds)
        self._needed = needed

    def find(self, name: str) -> type | None:
        if name not in self and ":" in name:
            asked = f"is a subclass of {self.base.__module__}.{self.base.__qualname__}"
            self.add(name, import_own(f"--{self.flag}", name, "Class", self._is_kind, asked))
        return self.get(name)

    def add(self, name: str, kind: type) -> None:
        """Let a user's own be one of them, by that name, which becomes its `name`. Raises ValueError."""
        problem = self._problem_with(kind)
        if problem is not None:
            raise ValueError(f"--{self.flag} {name}: {problem}")
        kind.name = name  # type: ignore[attr-defined]
        self[name] = kind
        flags_of.cache_clear()

    def forget_own(self) -> None:
        """Until they are named again."""
        for name in self.keys() - self.built_in:
            del self[name]
        flags_of.cache_clear()

    def _is_kind(self, found: object) -> bool:
        return isinstance(found, type) and issubclass(found, self.base)

    def _problem_with(self, kind: type) -> str | None:
        if not self._is_kind(kind):
            return f"it is no subclass of {self.base.__module__}.{self.base.__qualname__}; make it one"
        for name in self.built_in:
            if self[name] is kind:
                return f"this is {name}; name it so"
        left_out = [name for name, value in vars(kind).items() if isinstance(value, dataclasses.Field)]
        if left_out:
            return f"its class is no dataclass, and so {left_out[0]} no setting; write @dataclass(frozen=True) above it"
        for field in dataclasses.fields(kind):
            if setting_of(field) is None:
                how = f"{field.name} = {setting.__module__}.setting(default, help)"
                return f"its field {field.name} is no setting; write {how}"
            if field.default is MISSING:
                return f"its setting {field.name} has no default; give it one"
        is_lacking = getattr(kind, self._needed) is getattr(self.base, self._needed)
        return f"it has no {self._needed}; write one" if is_lacking else None


def stand_in(base: type, name: str, values: Mapping[str, Any]) -> Any:
    """A choice as it was recorded, without its code: its name and the values of its settings, and nothing else.

    Raises ValueError where they cannot be any.
    """
    fields = [(key, Any, setting(MISSING, "", refuse=lambda value: None)) for key in values]
    try:
        kind = dataclasses.make_dataclass("Recorded", fields, bases=(base,), namespace={"name": name}, frozen=True)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return kind(**values)
