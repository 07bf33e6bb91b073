"""RULER's tasks by their definitions, and evaluate.py ruler."""

from __future__ import annotations

import collections
import functools
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import write_checkpoint
from evaluate_calls import spied_reads
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import command as evaluate
from evaluation import ruler, subject
from evaluation.ruler_tasks import TASKS, Sample, fitted
from selective_kv import FullCache

seeds = st.integers(0, 10**6)
quick = settings(deadline=None, max_examples=20)
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")


def sample(task: str, seed: int, units: int, length: int = 8192) -> Sample:
    return TASKS[task].make(random.Random(seed), units, length)


@pytest.mark.parametrize(
    ("task", "key", "value"),
    [
        ("niah_single", r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multikey", r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah_multiuuid", r"[0-9a-f-]{36}", r"[0-9a-f-]{36}"),
    ],
)
@given(seed=seeds, units=st.integers(1, 200))
@quick
def test_needles(task: str, key: str, value: str, seed: int, units: int) -> None:
    """One line holds the key that is asked for; the others are sentences of noise, or needles of other keys."""
    made = sample(task, seed, units)
    lines = made.context.split("\n")[1:]
    found = [match.groups() for line in lines if (match := NEEDLE.fullmatch(line))]
    asked = re.search(r" for (\S+) mentioned in the provided text\?$", made.question)
    assert asked is not None and len(lines) == units + 1
    assert [v for _, k, v in found if k == asked[1]] == [*made.answers]
    assert len(found) == (1 if task == "niah_single" else units + 1)
    assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for _, k, v in found)
    assert made.prefix.startswith(" The special magic ") and made.prefix.endswith("mentioned in the provided text is")


@given(seed=seeds, units=st.integers(5, 200))
@quick
def test_variable_tracking(seed: int, units: int) -> None:
    """The five variables are all those that come to hold the value; the example before them is another chain."""
    made = sample("vt", seed, units)
    asked = re.search(r"assigned the value (\d{5}) in", made.question)
    assert asked is not None
    example, text = made.context.split("\n\n\n", 1)
    held: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text):
        held[name] = held.get(source, source)
    assert {name for name, value in held.items() if value == asked[1]} == {*made.answers} and len(made.answers) == 5
    assert re.findall(r"they are: (.*)", example) == [" ".join(re.findall(r"VAR ([A-Z]{3}) =", example))]
    assert text.count("Here we go.") == units


@given(seed=seeds, units=st.integers(0, 900), length=st.sampled_from([1024, 8192]))
@quick
def test_common_words(seed: int, units: int, length: int) -> None:
    """The ten words asked for occur more often than any other; numbers count from 1."""
    made = sample("cwe", seed, units, length)
    entries = re.findall(r"(\d+)\. (\S+)", made.context.rsplit("\n", 1)[1])
    assert [int(n) for n, _ in entries] == list(range(1, len(entries) + 1))
    counts = collections.Counter(word for _, word in entries)
    common, other = (6, 1) if length < 4096 else (30, 3)
    assert {word for word, n in counts.items() if n == common} == {*made.answers} and len(made.answers) == 10
    assert len(counts) == 10 + units and all(n == other for word, n in counts.items() if word not in made.answers)


@given(seed=seeds, units=st.integers(60, 3000), length=st.sampled_from([1024, 8192]))
@quick
def test_frequent_words(seed: int, units: int, length: int) -> None:
    """Dots aside, the three words asked for are the most frequent."""
    made = sample("fwe", seed, units, length)
    words = made.context.partition("coded words. ")[2].split()
    counts = collections.Counter(word for word in words if word != "...")
    assert [word for word, _ in counts.most_common(3)] == [*made.answers]
    fourth = counts.most_common(4)[3][1] if len(counts) > 3 else 0
    assert counts[made.answers[2]] > fourth or units < 200


def test_scores() -> None:
    made = Sample("", "", "", ("ABC", "12"))
    assert [made.score(text) for text in ("abc", "x12 abc", "a b c", "")] == [0.5, 1, 0, 0]


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_as_long_as_fits(task: str) -> None:
    """And the same seed makes the same."""

    def n_token(made: Sample) -> int:
        return len((made.context + made.question + made.prefix).split())

    for length in (1024, 5000):
        found = fitted(TASKS[task], length, "a", n_token)
        assert found is not None
        made, units = found
        for near in (1, units - 1, units, units + 1, 3 * units):
            if near >= TASKS[task].least:
                assert fitted(TASKS[task], length, "a", n_token, near) == found
        assert fitted(TASKS[task], length, "b", n_token) != found
        room = length - n_token(made) - TASKS[task].n_new
        assert 0 <= room < 60  # a unit of filler is no longer
    assert fitted(TASKS[task], 20, "a", n_token) is None


