"""Pictures of quality, from small made-up result files: the command, frontier, position, passkeys, RULER."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.text import Annotation
from plot_records import (
    CACHES,
    QUANTISED,
    WINDOW,
    benchmark,
    cells,
    keys,
    legend,
    passkeys,
    points,
    score,
    scores,
    step,
)

from common.errors import UserError
from plots import command as plot
from plots import pictures
from plots.records import read
from plots.styles import explain, style_of_family, styles


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


def test_every_picture_is_made_from_the_files_alone(tmp_path: Path) -> None:
    rows = [score(cache, i + 1, 0.1 * i, text) for text in ("a.txt", "b.txt") for i, cache in enumerate(CACHES)]
    (tmp_path / "d.json").write_text(json.dumps({"kind": "divergence", "rows": rows}) + "\n")
    (tmp_path / "p.json").write_text(json.dumps({"kind": "passkey", "rows": [keys(c, 0.5) for c in CACHES]}, indent=1))
    plot.main([str(tmp_path / "d.json"), str(tmp_path / "p.json"), "--out", str(tmp_path / "pictures")])
    expected = ("table", "memory", "cache", "frontier", "position", "passkeys")
    names = {f"{name}.{ending}" for name in expected for ending in ("png", "svg")}
    assert {f.name for f in (tmp_path / "pictures").iterdir()} == names
    for name in expected:
        png, svg = ((tmp_path / "pictures" / f"{name}.{ending}").read_bytes() for ending in ("png", "svg"))
        assert png.startswith(b"\x89PNG") and b"<svg" in svg


def test_missing_data_names_the_command_that_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot.main(["--out", str(tmp_path / "pictures")])
    err = capsys.readouterr().err
    assert "evaluate.py divergence" in err and "evaluate.py passkey" in err
    assert {f.stem for f in (tmp_path / "pictures").iterdir()} == {"memory", "cache"}


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "memory.png").mkdir()
    with pytest.raises(SystemExit) as exit_:
        plot.main(["--out", str(tmp_path)])
    err = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and err.startswith(f"plot.py: error: --out {tmp_path / 'memory.png'}: ")
    assert [f.name for f in tmp_path.iterdir()] == ["memory.png"]


def test_the_results_of_this_project_are_drawn_without_holes() -> None:
    """Every setting of the real model's is a point of every text's frontier, every cache of the bundled one's a row."""
    root = Path(__file__).parents[2] / "results"
    (record,) = read([root / "smollm2" / "perplexity.json"])
    figure = pictures.draw_frontier([record])
    assert figure is not None
    texts, settings = ({row[what] for row in record.rows} for what in ("text", "cache"))
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert len(panels) == len(texts) == 4
    for axis in panels:
        shown = {line.get_label(): len(line.get_xdata()) for line in axis.lines if line.get_marker() != "None"}
        assert sum(shown.values()) == len(settings) - 1  # the full cache is a line
    (table,) = pictures.draw_tables(read([*sorted(root.glob("p*.json")), *sorted(root.glob("rouge*.json"))])).values()
    assert len({tuple(row) for row in cells(table).values()}) == 1 and all(
        all(r.values()) for r in cells(table).values()
    )


def test_every_record_of_this_project_is_drawn_or_said_to_have_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    """README.md's command takes them all; one of llama.cpp's once stopped it."""
    root = Path(__file__).parents[2] / "results"
    files = [f for f in sorted(root.rglob("*.json*")) if not f.name.startswith("start_")]  # caches of long ago
    drawn = {record.path for record in read(files)}
    told = capsys.readouterr().err
    assert all(file in drawn or f"{file}: " in told for file in files)


def test_the_frontier_has_every_point_where_the_files_say() -> None:
    figure = pictures.draw_frontier([scores(score("full", 80, 0.0), score(QUANTISED, 20, 1e-5), score(WINDOW, 2, 0.5))])
    assert figure is not None
    (axis,) = figure.axes
    assert points(axis, "quantize_kv") == [(20, 1e-5)] and points(axis, "compress_kv") == [(2, 0.5)]
    assert [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1].count(80) == 1
    assert legend(figure)[:2] == ["compress_kv", "quantize_kv"]
    assert legend(figure)[-2:] == ["1: compress_kv 16/32", "2: quantize_kv 16/32"]  # along the line
    numbered = {t.get_text(): t.xy for t in axis.texts if isinstance(t, Annotation)}
    assert numbered == {"1": (2, 0.5), "2": (20, 1e-5)}


