"""Pictures from small made-up result files: what is drawn, by the figures' own objects."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

import kv_cache
from common.errors import UserError
from kv_cache import parse_policy
from model import CONFIGS
from plots import command as plot
from plots import memory as footprint
from plots import pictures
from plots.records import Record, read
from plots.styles import explain, style_of_family, styles

QUANTISED, WINDOW = "quantize_kv:sink_size=16,window_size=32", "compress_kv:sink_size=16,window_size=32,positions=cache"
CACHES = ["full", QUANTISED, WINDOW]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


def score(cache: str, mib: float, kl: float, text: str = "a.txt", **others: Any) -> dict[str, Any]:
    by_position = {"0-256": {"kl": kl / 2}, "256-1024": {"kl": kl}}
    return {"text": text, "cache": cache, "cache_bytes": mib * MIB, "perplexity": 9.0 + kl, "same_top": 1.0, "kl": kl,
            "by_position": by_position, **others}  # fmt: skip


def scores(*rows: dict[str, Any], model: str = "m") -> Record:
    return Record(Path("scores.json"), "divergence", {"kind": "divergence", "model": model, "rows": list(rows)})


def keys(cache: str, share: float, lengths: tuple[str, ...] = ("1024", "2048"), **others: Any) -> dict[str, Any]:
    return {"cache": cache, "mean": share, "recalled": {n: {"0": share, "0.5": 1.0} for n in lengths}, **others}


def passkeys(*rows: dict[str, Any], path: str = "keys.json") -> Record:
    return Record(Path(path), "passkey", {"kind": "passkey", "model": "m", "rows": list(rows)})


def report(setting: str, **changes: Any) -> Record:
    fields = {"model": "m", "device": "cpu", "dtype": "float32", "batch": 1, "tokens_read": 100, "tokens_written": 28,
              "decode_tokens_per_s": 20.0, "cache_bytes": {"window": 30 * MIB, "sink": 10 * MIB}, "setting": setting,
              "weight_bytes": 5 * MIB, "peak_memory_bytes": 100 * MIB}  # fmt: skip
    return Record(Path("report.json"), "report", fields | changes)


def benchmark(*rows: dict[str, Any], model: str = "llama-3.1-8b", **changes: Any) -> Record:
    fields = {"model": model, "device": "NVIDIA H200", "dtype": "bfloat16", "rows": list(rows)}
    return Record(Path("benchmark.json"), "benchmark", fields | changes)


def step(cache: str, context: int, cache_bytes: int | None = None, batch: int = 1, **others: Any) -> dict[str, Any]:
    return {"cache": cache, "batch": batch, "context": context, "step_ms": context / 100, "cache_bytes": cache_bytes,
            **others}  # fmt: skip


def ticks(axis: Axes) -> tuple[list[str], list[str]]:
    return [t.get_text() for t in axis.get_xticklabels()], [t.get_text() for t in axis.get_yticklabels()]


def points(axis: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axis.lines if line.get_label() == label]
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def cells(figure: Figure) -> dict[str, dict[str, str]]:
    """A table's: row -> column -> text."""
    (table,) = figure.axes[0].tables
    found = {at: cell.get_text().get_text() for at, cell in table.get_celld().items()}
    return {name: {found[0, c]: text for (row, c), text in found.items() if row == r and c >= 0}
            for (r, column), name in found.items() if column == -1}  # fmt: skip


# --- The command ------------------------------------------------------------------------------------


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


# --- Frontier and position --------------------------------------------------------------------------


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


# --- Passkeys ---------------------------------------------------------------------------------------


