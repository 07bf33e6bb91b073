"""README.md's tables are what the result files say, and what they say is put into them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from evaluation.ruler import beside_full
from plots import readme_tables

SETTINGS = [
    "full", "quantize_kv:sink_size=16,window_size=32", "quantize_kv:sink_size=16,window_size=128,k_bits=4,v_bits=4",
    "quantize_kv:sink_size=16,window_size=128,k_bits=3,v_bits=2",
    "compress_kv:sink_size=16,window_size=32,positions=cache",
]  # fmt: skip


def test_the_readme_says_what_the_files_say() -> None:
    texts = [path.read_text() for path in readme_tables.FILES]
    named = [name for text in texts for name in re.findall(r"<!-- (.*), by scripts/readme_tables\.py -->", text)]
    assert sorted(named) == sorted(readme_tables.TABLES)
    assert [readme_tables.filled(text) for text in texts] == texts, "run scripts/readme_tables.py"


def test_records_that_are_listed_are_there() -> None:
    listed = re.findall(r"`([\w/*.-]+\.jsonl?)`", (readme_tables.RESULTS / "README.md").read_text())
    records = [path.relative_to(readme_tables.RESULTS) for path in readme_tables.RESULTS.rglob("*.json*")]
    assert [pattern for pattern in listed if not any(record.match(pattern) for record in records)] == []


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two texts of 100 and 300 tokens, five caches."""
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    (tmp_path / "smollm2").mkdir()

    def put(name: str, kind: str | None, rows: list[dict[str, Any]]) -> None:
        kinds = {"model": "m", "device": "d"} | ({} if kind is None else {"kind": kind, "finished": True})
        (tmp_path / name).write_text(json.dumps(kinds | {"rows": rows}))

    scores = [
        {"text": text, "cache": cache, "tokens": n, "perplexity": 20.0, "perplexity_rise": 0.001 * i, "kl": i * kl,
         "kl_p99": 0.5, "same_top": 1 - 0.01 * i, "cache_bytes": 10.0, "bits_per_byte": 1.5,
         "by_position": {"0-8": {"kl": 0}}}
        for text, n, kl in (("val_books.txt.xz", 100, 1e-3), ("mine.txt", 300, 2e-3))
        for i, cache in enumerate(SETTINGS)
    ]  # fmt: skip
    steps = [
        {"cache": cache, "batch": batch, "context": n, "tokens_per_s": 1000 // (i + 1) - at, "step_ms": 1.0,
         "cache_bytes": 1000 - 150 * i}
        for i, cache in enumerate(SETTINGS) for at, (batch, n) in enumerate(((1, 8192), (1, 131072), (8, 32768)))
        if not (i == 3 and at)
    ]  # fmt: skip
    (tmp_path / readme_tables.STEPS).parent.mkdir()
    put(readme_tables.STEPS, None, steps)
    times = {"ours bf16": 300.0, "SDPA flash": 240.0, "ours int8": 120.0, "ours K4V4": 80.0}
    put(
        readme_tables.KERNELS, None, [{"batch": 8, "context": 32768, "version": v, "us": us} for v, us in times.items()]
    )
    for folder in ("", "smollm2/"):
        put(f"{folder}perplexity.json", "perplexity", scores)
        put(f"{folder}passkey.json", "passkey", [{"cache": cache, "mean": 0.5, "recalled": {}} for cache in SETTINGS])
    rouge = {"rouge_l": {"mean": 0.1}, "rouge_l_to_full": {"mean": 0.9}}
    put("rouge.json", "rouge", [rouge | {"cache": cache} for cache in SETTINGS[:2]])
    theirs = {"text": "mine.txt", "kl": 4e-3, "kl_p99": 0.1, "same_top": 0.9, "perplexity_rise": -0.01}
    put(
        "smollm2/llama_cpp.json",
        "llama.cpp",
        [theirs | {"cache": "f16", "bits": 16}, theirs | {"cache": "q8_0", "bits": 8.5}],
    )
    put("smollm2/divergence-window-4k.json", "divergence", [r | {"bits_per_quantised_element": 8.375} for r in scores])
    for half, caches in ((1, SETTINGS[:2]), (2, [SETTINGS[0], SETTINGS[2]])):
        cell = {"kept": 0.75, "kept_rise": -0.01, "kept_rise_error": 0.005, "kept_trials": 100}
        put(
            f"smollm2/ruler-{half}.json",
            "ruler",
            [{"cache": c, "sha256": "a", "by_length": {"8192": cell}} for c in caches],
        )
    nothing = {"kept_trials": 0}  # full scores on nothing of it
    third = [{"cache": c, "sha256": "b", "by_length": {"8192": nothing}} for c in SETTINGS[:3]]
    put(readme_tables.RULER[2], "ruler", third)
    return tmp_path


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_what_the_tables_hold(results: Path) -> None:
    header, _, *rows = cells(readme_tables.TABLES["choose"]())
    assert len(header) == 10 and [row[0] for row in rows] == [
        "full", "`quantize_kv`", "`quantize_kv --bits 4 --window_size 128`",
        "`quantize_kv --k_bits 3 --v_bits 2 --window_size 128`", "`compress_kv`",
    ]  # fmt: skip
    speeds = ["333", "332", "331"]
    assert rows[2][1:] == ["4.31 (4.50)", "27%", *speeds, "3.5e-3", "98.00%", "+0.20%", "50.0%"]
    assert rows[0][1:] == ["16", "100%", "1000", "999", "998", "0", "100.00%", "0.00%", "50.0%"]
    assert rows[3][3:6] == ["250", "", ""]  # what was not measured
    assert rows[4][1:6] == ["dropped", "0.04%", "200", "199", "198"]
    header, _, *rows = cells(readme_tables.TABLES["attention"]())
    assert header == ["", "8 x 32k"] and rows == [
        ["fastest in 16 bits, us", "240.0"], ["8 bits", "2.00x"], ["K4V4", "3.00x"]
    ]  # fmt: skip
    texts = cells(readme_tables.TABLES["texts"]())
    assert (
        texts[2][:4] == ["held-out books", "20.0000", "1.0e-3, +0.10%", "2.0e-3, +0.20%"] and texts[3][0] == "mine.txt"
    )
    beside = cells(readme_tables.TABLES["llama.cpp"]())
    assert beside[2] == ["llama.cpp q8_0", "8.5", "4.0e-3", "0.10", "90.00%", "-1.00%"]
    assert beside[3][:3] == ["**`quantize_kv`**", "8.375", "2.0e-3"]
    ruler = cells(readme_tables.TABLES["ruler"]())
    assert ruler[2:] == [
        ["full", "75.0%"], ["`quantize_kv`", "75.0% (-1.0 ± 0.5)"],
        ["`quantize_kv --bits 4 --window_size 128`", "75.0% (-1.0 ± 0.5)"],
    ]  # fmt: skip
    assert cells(readme_tables.TABLES["bundled"]())[3] == [
        "`quantize_kv`",
        "1.0e-3",
        "99.00%",
        "+0.10%",
        "50.0%",
        "0.100",
        "0.900",
    ]


def test_cells_of_several_samples_are_one() -> None:
    """As `beside_full` has it of all at once."""
    found, full = [1, 0, 1, 1, 0.5, 0, 1], [1, 1, 1, 0, 0.25, 1, 1]
    apart = [beside_full(part, found, full) for part in (range(3), range(3, 7))]
    whole = beside_full(range(7), found, full)
    assert readme_tables.pooled(apart) == pytest.approx({name: whole[name] for name in readme_tables.pooled(apart)})


def test_the_card(results: Path) -> None:
    assert cells(readme_tables.TABLES["card"]())[3] == ["quantize_kv 16/32", "10 B", "1.5000", "50.0%"]


def test_tables_are_filled_in(results: Path) -> None:
    text = "a\n<!-- texts, by scripts/readme_tables.py -->\n\nold\n<!-- end -->\nb"
    filled = readme_tables.filled(text)
    assert "old" not in filled and "held-out books" in filled and filled.startswith("a\n") and filled.endswith("\nb")
    assert readme_tables.filled(filled) == filled
    with pytest.raises(UserError, match="no table is called 'other'"):
        readme_tables.filled(text.replace("texts", "other"))
