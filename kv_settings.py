"""How a cache's setting is spelled: a name and knobs, as flags or in one word ("quantize_kv:window_size=32").

Nothing here needs torch: a mistake is told before that is imported. `kv_cache.make_policy` makes the cache itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.errors import UserError, nearest
from selective_kv.settings import CacheSettings, known_settings


def make_settings(name: str, knobs: Mapping[str, Any]) -> CacheSettings:
    """The settings of the cache called `name`, with values given as text or as they are: the cache itself where its
    class has been imported. Raises UserError.
    """
    known = known_settings()
    if name not in known:
        first = name.split()[0] if name.split() else name
        flags = "; in one word knobs stand behind a colon, as in quantize_kv:k_bits=4,v_bits=4"
        near = flags if first in known else nearest(name, known)
        raise UserError(f"no cache is called {name!r}: there are {', '.join(known)}{near}")
    fields = {f.name: f for f in dataclasses.fields(known[name])}
    values: dict[str, Any] = {}
    for knob, value in knobs.items():
        if knob not in fields:
            owners = sorted(n for n, c in known.items() if knob in {f.name for f in dataclasses.fields(c)})
            alike = [f"{field}={value}" for field in fields if field.endswith(f"_{knob}")]  # bits: k_bits, v_bits
            hint = f"; did you mean {','.join(alike)}?" if alike else nearest(knob, fields)
            raise UserError(
                f"--{knob} is a flag of {' and '.join(owners) or 'no cache'}, and the cache is {name}{hint}"
            )
        kind = type(fields[knob].default)
        try:
            values[knob] = _convert(value, kind)
        except ValueError:
            wanted = "true or false" if kind is bool else f"a value of type {kind.__name__}"
            raise UserError(f"--{knob} takes {wanted}, not {value!r}") from None
    try:
        return known[name](**values)
    except ValueError as error:
        raise UserError(str(error)) from None


def _convert(value: Any, kind: type) -> Any:
    if isinstance(value, kind):
        return value
    if kind is bool:
        if value not in ("true", "false"):
            raise ValueError(value)
        return value == "true"
    return kind(value)


def parse_settings(text: str) -> CacheSettings:
    """A cache setting in one word: "full", "quantize_kv:sink_size=16,window_size=32". Raises UserError."""
    name, _, rest = text.partition(":")
    knobs = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    return make_settings(name, knobs)


def format_policy(policy: CacheSettings) -> str:
    """What `parse_settings` reads."""
    values = [(f, getattr(policy, f.name)) for f in dataclasses.fields(policy)]
    shown = [(f.name, v) for f, v in values if v != f.default or not f.metadata.get("rare")]
    knobs = ",".join(f"{name}={str(v).lower()}" for name, v in shown)
    return f"{policy.name}:{knobs}" if knobs else policy.name
