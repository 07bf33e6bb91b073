"""What a cache costs in quality, as pictures: frontier, position, passkeys, table. They read in black and white.

A picture is a function from checked records (records.py) to a figure; plot.py is the command line.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from common.errors import UserError, printable
from common.files import replaced_whole
from common.messages import say
from plots.records import Grid, Record, Row, Run, choose, family, order, passkey_grids, score_runs, short, trials_of
from plots.styles import explain, plt, style_of_family, styles

DIRECTIONS = ((0.7, 0.7), (1, 0), (-0.7, -0.7), (-1, 0), (0, 1), (0, -1), (0.7, -0.7), (-0.7, 0.7))
MIB = 1 << 20
LEAST_KL = 1e-9  # nothing smaller is measured, and a logarithmic axis has no zero
CLOSER = 0.95
MOST_LINES = 8  # of one panel: more are not told apart


def save(figure: Figure, out: Path, name: str) -> None:
    """Write a picture as PNG and SVG, each whole or not at all, with its names explained. Raises UserError."""
    explain(figure)
    for ending in ("png", "svg"):
        path = out / f"{name}.{ending}"
        metadata = {"Date": None} if ending == "svg" else None
        try:
            with replaced_whole(path) as part, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font has not: boxes say so
                figure.savefig(part, format=ending, dpi=110, bbox_inches="tight", metadata=metadata)
        except OSError as error:
            raise UserError(f"--out {path}: {error.strerror}") from None
    plt.close(figure)
    print(f"{out / name}.png, .svg", flush=True)


def plain(value: float, _: object = None) -> str:
    """A logarithmic axis's number without a formula."""
    return f"{value:g}"


def thousands(context: int) -> str:
    return str(context) if context % 1024 else f"{context // 1024}k"


# --- Frontier ---------------------------------------------------------------------------------------


def frontier_of(rows: Mapping[str, Row]) -> list[str]:
    """The settings whose KL is at least 5% below that of every smaller one, fewest bytes first.

    Less is within the errors of a few windows: a sink of 4 or of 16 would then both be named.
    """
    found: list[str] = []
    for setting in sorted(rows, key=lambda s: (rows[s]["cache_bytes"], rows[s]["kl"])):
        if not found or rows[setting]["kl"] < CLOSER * rows[found[-1]]["kl"]:
            found.append(setting)
    return found


def compared(run: Run, rows: Mapping[str, Row]) -> dict[str, Row]:
    """The settings beside the full cache that say how many bytes they take."""
    silent = [short(s) for s, r in rows.items() if r["cache_bytes"] <= 0]
    if silent:
        say(f"frontier: {', '.join(silent)} on {run.text}: their caches do not say their bytes, left out")
    return {s: rows[s] for s in sorted(rows, key=order) if s != "full" and rows[s]["cache_bytes"] > 0}


def draw_frontier(records: Iterable[Record]) -> Figure | None:
    """Quality against memory, a panel per run. A marker per family; what is on the frontier is numbered and named.

    None: the files compare nothing with the full cache.
    """
    runs = {run: rows for run, rows in score_runs(records).items() if compared(run, rows)}
    if not runs:
        return None
    shown = {run: compared(run, rows) for run, rows in runs.items()}
    families = list(dict.fromkeys(family(s) for s in sorted({s for rows in shown.values() for s in rows}, key=order)))
    best = {s: rows[s]["cache_bytes"] for rows in shown.values() for s in frontier_of(rows)}
    numbers = {s: str(i) for i, s in enumerate(sorted(best, key=lambda s: (best[s], order(s))), 1)}  # along the line
    across = 2 if len(runs) == 4 else min(3, len(runs))  # no empty places
    down = -(-len(runs) // across)
    size = (4.0 * across, 3.6 * down) if len(runs) > 1 else (6.5, 4.6)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    several = len({run.model for run in runs}) > 1
    for axis, (run, rows) in zip(axes.flat, runs.items(), strict=False):
        scatter(axis, shown[run], families)
        full = rows["full"]["cache_bytes"] / MIB
        axis.axvline(full, color="black", linewidth=1)
        axis.text(full, 0.97, "full ", transform=axis.get_xaxis_transform(), ha="right", va="top", fontsize=8)
        axis.set_title(f"{printable(run.model, 40)}, {run.title}" if several else run.title, fontsize=9)
        axis.set(xscale="log", yscale="log")
        axis.margins(x=0.12, y=0.12)
        if len({row["cache_bytes"] for row in rows.values()}) == 1:  # a context so short that nothing leaves a window
            axis.set_xlim(full / 2, full * 2)
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # caches may all lie within one power of ten
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(plain)
            side.set_minor_formatter(NullFormatter())
        axis.set_xlabel("cache, MiB", fontsize=9)
        axis.grid(True, alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean KL from the full cache, nats", fontsize=9)
    if not several and (model := next(iter(runs)).model):
        figure.suptitle(f"What {printable(model, 60)} loses by its cache's size", fontsize=9)
    figure.tight_layout()
    for axis, rows in zip(axes.flat, shown.values(), strict=False):
        spread_numbers(axis, rows, numbers)
    handles = frontier_legend(families, numbers)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 0.98)}
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": across + 1}
    figure.legend(handles=handles, fontsize=8, **(below if across > 1 else beside))
    return figure


