"""The caches' settings, apart from the caches themselves: names, knobs with their help, and what values they may have.

Nothing here needs torch, so that a command line can offer and check the knobs at once. A cache class is one of these
and a storage: `class SelectiveCache(SelectiveSettings, RegionCache)`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

BITS = (8, 4, 3, 2)  # of what is quantised
MOST = 2**31 - 1  # of a knob: sizes of tensors are made of it


def knob(default: Any, help: str, least: int | None = None, choices: Sequence[Any] = (), rare: bool = False) -> Any:
    """A dataclass field that becomes a command-line flag. least: the smallest value allowed; rare: a setting's
    name leaves it out where it has its default."""
    return field(default=default, metadata={"help": help, "least": least, "choices": tuple(choices), "rare": rare})


@dataclass
class CacheSettings:
    """A cache's knobs: its fields, made by `knob`. name: how it is found; "": it is not to be."""

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least")
            if f.metadata.get("choices") and value not in f.metadata["choices"]:
                raise ValueError(f"--{f.name} must be one of {', '.join(map(str, f.metadata['choices']))}, not {value}")
            kind = type(f.default)
            if kind is int and hasattr(value, "__index__") and not isinstance(value, bool):  # numpy's, for one
                value = operator.index(value)
                setattr(self, f.name, value)
            if kind in (bool, int, str) and type(value) is not kind:  # a library's caller may hand over anything
                raise ValueError(f"--{f.name} takes a value of type {kind.__name__}, not {value!r}")
            if least is not None and value < least:
                raise ValueError(f"--{f.name} must be at least {least}, not {value}")
            if isinstance(value, int) and value > MOST:
                raise ValueError(f"--{f.name} must be at most {MOST:,}, not {value}")


@dataclass
class FullSettings(CacheSettings):
    """Keep every token in full precision: all that the model itself can look back to."""

    name: ClassVar[str] = "full"


@dataclass
class SinkWindowSettings(CacheSettings):
    """Keep the first tokens and the most recent ones; drop the middle.

    StreamingLLM (Xiao et al. 2023, arXiv:2309.17453). Constant memory and speed, however long the text;
    what left the window is forgotten.
    """

    name: ClassVar[str] = "compress_kv"

    sink_size: int = knob(16, "first tokens kept for ever: a few keep the model stable, more cost little", 0)
    window_size: int = knob(32, "most recent tokens kept: memory grows with it, and what the model remembers", 1)
    positions: str = knob(
        "cache",
        "'cache' counts positions within the cache, so that text can run past the trained context; "
        "'original' keeps each token's own position",
        choices=("cache", "original"),
    )


@dataclass
class SelectiveSettings(CacheSettings):
    """Keep the first and the most recent tokens in full precision and everything between them in 8 to 2 bits.

    Tokens leave the window 128 at a time, as a tile: between window_size and window_size + 127 of them are exact.
    """

    name: ClassVar[str] = "quantize_kv"

    sink_size: int = knob(16, "first tokens kept in full precision: they draw much attention and cost little", 0)
    window_size: int = knob(
        32,
        "most recent tokens kept in full precision: a larger one is closer to the full cache, and larger",
        1,
    )

    k_bits: int = knob(
        8,
        "bits of the keys between them: keys are the more sensitive; 2 bits are for experiments",
        choices=BITS,
        rare=True,
    )  # fmt: skip
    v_bits: int = knob(8, "bits of the values between them", choices=BITS, rare=True)
    rotate: bool = knob(
        True,
        "rotate keys, and values of fewer than 8 bits, by a Hadamard matrix, which spreads outliers: costs no memory",
        rare=True,
    )


def known_settings() -> dict[str, type[CacheSettings]]:
    """Every cache's knobs by its name. Where a cache class has been imported, a user's own included, that is it."""
    found: dict[str, type[CacheSettings]] = {}
    waiting: list[type[CacheSettings]] = [CacheSettings]
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if cls.name:
            found[cls.name] = cls
    return found