def test_ticks_are_numbers_where_all_caches_are_within_one_power_of_ten() -> None:
    """Labels of minor ticks were formulas, and formulas are not drawn: their source was, one over the other."""
    figure = pictures.draw_frontier(
        [scores(score("full", 3.1, 0.0), score(QUANTISED, 2.2, 2e-5), score(WINDOW, 1.4, 4e-5))]
    )
    assert figure is not None
    figure.canvas.draw()
    (axis,) = figure.axes
    for side in (axis.xaxis, axis.yaxis):
        assert all(re.fullmatch(r"[0-9.e-]*", label.get_text()) for label in side.get_ticklabels(which="both"))
    assert "2" in [label.get_text() for label in axis.get_xticklabels()]


def test_no_family_is_dropped() -> None:
    """Seven markers were there, and the eighth family had none: its points were not drawn."""
    names = [f"plugin{i}:sink_size=4,window_size={8 + n}" for i in range(30) for n in range(2)]
    rows = [score(name, 10 + i, 1.0 / (i + 1)) for i, name in enumerate(names)]
    figure = pictures.draw_frontier([scores(score("full", 80, 0.0), *rows)])
    assert figure is not None
    assert all(len(points(figure.axes[0], f"plugin{i}")) == 2 for i in range(30))
    families = [f"plugin{i}" for i in range(24)]
    assert len({tuple(sorted(style_of_family(name, families).items())) for name in families}) == 24


def test_numbers_lie_neither_on_points_nor_on_each_other() -> None:
    """Names of points that lie close covered each other."""
    rows = [score(f"quantize_kv:sink_size=4,window_size={i}", 20 + 0.3 * i, 1e-5 * 0.8**i) for i in range(1, 10)]
    figure = pictures.draw_frontier([scores(score("full", 80, 0.0), score(WINDOW, 1, 0.5), *rows)])
    assert figure is not None
    (axis,) = figure.axes
    renderer = figure.canvas.get_renderer()
    texts = [t for t in axis.texts if isinstance(t, Annotation)]
    boxes = [super(Annotation, t).get_window_extent(renderer) for t in texts if t.update_positions(renderer) is None]
    assert len(boxes) == 10 and all(box.count_overlaps(boxes) == 1 for box in boxes)
    marks = axis.transData.transform([t.xy for t in texts])
    assert not any(box.contains(x, y) for box in boxes for x, y in marks)
    frame = axis.get_window_extent(renderer)
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)


def test_the_frontier_leaves_out_what_is_within_errors_of_a_smaller_one() -> None:
    rows = {"a": score("a", 1, 1.0), "b": score("b", 2, 0.96), "c": score("c", 3, 0.5), "d": score("d", 4, 0.6)}
    assert pictures.frontier_of(rows) == ["a", "c"]


def test_runs_of_other_lengths_are_panels_of_their_own() -> None:
    """A sweep over 2 windows stood in one panel with scores over 4, and one overwrote the other."""
    two = scores(score("full", 80, 0.0, tokens=20, windows=2), score(QUANTISED, 20, 1e-5, tokens=20, windows=2))
    four = scores(score("full", 80, 0.0, tokens=40, windows=4), score(QUANTISED, 20, 2e-5, tokens=40, windows=4))
    figure = pictures.draw_frontier([two, four])
    assert figure is not None
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["a.txt, 2 windows, 20 tokens", "a.txt, 4 windows, 40 tokens"]
    assert [points(axis, "quantize_kv") for axis in figure.axes] == [[(20, 1e-5)], [(20, 2e-5)]]


def test_files_that_disagree_on_one_run_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    twice = [scores(score("full", 80, 0.0), score(QUANTISED, 20, kl)) for kl in (1e-5, 2e-3)]
    assert pictures.draw_frontier(twice) is not None
    assert "quantize_kv 16/32 on a.txt: two files disagree" in capsys.readouterr().err


def test_a_cache_that_does_not_say_its_bytes_is_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    figure = pictures.draw_frontier([scores(score("full", 80, 0.0), score(QUANTISED, 20, 0.1), score("mine", 0, 0.2))])
    assert figure is not None and legend(figure)[0] == "quantize_kv"
    assert "mine on a.txt: their caches do not say their bytes" in capsys.readouterr().err


