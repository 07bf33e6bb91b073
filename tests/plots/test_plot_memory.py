"""The pictures of memory and of speed, and the table, from small made-up result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes
from plot_records import (
    MIB,
    QUANTISED,
    WINDOW,
    benchmark,
    cells,
    keys,
    passkeys,
    points,
    report,
    score,
    scores,
    step,
    ticks,
)

import kv_cache
from kv_cache import parse_policy
from model import CONFIGS
from plots import command as plot
from plots import memory as footprint
from plots import pictures
from plots.records import Record


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


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
