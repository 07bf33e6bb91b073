"""evaluate.py passkey: what is hidden, asked and counted; and how settings share one prefill."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluate_calls import CACHES, record, spied_reads, text_file

from evaluation import command as evaluate
from evaluation import passkeys as retrieval
from evaluation import subject


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_file(tmp_path)


def test_passkeys_read_the_cache(tiny: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights recall nothing; what counts is that every cell is tried, and the question finds only the cache."""
    asked = spied_reads(monkeypatch)
    base = ["--checkpoint_path", tiny, "--text", text, "--lengths", 200, 240, 200, "--depths", 0, 1, "--trials", 2]
    r = record(tmp_path, "passkey", *base, *CACHES)
    questions = [(name, before + n) for name, before, n in asked if before]
    assert len(questions) == 2 * 2 * 2 * 3 and {n for _, n in questions} == {200, 240}
    assert {name for name, _ in questions} == {"full", "quantize_kv", "compress_kv"}
    for row in r["rows"]:
        assert set(row["recalled"]) == {"200", "240"} and row["trials"] == 8
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1 and row["text"] == text.name
    assert r["settings"] == {"lengths": [200, 240], "depths": [0, 1], "trials": 2, "batch": 1}


def test_a_prompt_taken_from_the_full_cache_is_the_prompt_read(tiny: Path) -> None:
    """One prefill for all settings: keys and values of a prompt that is one chunk do not depend on the cache."""
    args = evaluate.make_parser().parse(["passkey", "--checkpoint_path", str(tiny), "--device", "cpu", *CACHES])
    tested = subject.Subject(args)
    prompts = [list(range(3, 90)), list(range(5, 70))]
    engine_of = tested.engines_after(prompts, 120)
    for policy in tested.policies:
        engine, alone = engine_of(policy), tested.engine(policy, 120, 2)
        alone.read(prompts)
        for mine, theirs in zip(engine.cache.layers, alone.cache.layers, strict=True):
            for a, b in zip(mine.storage() or [], theirs.storage() or [], strict=True):
                assert (a is None and b is None) or (a == b).all()
        rows = [list(e.generate([[7, 8], [9]], 6)) for e in (engine, alone)]
        assert rows[0] == rows[1]


def test_a_question_fed_by_steps_is_the_question_read(tiny: Path) -> None:
    """What a GPU does, whose step is captured: each token as a chunk of one."""
    args = evaluate.make_parser().parse(["passkey", "--checkpoint_path", str(tiny), "--device", "cpu", *CACHES])
    tested = subject.Subject(args)
    prompts, questions = [list(range(3, 90)), list(range(5, 70))], [[7, 8, 9], [9, 4, 3]]
    for policy in tested.policies:
        read, stepped = (tested.engine(policy, 160, 2) for _ in range(2))
        for engine in (read, stepped):
            engine.read(prompts)
        rows = list(subject.fed(stepped, questions, 5))
        *tokens, last = zip(*questions, strict=True)
        for column in tokens:
            read.read([[token] for token in column])
        assert rows == list(read.generate([[token] for token in last], 5))


@pytest.mark.gpu
def test_on_a_gpu_the_same_keys_are_recalled(text: Path, tmp_path: Path) -> None:
    """There the answering step is captured, kept from group to group, and fed the questions."""
    sizes = "sink_size=4,window_size=16"
    caches = [f"quantize_kv:{sizes}", f"quantize_kv:{sizes},k_bits=4,v_bits=4", f"compress_kv:{sizes}"]
    base = ["passkey", "--dtype", "float32", "--text", text, "--lengths", 300, 500, "--depths", 0.3, 0.8, "--trials", 3]
    base += ["--caches", *caches, "--batch", 4]
    cpu, gpu = (record(tmp_path, *base, "--device", device)["rows"] for device in ("cpu", "cuda"))
    assert [row["recalled"] for row in gpu] == [row["recalled"] for row in cpu]
    assert cpu[0]["mean"] == 1 and cpu[-1]["mean"] < 1


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)]
)
def test_wilsons_interval(right: int, n: int, low: float, high: float) -> None:
    """The last figures are those of Newcombe 1998, table I."""
    assert retrieval.wilson(right, n) == pytest.approx((low, high), abs=1e-4)
