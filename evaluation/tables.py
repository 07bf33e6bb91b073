"""evaluate.py's results as tables for people: rows as its records hold them."""

from __future__ import annotations

import itertools
import math
from typing import Any

from cli.report import size


def name_of(row: dict[str, Any]) -> str:
    """The cache, and the weights where they are in fewer bits."""
    weights = row.get("weights", "16")
    return row["cache"] if weights == "16" else f"{row['cache']}, weights {weights}"


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
                print(f"{name_of(r):<58}{r['perplexity']:>11.4f}{r['perplexity_rise']:>+10.4%}{error:>9}"
                      f"{r['bits_per_byte'] or math.nan:>11.4f}{size(r['cache_bytes']):>12}")  # fmt: skip
        else:
            print(f"{'cache':<58}{'mean KL':>11}{'+-':>9}{'99th pct':>10}{'same top':>10}{'cache':>12}")
            for r in found:
                error = "" if r["kl_error"] is None else f"{r['kl_error']:.1e}"
                print(f"{name_of(r):<58}{r['kl']:>11.2e}{error:>9}{r['kl_p99']:>10.1e}{r['same_top']:>10.2%}"
                      f"{size(r['cache_bytes']):>12}")  # fmt: skip
        where = list(first["by_position"])
        value = "nll" if kind == "perplexity" else "kl"
        print(f"{f'{value} by position':<58}" + " ".join(f"{w:>11}" for w in where))
        for r in found:
            print(f"{name_of(r):<58}" + " ".join(f"{r['by_position'][w][value]:>11.3g}" for w in where))


def print_passkeys(rows: list[dict[str, Any]]) -> None:
    print(f"{rows[0]['text']}: {rows[0]['trials']} keys a cache, {rows[0]['trials_per_cell']} a cell; 95% intervals")
    for r in rows:
        interval = f"[{r['low']:.1%}, {r['high']:.1%}]"
        print(f"{r['cache']}: {r['mean']:.1%} {interval} of keys recalled; {size(r['cache_bytes'])}")
        depths = list(next(iter(r["recalled"].values())))
        print(f"  {'length':>8} " + " ".join(f"{float(d):>5.0%}" for d in depths) + "   depth")
        for length, row in r["recalled"].items():
            print(f"  {length:>8} " + " ".join(f"{row[d]:>5.0%}" for d in depths))


def print_ruler(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"RULER: {first['trials']} samples a cache, {first['trials_per_cell']} a cell; the share of answers given, "
          "95% intervals; kept: cells where the full cache scores above 20%")  # fmt: skip
    lengths = list(next(iter(first["scores"].values())))
    for r in rows:
        kept = "no cell is kept"
        if "kept" in r:
            kept = f"kept {r['kept']:.1%} [{r['kept_low']:.1%}, {r['kept_high']:.1%}]"
            kept += f", {r['kept_rise']:+.1%} +- {r['kept_rise_error']:.1%} to full"
        print(f"{r['cache']}: {r['mean']:.1%} [{r['low']:.1%}, {r['high']:.1%}]; {kept}; {size(r['cache_bytes'])}")
        print(f"  {'task':<16}" + " ".join(f"{n:>7}" for n in lengths) + "   tokens")
        for task, row in r["scores"].items():
            print(f"  {task:<16}" + " ".join(f"{row[n]:>7.1%}" for n in lengths))


def print_summaries(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"{first['text']}: {first['documents']} documents, {first['cut']} cut to fit, {first['tokens']} tokens; "
          "ROUGE-L F by the package rouge_score, 95% intervals")  # fmt: skip
    print(f"{'cache':<58}{'to references':>26}{'over the full cache':>28}{'to the full cache':>26}{'cache':>12}")
    for r in rows:
        cells = [
            "{mean:{s}.4f} [{low:{s}.4f}, {high:{s}.4f}]".format(s=sign, **r[key]) if key in r else "no references"
            for key, sign in (("rouge_l", ""), ("rouge_l_rise", "+"), ("rouge_l_to_full", ""))
        ]
        print(f"{r['cache']:<58}{cells[0]:>26}{cells[1]:>28}{cells[2]:>26}{size(r['cache_bytes']):>12}")
