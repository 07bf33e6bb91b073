"""The READMEs' tables of figures, written from the result files: python scripts/readme_tables.py [--check]

Each stands between `<!-- NAME, by scripts/readme_tables.py -->` and `<!-- end -->`:

  choose     each cache's bits, memory, speed and cost on a real model     smollm2/perplexity, passkey; STEPS
  attention  one layer's decode attention by shape and format              KERNELS
  texts      KL and perplexity by text                                     smollm2/perplexity
  llama.cpp  its caches and ours on the same file and window               smollm2/llama_cpp and divergence-window-4k
  ruler      RULER's kept tasks by length                                  RULER
  bundled    all of the bundled model's figures                            perplexity, passkey, rouge
  card       the same in its model card                                    perplexity, passkey
  prompts    time to the first token by length                             h100/first-token

Files are those of `results/`, whose records hold their commands. With --check nothing is written, and the program exits
with 1 where a table is not what the files say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import kv_cache
from cli.options import Parser
from common.errors import UserError
from common.files import read_json, write_whole
from common.messages import size
from common.program import program
from kv_cache import parse_policy
from model import CONFIGS
from plots.pictures import thousands
from plots.records import Row, knobs_of, order, read, short
from selective_kv import Shape

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
FILES = (ROOT / "README.md", RESULTS / "README.md", ROOT / "assets" / "demo" / "README.md")
STEPS = "h100/steps.jsonl"  # whole steps
KERNELS = "kernels-h100.json"  # one layer's attention
RULER = (  # of the last, 20 of 400 samples, those of 8k, were cut off; full scores 0 there
    "smollm2/ruler-1.json", "smollm2/ruler-2.json", "smollm2/ruler-vt.json",
)  # fmt: skip
CONFIG = CONFIGS["llama-3.1-8b"]
SHOWN = (
    "full", "quantize_kv 16/32", "quantize_kv 16/128", "quantize_kv K8V4 16/128", "quantize_kv K4V4 16/128",
    "quantize_kv K3V3 16/128", "quantize_kv K4V2 16/128", "quantize_kv K3V2 16/128", "compress_kv 16/32",
)  # fmt: skip
TEXTS = {
    "val_books": "held-out books", "wikitext2_raw_test": "WikiText-2, raw test", "longctx_cc0": "three CC0 novels",
    "squality_dev": "SQuALITY stories",
}  # fmt: skip


def load(name: str) -> dict[str, Any]:
    """A record. Raises UserError."""
    return read_json(RESULTS / name)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, figures to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# --- Cells ------------------------------------------------------------------------------------------


def flags(setting: str) -> str:
    """A setting as it is typed: "`quantize_kv --bits 4 --window_size 128`"."""
    name = setting.partition(":")[0]
    values = knobs_of(setting)
    k, v = values.get("k_bits", "8"), values.get("v_bits", "8")
    words = [name]
    if k == v != "8":
        words.append(f"--bits {k}")
    else:
        words += [f"--{side}_bits {bits}" for side, bits in (("k", k), ("v", v)) if bits != "8"]
    if values.get("sink_size", "16") != "16":
        words.append(f"--sink_size {values['sink_size']}")
    if values.get("window_size", "32") != "32":
        words.append(f"--window_size {values['window_size']}")
    return "full" if name == "full" else f"`{' '.join(words)}`"


def bits(setting: str) -> str:
    """Bits of an element of the middle, with all scales, at head_dim 128 and 64."""
    seen = parse_policy(setting).sees()
    if setting == "full":
        return "16"
    if seen is None or seen.formats is None:
        return "dropped"
    at = [sum(form.bits_per_element(dim) for form in seen.formats) / 2 for dim in (128, 64)]
    return f"{at[0]:.2f} ({at[1]:.2f})"


def power(value: float) -> str:
    if value >= 0.1:
        return f"{value:.2f}"
    return "0" if value < 1e-12 else f"{value:.1e}".replace("e-0", "e-")


def mean(rows: Sequence[Row], field: str) -> float:
    """Over the tokens of several texts."""
    return sum(r[field] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows)


def signed(share: float) -> str:
    text = f"{share:+.2%}"
    return text.lstrip("+-") if float(text[:-1]) == 0 else text


def shown(rows: Iterable[Row]) -> list[str]:
    """The settings of the tables that are among the rows, in their order."""
    found = {short(r["cache"]): r["cache"] for r in rows}
    return [found[name] for name in SHOWN if name in found]


def by_quality(rows: Iterable[Row]) -> list[Row]:
    """Full first, what is dropped last, and most bits before fewer."""

    def key(row: Row) -> tuple[Any, ...]:
        seen = parse_policy(row["cache"]).sees()
        n_bit = 0.0 if seen is None or seen.formats is None else sum(f.bits_per_element(128) for f in seen.formats)
        return row["cache"] != "full", -n_bit, order(row["cache"])

    return sorted(rows, key=key)


# --- Tables -----------------------------------------------------------------------------------------


def held(setting: str, n_token: int) -> int:
    """Bytes of the 8B's cache in 16 bits."""
    shape = Shape(1, CONFIG.n_kv_head, CONFIG.head_dim, n_token, torch.bfloat16, torch.device("meta"))
    return sum(kv_cache.plan(parse_policy(setting), CONFIG.n_layer, shape).values())