def scatter(axis: Axes, rows: Mapping[str, Row], families: Sequence[str]) -> None:
    """A series of points per family, and the lower left frontier as steps."""
    line = [at(rows[s]) for s in frontier_of(rows)]
    axis.step(*zip(*line, strict=True), where="post", color="#aaaaaa", linewidth=1, zorder=1)
    for name in families:
        points = [at(row) for setting, row in rows.items() if family(setting) == name]
        if points:
            axis.plot(*zip(*points, strict=True), linestyle="", label=name, **style_of_family(name, families))


def at(row: Row) -> tuple[float, float]:
    return row["cache_bytes"] / MIB, max(row["kl"], LEAST_KL)


def spread_numbers(axis: Axes, rows: Mapping[str, Row], numbers: Mapping[str, str]) -> None:
    """Each numbered point's number beside it, where neither a point nor another number is; a hair leads to it."""
    figure = axis.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    scale, inside = figure.dpi / 72, axis.get_window_extent(renderer)
    ways = [(r * x, r * y) for r in range(9, 80, 5) for x, y in DIRECTIONS]
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in (axis.transData.transform(at(r)) for r in rows.values())]
    for setting in sorted(set(rows) & set(numbers), key=lambda s: at(rows[s])):
        point = axis.transData.transform(at(rows[setting]))
        text = axis.annotate(
            numbers[setting], at(rows[setting]), xytext=(0, 0), textcoords="offset points", fontsize=8, ha="center",
            va="center", arrowprops={"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
        width, height = Text.get_window_extent(text, renderer).padded(1).size
        for x, y in ways:
            left, bottom = point + scale * np.array([x, y]) - (width / 2, height / 2)
            moved = Bbox.from_bounds(left, bottom, width, height)
            if moved.count_overlaps(taken) == 0 and inside.contains(*moved.min) and inside.contains(*moved.max):
                break
        text.set_position((x, y))
        taken.append(moved)


def frontier_legend(families: Sequence[str], numbers: Mapping[str, str]) -> list[Line2D]:
    """What the markers are, then which settings the numbers are."""
    marks = [Line2D([], [], linestyle="", label=name, **style_of_family(name, families)) for name in families]
    named = [Line2D([], [], linestyle="", label=f"{n}: {short(s)}") for s, n in numbers.items()]
    step = Line2D([], [], color="#aaaaaa", linewidth=1, label="frontier: every smaller cache has 5% more KL or worse")
    return [*marks, step, *named]


# --- Position ---------------------------------------------------------------------------------------


def draw_position(records: Iterable[Record]) -> Figure | None:
    """Divergence by position in the window, of the first text. Of many settings, some of its frontier's."""
    runs = {run: rows for run, rows in score_runs(records).items() if set(rows) - {"full"}}
    if not runs:
        return None
    run, rows = next(iter(runs.items()))
    if len(runs) > 1:
        say(f"position: drawn for {run.title} alone, the first of {len(runs)} runs")
    settings = sorted(set(rows) - {"full"}, key=order)
    shown = selection({s: rows[s] for s in settings})
    if len(shown) < len(settings):
        lost = [short(s) for s in settings if s not in shown]
        say(f"position: {len(shown)} of {len(settings)} settings drawn; left out: {', '.join(lost)}")
    figure, axis = plt.subplots(figsize=(6, 3.4))
    looks = styles(shown)
    for setting in shown:
        by = rows[setting]["by_position"]
        values = [max(cell["kl"], LEAST_KL) for cell in by.values()]
        axis.plot(list(by), values, label=short(setting), **looks[setting])
    axis.tick_params(axis="x", labelsize=8)
    axis.set(yscale="log", xlabel=f"position in the text's window; {run.title}", ylabel="mean KL, nats")
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(", ".join(filter(None, (run.model, run.dtype))), fontsize=9)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside: the lines need all the room
    axis.grid(True, alpha=0.3)
    return figure


def selection(rows: Mapping[str, Row]) -> list[str]:
    """All settings, or where they are many the frontier's, evenly thinned with its ends; in the settings' order."""
    if len(rows) <= MOST_LINES:
        return list(rows)
    best = frontier_of(rows)
    if len(best) > MOST_LINES:
        best = [best[round(i * (len(best) - 1) / (MOST_LINES - 1))] for i in range(MOST_LINES)]
    return sorted(best, key=order)


# --- Passkeys ---------------------------------------------------------------------------------------


def draw_passkeys(records: Iterable[Record]) -> dict[str, Figure]:
    """A picture per model, text and grid: a map of lengths and depths per cache, four side by side.

    Keys are the file's, as in passkeys-val-books; a single one is called passkeys.
    """
    grids = passkey_grids(records)
    figures: dict[str, Figure] = {}
    for grid, rows in grids.items():
        words = ["passkeys", *([grid.text.partition(".")[0]] if len(grids) > 1 else [])]
        name = base = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
        n = 2
        while name in figures:
            name, n = f"{base}-{n}", n + 1
        figures[name] = passkey_figure(grid, rows)
    return figures


def passkey_figure(grid: Grid, rows: Mapping[str, Row]) -> Figure:
    settings = sorted(rows, key=order)
    across = min(4, len(settings))
    down = -(-len(settings) // across)
    figure, axes = plt.subplots(down, across, figsize=(max(3.4, 2.8 * across), 2.5 * down + 0.3), squeeze=False)
    for axis in axes.flat[len(settings) :]:
        axis.axis("off")
    for axis, setting in zip(axes.flat, settings, strict=False):
        draw_map(axis, rows[setting])
        axis.set_title(f"{short(setting)}\n{recalled_of(rows[setting])}", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("length, tokens", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("depth", fontsize=8)
    where = f" by {printable(grid.model, 60)}" if grid.model else ""
    where += f", hidden in {printable(grid.text, 60)}" if grid.text else ""
    figure.suptitle(f"Keys recalled{where}", fontsize=9)
    figure.tight_layout()
    return figure


def draw_map(axis: Axes, row: Row) -> None:
    lengths, depths = list(row["recalled"]), list(next(iter(row["recalled"].values())))
    shares = [[row["recalled"][n][d] for d in depths] for n in lengths]
    axis.imshow(shares, cmap="Greys_r", vmin=0, vmax=1, aspect="auto")
    for y, cells in enumerate(shares):
        for x, share in enumerate(cells):
            colour = "white" if share < 0.5 else "black"
            axis.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(depths)), [f"{float(d):.0%}" for d in depths], fontsize=7)
    axis.set_yticks(range(len(lengths)), lengths, fontsize=7)
    # Borders: cells of one share would be one field.
    axis.set_xticks([x + 0.5 for x in range(len(depths) - 1)], minor=True)
    axis.set_yticks([y + 0.5 for y in range(len(lengths) - 1)], minor=True)
    axis.grid(True, which="minor", color="#888888", linewidth=0.6)
    axis.tick_params(which="minor", length=0)


def recalled_of(row: Row) -> str:
    """ "99.5% of 200 keys", with the 95% interval where the file has one. 100% is all of them."""
    trials = trials_of(row)
    share = f"{row['mean']:.1%}" + (f" of {trials} keys" if trials else "")
    return f"{share} [{row['low']:.1%}, {row['high']:.1%}]" if "low" in row and "high" in row else share


# --- Table ------------------------------------------------------------------------------------------

COLUMNS = ("cache", "perplexity", "mean KL", "same top", "passkeys", "ROUGE-L", "to full's", "tokens/s")
Cells = dict[str, dict[str, str]]  # setting -> column -> text


def draw_tables(records: Sequence[Record]) -> dict[str, Figure]:
    """Every figure of every cache side by side, as far as the files have them: model -> table."""
    kinds = ("perplexity", "divergence", "passkey", "rouge", "report")
    records = [r for r in records if r.kind in kinds]
    models = dict.fromkeys(r.fields.get("model", "") for r in records)
    return {model: draw_table([r for r in records if r.fields.get("model", "") == model]) for model in models}


def draw_table(records: Sequence[Record]) -> Figure:
    """One model's. Each column is of one run: figures of others do not compare. The caption says of which."""
    cells: Cells = {}
    parts = (add_scores, add_passkeys, add_rouge, add_speed)
    notes = [note for add in parts if (note := add(records, cells))]
    columns = [c for c in COLUMNS if any(c in row for row in cells.values())]
    settings = sorted(cells, key=order)
    label = max(len(short(s)) for s in settings)
    figure, axis = plt.subplots(figsize=(0.075 * label + 1.1 * len(columns), 0.3 + 0.3 * len(cells)))
    axis.axis("off")
    table = axis.table(
        [[cells[s].get(c, "") for c in columns] for s in settings],
        rowLabels=[short(s) for s in settings], colLabels=columns, loc="center", cellLoc="right",
    )  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.4)
    model = records[0].fields.get("model", "")
    caption = "\n".join([*([printable(model, 60)] if model else []), *notes])
    axis.annotate(caption, (0, 0), xycoords=table, xytext=(0, -6), textcoords="offset points", va="top", fontsize=8)
    return figure


def add_scores(records: Iterable[Record], cells: Cells) -> str | None:
    runs = score_runs(records)
    if not runs:
        return None
    first = next(iter(runs))  # other texts are in the frontier
    same = {run: rows for run, rows in runs.items() if (run.text, run.sha256) == (first.text, first.sha256)}
    run, rows = choose(f"table, {first.text}", same, lambda r: (r.tokens, len(same[r])))
    for setting, r in rows.items():
        cells.setdefault(setting, {}).update({
            "cache": f"{r['cache_bytes'] / MIB:.2f} MiB", "perplexity": f"{r['perplexity']:.4f}",
            "mean KL": f"{r['kl']:.1e}" if r["kl"] else "0", "same top": f"{r['same_top']:.2%}",
        })  # fmt: skip
    return f"cache, perplexity, KL, same top: {run.title}"


def add_passkeys(records: Iterable[Record], cells: Cells) -> str | None:
    grids = passkey_grids(records)
    if not grids:
        return None
    grid, rows = choose("table, passkeys", grids, lambda g: (len(grids[g]), sum(map(float, g.lengths))))
    for setting, r in rows.items():
        cells.setdefault(setting, {})["passkeys"] = f"{r['mean']:.1%}"
    where = f" of {printable(grid.text, 60)}" if grid.text else ""
    return f"passkeys: in {', '.join(grid.lengths)} tokens{where}"


def add_rouge(records: Iterable[Record], cells: Cells) -> str | None:
    runs: dict[tuple[str, str, int], dict[str, Row]] = {}
    for record in records:
        for r in record.rows if record.kind == "rouge" else ():
            run = (r["text"], r.get("sha256", ""), int(r.get("documents", 0)))
            runs.setdefault(run, {})[r["cache"]] = r
    if not runs:
        return None
    (text, _, documents), rows = choose("table, ROUGE-L", runs, lambda run: (run[2], len(runs[run])))
    for setting, r in rows.items():
        means = {"to full's": r["rouge_l_to_full"]["mean"]}
        means |= (
            {"ROUGE-L": r["rouge_l"]["mean"]} if "rouge_l" in r else {}
        )  # a text that the model wrote has no summary
        cells.setdefault(setting, {}).update({column: f"{mean:.4f}" for column, mean in means.items()})
    return f"ROUGE-L: {printable(text, 60)}, {documents} documents; to full's: to the full cache's own summaries"


def add_speed(records: Iterable[Record], cells: Cells) -> str | None:
    runs: dict[tuple[str, str, int, int], dict[str, Row]] = {}
    for record in records:
        if record.kind == "report":
            r = record.fields
            runs.setdefault((r["device"], r["dtype"], r["batch"], r["tokens_read"]), {})[r["setting"]] = r
    if not runs:
        return None
    (device, dtype, batch, read), rows = choose("table, tokens/s", runs, lambda run: (len(runs[run]), run[3]))
    for setting, r in rows.items():
        cells.setdefault(setting, {})["tokens/s"] = f"{r['decode_tokens_per_s']:.1f}"
    return f"tokens/s: {device}, {dtype}, batch {batch}, after {read:,} tokens"
