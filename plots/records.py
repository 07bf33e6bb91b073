"""Result files for pictures: reading, checking, and choosing what may stand side by side.

A file holds one JSON object, or one a line. What the tools write is known by its fields and checked here, once,
so that a picture never meets a hole: a wrong file is one line that says what is missing, an unfinished record
and one that has no picture are left out with a line that says so.

Figures are compared only within a run: one model and dtype, the same text, as many windows of it. Two files that
score a setting in one run are one point; where they disagree, standard error says whose figures are taken.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import selective_kv
from common.errors import UserError, printable
from common.files import LARGEST_JSON, read_file
from common.messages import say
from kv_cache import format_policy, make_policy

Row = dict[str, Any]


# --- Reading ----------------------------------------------------------------------------------------


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not


CHECKS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda v: isinstance(v, str),
    "a number": _number,
    "a number above zero": lambda v: _number(v) and v > 0,
    "a whole number above zero": lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 < v < 1e15,
    "a number or null": lambda v: v is None or _number(v),
    "an object": lambda v: isinstance(v, dict) and bool(v),
    "sizes by region": lambda v: isinstance(v, dict) and all(_number(n) for n in v.values()),
    "a list": lambda v: isinstance(v, list),
}
_SCORE = {"text": "a text", "cache": "a text", "cache_bytes": "a number", "perplexity": "a number",
          "kl": "a number", "same_top": "a number", "by_position": "an object"}  # fmt: skip
_ROUGE = {"text": "a text", "cache": "a text", "rouge_l_to_full": "an object"}
ROWS: dict[str, dict[str, str]] = {  # what every row of a kind must have
    "perplexity": _SCORE,
    "divergence": _SCORE,
    "passkey": {"cache": "a text", "mean": "a number", "recalled": "an object"},
    "ruler": {"cache": "a text", "mean": "a number", "scores": "an object"},
    "rouge": _ROUGE,
    "benchmark": {"cache": "a text", "batch": "a whole number above zero", "context": "a whole number above zero",
                  "step_ms": "a number above zero"},
}  # fmt: skip
_WHERE = {"model": "a text", "device": "a text", "dtype": "a text"}
FIELDS: dict[str, dict[str, str]] = {  # and every record
    "benchmark": {"model": "a text", "device": "a text"},
    "report": _WHERE | {"cache": "an object", "batch": "a whole number above zero", "decode_tokens_per_s": "a number",
                        "tokens_read": "a number", "tokens_written": "a number", "cache_bytes": "sizes by region",
                        "weight_bytes": "a number", "peak_memory_bytes": "a number"},
}  # fmt: skip
_RUN = {"sha256": "a text", "tokens": "a number", "windows": "a number"}
OPTIONAL: dict[str, dict[str, str]] = {  # read where a row or a record has them: older files lack some
    "record": {"model": "a text", "dtype": "a text", "full_cache_bytes": "a number"},
    "perplexity": _RUN,
    "divergence": _RUN,
    "passkey": dict.fromkeys(("trials", "trials_per_cell"), "a number above zero")
    | dict.fromkeys(("low", "high"), "a number"),
    "ruler": {"sha256": "a text", "trials_per_cell": "a whole number above zero"},
    "rouge": {"sha256": "a text", "documents": "a number"},
    "benchmark": dict.fromkeys(("cache_bytes", "peak_memory_bytes"), "a number or null"),
}
# Scripts whose records have no picture.
NOT_DRAWN = {f"scripts/{name}.py" for name in (
    "bench_attention", "bench_kernels", "bench_transformers", "divergence_transformers", "evaluate_llama_cpp"
)}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A record of a tool, checked. kind: one of evaluate.py's, "benchmark", or "report" (generate.py's)."""

    path: Path
    kind: str
    fields: Row

    @property
    def rows(self) -> list[Row]:
        return self.fields["rows"]


def read(paths: Iterable[Path]) -> list[Record]:
    """The records that pictures are made of. Raises UserError."""
    return [record for path in paths for value in _objects(path) if (record := _record(path, value)) is not None]


