"""Where memory goes, as pictures: bars of weights, cache and the rest, and cache bytes against the context.

Bytes come from the files: generate.py's reports (bytes really allocated, and the peak) and benchmark.py's rows
(the cache's bytes at the context, and a peak per cache on a GPU). Lines are the plan of the model's shape, where the
model is one of model.CONFIGS or the bundled one. Without such files both pictures are Llama 3.1 8B's plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

import kv_cache
import selective_kv
from checkpoint import DTYPES, find_demo, open_checkpoint
from cli.plan import make_plan, weight_bytes
from common.errors import UserError, printable
from common.messages import say
from kv_cache import parse_policy
from model import CONFIGS, Config
from plots.pictures import MIB, thousands
from plots.records import Record, Row, order, short
from plots.styles import plt, styles
from selective_kv import Shape

PLANNED = "llama-3.1-8b"
SETTINGS = ["full", "compress_kv:sink_size=16,window_size=32,positions=cache",
            "quantize_kv:sink_size=16,window_size=32"]  # fmt: skip
GREYS = {"weights": ("#dddddd", ""), "cache": ("#777777", "///"), "rest": ("#ffffff", "...")}
MOST_CONTEXTS = 4  # of the bars: the largest


class Series(NamedTuple):
    """What may stand in one panel. source: the program."""

    model: str
    device: str
    dtype: str
    batch: int
    source: str


@dataclass(frozen=True)
class Held:
    """Bytes of a setting at a context; None: not known."""

    setting: str
    context: int
    cache: int
    weights: int | None = None
    peak: int | None = None

    def parts(self) -> dict[str, int]:
        known = (self.weights or 0) + self.cache
        found = {"weights": self.weights or 0, "cache": self.cache}
        return found if self.peak is None else found | {"rest": max(0, self.peak - known)}


def config_of(model: str) -> Config | None:
    """The shape of a model by the name that records have; None: it is not known here."""
    if model in CONFIGS:
        return CONFIGS[model]
    if model != "demo":
        return None
    try:
        return open_checkpoint(find_demo()).config
    except UserError as error:
        say(f"no plan of the bundled model: {error}")
        return None


def held_by(records: Iterable[Record]) -> dict[Series, list[Held]]:
    """Every measured figure of the files, by panel, contexts rising."""
    found: dict[Series, dict[tuple[int, str], Held]] = {}
    for record in records:
        if record.kind not in ("report", "benchmark"):
            continue
        config, fields = config_of(record.fields["model"]), record.fields
        made = [of_report(fields, config)] if record.kind == "report" else of_benchmark(record.rows, fields, config)
        source = "generate.py" if record.kind == "report" else "benchmark.py"
        for batch, held in made:
            series = Series(fields["model"], fields["device"], fields.get("dtype", ""), batch, source)
            if held.cache:  # a cache that does not say, or a peer's
                found.setdefault(series, {})[held.context, held.setting] = held
    return {series: [by[k] for k in sorted(by, key=lambda k: (k[0], order(k[1])))] for series, by in found.items()}


def of_report(r: Row, config: Config | None) -> tuple[int, Held]:
    """The context of a report is its cache's capacity: what is allocated for it."""
    tokens = (r["tokens_read"] + r["tokens_written"]) // r["batch"]
    if config and r.get("full_cache_bytes") and r["dtype"] in DTYPES:
        per_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * DTYPES[r["dtype"]].itemsize
        tokens = int(r["full_cache_bytes"]) // (per_token * r["batch"])
    cache = sum(r["cache_bytes"].values())
    return r["batch"], Held(r["setting"], max(1, tokens), cache, r["weight_bytes"], r["peak_memory_bytes"])


