# SPDX-License-Identifier: Apache-2.0
"""Frozen records: what a plan, a configuration and a report are made of.

A stand-in for ``@dataclass(frozen=True, kw_only=True)`` that type checkers treat the same way (PEP 681). It exists for
one reason: ``dataclasses`` and ``typing`` cost more to import, and 25 of its classes more to make, than the whole of
the jail's work, and both are on the path of every ``create`` (docs/adr/0006).
"""

from __future__ import annotations

__all__ = ["Record", "cast"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, cast, dataclass_transform
else:

    def cast(_kind, value):  # noqa: ANN001, ANN201, D103 (typing.cast without typing)
        return value

    def dataclass_transform(**_options):  # noqa: ANN003, ANN202 (seen by no type checker)
        return lambda cls: cls


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Record:
    """Base of every frozen record: keyword arguments only, no attribute ever changes, equality by value.

    A subclass lists its fields as annotations; a class attribute of the same name is the default. It may define
    ``validate()``, which raises ``ValueError`` when the values make no sense together.
    """

    fields: ClassVar[dict[str, str]] = {}  # name -> annotation as written (annotations are strings here)

    def __init_subclass__(cls) -> None:
        """Collect the fields of the subclass, those of its bases first."""
        own = {
            name: kind
            for name, kind in cls.__dict__.get("__annotations__", {}).items()  # noqa: RUF063 (inspect costs 8 ms)
            if not str(kind).startswith("ClassVar")
        }
        cls.fields = {**cls.fields, **own}

    def __init__(self, **values: Any) -> None:  # noqa: ANN401 (each field has its own type)
        """Set every field; an unknown or missing name is a ``TypeError``."""
        kind = type(self)
        for name in kind.fields:
            if name not in values:
                if not hasattr(kind, name):
                    raise TypeError(f"{kind.__name__}: {name} is missing")
                values[name] = getattr(kind, name)
        if len(values) != len(kind.fields):
            unknown = ", ".join(sorted(values.keys() - kind.fields.keys()))
            raise TypeError(f"{kind.__name__} has no field {unknown}")
        self.__dict__.update(values)
        self.validate()

    def validate(self) -> None:
        """Raise ``ValueError`` if the values make no sense together."""

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: records are frozen."""
        raise AttributeError(f"{type(self).__name__} is frozen: cannot set {name}")

    def __delattr__(self, name: str) -> None:
        """Refuse: records are frozen."""
        raise AttributeError(f"{type(self).__name__} is frozen: cannot delete {name}")

    def __eq__(self, other: object) -> bool:
        """Two records are equal if they are of one class and all their fields are equal."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        """Hash by value."""
        # In the order of declaration: that of __dict__ is the caller's, defaults last.
        return hash((type(self), *(self.__dict__[name] for name in type(self).fields)))

    def __repr__(self) -> str:
        """Return the expression that makes this record."""
        inner = ", ".join(f"{name}={self.__dict__[name]!r}" for name in type(self).fields)
        return f"{type(self).__name__}({inner})"

    def replace(self, **changes: Any) -> Self:  # noqa: ANN401 (each field has its own type)
        """Return a copy with some fields changed."""
        return type(self)(**{**self.__dict__, **changes})

    def as_dict(self) -> dict[str, Any]:
        """Return name -> value in the order of declaration; nested records stay records."""
        return {name: self.__dict__[name] for name in type(self).fields}