def _objects(path: Path) -> list[Any]:
    """The JSON values of a file: one, over as many lines as it likes, or one a line."""
    try:
        text = read_file(path, LARGEST_JSON).decode("utf-8")
        try:
            return [json.loads(text)]
        except json.JSONDecodeError:
            lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
            if len(lines) < 2 or any(not line.startswith("{") for _, line in lines):
                raise
        found = []
        for n, line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {n}: not JSON ({error})") from None
        return found
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise UserError(f"{path}: not JSON ({error})") from None


def _record(path: Path, value: Any) -> Record | None:
    """What the value is, checked; None: nothing to draw, and standard error says why."""
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: a JSON object of evaluate.py, benchmark.py or generate.py is needed, not {value!r:.40}"
        )
    kind = _kind(path, value)
    if kind is None:
        say(f"{path}: no picture shows this kind of record, left out")
        return None
    _check(str(path), value, FIELDS.get(kind, {}), OPTIONAL["record"])
    if value.get("finished") is False:
        say(f"{path}: an unfinished record, left out")
        return None
    if kind == "report":
        return Record(path, kind, value | {"setting": _setting(path, value["cache"])})
    _check(str(path), value, {"rows": "a list"})
    if not value["rows"]:
        say(f"{path}: no rows, left out")
        return None
    for n, row in enumerate(value["rows"], 1):
        _check_row(f"{path}, row {n}", row, kind)
    if kind in ("perplexity", "divergence"):
        has = {row["text"] for row in value["rows"] if row["cache"] == "full"}
        for row in value["rows"]:
            if row["text"] not in has:
                raise UserError(f"{path}: no row of the full cache for {row['text']}")
    return Record(path, kind, value)


def _no_steps(row: Any) -> bool:
    """Whether a row is of kernels alone (`--kernels`) or of times to the first token (`--first_token`)."""
    return isinstance(row, dict) and (
        ("cache" not in row and ("us" in row or "ms" in row)) or ("first_token_s" in row and "step_ms" not in row)
    )


def _kind(path: Path, value: Row) -> str | None:
    """None: a record of this project that no picture shows. Raises UserError for what no tool of it writes."""
    command = value.get("command")
    if isinstance(command, list) and command[:1] and str(command[0]) in NOT_DRAWN:
        return None
    if "kind" in value:
        if value["kind"] not in [kind for kind in ROWS if kind != "benchmark"]:
            raise UserError(
                f"{path}: kind {value['kind']!r:.40} is none of perplexity, divergence, passkey, ruler, rouge"
            )
        return str(value["kind"])
    rows = value.get("rows")
    if isinstance(rows, list):
        return None if rows and all(map(_no_steps, rows)) else "benchmark"
    if "decode_tokens_per_s" in value:
        return "report"
    if "plan" in value:  # generate.py --dry_run: it measured nothing
        return None
    raise UserError(f"{path}: no kind, no rows and no decode_tokens_per_s: not what a tool of this project writes")


def _check(where: str, owner: Row, needed: Mapping[str, str], optional: dict[str, str] | None = None) -> None:
    for name in needed:
        if name not in owner:
            raise UserError(f"{where}: no {name}")
    for name, what in ((optional or {}) | dict(needed)).items():
        if name in owner and not CHECKS[what](owner[name]):
            raise UserError(f"{where}: {name} is not {what}: {owner[name]!r:.40}")