def of_benchmark(rows: Sequence[Row], fields: Row, config: Config | None) -> list[tuple[int, Held]]:
    """A peak that all caches of a context share is the process's, not a cache's: it is not taken."""
    dtype = DTYPES.get(fields.get("dtype", ""))
    weights = weight_bytes(config, dtype) if config and dtype else None
    peaks: dict[tuple[int, int], list[Any]] = {}
    for r in rows:
        peaks.setdefault((r["batch"], r["context"]), []).append(r.get("peak_memory_bytes"))
    made = []
    for r in rows:
        same = peaks[r["batch"], r["context"]]
        peak = r.get("peak_memory_bytes") if len(same) == 1 or len(set(same)) > 1 else None
        peak = peak if weights else None  # what the rest is beside
        made.append((r["batch"], Held(r["cache"], r["context"], r.get("cache_bytes") or 0, weights, peak)))
    return made


def planned(model: str, contexts: Sequence[int]) -> tuple[Series, list[Held]]:
    """What the plan says of a named model in bfloat16, a prompt read in chunks of 8,192 tokens."""
    config, found = CONFIGS[model], []
    for context in contexts:
        for setting in SETTINGS:
            plan = make_plan(config, parse_policy(setting), shape(config, context, torch.bfloat16), 8192)
            found.append(Held(setting, context, sum(plan.cache.values()), plan.weights, plan.total))
    return Series(model, "", "bfloat16", 1, "planned"), found


def shape(config: Config, context: int, dtype: torch.dtype, batch: int = 1) -> Shape:
    return Shape(batch, config.n_kv_head, config.head_dim, context, dtype, torch.device("meta"))


def draw_footprints(records: Iterable[Record]) -> dict[str, Figure]:
    """Both pictures of every model and device; the plan's where there is none."""
    by_place: dict[str, dict[Series, list[Held]]] = {}
    for series, held in held_by(records).items():
        name = re.sub(r"[^a-z0-9]+", "-", f"{series.model} {series.device}".lower()).strip("-")
        by_place.setdefault(name, {})[series] = held
    if not by_place:
        series, held = planned(PLANNED, [8192, 32768, 131072])
        return {"memory": draw_memory({series: held}), "cache": draw_cache({series: []})}
    made = {f"memory-{name}": draw_memory(panels) for name, panels in by_place.items()}
    return made | {f"cache-{name}": draw_cache(panels) for name, panels in by_place.items()}


def title(series: Series) -> str:
    words = [series.model, series.dtype, series.device, f"batch {series.batch}", series.source]
    return ", ".join(printable(word, 60) for word in words if word)


# --- Bars -------------------------------------------------------------------------------------------


def draw_memory(panels: dict[Series, list[Held]]) -> Figure:
    """A panel per batch and program; a bar per context and cache, its total at its end."""
    shown = {}
    for series, held in panels.items():
        contexts = sorted({h.context for h in held})[-MOST_CONTEXTS:]
        shown[series] = [h for h in held if h.context in contexts]
    heights = [len(held) + 0.6 * len({h.context for h in held}) for held in shown.values()]  # one a bar, and gaps
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(8, 0.21 * sum(heights) + 0.8 * len(shown)), squeeze=False, height_ratios=heights
    )
    for axis, (series, held) in zip(axes[:, 0], shown.items(), strict=True):
        draw_parts(axis, held)
        axis.set_title(title(series), fontsize=9)
        if all(h.peak is None for h in held):
            axis.set_xlabel(axis.get_xlabel() + "; the files have no peak per cache", fontsize=9)
        elif series.source == "generate.py" and series.device == "cpu":
            axis.set_xlabel(
                axis.get_xlabel() + "; the rest is all else of the process, Python and PyTorch too", fontsize=9
            )
    figure.tight_layout()
    return figure


