"""evaluate.py's results as tables for people: rows as its records hold them."""

from __future__ import annotations

import itertools
import math
from typing import Any

from report import size


def print_scores(rows: list[dict[str, Any]], kind: str) -> None:
    for name, group in itertools.groupby(rows, lambda r: r["text"]):
        found = list(group)
        first = found[0]
        entropy = f"; the text's entropy {first['nll']:.4f} nats a token" if first["sampled"] else ""
        print(f"{name}: {first['windows']} windows, {first['tokens']} tokens{entropy}")
        if kind == "perplexity":
            print(f"{'cache':<58}{'perplexity':>11}{'rise':>10}{'+-':>9}{'bits/byte':>11}{'cache':>12}")
            for r in found:
                error = "" if r["perplexity_rise_error"] is None else f"{r['perplexity_rise_error']:.4%}"
                print(f"{r['cache']:<58}{r['perplexity']:>11.4f}{r['perplexity_rise']:>+10.4%}{error:>9}"
                      f"{r['bits_per_byte'] or math.nan:>11.4f}{size(r['cache_bytes']):>12}")  # fmt: skip
        else:
            print(f"{'cache':<58}{'mean KL':>11}{'+-':>9}{'99th pct':>10}{'same top':>10}{'cache':>12}")
            for r in found:
                error = "" if r["kl_error"] is None else f"{r['kl_error']:.1e}"
                print(f"{r['cache']:<58}{r['kl']:>11.2e}{error:>9}{r['kl_p99']:>10.1e}{r['same_top']:>10.2%}"
                      f"{size(r['cache_bytes']):>12}")  # fmt: skip
        where = list(first["by_position"])
        value = "nll" if kind == "perplexity" else "kl"
        print(f"  {value} by position: " + "  ".join(where))
        for r in found:
            print(f"  {r['cache']:<56}" + "  ".join(f"{r['by_position'][w][value]:.3g}" for w in where))


def print_passkeys(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        print(
            f"{r['cache']}: {r['mean']:.1%} of keys recalled, {r['trials_per_cell']} a cell; {size(r['cache_bytes'])}"
        )
        depths = list(next(iter(r["recalled"].values())))
        print(f"  {'length':>8} " + " ".join(f"{float(d):>5.0%}" for d in depths) + "   depth")
        for length, row in r["recalled"].items():
            print(f"  {length:>8} " + " ".join(f"{row[d]:>5.0%}" for d in depths))


def print_summaries(rows: list[dict[str, Any]]) -> None:
    print(f"{rows[0]['text']}: {rows[0]['documents']} documents; ROUGE-L F by the package rouge_score, 95% intervals")
    print(f"{'cache':<58}{'to references':>24}{'to the full cache':>24}{'cache':>12}")
    for r in rows:
        shown = [f"{x['mean']:.4f} [{x['low']:.4f}, {x['high']:.4f}]" for x in (r["rouge_l"], r["rouge_l_to_full"])]
        print(f"{r['cache']:<58}{shown[0]:>24}{shown[1]:>24}{size(r['cache_bytes']):>12}")
