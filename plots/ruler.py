"""RULER's scores as a picture: a panel per task, score against length, a line per cache with its interval."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.figure import Figure

from common.messages import say
from evaluation.passkeys import wilson
from plots.pictures import thousands
from plots.records import Record, Row, choose, order, short
from plots.styles import plt, styles

Grid = tuple[str, tuple[str, ...], tuple[str, ...], str]  # model, tasks, lengths, sha256 of the samples


def ruler_grids(records: Iterable[Record]) -> dict[Grid, dict[str, Row]]:
    """Rows that were given the same samples: grid -> setting -> row."""
    grids: dict[Grid, dict[str, Row]] = {}
    for record in records:
        for row in record.rows if record.kind == "ruler" else ():
            scores = row["scores"]
            lengths = tuple(next(iter(scores.values())))
            grid = (record.fields.get("model", ""), tuple(scores), lengths, row.get("sha256", ""))
            rows = grids.setdefault(grid, {})
            if row["cache"] in rows:
                say(f"RULER: {short(row['cache'])} is there twice with the same samples: {record.path} is taken")
            rows[row["cache"]] = row
    return grids


def draw_ruler(records: Iterable[Record]) -> Figure:
    """One run's; others do not compare, and standard error says that they are left out."""
    grids = ruler_grids(records)
    (model, tasks, lengths, _), rows = choose("RULER", grids, lambda g: (len(grids[g]), len(g[1]) * len(g[2])))
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.4 * across, 2.6 * down), squeeze=False, sharey=True)
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    settings = sorted(rows, key=order)
    looks = styles(settings)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for i, setting in enumerate(settings):
            row = rows[setting]
            shares = [row["scores"][task][n] for n in lengths]
            n_trial = int(row.get("trials_per_cell", 0))
            style = looks[setting] | {"capsize": 2}
            x = [n + 0.06 * (i - (len(settings) - 1) / 2) for n in range(len(lengths))]  # apart, or they would hide
            bounds = [wilson(share * n_trial, n_trial) for share in shares] if n_trial else []
            errors = [[max(0.0, s - low) for s, (low, _) in zip(shares, bounds, strict=True)],
                      [max(0.0, high - s) for s, (_, high) in zip(shares, bounds, strict=True)]]  # fmt: skip
            axis.errorbar(x, shares, yerr=errors if bounds else None, label=short(setting), linewidth=1, **style)
        axis.set_title(task, fontsize=9)
        axis.set_xticks(range(len(lengths)), [thousands(int(n)) for n in lengths], fontsize=8)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(True, alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of answers", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("length, tokens", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)
    figure.suptitle(f"RULER, {model}" if model else "RULER", fontsize=9)
    figure.tight_layout()
    return figure
