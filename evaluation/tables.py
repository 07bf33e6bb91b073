"""evaluate.py's results as tables for people: rows as its records hold them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import printable
from common.messages import size
from common.tables import table

Row = dict[str, Any]


def name_of(row: Row) -> str:
    """The cache, and the weights where they are in fewer bits."""
    weights = row.get("weights", "16")
    return row["cache"] if weights == "16" else f"{row['cache']}, weights {weights}"


def held(row: Row) -> str:
    """A cache's bytes (a cache of the user's may not say), and bits an element of what it quantises."""
    bits = row.get("bits_per_quantised_element")
    quantised = f", {bits:.3g} bits" if bits else ""
    return size(row["cache_bytes"]) + quantised if row["cache_bytes"] else "not told"


def named(row: Row) -> str:
    """The text, as a terminal can be shown its name."""
    return printable(row["text"], 80)


def print_scores(rows: list[Row], kind: str) -> None:
    """A table a text, then the same by position in the window."""
    for _, group in itertools.groupby(rows, lambda r: r["text"]):
        found = list(group)
        first = found[0]
        entropy = f"; the text's entropy {first['nll']:.4f} nats a token" if first["sampled"] else ""
        print(f"{named(first)}: {first['windows']} windows, {first['tokens']} tokens{entropy}")
        if kind == "perplexity":
            header = ["cache", "perplexity", "rise", "+-", "bits/byte", "cache"]
            cells = [
                [name_of(r), f"{r['perplexity']:.4f}", f"{r['perplexity_rise']:+.4%}",
                 "" if r["perplexity_rise_error"] is None else f"{r['perplexity_rise_error']:.4%}",
                 f"{r['bits_per_byte']:.4f}" if r["bits_per_byte"] else "", held(r)]
                for r in found
            ]  # fmt: skip
        else:
            header = ["cache", "mean KL", "+-", "99th pct", "same top", "cache"]
            cells = [
                [name_of(r), f"{r['kl']:.2e}", "" if r["kl_error"] is None else f"{r['kl_error']:.1e}",
                 f"{r['kl_p99']:.1e}", f"{r['same_top']:.2%}", held(r)]
                for r in found
            ]  # fmt: skip
        print(table(header, cells))
        where = list(first["by_position"])
        value = "nll" if kind == "perplexity" else "kl"
        by = [[name_of(r), *(f"{r['by_position'][w][value]:.3g}" for w in where)] for r in found]
        print(table([f"{value} by position", *where], by))


def print_passkeys(rows: list[Row]) -> None:
    for _, group in itertools.groupby(rows, lambda r: r["text"]):
        found = list(group)
        first = found[0]
        print(f"{named(first)}: {first['trials']} keys a cache, {first['trials_per_cell']} a cell; 95% intervals")
        for r in found:
            interval = f"[{r['low']:.1%}, {r['high']:.1%}]"
            print(f"{name_of(r)}: {r['mean']:.1%} {interval} of keys recalled; {held(r)}")
            depths = list(next(iter(r["recalled"].values())))
            cells = [[length, *(f"{row[d]:.0%}" for d in depths)] for length, row in r["recalled"].items()]
            print(table(["length \\ depth", *(f"{float(d):.0%}" for d in depths)], cells, left=0))


def print_ruler(rows: list[Row]) -> None:
    """A table of each cache's scores by task and length, then one of all caches by length."""
    first = rows[0]
    print(f"RULER: {first['trials']} samples a cache, {first['trials_per_cell']} a cell; the share of answers given, "
          "95% intervals; kept: cells where the full cache scores above 20%")  # fmt: skip
    lengths = list(next(iter(first["scores"].values())))
    for r in rows:
        kept = "no cell is kept"
        if "kept" in r:
            kept = f"kept {r['kept']:.1%} [{r['kept_low']:.1%}, {r['kept_high']:.1%}], {rise(r)} to full"
        print(f"{name_of(r)}: {r['mean']:.1%} [{r['low']:.1%}, {r['high']:.1%}]; {kept}; {held(r)}")
        cells = [[task, *(f"{row[n]:.1%}" for n in lengths)] for task, row in r["scores"].items()]
        print(table(["task \\ tokens", *lengths], cells))
    by = [
        [
            name_of(r),
            *(f"{cell['kept']:.1%} ({rise(cell)})" if "kept" in cell else "" for cell in r["by_length"].values()),
        ]
        for r in rows
    ]
    print(table(["kept, beside full", *lengths], by))


def rise(row: Row) -> str:
    """How much is kept beyond what the full cache has, in points, with the standard error."""
    return f"{100 * row['kept_rise']:+.1f} +- {100 * row['kept_rise_error']:.1f}"


def print_summaries(rows: list[Row]) -> None:
    """A table of ROUGE-L by cache."""
    first = rows[0]
    print(f"{named(first)}: {first['documents']} documents, {first['cut']} cut to fit, {first['tokens']} tokens; "
          "ROUGE-L F by the package rouge_score, 95% intervals")  # fmt: skip
    cells = [
        [name_of(r), *(
            "{mean:{s}.4f} [{low:{s}.4f}, {high:{s}.4f}]".format(s=sign, **r[key]) if key in r else "no references"
            for key, sign in (("rouge_l", ""), ("rouge_l_rise", "+"), ("rouge_l_to_full", ""))
        ), held(r)]
        for r in rows
    ]  # fmt: skip
    print(table(["cache", "to references", "over the full cache", "to the full cache", "cache"], cells))


def print_speeds(reports: Sequence[Row]) -> None:
    """generate.py's reports, one setting a line."""
    first = reports[0]
    print(f"{printable(first['model'], 80)}, {first['dtype']} on {first['device']}, batch {first['batch']}, "
          f"{first['tokens_read']} tokens read, {first['tokens_written']} written")  # fmt: skip
    cells = [
        [r["setting"], f"{r['decode_tokens_per_s']:.2f}", f"{r['time_to_first_token_s']:.3f}",
         size(sum(r["cache_bytes"].values())) if r["cache_bytes"] else "not told", size(r["peak_memory_bytes"])]
        for r in reports
    ]  # fmt: skip
    print(table(["cache", "tokens/s", "first token, s", "cache", "peak"], cells))


PRINTERS: dict[str, Callable[[list[Row]], None]] = {
    "perplexity": lambda rows: print_scores(rows, "perplexity"),
    "divergence": lambda rows: print_scores(rows, "divergence"),
    "passkey": print_passkeys,
    "ruler": print_ruler,
    "rouge": print_summaries,
}