def test_position_draws_each_setting_by_its_buckets() -> None:
    figure = pictures.draw_position([scores(score("full", 80, 0.0), score(QUANTISED, 20, 1e-5), score(WINDOW, 2, 0.0))])
    assert figure is not None
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == ["compress_kv 16/32", "quantize_kv 16/32"]
    assert list(axis.lines[1].get_ydata()) == [5e-6, 1e-5] and list(axis.lines[1].get_xdata()) == ["0-256", "256-1024"]
    assert list(axis.lines[0].get_ydata()) == [pictures.LEAST_KL] * 2


def test_position_of_many_settings_is_a_selection(capsys: pytest.CaptureFixture[str]) -> None:
    """Forty lines under a legend of twice the plot's height."""
    rows = [score(f"quantize_kv:sink_size=4,window_size={n}", n, 1 / n) for n in range(1, 41)]
    figure = pictures.draw_position([scores(score("full", 80, 0.0), *rows)])
    assert figure is not None
    names = [line.get_label() for line in figure.axes[0].lines]
    assert len(names) == 8 and names[0] == "quantize_kv 4/1"
    looks = {(line.get_marker(), line.get_markerfacecolor(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 8
    err = capsys.readouterr().err
    assert "8 of 40 settings drawn" in err and "quantize_kv 4/2," in err and "quantize_kv 4/1," not in err


def ruler_row(cache: str, share: float, sha256: str = "x", **others: Any) -> dict[str, Any]:
    scores = {task: {"1024": share, "4096": 0.5} for task in ("vt", "cwe")}
    return {"cache": cache, "mean": share, "scores": scores, "sha256": sha256, "trials_per_cell": 10, **others}


def test_ruler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A panel per task; rows of other samples do not compare, and a hole is told by its row."""
    rows = [ruler_row("full", 0.9), ruler_row(QUANTISED, 0.8)]
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"kind": "ruler", "model": "m", "rows": rows}) + "\n")
    other = json.dumps({"kind": "ruler", "model": "m", "rows": [ruler_row("full", 0.1, "y")]})
    (tmp_path / "s.json").write_text(other + "\n")
    figure = plot.draw(read([file, tmp_path / "s.json"]))["ruler"]
    assert [axis.get_title() for axis in figure.axes[:2]] == ["vt", "cwe"]
    assert legend(figure) == ["full", "quantize_kv 16/32"]
    heights = [list(bar.lines[0].get_ydata()) for bar in figure.axes[0].containers]
    assert heights == [[0.9, 0.5], [0.8, 0.5]]
    assert "RULER: 2 runs do not compare" in capsys.readouterr().err
    rows[1]["scores"]["cwe"].pop("4096")
    file.write_text(json.dumps({"kind": "ruler", "rows": rows}))
    with pytest.raises(UserError, match="row 2, cwe: every task has the same lengths"):
        read([file])


def test_a_cache_looks_alike_in_every_picture_and_its_name_is_explained(tmp_path: Path) -> None:
    settings = ["full", WINDOW, QUANTISED, QUANTISED + ",v_bits=4"]
    assert styles(settings)[QUANTISED] == styles([QUANTISED])[QUANTISED]
    assert len({look["marker"] for look in styles(settings).values()}) == 4
    figure = plot.speed_figure([benchmark(*(step(s, 256) for s in settings), *(step(s, 512) for s in settings)).fields])
    assert "llama-3.1-8b" in figure.get_suptitle() and "NVIDIA H200" in figure.get_suptitle()
    explain(figure)
    note = figure.texts[-1].get_text()
    assert "(sink)" in note and "K8V4: keys in 8 bits, values in 4" in note and "mean KL" not in note


def test_names_from_files_are_no_formulas_and_no_control_characters(tmp_path: Path) -> None:
    r"""`$\frac$` in a text's name was mathematics to matplotlib: a traceback."""
    text = "$\\frac$ \x1b[2J\n" + "long" * 1000
    rows = [score(name, 10 + len(name), 1e-5, text=text) for name in ("full", QUANTISED, "mine$x$:a=$\\frac$")]
    made = plot.draw([scores(*rows, model="$\\sqrt$"), passkeys(keys("full", 1.0, text=text, sha256="a"))])
    for name, figure in made.items():
        pictures.save(figure, tmp_path, name)
    assert len(list(tmp_path.glob("*.png"))) == len(made) >= 4
    for svg in tmp_path.glob("*.svg"):
        assert "\x1b" not in svg.read_text()
