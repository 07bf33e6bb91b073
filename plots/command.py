"""What scripts/plot.py draws: every picture that the records have data for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.errors import printable
from common.messages import say
from plots.flags import main
from plots.memory import draw_footprints
from plots.pictures import draw_frontier, draw_passkeys, draw_position, draw_tables, save, thousands
from plots.records import Record, short
from plots.ruler import draw_ruler
from plots.styles import plt, styles

__all__ = ["draw", "draw_speed", "main", "speed_figure"]


def slug(*words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def draw_speed(records: Sequence[dict[str, Any]], out: Path, name: str = "speed") -> None:
    """benchmark.py's picture of its own record."""
    save(speed_figure(records), out, name)


def speed_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """benchmark.py's steps against the context, and each cache's speed over the first one's, a row per batch."""
    rows = [row for record in records for row in record["rows"]]
    batches = list(dict.fromkeys(r["batch"] for r in rows))
    looks = styles(list(dict.fromkeys(r["cache"] for r in rows)))
    figure, axes = plt.subplots(len(batches), 2, figsize=(9.5, 2.9 * len(batches)), squeeze=False)
    for (latency, ratio), batch in zip(axes, batches, strict=True):
        caches: dict[str, dict[int, float]] = {}
        for r in rows:
            if r["batch"] == batch:
                caches.setdefault(r["cache"], {})[r["context"]] = r["step_ms"]
        base = next(iter(caches.values()))
        if len({c for steps in caches.values() for c in steps}) == 1:
            draw_bars(latency, ratio, caches, batch)
            continue
        for setting, steps in caches.items():
            contexts = sorted(steps)
            latency.plot(contexts, [steps[c] for c in contexts], label=short(setting), **looks[setting])
            shared = [c for c in contexts if c in base]
            ratio.plot(shared, [base[c] / steps[c] for c in shared], **looks[setting])
        for axis, label in ((latency, "ms a step"), (ratio, f"speed over {short(next(iter(caches)))}")):
            axis.set(xscale="log", xlabel=f"context, tokens; batch {batch}", ylabel=label)
            ticks = sorted({c for steps in caches.values() for c in steps})
            axis.set_xticks(ticks, [thousands(c) for c in ticks], fontsize=8)
            axis.minorticks_off()
            axis.grid(True, alpha=0.3)
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    handles, labels = max((pair[0].get_legend_handles_labels() for pair in axes), key=lambda found: len(found[0]))
    if handles:
        figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)
    figure.suptitle(measured(records[0]), fontsize=9)
    figure.tight_layout()
    return figure


def measured(record: dict[str, Any]) -> str:
    """What was timed, and where: the model, its dtype and weights, the device."""
    weights = str(record.get("weights", "16"))
    words = [str(record.get("dtype", "")), f"weights {weights}" if weights != "16" else ""]
    what = ", ".join(printable(word, 60) for word in (str(record["model"]), *words) if word)
    return f"A decode step of {what}, on {printable(str(record['device']), 60)}"


def draw_bars(latency: Any, ratio: Any, caches: dict[str, dict[int, float]], batch: int) -> None:
    """One context only: a bar per cache, the first at the top."""
    names, steps = [short(setting) for setting in caches], [next(iter(found.values())) for found in caches.values()]
    context = thousands(next(iter(next(iter(caches.values())))))
    for axis, values, label in ((latency, steps, "ms a step"), (ratio, [steps[0] / t for t in steps], "speed over")):
        axis.barh(names, values, color="#dddddd", edgecolor="black")
        for y, value in enumerate(values):
            axis.text(value, y, f" {value:.2f}", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(values))
        label += f" {names[0]}" if axis is ratio else ""
        axis.set_xlabel(f"{label}; {context} tokens of context, batch {batch}")
        axis.tick_params(axis="y", labelsize=8)


def draw_speeds(records: Sequence[Record]) -> dict[str, Figure]:
    """A picture per model and device, and per dtype where one device has measured several."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        if record.kind == "benchmark":
            where, dtype = (record.fields["model"], record.fields["device"]), record.fields.get("dtype", "")
            found.setdefault(where, {}).setdefault(dtype, []).append(record.fields)
    figures = {}
    for where, by_dtype in found.items():
        for dtype, group in by_dtype.items():
            name = slug("speed", *where, *([dtype] if len(by_dtype) > 1 else []))
            steps = [(row["cache"], row["batch"], row["context"]) for record in group for row in record["rows"]]
            if len(set(steps)) < len(steps):
                say(f"{name}: files repeat {len(steps) - len(set(steps))} measurements; the last of each is drawn")
            figures[name] = speed_figure(group)
    return figures


def draw(records: Sequence[Record]) -> dict[str, Figure]:
    """All pictures that the records have data for: name -> figure."""
    tables = draw_tables(records)
    figures = draw_speeds(records) | draw_footprints(records)
    figures |= {"table" if len(tables) == 1 else slug("table", model): table for model, table in tables.items()}
    frontier, position = draw_frontier(records), draw_position(records)
    if frontier and position:
        figures |= {"frontier": frontier, "position": position}
    else:
        say("no frontier and no position: `scripts/evaluate.py divergence --json FILE` makes their data")
    if any(r.kind == "passkey" for r in records):
        figures |= draw_passkeys(records)
    else:
        say("no passkeys: `scripts/evaluate.py passkey --json FILE` makes their data")
    if any(r.kind == "ruler" for r in records):
        figures["ruler"] = draw_ruler(records)
    return figures