def test_an_answer_is_read_until_it_is_complete() -> None:
    """Or ends, or is as long as its task's may be; each sequence of a group by its own."""
    texts = ["xABcdefghijk", "xabc\0fghijkl", "zzzzzzzzzzzz", "12345678901ab"]
    engine = SimpleNamespace(
        captures=False, generate=lambda prompts, n: ([ord(text[i]) for text in texts] for i in range(n))
    )
    tested: Any = SimpleNamespace(end_ids={0}, tokenizer=SimpleNamespace(decode=lambda ids: "".join(map(chr, ids))))
    group: Any = [SimpleNamespace(n_new=9, sample=Sample("", "", "", (word,))) for word in ("ab", "??", "ab", "ab")]
    enough = functools.partial(ruler.answered, tested, group)
    written = subject.Subject._written(tested, lambda _: engine, FullCache(), [[2]] * 4, 12, enough)
    assert ["".join(map(chr, ids)) for ids in written] == ["xABcdefg", "xabc", "zzzzzzzzz", "123456789"]


def test_summary_keeps_what_the_full_cache_can_do() -> None:
    def trial(task: str, length: int) -> Any:
        return SimpleNamespace(task=task, length=length, ids=[1] * length)

    trials = [trial("a", 10), trial("a", 10), trial("b", 10), trial("b", 20)]
    row = ruler.summary(trials, [1, 0, 1, 0.5], [1, 1, 0.2, 0.4])
    assert row["scores"] == {"a": {"10": 0.5}, "b": {"10": 1, "20": 0.5}}
    assert row["mean"] == 0.625 and row["trials"] == 4 and row["tokens"] == 50
    assert row["kept_trials"] == 3 and row["kept"] == 0.5 and row["kept_rise"] == pytest.approx((0 - 1 + 0.1) / 3)
    assert row["low"] < row["mean"] < row["high"]
    assert row["by_length"]["10"]["tasks"] == ["a"] and row["by_length"]["10"]["kept_rise"] == -0.5
    assert row["by_length"]["20"]["tasks"] == ["b"] and row["by_length"]["20"]["kept"] == 0.5
    assert "kept" not in ruler.summary(trials, [0, 0, 0, 0], [0, 0, 0, 0])


def test_the_question_finds_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task through every cache; what precedes the question is read before it."""
    folder = write_checkpoint(tmp_path / "model", context=4096)
    asked = spied_reads(monkeypatch)
    out = tmp_path / "r.json"
    argv = ["ruler", "--checkpoint_path", folder, "--lengths", 2500, "--trials", 1, "--json", out, "--caches"]
    evaluate.main([*map(str, argv), "quantize_kv:sink_size=4,window_size=16", "compress_kv:sink_size=4,window_size=16"])
    found = json.loads(out.read_text())
    questions = [(before, n) for _, before, n in asked if before]
    assert len(questions) == len(TASKS) * 3 and all(before > 1000 and before + n <= 2500 for before, n in questions)
    for row in found["rows"]:
        assert set(row["scores"]) == set(TASKS) and row["trials"] == len(TASKS)
    assert found["settings"] == {"lengths": [2500], "tasks": list(TASKS), "trials": 1, "chat": False, "batch": 1}


def test_answers_of_several_lengths_are_written_together(tmp_path: Path) -> None:
    """The shorter ones go on with the longest: past their room a tile was written into the next sequence's memory."""
    folder = write_checkpoint(tmp_path / "model", context=4096)
    out = tmp_path / "r.json"
    argv = ["ruler", "--checkpoint_path", folder, "--lengths", 2440, "--trials", 1, "--batch", 2, "--json", out]
    evaluate.main([*map(str, argv), "--tasks", "vt", "niah_single", "--caches", "quantize_kv:window_size=8"])
    assert [row["trials"] for row in json.loads(out.read_text())["rows"]] == [2, 2]


def test_mistakes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--lengths", "300"], "past the model's context"),
        (["--lengths", "200"], "--lengths 200: too short for"),
        (["--tasks", "qa"], "--tasks qa: RULER's tasks here are niah_single"),
        (["--chat", "--lengths", "250"], "has no chat template"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["ruler", "--checkpoint_path", str(tiny), "--caches", "quantize_kv", *argv])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and message in err and err.count("\n") == 1