def test_each_map_of_passkeys_has_its_own_lengths() -> None:
    """The last map's labels stood beside all: lengths 1024 and 2048 were labelled 512 and 700."""
    figures = pictures.draw_passkeys(
        [passkeys(keys("full", 1.0)), passkeys(keys(QUANTISED, 0.25, ("512", "700", "900")))]
    )
    (first,), (second,) = (figure.axes for figure in figures.values())
    assert ticks(first) == (["0%", "50%"], ["1024", "2048"])
    assert ticks(second) == (["0%", "50%"], ["512", "700", "900"])
    assert [t.get_text() for t in second.texts] == ["25%", "100%"] * 3
    assert second.images[0].get_array().tolist() == [[0.25, 1.0]] * 3
    assert list(second.get_yticks(minor=True)) == [0.5, 1.5] and list(second.get_xticks(minor=True)) == [0.5]
    borders = [*second.xaxis.get_minor_ticks(), *second.yaxis.get_minor_ticks()]
    assert len(borders) == 3 and all(tick.gridline.get_visible() for tick in borders)  # cells of 100% were one field


def test_maps_say_how_many_passkeys_and_the_interval() -> None:
    rows = [keys("full", 1.0, trials_per_cell=4), keys(QUANTISED, 0.5, trials=12, low=0.25, high=0.75), keys("mine", 0)]
    titles = [axis.get_title() for axis in pictures.draw_passkeys([passkeys(*rows)])["passkeys"].axes[:3]]
    assert titles == ["full\n100.0% of 16 keys", "mine\n0.0%", "quantize_kv 16/32\n50.0% of 12 keys [25.0%, 75.0%]"]


def test_fields_that_newer_files_have_do_no_harm(tmp_path: Path) -> None:
    row = keys("full", 0.5, text="t", sha256=None, tokens=[1], trials=8, trials_per_cell=2, low=0.25, high=0.75)
    (tmp_path / "p.json").write_text(json.dumps({"kind": "passkey", "model": "m", "settings": {}, "rows": [row]}))
    (axis,) = pictures.draw_passkeys(read([tmp_path / "p.json"]))["passkeys"].axes
    assert axis.get_title() == "full\n50.0% of 8 keys [25.0%, 75.0%]"


def test_a_cache_in_two_grids_is_two_maps_and_in_one_the_larger_file_is_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few, many = keys("full", 0.5, trials_per_cell=1), keys("full", 1.0, trials_per_cell=8)
    other = keys("full", 0.0, ("512",), trials_per_cell=1)
    for order in ((few, many, other), (many, few, other)):
        figures = pictures.draw_passkeys([passkeys(row, path=f"{row['mean']}.json") for row in order]).values()
        titles = [axis.get_title() for figure in figures for axis in figure.axes]
        assert titles == ["full\n100.0% of 32 keys", "full\n0.0% of 2 keys"]
        assert (
            "passkeys of full: two files disagree: 1.0.json, with the most trials, is taken" in capsys.readouterr().err
        )


# --- Table ------------------------------------------------------------------------------------------


def test_the_table_has_every_figure_of_every_cache() -> None:
    interval = {"mean": 0.25, "low": 0.0, "high": 1.0}
    row = {"text": "s.jsonl", "cache": QUANTISED, "documents": 3, "rouge_l": interval, "rouge_l_to_full": interval}
    rouge = Record(Path("r.json"), "rouge", {"model": "m", "rows": [row]})
    figure = plot.draw([
        scores(score("full", 80, 0.0), score(QUANTISED, 20, 1e-5)), passkeys(keys(QUANTISED, 0.5, trials_per_cell=2)),
        rouge, report(QUANTISED),
    ])["table"]  # fmt: skip
    assert cells(figure) == {
        "full": {"cache": "80.00 MiB", "perplexity": "9.0000", "mean KL": "0", "same top": "100.00%", "passkeys": "",
                 "ROUGE-L": "", "to full's": "", "tokens/s": ""},
        "quantize_kv 16/32": {"passkeys": "50.0%", "cache": "20.00 MiB", "perplexity": "9.0000",
                              "mean KL": "1.0e-05", "same top": "100.00%", "ROUGE-L": "0.2500", "to full's": "0.2500",
                              "tokens/s": "20.0"},
    }  # fmt: skip
    (caption,) = [t.get_text() for t in figure.axes[0].texts]
    assert caption.splitlines() == [
        "m", "cache, perplexity, KL, same top: a.txt", "passkeys: in 1024, 2048 tokens",
        "ROUGE-L: s.jsonl, 3 documents; to full's: to the full cache's own summaries",
            "tokens/s: cpu, float32, batch 1, after 100 tokens",
    ]  # fmt: skip


