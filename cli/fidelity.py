"""Whether a cache's format suits a checkpoint: measured on the prompt's own keys, and told before the text comes."""

from __future__ import annotations

import math
from typing import Any

from common.messages import say
from engine import Engine
from selective_kv import KVCache
from selective_kv.score_error import BOUND
from selective_kv.settings import BITS


class KeyCheck:
    """Measures the error of a prompt's stored keys, once it has been read. Call `watch` with an engine whose hook calls
    `hook`.

    report: the fields for the JSON report, after an event; empty for a cache that stores keys in full precision.
    """

    def __init__(self, policy: KVCache) -> None:
        seen = policy.sees()
        self.bits = None if seen is None or seen.formats is None else seen.formats[0].bits
        self.engine: Engine | None = None
        self.report: dict[str, Any] = {}

    def watch(self, engine: Engine) -> None:
        self.engine = engine

    def hook(self, event: str) -> None:
        if event != "read" or self.bits is None or self.engine is None or self.report.get("layers"):
            return
        layers = self._measured(None)
        self.report = {"layers": layers, "bound": BOUND, "k_bits": self.bits}
        if layers is not None and max(layers) > BOUND:
            say(self._warning(layers))

    def _measured(self, k_bits: int | None) -> list[float] | None:
        """The error of a layer is the root mean square over the ranks that measured one."""
        assert self.engine is not None
        mine, ranks = self.engine.cache.score_errors(k_bits), self.engine.ranks
        known = [one for one in ([mine] if ranks is None else ranks.from_all(mine)) if one is not None]
        layers = [math.sqrt(sum(x * x for x in xs) / len(xs)) for xs in zip(*known, strict=True)]
        return layers if layers and all(map(math.isfinite, layers)) else None  # what is not finite has its own error

    def _warning(self, layers: list[float]) -> str:
        off = [i for i, error in enumerate(layers) if error > BOUND]
        worst = max(off, key=layers.__getitem__)
        line = (
            f"warning: {self.bits}-bit keys are a bad choice for this checkpoint: in {len(off)} of {len(layers)} layers"
            f" scores are off by more than {BOUND:g}, and weights by a factor of e (layer {worst}: {layers[worst]:.2g})"
        )
        for bits in sorted(bits for bits in BITS if bits > (self.bits or 0)):
            found = self._measured(bits)
            if found is not None and max(found) <= BOUND:
                return f"{line}; with --k_bits {bits} they would be off by {max(found):.2g} at most"
        return f"{line}; no number of bits suits it: use the full cache"


def fidelity_line(report: dict[str, Any]) -> list[str]:
    """The report's line on the bits that a cache stores, scales included, and on their error. The error is there only
    if this run read a prompt: that of a saved cache was reported when it was saved."""
    bits, errors = report.get("bits_per_element"), report.get("score_error")
    if not bits:
        return []
    line = f"quantised: {bits['keys']:.3g} bits an element of keys, {bits['values']:.3g} of values, scales included"
    if not errors:
        return [line]
    if "quantised" not in report["cache_bytes"]:
        return [f"{line}; of this run nothing: so short a run lets nothing leave the window"]
    if not errors["layers"]:
        return [f"{line}; their error is not known: measuring it takes 16 tokens that are read and still exact"]
    worst = max(range(len(errors["layers"])), key=errors["layers"].__getitem__)
    return [
        f"{line}; the last keys' scores are off by {errors['layers'][worst]:.2g} at most (layer {worst}; more than "
        f"{errors['bound']:g} is bad)"
    ]
