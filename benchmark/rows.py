"""What a benchmark's rows say together: slopes over the contexts, and the table for people."""

from __future__ import annotations

import statistics
from typing import Any

from common.messages import size
from common.tables import table


def slope(rows: list[dict[str, Any]]) -> float:
    """Least-squares microseconds of a step per 1,000 tokens of context."""
    xs, ys = [r["context"] / 1e3 for r in rows], [r["step_ms"] * 1e3 for r in rows]
    return statistics.linear_regression(xs, ys).slope if len(set(xs)) > 1 else 0.0  # one context has no slope


def no_slower_from(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> int | None:
    """The smallest context measured from which on no step takes longer than the base's; None: at the largest it does.

    rows and base: one row a context, in the same order, contexts rising.
    """
    found = None
    for r, b in zip(reversed(rows), reversed(base), strict=True):
        if r["step_ms"] > b["step_ms"]:
            break
        found = r["context"]
    return found


def print_slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each cache's slope, of rows over one setting of weights, where a batch has several contexts: printed, and by the
    cache and batch it is of."""
    slopes = {}
    for batch in dict.fromkeys(r["batch"] for r in rows):
        by_cache: dict[str, list[dict[str, Any]]] = {}
        for r in sorted(rows, key=lambda r: r["context"]):
            if r["batch"] == batch:
                by_cache.setdefault(r["cache"], []).append(r)
        base, base_rows = next(iter(by_cache.items()))
        if len(base_rows) < 2:
            continue
        for name, found in by_cache.items():
            slopes[f"{name} batch {batch}"] = slope(found)
            start = no_slower_from(found, base_rows)
            than = "" if name == base else f"; no slower than {base} from {start} tokens on" if start else \
                f"; slower than {base} at {found[-1]['context']} tokens"  # fmt: skip
            of = "" if found[0]["weights"] == "16" else f"weights {found[0]['weights']}, "
            print(f"{of}batch {batch}, {name}: {slope(found):.2f} us per 1,000 tokens of context{than}")
    return slopes


def print_table(rows: list[dict[str, Any]]) -> None:
    """vs first: over the first row of the same batch and context, with whatever weights that one is."""
    several = len({r["weights"] for r in rows}) > 1
    header = [
        *(["weights"] if several else []),
        "cache",
        "batch",
        "context",
        "step ms",
        "min-max",
        "tok/s",
        "vs first",
        "cache",
        "bits K, V",
        "ceiling",
        "peak",
    ]
    if with_prefill := any(r["prefill_s"] for r in rows):
        header += ["first token, s", "of it storing"]
    cells = []
    for r in rows:
        base = next(b for b in rows if (b["batch"], b["context"]) == (r["batch"], r["context"]))
        told, bits = r["cache_bytes"] is not None, r.get("bits_per_element")
        cells.append([
            *([r["weights"]] if several else []), r["cache"], str(r["batch"]), str(r["context"]), f"{r['step_ms']:.3f}",
            f"{r['step_ms_min']:.2f}-{r['step_ms_max']:.2f}", f"{r['tokens_per_s']:.1f}",
            f"{base['step_ms'] / r['step_ms']:.3f}x" if base["cache"] == rows[0]["cache"] else "",
            size(r["cache_bytes"]) if told else "not told",
            f"{bits['keys']:.3g}, {bits['values']:.3g}" if bits else "", f"{r['share_of_ceiling']:.1%}" if told else "",
            size(r["peak_memory_bytes"]) if r["peak_memory_bytes"] else "",
        ])  # fmt: skip
        if with_prefill:
            store = "" if r["store_s"] is None else f"{r['store_s'] / r['prefill_s']:.2%}"
            cells[-1] += [f"{r['prefill_s']:.3f}", store]
    print(table(header, cells))
    for r in rows:
        if r.get("each_step"):
            each = r["each_step"]
            print(
                f"{r['cache']}, {r['batch']} x {r['context']}, {each['steps']} steps one by one: mean "
                f"{each['mean_over_median']:.4f}, longest {each['longest_over_median']:.3f} of the median"
            )