def test_the_table_never_mixes_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """A perplexity over 2 windows stood beside those over 4, whichever file came last."""
    two = scores(
        score("full", 80, 0.0, tokens=20), score(QUANTISED, 20, 0.5, tokens=20), score(WINDOW, 1, 2, tokens=20)
    )
    four = scores(score("full", 80, 0.0, tokens=40), score(QUANTISED, 20, 0.25, tokens=40))
    for files in ([two, four], [four, two]):
        (table,) = pictures.draw_tables(files).values()
        assert {name: row["mean KL"] for name, row in cells(table).items()} == {
            "full": "0",
            "quantize_kv 16/32": "2.5e-01",
        }
        assert "without 1 settings that only others have: compress_kv 16/32" in capsys.readouterr().err


def test_each_model_has_its_table() -> None:
    figures = plot.draw([scores(score("full", 80, 0.0), model="a b"), scores(score("full", 40, 0.0), model="c")])
    assert {"table-a-b", "table-c"} <= set(figures) and "table" not in figures
    assert cells(figures["table-c"])["full"]["cache"] == "40.00 MiB"


# --- Memory -----------------------------------------------------------------------------------------


def bars(axis: Axes) -> dict[str, list[float]]:
    return {str(c.get_label()): [bar.get_width() for bar in c] for c in axis.containers}


def test_memory_is_what_the_reports_say() -> None:
    figure = footprint.draw_footprints([report("full"), report(QUANTISED, cache_bytes={"window": 20 * MIB})])
    (axis,) = figure["memory-m-cpu"].axes
    assert bars(axis) == {"weights": [5, 5], "cache": [40, 20], "rest": [55, 75]}
    assert ticks(axis)[1] == ["full, 128", "quantize_kv 16/32, 128"]
    assert [t.get_text() for t in axis.texts] == [" 100.0", " 100.0"]
    assert axis.get_title() == "m, float32, cpu, batch 1, generate.py"
    (axis,) = figure["cache-m-cpu"].axes
    assert points(axis, "full") == [(128, 40)] and points(axis, "quantize_kv 16/32") == [(128, 20)]


def test_cache_bytes_are_the_files_and_the_plan_is_a_line() -> None:
    config, sizes = CONFIGS["llama-3.1-8b"], {}
    for cache in ("full", QUANTISED):
        for n in (256, 8192):
            at = footprint.shape(config, n, footprint.DTYPES["bfloat16"])
            sizes[cache, n] = sum(kv_cache.plan(parse_policy(cache), config.n_layer, at).values())
    rows = [step(cache, n, n_bytes + MIB) for (cache, n), n_bytes in sizes.items()] + [step("theirs", 256)]
    (axis,) = footprint.draw_footprints([benchmark(*rows)])["cache-llama-3-1-8b-nvidia-h200"].axes
    assert points(axis, "full") == [(n, sizes["full", n] / MIB + 1) for n in (256, 8192)]
    line = dict(points(axis, "quantize_kv 16/32, planned"))
    assert line[8192] == sizes[QUANTISED, 8192] / MIB
    assert len(axis.lines) == 4  # a cache that nobody can tell the bytes of has none
    assert ticks(axis)[0] == ["256", "8k"]