def draw_parts(axis: Axes, held: Sequence[Held]) -> None:
    """Stacked bars, a group per context, the smallest at the top."""
    unit, divisor = ("GiB", 1 << 30) if max(sum(h.parts().values()) for h in held) >= 1 << 30 else ("MiB", 1 << 20)
    places, labels, at, last = [], [], 0.0, held[0].context
    for h in held:
        at += 1.0 if h.context == last else 1.6
        last = h.context
        places.append(at)
        labels.append(f"{short(h.setting)}, {thousands(h.context)}")
    base = [0.0] * len(held)
    for name, (grey, hatch) in GREYS.items():
        sizes = [h.parts().get(name, 0) / divisor for h in held]
        if any(sizes):
            axis.barh(places, sizes, left=base, color=grey, hatch=hatch, edgecolor="black", linewidth=0.8, label=name)
        base = [a + b for a, b in zip(base, sizes, strict=True)]
    for place, total in zip(places, base, strict=True):
        axis.text(total, place, f" {total:.1f}", va="center", fontsize=8)
    axis.set_yticks(places, labels, fontsize=8)
    axis.set_ylim(places[-1] + 0.8, places[0] - 0.8)
    axis.set_xlim(0, 1.12 * max(base))
    axis.set_xlabel(unit, fontsize=9)
    axis.set_ylabel("cache, tokens of context", fontsize=9)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=8)


# --- Lines ------------------------------------------------------------------------------------------


def draw_cache(panels: dict[Series, list[Held]]) -> Figure:
    """A panel per batch: the files' bytes as points, the plan as lines, a look per setting."""
    batches = sorted({(s.batch, s.dtype) for s in panels})
    settings = sorted({h.setting for held in panels.values() for h in held}, key=order) or SETTINGS
    figure, axes = plt.subplots(1, len(batches), figsize=(4.6 * len(batches), 3.6), squeeze=False, sharey=True)
    for axis, (batch, dtype) in zip(axes[0], batches, strict=True):
        here = {s: held for s, held in panels.items() if (s.batch, s.dtype) == (batch, dtype)}
        draw_bytes(axis, here, settings)
        first = next(iter(here))
        sources = ", ".join(s.source for s in here)
        axis.set_title(title(first._replace(source=sources)), fontsize=8)
    figure.tight_layout()
    measured = any(panels.values())
    looks = {s: look | ({} if measured else {"marker": ""}) for s, look in styles(settings).items()}
    handles = [Line2D([], [], label=short(s), linewidth=1, **looks[s]) for s in settings]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 0.98), fontsize=8, title_fontsize=8,
                  title="points: in the files; lines: planned" if measured else "planned")  # fmt: skip
    return figure


def draw_bytes(axis: Axes, panels: dict[Series, list[Held]], settings: Sequence[str]) -> None:
    held = [h for found in panels.values() for h in found]
    series, config = next(iter(panels)), config_of(next(iter(panels)).model)
    contexts = sorted({h.context for h in held}) or [2**i for i in range(6, 18)]
    least, most = contexts[0] / 2, contexts[-1] * (2 if len(contexts) == 1 else 1)
    grid = [max(1, round(least * (most / least) ** (i / 40))) for i in range(41)]
    looks = {s: look | {"linewidth": 1} for s, look in styles(settings).items()}
    for setting in settings:
        points = [(h.context, h.cache / MIB) for h in held if h.setting == setting]
        style = looks[setting]
        if points or not held:
            sizes = plan_line(config, setting, grid, DTYPES.get(series.dtype), series.batch)
            axis.plot(grid[: len(sizes)], sizes, label=f"{short(setting)}, planned", **style | {"marker": ""})
        if points:
            axis.plot(*zip(*points, strict=True), label=short(setting), **style | {"linestyle": ""})
    axis.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="cache, MiB")
    ticks = [c for c, after in zip(contexts, [*contexts[1:], math.inf], strict=True) if after > 1.2 * c]
    axis.set_xticks(ticks, [thousands(c) for c in ticks], fontsize=8)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(True, which="major", alpha=0.3)


def plan_line(
    config: Config | None, setting: str, contexts: Sequence[int], dtype: torch.dtype | None, batch: int
) -> list[float]:
    """MiB by context; none where the model or the cache is not known here."""
    if config is None or dtype is None or setting.partition(":")[0] not in selective_kv.caches():
        return []
    policy = parse_policy(setting)
    return [sum(kv_cache.plan(policy, config.n_layer, shape(config, n, dtype, batch)).values()) / MIB
            for n in contexts]  # fmt: skip
