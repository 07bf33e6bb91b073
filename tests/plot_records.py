"""Small made-up result files for tests of pictures, and what a figure's own objects say was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.records import Record

QUANTISED, WINDOW = "quantize_kv:sink_size=16,window_size=32", "compress_kv:sink_size=16,window_size=32,positions=cache"


CACHES = ["full", QUANTISED, WINDOW]
MIB = 1 << 20


def score(cache: str, mib: float, kl: float, text: str = "a.txt", **others: Any) -> dict[str, Any]:
    by_position = {"0-256": {"kl": kl / 2}, "256-1024": {"kl": kl}}
    return {"text": text, "cache": cache, "cache_bytes": mib * MIB, "perplexity": 9.0 + kl, "same_top": 1.0, "kl": kl,
            "by_position": by_position, **others}  # fmt: skip


def scores(*rows: dict[str, Any], model: str = "m") -> Record:
    return Record(Path("scores.json"), "divergence", {"kind": "divergence", "model": model, "rows": list(rows)})


def keys(cache: str, share: float, lengths: tuple[str, ...] = ("1024", "2048"), **others: Any) -> dict[str, Any]:
    return {"cache": cache, "mean": share, "recalled": {n: {"0": share, "0.5": 1.0} for n in lengths}, **others}


def passkeys(*rows: dict[str, Any], path: str = "keys.json") -> Record:
    return Record(Path(path), "passkey", {"kind": "passkey", "model": "m", "rows": list(rows)})


def report(setting: str, **changes: Any) -> Record:
    fields = {"model": "m", "device": "cpu", "dtype": "float32", "batch": 1, "tokens_read": 100, "tokens_written": 28,
              "decode_tokens_per_s": 20.0, "cache_bytes": {"window": 30 * MIB, "sink": 10 * MIB}, "setting": setting,
              "weight_bytes": 5 * MIB, "peak_memory_bytes": 100 * MIB}  # fmt: skip
    return Record(Path("report.json"), "report", fields | changes)


def benchmark(*rows: dict[str, Any], model: str = "llama-3.1-8b", **changes: Any) -> Record:
    fields = {"model": model, "device": "NVIDIA H200", "dtype": "bfloat16", "rows": list(rows)}
    return Record(Path("benchmark.json"), "benchmark", fields | changes)


def step(cache: str, context: int, cache_bytes: int | None = None, batch: int = 1, **others: Any) -> dict[str, Any]:
    return {"cache": cache, "batch": batch, "context": context, "step_ms": context / 100, "cache_bytes": cache_bytes,
            **others}  # fmt: skip


def ticks(axis: Axes) -> tuple[list[str], list[str]]:
    return [t.get_text() for t in axis.get_xticklabels()], [t.get_text() for t in axis.get_yticklabels()]


def points(axis: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axis.lines if line.get_label() == label]
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def cells(figure: Figure) -> dict[str, dict[str, str]]:
    """A table's: row -> column -> text."""
    (table,) = figure.axes[0].tables
    found = {at: cell.get_text().get_text() for at, cell in table.get_celld().items()}
    return {name: {found[0, c]: text for (row, c), text in found.items() if row == r and c >= 0}
            for (r, column), name in found.items() if column == -1}  # fmt: skip