def test_a_peak_that_all_caches_share_is_not_drawn_and_one_of_their_own_is() -> None:
    """Of old files the peak is the whole process's: it says nothing of a cache."""
    weights = footprint.weight_bytes(CONFIGS["llama-3.1-8b"], footprint.DTYPES["bfloat16"]) / 2**30
    for peaks, expected in (((30, 30), None), ((30, 25), [30 - weights - 2, 25 - weights - 1])):
        rows = [step(cache, 8192, n * 2**30, peak_memory_bytes=peak * 2**30)
                for cache, n, peak in zip(("full", QUANTISED), (2, 1), peaks, strict=True)]  # fmt: skip
        (axis,) = footprint.draw_footprints([benchmark(*rows)])["memory-llama-3-1-8b-nvidia-h200"].axes
        assert bars(axis).get("rest") == (expected and pytest.approx(expected))
        assert bars(axis)["weights"] == pytest.approx([weights] * 2) and bars(axis)["cache"] == [2, 1]


def test_a_report_of_the_bundled_model_stands_at_the_capacity_of_its_cache() -> None:
    """Not at the tokens read and written, which an early end leaves below it."""
    config = footprint.config_of("demo")
    assert config is not None
    full = 2 * config.n_layer * config.n_kv_head * config.head_dim * 4 * 500
    made = [report("full", model="demo", full_cache_bytes=full, cache_bytes={"window": full})]
    (axis,) = footprint.draw_footprints(made)["cache-demo-cpu"].axes
    assert points(axis, "full") == [(500, full / MIB)]
    assert dict(points(axis, "full, planned"))[500] == full / MIB


def test_without_bytes_in_the_files_memory_is_the_plan_and_says_so() -> None:
    figures = footprint.draw_footprints([scores(score("full", 80, 0.0))])
    (memory,), (cache,) = figures["memory"].axes, figures["cache"].axes
    assert "llama-3.1-8b" in memory.get_title() and "planned" in memory.get_title() and "planned" in cache.get_title()
    assert bars(memory)["cache"][::3] == [1, 4, 16]  # GiB of the full cache at 8k, 32k and 128k
    assert len(ticks(memory)[1]) == 9 and len(cache.lines) == 3


# --- Speed ------------------------------------------------------------------------------------------


def test_benchmarks_are_drawn_apart_by_model_and_device(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [step(cache, context, batch=batch) for cache in ("full", QUANTISED, "transformers dynamic")
            for batch, context in ((1, 100), (1, 2048), (8, 100))]  # fmt: skip
    figures = plot.draw([benchmark(*rows, model="m", device=device) for device in ("cpu", "NVIDIA H200", "cpu")])
    assert {name for name in figures if name.startswith("speed")} == {"speed-m-cpu", "speed-m-nvidia-h200"}
    assert "table" not in figures and "speed-m-cpu: files repeat 9 measurements" in capsys.readouterr().err
    latency, ratio, bar, _ = figures["speed-m-nvidia-h200"].axes
    assert points(latency, "transformers dynamic") == [(100, 1.0), (2048, 20.48)]
    assert all(list(line.get_ydata()) == [1, 1] for line in ratio.lines) and ratio.get_ylabel() == "speed over full"
    assert ticks(latency)[0] == ["100", "2k"]
    assert ticks(bar)[1] == ["full", "quantize_kv 16/32", "transformers dynamic"]
    assert [b.get_width() for b in bar.patches] == [1.0] * 3


def test_benchmarks_of_two_dtypes_are_two_pictures() -> None:
    figures = plot.draw([benchmark(step("full", 8), dtype=dtype) for dtype in ("bfloat16", "float32")])
    assert {name[-8:] for name in figures if name.startswith("speed")} == {"bfloat16", "-float32"}


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


# --- Names ------------------------------------------------------------------------------------------


def test_texts_of_two_files_are_two_pictures_and_not_one_cache_twice() -> None:
    """README's own plot line: 16 maps, each cache twice, of two texts of which two more were dropped."""
    rows = [
        keys("full", 1.0, text=f"{name}.txt.xz", sha256=name, trials_per_cell=2)
        for name in ("books", "novels", "books")
    ]
    figures = pictures.draw_passkeys([passkeys(row) for row in rows])
    assert list(figures) == ["passkeys-books", "passkeys-novels"] and all(len(f.axes) == 1 for f in figures.values())
    assert "books.txt.xz" in figures["passkeys-books"].get_suptitle()


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