def tokens_per_s(batch: int, context: int) -> dict[str, str]:
    """The speed of each setting's step at a batch and context, by setting, from STEPS."""
    rows = [r for record in read([RESULTS / STEPS]) for r in record.rows]
    return {r["cache"]: f"{r['tokens_per_s']:.0f}" for r in rows if (r["batch"], r["context"]) == (batch, context)}


def attention() -> str:
    """One layer's decode attention by shape: us of the fastest there is in 16 bits, and how much faster each format."""
    by_shape: dict[tuple[int, int], dict[str, float]] = {}
    for r in load(KERNELS)["rows"]:
        by_shape.setdefault((r["batch"], r["context"]), {})[r["version"]] = r["us"]
    best = {
        shape: min(t for version, t in us.items() if version == "ours bf16" or version.startswith("SDPA"))
        for shape, us in by_shape.items()
    }
    versions = dict.fromkeys(v for us in by_shape.values() for v in us if v.startswith("ours ") and v != "ours bf16")
    rows = [["fastest in 16 bits, us", *(f"{t:.1f}" for t in best.values())]]
    for version in versions:
        cells = [f"{best[at] / us[version]:.2f}x" if version in us else "" for at, us in by_shape.items()]
        rows.append([version.removeprefix("ours ").replace("int8", "8 bits"), *cells])
    return markdown(["", *(f"{batch} x {thousands(n)}" for batch, n in by_shape)], rows)


def choose() -> str:
    scores, keys = load("smollm2/perplexity.json")["rows"], load("smollm2/passkey.json")["rows"]
    recalled = {r["cache"]: r for r in keys}
    header = ["cache", "bits of the middle", "memory of full, 128k", "tokens/s, 8k", "128k", "8 x 32k", "mean KL",
              "same top token", "perplexity", "passkeys"]  # fmt: skip
    speeds = [tokens_per_s(batch, context) for batch, context in ((1, 8192), (1, 131072), (8, 32768))]
    found = []
    for setting in shown(scores):
        mine = [r for r in scores if r["cache"] == setting]
        share = held(setting, 131072) / held("full", 131072)
        found.append([
            flags(setting), bits(setting), f"{share:.0%}" if share > 0.01 else f"{share:.2%}",
            *(speed.get(setting, "") for speed in speeds), power(mean(mine, "kl")), f"{mean(mine, 'same_top'):.2%}",
            signed(mean(mine, "perplexity_rise")), f"{recalled[setting]['mean']:.1%}",
        ])  # fmt: skip
    return markdown(header, found)