def _check_row(where: str, row: Any, kind: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object: {row!r:.40}")
    _check(where, row, ROWS[kind], OPTIONAL[kind])
    if kind == "rouge":
        for name in ("rouge_l", "rouge_l_to_full") if "rouge_l" in row else ("rouge_l_to_full",):
            if not isinstance(row[name], dict):
                raise UserError(f"{where}: {name} is not an object: {row[name]!r:.40}")
            _check(f"{where}, {name}", row[name], {"mean": "a number"})
    inner: Row = row.get("by_position") or row.get("recalled") or {}
    needed = {"kl": "a number"}
    for name, cell in inner.items() if kind != "rouge" else ():
        if not isinstance(cell, dict) or not cell:
            raise UserError(f"{where}, {name}: not an object with figures: {cell!r:.40}")
        if kind == "passkey":
            depths = next(iter(inner.values()))
            needed = dict.fromkeys(depths, "a number")
            if any(re.fullmatch(r"[0-9.]+", depth) is None for depth in depths) or len(cell) != len(depths):
                raise UserError(f"{where}, {name}: the depths of every length are the same numbers from 0 to 1")
        _check(f"{where}, {name}", cell, needed)
    for task, cell in row["scores"].items() if kind == "ruler" else ():
        lengths = next(iter(row["scores"].values()))
        if not isinstance(cell, dict) or not cell or cell.keys() != lengths.keys():
            raise UserError(f"{where}, {task}: every task has the same lengths: {cell!r:.40}")
        if any(not length.isdecimal() for length in cell):
            raise UserError(f"{where}, {task}: a length is no number: {', '.join(cell)}")
        _check(f"{where}, {task}", cell, dict.fromkeys(cell, "a number"))


def _setting(path: Path, cache: Row) -> str:
    _check(f"{path}, cache", cache, {"name": "a text"})
    try:
        return setting_of(cache)
    except UserError as error:
        raise UserError(f"{path}, cache: {error}") from None


# --- Naming -----------------------------------------------------------------------------------------


def setting_of(cache: Row) -> str:
    """The setting, as evaluate.py writes it, of the cache in a report of generate.py, which lists every knob."""
    knobs = {name: value for name, value in cache.items() if name != "name"}
    if cache["name"] in selective_kv.caches():
        return format_policy(make_policy(cache["name"], knobs))
    return ":".join([cache["name"], ",".join(f"{k}={v}" for k, v in knobs.items())]).strip(":")


def knobs_of(setting: str) -> dict[str, str]:
    return dict(knob.partition("=")[::2] for knob in setting.partition(":")[2].split(",") if knob)


def _parts(setting: str) -> tuple[str, str, list[str]]:
    """The name with its bits, the sizes, and the other knobs. What goes without saying is left out."""
    values = knobs_of(setting)
    bits = [values.pop("k_bits", "8"), values.pop("v_bits", "8")]
    sizes = {k: values.pop(k) for k in ("sink_size", "window_size") if k in values}
    others = [f"{k}={v}" for k, v in values.items() if (k, v) != ("positions", "cache")]
    name = setting.partition(":")[0] + ("" if bits == ["8", "8"] else f" K{bits[0]}V{bits[1]}")
    both = len(sizes) == 2
    return name, ("/" if both else ",").join(v if both else f"{k}={v}" for k, v in sizes.items()), others


def family(setting: str) -> str:
    """All of a setting but its sizes: "quantize_kv K8V4"."""
    name, _, others = _parts(setting)
    return " ".join([name, *others])


def short(setting: str) -> str:
    """ "quantize_kv:sink_size=16,window_size=32" -> "quantize_kv 16/32". Two settings never share a name."""
    name, sizes, others = _parts(setting)
    return printable(" ".join([name, *([sizes] if sizes else []), *others]), 100)


def order(setting: str) -> tuple[Any, ...]:
    """The full cache first, then by cache, bits (most first), sizes and other knobs."""
    name, values = setting.partition(":")[0], knobs_of(setting)
    bits = [-int(n) if (n := values.get(k, "8")).isdecimal() else 0 for k in ("k_bits", "v_bits")]
    sizes = [int(n) if (n := values.get(k, "0")).isdecimal() else 0 for k in ("sink_size", "window_size")]
    return name != "full", name, bits, sizes, setting


# --- Choosing ---------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What scores must share to be compared."""

    model: str
    dtype: str
    text: str
    sha256: str
    tokens: int
    windows: int
    weights: str = ""  # the checkpoint's fingerprint, where the file has it: folders may be called alike

    @property
    def title(self) -> str:
        """The text, and how much of it was scored."""
        parts = [f"{self.windows} windows"] if self.windows else []
        parts += [f"{self.tokens:,} tokens"] if self.tokens else []
        return ", ".join([printable(self.text, 60), *parts])


def score_runs(records: Iterable[Record]) -> dict[Run, dict[str, Row]]:
    """Perplexity's and divergence's rows: run -> setting -> row."""
    runs: dict[Run, dict[str, Row]] = {}
    for record in records:
        for row in record.rows if record.kind in ("perplexity", "divergence") else ():
            fields = record.fields
            run = Run(fields.get("model", ""), fields.get("dtype", ""), row["text"], row.get("sha256", ""),
                      int(row.get("tokens", 0)), int(row.get("windows", 0)), weights_of(record))  # fmt: skip
            before = runs.setdefault(run, {}).get(row["cache"])
            if before and not all(math.isclose(before[k], row[k], rel_tol=1e-3, abs_tol=1e-9)
                                  for k in ("perplexity", "kl")):  # fmt: skip
                say(f"{short(row['cache'])} on {run.title}: two files disagree (perplexity {before['perplexity']:.4f} "
                    f"and {row['perplexity']:.4f}): {record.path}, the last, is taken")  # fmt: skip
            runs[run][row["cache"]] = row
    return runs


def weights_of(record: Record) -> str:
    """The fingerprint of the weights; "": an older file."""
    source = record.fields.get("made_from")
    found = source.get("checkpoint") if isinstance(source, dict) else None
    return found if isinstance(found, str) else ""


def trials_of(row: Row) -> int | None:
    """How many passkeys a row asks for in all; None: it does not say."""
    cells = sum(len(cell) for cell in row["recalled"].values())
    return int(row["trials_per_cell"]) * cells if "trials_per_cell" in row else row.get("trials")


class Grid(NamedTuple):
    """What passkeys must share to be compared."""

    model: str
    lengths: tuple[str, ...]
    depths: tuple[str, ...]
    text: str = ""
    sha256: str = ""
    weights: str = ""


def passkey_grids(records: Iterable[Record]) -> dict[Grid, dict[str, Row]]:
    """Passkeys' rows: model and grid -> setting -> row. Of two files with one grid, the one with more trials."""
    grids: dict[Grid, dict[str, Row]] = {}
    for record in records:
        for row in record.rows if record.kind == "passkey" else ():
            recalled = row["recalled"]
            depths = tuple(next(iter(recalled.values())))
            model, text, digest = (
                record.fields.get("model", ""),
                str(row.get("text") or ""),
                str(row.get("sha256") or ""),
            )
            grid = Grid(model, tuple(recalled), depths, text, digest, weights_of(record))
            before = grids.setdefault(grid, {}).get(row["cache"])
            row = row | {"path": str(record.path)}
            if before is None:
                grids[grid][row["cache"]] = row
                continue
            best = max(before, row, key=lambda r: trials_of(r) or 0)
            if before["recalled"] != recalled:
                say(f"passkeys of {short(row['cache'])}: two files disagree: {best['path']}, with the most trials, "
                    f"is taken")  # fmt: skip
            grids[grid][row["cache"]] = best
    return grids


def choose(what: str, groups: Mapping[Any, dict[str, Row]], weight: Callable[[Any], Any]) -> tuple[Any, dict[str, Row]]:
    """The heaviest group. What only others have is left out, and standard error says so: they do not compare."""
    best = max(groups, key=weight)
    lost = sorted({s for group in groups.values() for s in group} - set(groups[best]), key=order)
    if len(groups) > 1:
        names = f"; without {len(lost)} settings that only others have: {', '.join(map(short, lost))}" if lost else ""
        say(f"{what}: {len(groups)} runs do not compare, one is taken{names}")
    return best, groups[best]
