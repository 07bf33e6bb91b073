"""Pictures from result files alone: python scripts/plot.py results/*.json outputs/frontier/*.json --out assets

Each picture is made where its data is among the files, as PNG and SVG, and reads in black and white:

  memory      weights, cache and the rest as the context grows, per cache   (the plan; no file needed)
  cache       cache bytes against context: allocated (points), planned (lines)         (no file needed)
  table       perplexity, divergence, passkeys, ROUGE-L, tokens/s and memory per cache               any of them
  frontier    mean KL against cache bytes                            evaluate.py divergence or perplexity
  position    mean KL by position in the window                      evaluate.py divergence or perplexity
  speed-...   a decode step against the context, and over the first cache's; per model and device    benchmark.py
  passkeys    share recalled by length and depth, a map per cache                     evaluate.py passkey
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import kv_cache
from console import require_writable
from kv_cache import FullCache, KVCache, ModelCache, SelectiveCache, Shape, SinkWindowCache
from model import CONFIGS, Config
from options import Parser, format_policy, make_policy
from report import make_plan
from tokenizer import UserError

LOOKS = {  # grey, line, marker, hatch: told apart without colour
    "full": ("#222222", "-", "o", ""),
    "compress_kv": ("#888888", ":", "s", "///"),
    "quantize_kv": ("#555555", "--", "^", "..."),
}
POLICIES: list[KVCache] = [FullCache(), SinkWindowCache(16, 32), SelectiveCache(16, 32)]
GIB = 1 << 30


def look(setting: str) -> tuple[str, str, str, str]:
    return LOOKS.get(setting.partition(":")[0], ("#000000", "-.", "d", "xx"))


def short(setting: str) -> str:
    """ "quantize_kv:sink_size=16,window_size=32" -> "quantize_kv 16/32"."""
    _, _, knobs = setting.partition(":")
    values = dict(knob.split("=") for knob in knobs.split(",") if knob)
    sizes = [values[k] for k in ("sink_size", "window_size") if k in values]
    return " ".join([family(setting), "/".join(sizes)]).strip()


def family(setting: str) -> str:
    """The cache's name, and its bits where they are not 8: "quantize_kv K8V4"."""
    name, _, knobs = setting.partition(":")
    values = dict(knob.split("=") for knob in knobs.split(",") if knob)
    bits = [values.get("k_bits", "8"), values.get("v_bits", "8")]
    return name if bits == ["8", "8"] else f"{name} K{bits[0]}V{bits[1]}"


