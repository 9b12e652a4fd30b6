# SPDX-License-Identifier: Apache-2.0
"""Plan <-> JSON: the jail's wire format. Versioned; an unknown key, a missing key or a wrong type is refused. Pure."""

from __future__ import annotations

import json

from depriv import steps
from depriv.records import cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from depriv.records import Record


VERSION = 1
_STEPS = {kind.__name__: kind for kind in steps.ALL}


def encode(plan: steps.Plan) -> bytes:
    """Return the plan as one line of JSON."""
    data = {
        "version": VERSION,
        "domain": plan.domain,
        "domid": plan.domid,
        "restricted": plan.restricted,
        "shared": plan.shared,
        "steps": [as_json(step) for step in plan.steps],
        "after": [as_json(step) for step in plan.after],
    }
    return json.dumps(data, separators=(",", ":")).encode()


def decode(text: bytes) -> steps.Plan:
    """Return the plan in ``text``.

    Raises:
        ValueError: it is not exactly what ``encode`` writes; the message names the step and the field.
    """
    value: object = json.loads(text)
    want = {"version", "domain", "domid", "restricted", "shared", "steps", "after"}
    data = cast("dict[str, Any]", value)
    if not isinstance(value, dict) or data.keys() != want:
        raise ValueError(f"a plan has exactly the keys {', '.join(sorted(want))}")
    if type(data["version"]) is not int or data["version"] != VERSION:  # True is 1, too
        raise ValueError(f"plan of version {data['version']!r}: this jail speaks version {VERSION}")
    kinds = {"domain": str, "domid": int, "restricted": bool, "shared": bool, "steps": list, "after": list}
    for name, kind in kinds.items():
        if type(data[name]) is not kind:
            raise ValueError(f"plan: {name} is not of type {kind.__name__}")
    return steps.Plan(
        domain=data["domain"],
        domid=data["domid"],
        restricted=data["restricted"],
        shared=data["shared"],
        steps=tuple(_step(item) for item in data["steps"]),
        after=tuple(_step(item) for item in data["after"]),
    )


def as_json(record: Record) -> dict[str, Any]:
    """Return one step as a JSON object whose first key, ``step``, names it."""
    return {"step": type(record).__name__, **record.as_dict()}


def _step(item: object) -> Any:  # noqa: ANN401 (the JSON boundary)
    fields = cast("dict[str, Any]", item)
    if type(item) is not dict or type(fields.get("step")) is not str or fields["step"] not in _STEPS:
        raise ValueError(f"unknown step {repr(fields)[:80]}")
    kind = _STEPS[fields["step"]]
    values = {key: value for key, value in fields.items() if key != "step"}
    if values.keys() != kind.fields.keys():
        wrong = ", ".join(sorted(values.keys() ^ kind.fields.keys()))
        raise ValueError(f"step {kind.__name__}: unknown or missing: {wrong}")
    return kind(**{name: _value(f"{kind.__name__}.{name}", kind.fields[name], values[name]) for name in values})


def _value(place: str, annotation: str, value: Any) -> Any:  # noqa: ANN401 (the JSON boundary)
    """Return ``value`` as the annotation asks for, or raise: never convert."""
    scalars: dict[str, type] = {"int": int, "str": str, "bool": bool}
    if annotation in scalars:
        if type(value) is not scalars[annotation]:
            raise ValueError(f"{place}: want {annotation}, have {type(value).__name__}")
        return value
    inner = scalars[annotation.removeprefix("tuple[").removesuffix(", ...]")]
    items = cast("list[object]", value)
    if type(value) is not list or any(type(item) is not inner for item in items):
        raise ValueError(f"{place}: want {annotation}")
    return tuple(items)