def by_text(name: str) -> str:
    rows = load(name)["rows"]
    settings = [s for s in shown(rows) if s not in ("full", "quantize_kv:sink_size=16,window_size=128")]
    header = ["text", "perplexity, full", *(f"{short(s)}" for s in settings)]
    found = []
    for text in dict.fromkeys(r["text"] for r in rows):
        mine = {r["cache"]: r for r in rows if r["text"] == text}
        cells = [f"{power(mine[s]['kl'])}, {signed(mine[s]['perplexity_rise'])}" for s in settings]
        found.append([TEXTS.get(text.partition(".")[0], text), f"{mine['full']['perplexity']:.4f}", *cells])
    return markdown(header, found)


def beside_llama_cpp() -> str:
    theirs = load("smollm2/llama_cpp.json")["rows"]
    text = theirs[0]["text"]
    found = {r["cache"]: r for r in load("smollm2/divergence-window-4k.json")["rows"] if r["text"] == text}
    ours = [found[setting] for setting in shown(found.values()) if setting != "full"]
    rows = [(f"llama.cpp {r['cache']}", r["bits"], r) for r in theirs if r["text"] == text and r["cache"] != "f16"]
    rows += [(f"**{flags(r['cache'])}**", r.get("bits_per_quantised_element", 0.0), r) for r in ours]
    header = ["cache", "bits an element", "mean KL", "99th percentile", "same top token", "perplexity"]
    return markdown(header, [
        [name, f"{n_bit:g}" if n_bit else "the middle dropped", power(r["kl"]), power(r["kl_p99"]),
         f"{r['same_top']:.2%}", signed(r["perplexity_rise"])]
        for name, n_bit, r in rows
    ])  # fmt: skip


def ruler() -> str:
    by_cache: dict[str, dict[str, Row]] = {}  # and by the samples: full was given the same ones twice
    for name in RULER:
        for r in load(name)["rows"]:
            by_cache.setdefault(r["cache"], {})[r["sha256"]] = r
    if any(found.keys() != by_cache["full"].keys() for found in by_cache.values()):
        raise UserError(f"{', '.join(RULER)}: a cache was not given the samples that the others were")
    lengths = list(next(iter(by_cache["full"].values()))["by_length"])
    table = []
    for r in by_quality(next(iter(found.values())) for found in by_cache.values()):
        cells = []
        for length in lengths:
            of = [row["by_length"][length] for row in by_cache[r["cache"]].values()]
            cell = pooled([cell for cell in of if cell["kept_trials"]])
            rise = f" ({100 * cell['kept_rise']:+.1f} ± {100 * cell['kept_rise_error']:.1f})"
            cells.append(f"{cell['kept']:.1%}" + ("" if r["cache"] == "full" else rise))
        table.append([flags(r["cache"]), *cells])
    return markdown(["cache", *(f"{int(n) // 1024}k" for n in lengths)], table)


def pooled(cells: Sequence[Row]) -> Row:
    """Of several sets of samples what `evaluation.ruler.beside_full` would have said of all: mean, rise over full, and
    its standard error, from each set's."""
    n = sum(cell["kept_trials"] for cell in cells)
    kept, rise = (sum(cell["kept_trials"] * cell[field] for cell in cells) / n for field in ("kept", "kept_rise"))
    squares = 0.0  # of each sample's rise less the mean of all
    for cell in cells:
        m = cell["kept_trials"]
        squares += cell["kept_rise_error"] ** 2 * m * (m - 1) + m * (cell["kept_rise"] - rise) ** 2
    return {"kept": kept, "kept_rise": rise, "kept_rise_error": (squares / max(1, n - 1) / n) ** 0.5}