def in_order(by_setting: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The full cache first, then by cache, bits (most first) and sizes."""

    def key(setting: str) -> tuple[Any, ...]:
        name, *bits = family(setting).split(" ")
        sizes = [int(n) for n in re.findall(r"(?:sink|window)_size=(\d+)", setting)]
        return name != "full", name, bits and [-int(n) for n in re.findall(r"\d", bits[0])], sizes, setting

    return [by_setting[setting] for setting in sorted(by_setting, key=key)]


def setting_of(cache: dict[str, Any]) -> str:
    """The setting, as evaluate.py writes it, of the cache in a report of generate.py, which lists every knob."""
    knobs = {name: value for name, value in cache.items() if name != "name"}
    if cache["name"] in kv_cache.caches():
        return format_policy(make_policy(cache["name"], knobs))
    return ":".join([cache["name"], ",".join(f"{k}={v}" for k, v in knobs.items())]).strip(":")


def save(figure: Any, out: Path, name: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(
            out / f"{name}.{ending}", dpi=110, bbox_inches="tight", metadata={"Date": None} if ending == "svg" else None
        )
    plt.close(figure)
    print(f"{out / name}.png, .svg")


def shape(config: Config, context: int, device: str = "meta") -> Shape:
    return Shape(1, config.n_kv_head, config.head_dim, context, torch.bfloat16, torch.device(device))


def draw_memory(out: Path) -> None:
    """Where memory goes: Llama 3.1 8B in bfloat16, one sequence, by the plan."""
    config, contexts = CONFIGS["llama-3.1-8b"], [8192, 32768, 131072]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True)
    for axis, policy in zip(axes, POLICIES, strict=True):
        plans = [make_plan(config, policy, shape(config, n), 8192) for n in contexts]
        parts = [
            ("weights", [p.weights / GIB for p in plans], "#dddddd", ""),
            ("cache", [sum(p.cache.values()) / GIB for p in plans], "#777777", "///"),
            ("activations", [p.activations / GIB for p in plans], "#ffffff", "..."),
        ]
        base = [0.0] * len(plans)
        for name, sizes, grey, hatch in parts:
            axis.bar(range(len(plans)), sizes, bottom=base, color=grey, hatch=hatch, edgecolor="black", label=name)
            base = [a + b for a, b in zip(base, sizes, strict=True)]
        for i, total in enumerate(base):
            axis.text(i, total + 0.4, f"{total:.1f}", ha="center", fontsize=9)
        axis.set_xticks(range(len(plans)), [f"{n // 1024}k" for n in contexts])
        axis.set_title(policy.name)
        axis.set_xlabel("context")
        axis.set_ylim(0, 38)
    axes[0].set_ylabel("GiB, Llama 3.1 8B in bfloat16")
    axes[0].legend(loc="upper left", fontsize=8)
    save(figure, out, "memory")


def draw_cache(out: Path) -> None:
    """Cache bytes against context: the plan as lines, really allocated caches as points."""
    config = CONFIGS["llama-3.2-1b"]
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    for policy in POLICIES:
        grey, line, marker, _ = look(policy.name)
        planned = [2**i for i in range(6, 15)]
        sizes = [sum(kv_cache.plan(policy, config.n_layer, shape(config, n)).values()) for n in planned]
        axis.plot(planned, [s / 2**20 for s in sizes], line, color=grey, label=f"{policy.name}, planned")
        taken = [
            sum(ModelCache(policy, config.n_layer, shape(config, n, "cpu")).nbytes().values()) for n in planned[::2]
        ]
        axis.plot(planned[::2], [n / 2**20 for n in taken], marker, color=grey, markerfacecolor="white",
                  label=f"{policy.name}, allocated")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MiB, Llama 3.2 1B in bfloat16")
    axis.legend(fontsize=8)
    axis.grid(True, which="major", alpha=0.3)
    save(figure, out, "cache")


def draw_frontier(rows: list[dict[str, Any]], out: Path) -> None:
    """Quality against memory, a panel per text."""
    texts = list(dict.fromkeys(r["text"] for r in rows))
    figure, axes = plt.subplots(1, len(texts), figsize=(4.2 * len(texts), 3.4), squeeze=False, sharey=True)
    for axis, text in zip(axes[0], texts, strict=True):
        found = {r["cache"]: r for r in rows if r["text"] == text and r["cache"] != "full"}.values()
        if len(found) > 8:  # a sweep: names would cover each other
            families = list(dict.fromkeys(sorted(family(r["cache"]) for r in found)))
            for name, marker in zip(families, "s^vDoP*", strict=False):
                points = [(r["cache_bytes"] / 2**20, r["kl"]) for r in found if family(r["cache"]) == name]
                filled = "#888888" if marker in "sv" else "white"
                axis.plot(*zip(*points, strict=True), marker, color="#333333", markerfacecolor=filled, label=name)
            axis.legend(fontsize=7)
        for r in found if len(found) <= 8 else ():
            grey, _, marker, _ = look(r["cache"])
            axis.plot(r["cache_bytes"] / 2**20, r["kl"], marker, color=grey, markersize=7)
            axis.annotate(short(r["cache"]), (r["cache_bytes"] / 2**20, r["kl"]), xytext=(6, 4),
                          textcoords="offset points", fontsize=7)  # fmt: skip
        full = next(r for r in rows if r["text"] == text and r["cache"] == "full")
        axis.axvline(full["cache_bytes"] / 2**20, color="black", linewidth=1)
        axis.text(
            full["cache_bytes"] / 2**20, 0.96, "full ", transform=axis.get_xaxis_transform(), ha="right", fontsize=8
        )
        axis.set(yscale="log", title=text, xlabel="cache, MiB")
        axis.margins(x=0.18, y=0.15)
        axis.set_xlim(left=0)
        axis.grid(True, alpha=0.3)
    axes[0][0].set_ylabel("mean KL from the full cache, nats")
    save(figure, out, "frontier")


def draw_position(rows: list[dict[str, Any]], out: Path) -> None:
    """Divergence by position in the window, of the first text."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    found = [r for r in rows if r["text"] == rows[0]["text"] and r["cache"] != "full"]
    for i, r in enumerate({r["cache"]: r for r in found}.values()):
        grey, line, _, _ = look(r["cache"])
        where = list(r["by_position"])
        filled = "white" if i // 4 else grey
        axis.plot(where, [max(r["by_position"][w]["kl"], 1e-9) for w in where], line, marker="s^vD"[i % 4], color=grey,
                  markerfacecolor=filled, label=short(r["cache"]))  # fmt: skip
    axis.set(yscale="log", xlabel=f"position in the window, {rows[0]['text']}", ylabel="mean KL, nats")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside: the lines need all the room
    axis.grid(True, alpha=0.3)
    save(figure, out, "position")


def draw_passkeys(rows: list[dict[str, Any]], out: Path) -> None:
    """A map of lengths and depths per cache, four side by side."""
    rows = in_order({r["cache"]: r for r in rows})
    across = min(4, len(rows))
    down = -(-len(rows) // across)
    figure, axes = plt.subplots(down, across, figsize=(2.6 * across, 2.4 * down), squeeze=False, sharey=True)
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, r in zip(axes.flat, rows, strict=False):
        lengths, depths = list(r["recalled"]), list(next(iter(r["recalled"].values())))
        shares = [[r["recalled"][n][d] for d in depths] for n in lengths]
        axis.imshow(shares, cmap="Greys_r", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                axis.text(
                    x,
                    y,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if share < 0.5 else "black",
                )
        axis.set_xticks(range(len(depths)), [f"{float(d):.0%}" for d in depths], fontsize=7)
        axis.set_yticks(range(len(lengths)), lengths, fontsize=8)
        axis.set_title(short(r["cache"]), fontsize=9)
        axis.set_xlabel("depth", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("length, tokens", fontsize=8)
    figure.tight_layout()
    save(figure, out, "passkeys")


def draw_speed(records: list[dict[str, Any]], out: Path, name: str = "speed") -> None:
    """benchmark.py's steps against the context, and each cache's speed over the first one's, a row per batch."""
    rows = [row for record in records for row in record["rows"]]
    batches = list(dict.fromkeys(r["batch"] for r in rows))
    every = list(dict.fromkeys(r["cache"] for r in rows))  # the same marker in every panel
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
            i = every.index(setting)
            grey, line, _, _ = look(setting)
            style = {"marker": "os^vDP*"[i % 7], "color": grey, "markerfacecolor": "white" if i % 2 else grey}
            contexts = sorted(steps)
            latency.plot(contexts, [steps[c] for c in contexts], line, label=short(setting), **style)
            shared = [c for c in contexts if c in base]
            ratio.plot(shared, [base[c] / steps[c] for c in shared], line, **style)
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
    figure.tight_layout()
    save(figure, out, name)


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


def thousands(context: int) -> str:
    return str(context) if context % 1024 else f"{context // 1024}k"


def draw_table(records: list[dict[str, Any]], out: Path) -> None:
    """Every figure of every cache side by side, as far as the files have them."""
    cells: dict[str, dict[str, str]] = {}
    for record in records:
        for r in record["rows"] if "kind" in record else ():
            row = cells.setdefault(r["cache"], {})
            if record["kind"] in ("perplexity", "divergence") and r["text"] == record["rows"][0]["text"]:
                row |= {"perplexity": f"{r['perplexity']:.4f}", "mean KL": f"{r['kl']:.1e}"}
                row["same top"], row["cache"] = f"{r['same_top']:.2%}", f"{r['cache_bytes'] / 2**20:.2f} MiB"
            elif record["kind"] == "passkey":
                row["passkeys"] = f"{r['mean']:.0%}"
            elif record["kind"] == "rouge":
                row["ROUGE-L"] = f"{r['rouge_l']['mean']:.4f}"
                row["to full"] = f"{r['rouge_l_to_full']['mean']:.4f}"
        if "decode_tokens_per_s" in record:  # generate.py's report
            cells.setdefault(setting_of(record["cache"]), {})["tokens/s"] = f"{record['decode_tokens_per_s']:.1f}"
    order = ("cache", "perplexity", "mean KL", "same top", "passkeys", "ROUGE-L", "to full", "tokens/s")
    columns = [c for c in order if any(c in row for row in cells.values())]
    rows = in_order({setting: row | {"name": short(setting)} for setting, row in cells.items()})
    figure, axis = plt.subplots(figsize=(1.7 + 1.05 * len(columns), 0.3 + 0.3 * len(cells)))
    axis.axis("off")
    table = axis.table(
        [[row.get(c, "") for c in columns] for row in rows],
        rowLabels=[row["name"] for row in rows], colLabels=columns, loc="center", cellLoc="right",
    )  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.4)
    save(figure, out, "table")


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """Every JSON object of the files, one a line or one a file."""
    found = []
    for path in paths:
        try:
            text = path.read_text()
            found += [json.loads(text)] if text.count("\n{") == 0 else [json.loads(line) for line in text.splitlines()]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: {error}") from None
    return found


def main(argv: list[str] | None = None) -> None:
    p = Parser("plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", type=Path, nargs="*", help="what evaluate.py and sweep.py wrote")
    p.add_argument("--out", type=Path, default=Path("outputs/pictures"))
    args = p.parse(sys.argv[1:] if argv is None else argv)
    try:
        records = read(args.files)
        require_writable(args.out / "table.png", "--out")
    except UserError as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    scores = [row for r in records if r.get("kind") in ("perplexity", "divergence") for row in r["rows"]]
    keys = [row for r in records if r.get("kind") == "passkey" for row in r["rows"]]
    speeds = [r for r in records if any("step_ms" in row for row in r.get("rows", ()))]
    for where in dict.fromkeys((r["model"], r["device"]) for r in speeds):
        name = "speed-" + re.sub(r"[^a-z0-9]+", "-", " ".join(where).lower())
        draw_speed([r for r in speeds if (r["model"], r["device"]) == where], args.out, name)
    if any("kind" in r or "decode_tokens_per_s" in r for r in records):
        draw_table(records, args.out)
    draw_memory(args.out)
    draw_cache(args.out)
    if scores:
        draw_frontier(scores, args.out)
        draw_position(scores, args.out)
    else:
        print(
            "no frontier and no position: `scripts/evaluate.py divergence --json FILE` makes their data",
            file=sys.stderr,
        )
    if keys:
        draw_passkeys(keys, args.out)
    else:
        print("no passkeys: `scripts/evaluate.py passkey --json FILE` makes their data", file=sys.stderr)


if __name__ == "__main__":
    main()