def bundled() -> str:
    scores = [r for r in load("perplexity.json")["rows"] if r["text"].startswith("val_books")]
    keys = {r["cache"]: r for r in load("passkey.json")["rows"]}
    words = {r["cache"]: r for r in load("rouge.json")["rows"]}
    header = ["cache", "mean KL", "same top token", "perplexity", "passkeys", "ROUGE-L", "to full's"]
    found = []
    for r in by_quality(r for r in scores if r["cache"] in shown(scores)):
        setting, full = r["cache"], r["cache"] == "full"
        rouge = words.get(setting)
        to_full = "" if full or rouge is None else f"{rouge['rouge_l_to_full']['mean']:.3f}"
        found.append([
            flags(setting), "" if full else power(r["kl"]), "" if full else f"{r['same_top']:.2%}",
            f"{r['perplexity']:.4f}" if full else signed(r["perplexity_rise"]),
            f"{keys[setting]['mean']:.1%}" if setting in keys else "",
            "" if rouge is None else f"{rouge['rouge_l']['mean']:.3f}", to_full,
        ])  # fmt: skip
    return markdown(header, found)


def card() -> str:
    scores = [r for r in load("perplexity.json")["rows"] if r["text"].startswith("val_books")]
    keys = {r["cache"]: r for r in load("passkey.json")["rows"]}
    header = ["cache, sink / window", "cache bytes", "bits per byte", "passkeys"]
    return markdown(header, [
        [short(r["cache"]), size(r["cache_bytes"]), f"{r['bits_per_byte']:.4f}", f"{keys[r['cache']]['mean']:.1%}"]
        for r in by_quality(scores)
    ])  # fmt: skip


def prompts() -> str:
    """Seconds, and over the full cache's; then the peaks of the longest."""
    rows = load("h100/first-token.json")["rows"]
    found = {(r["context"], r["cache"]): r for r in rows}
    settings = by_quality({r["cache"]: r for r in rows}.values())
    names = [r["cache"] for r in settings]
    cells = []
    for context in dict.fromkeys(r["context"] for r in rows):
        full = found[context, "full"]["first_token_s"]
        seconds = [found[context, name]["first_token_s"] for name in names]
        shares = ["", *(f" ({s / full:.2f}x)" for s in seconds[1:])]
        told = (f"{s:.{3 if s < 1 else 2}f}{share}" for s, share in zip(seconds, shares, strict=True))
        cells.append([f"{context:,}", *told])
    peaks = [size(found[context, name]["peak_memory_bytes"]) for name in names]
    return markdown(["prompt", *map(flags, names)], [*cells, [f"peak memory at {context:,}", *peaks]])


TABLES: dict[str, Callable[[], str]] = {
    "choose": choose, "texts": lambda: by_text("smollm2/perplexity.json"), "llama.cpp": beside_llama_cpp,
    "ruler": ruler, "bundled": bundled, "bundled texts": lambda: by_text("perplexity.json"), "card": card,
    "prompts": prompts, "attention": attention,
}  # fmt: skip


def filled(text: str) -> str:
    """The README with its tables as the files have them. Raises UserError where a table has no end or no such name."""

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise UserError(f"no table is called {name!r}: there are {', '.join(TABLES)}")
        return f"{begin(name)}\n\n{TABLES[name]()}\n\n<!-- end -->"

    return re.sub(r"<!-- ([^,\n]+), by scripts/readme_tables\.py -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def begin(name: str) -> str:
    return f"<!-- {name}, by scripts/readme_tables.py -->"


def main(argv: list[str] | None = None) -> None:
    p = Parser("readme_tables.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing; exit with 1 where one is not as it should be")
    with program("readme_tables.py"):
        args = p.parse(sys.argv[1:] if argv is None else argv)
        for path in FILES:
            before = path.read_text()
            after = filled(before)
            if args.check and after != before:
                name = path.relative_to(ROOT)
                raise SystemExit(f"{name}: its tables are not what results/ has: run scripts/readme_tables.py")
            if after != before:
                write_whole(path, after)
