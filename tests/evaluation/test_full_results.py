"""What the full cache gave is kept for other settings: computed once, the same to the bit, never another run's."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SENTENCES, write_checkpoint
from forks import Forked, fork_instead
from torch import Tensor

from common.errors import UserError
from engine import Engine
from evaluation import command as evaluate
from evaluation import full_results, scoring, sweep
from evaluation.full_results import FullResults
from model import Transformer
from selective_kv import KVCache

TEXT = "\n".join(SENTENCES * 2)
SETTINGS = ("quantize_kv:sink_size=2,window_size=8", "compress_kv:sink_size=2,window_size=8")
STORIES = [{"text": TEXT[:300], "summary": "A fox."}, {"text": TEXT[300:700], "summary": "A boat."}]
KINDS = {
    "perplexity": ["--context", "200", "--windows", "2"],
    "divergence": ["--context", "60", "--windows", "2", "--weights", "int8"],
    "passkey": ["--lengths", "200", "--depths", "0.5", "--trials", "2"],
    "ruler": ["--lengths", "1500", "--trials", "1", "--tasks", "niah_single", "vt"],
    "rouge": ["--context", "100", "--max_new_tokens", "8", "--documents", "2"],
}
OWN = ("perplexity", "passkey")  # also tried on what the model writes itself


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("kept") / "tiny", context=2048)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress(TEXT.encode()))
    (tmp_path / "stories.jsonl").write_text("\n".join(map(json.dumps, STORIES)))
    return path


@pytest.fixture
def full_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the full cache has computed since: texts that it scored, answers that it gave, texts that it wrote."""
    runs: list[str] = []
    read, generate, score = scoring.read_parallel, Engine.generate, scoring.score

    def counted_read(model: Transformer, policy: KVCache, tokens: Tensor) -> Tensor:
        runs.extend(["read"] if policy.name == "full" else [])
        return read(model, policy, tokens)

    def counted_generate(engine: Engine, *args: Any) -> Any:
        runs.extend(["generate"] if engine.cache.policy.name == "full" else [])
        return generate(engine, *args)

    def counted_score(model: Transformer, tokens: Tensor, states: Tensor, *rest: Any) -> Any:
        runs.extend(["score"] if states.data_ptr() == rest[0].data_ptr() else [])
        return score(model, tokens, states, *rest)

    monkeypatch.setattr(scoring, "read_parallel", counted_read)
    monkeypatch.setattr(Engine, "generate", counted_generate)
    monkeypatch.setattr(scoring, "score", counted_score)
    yield runs


def evaluated(model: Path, out: Path, argv: list[str], *settings: str) -> dict[str, Any]:
    evaluate.main([*argv, "--checkpoint_path", str(model), "--caches", *settings, "--json", str(out)])
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind} of its own" for kind in OWN)])
def test_results_are_the_same_to_the_bit_and_the_full_cache_runs_once(
    kind: str, model: Path, tmp_path: Path, text: Path, full_runs: list[str]
) -> None:
    """A sweep computed `full` again in every task."""
    own = kind.endswith("own")
    kind = kind.split()[0]
    argv = [kind, *KINDS[kind]]
    if not own and kind != "ruler":
        argv += ["--text", str(tmp_path / "stories.jsonl" if kind == "rouge" else text)]
    alone = [evaluated(model, tmp_path / "r.json", argv, setting) for setting in SETTINGS]
    each = len(full_runs) // len(SETTINGS)
    assert each
    full_runs.clear()
    shared = [*argv, "--keep_full", str(tmp_path / "full")]
    assert [evaluated(model, tmp_path / "r.json", shared, setting) for setting in SETTINGS] == alone
    assert len(full_runs) == each  # the first computed, the second read
    assert evaluated(model, tmp_path / "r.json", shared, "full")["rows"][0] == alone[0]["rows"][0]
    assert len(full_runs) == each


def test_nothing_of_another_run_is_taken(model: Path, tmp_path: Path, text: Path, full_runs: list[str]) -> None:
    """Other weights, texts, settings, dtypes, devices, a changed program: a result is found by all that made it."""
    folder = ["--keep_full", str(tmp_path / "full")]
    argv = ["divergence", "--text", str(text), "--context", "60", "--windows", "1"]

    def computes(*more: str, of: Path = model) -> bool:
        full_runs.clear()
        changed = evaluated(of, tmp_path / "r.json", [*argv, *folder, *more], SETTINGS[0])
        found, full_runs[:] = list(full_runs), []
        if "--sequential" not in more:
            assert changed == evaluated(of, tmp_path / "r.json", [*argv, *more], SETTINGS[0])
        return "read" in found or "score" in found

    assert computes() and not computes()
    assert computes("--windows", "2") and computes("--dtype", "bfloat16") and computes("--sequential")
    assert computes("--weights", "int8")
    other = write_checkpoint(tmp_path / "other" / "tiny", seed=1, context=2048)
    assert computes(of=other)
    assert computes("--reference_path", str(other)) and not computes("--reference_path", str(other))
    third = write_checkpoint(tmp_path / "third" / "tiny", seed=2, context=2048)
    assert computes("--reference_path", str(third))  # folders of one name: their states were taken for each other's
    text.write_bytes(lzma.compress(TEXT.replace("fox", "dog").encode()))
    assert computes()
    text.write_bytes(lzma.compress(TEXT.encode()))
    assert not computes()


def test_a_file_that_was_damaged_or_is_anothers_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"a": torch.arange(5.0), "b": torch.full((2, 3), float(len(made)), dtype=torch.bfloat16)}

    found = FullResults(tmp_path, {"device": "cpu", "command": ["a"]}).result("x", [1, 2], make)
    again = FullResults(tmp_path, {"device": "cpu", "command": ["b"]})
    assert all((found[name] == tensor).all() for name, tensor in again.result("x", [1, 2], make).items())
    assert len(made) == 1
    again.result("x", [1, 3], make)  # other tokens: of a text that came through a pipe, in no record
    assert len(made) == 2
    FullResults(tmp_path, {"device": "H100"}).result("x", [1, 3], make)
    assert len(made) == 3
    (file,) = (again.folder or tmp_path).glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (b"", whole[:40], whole[:-3], whole[:-3] + b"abc", b"\xff" * 100, whole.replace(b"cpu", b"gpu")):
        file.write_bytes(damaged)
        assert again.result("x", [1, 3], make)["b"][0, 0] == len(made)
        assert file.read_bytes() != damaged
    n = len(made)
    monkeypatch.setattr(full_results, "sources", lambda: "another program")
    FullResults(tmp_path, {"device": "cpu"}).result("x", [1, 3], make)
    assert len(made) == n + 1
    with pytest.raises(ZeroDivisionError):
        again.result("y", [], lambda: {"a": torch.ones(1) / (1 // 0)})
    assert not [f for f in tmp_path.rglob("*") if "part" in f.name or f.stem == "y"]


def test_texts_come_back(tmp_path: Path) -> None:
    store = FullResults(tmp_path, {})
    for n, words in enumerate(("", "a", "żółw \n\x00 📦", "x" * 10_000)):
        assert store.text(str(n), [], lambda: words) == words  # noqa: B023
        assert store.text(str(n), [], lambda: "another") == words
        assert FullResults().text(str(n), [], lambda: words) == words  # noqa: B023


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    with pytest.raises(UserError, match="--keep_full"):
        FullResults(tmp_path / "file", {})


CODE = """
import sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from evaluation.full_results import FullResults
def make():
    Path(sys.argv[3]).touch()
    time.sleep(float(sys.argv[4]))
    return {"a": torch.tensor([float(sys.argv[5])])}
print(FullResults(Path(sys.argv[2]), {}).result("x", [], make)["a"].item())
"""


@pytest.mark.parametrize("killed", [False, True])
def test_runs_at_the_same_time_wait_for_each_other_and_not_for_the_dead(killed: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(ROOT), str(tmp_path / "full")]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    first = subprocess.Popen([*command, str(tmp_path / "begun"), "600" if killed else "2", "1"], env=env)
    while not (tmp_path / "begun").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.Popen([*command, str(tmp_path / "other"), "0", "2"], env=env, stdout=subprocess.PIPE, text=True)
    if killed:
        first.kill()
    first.wait()
    said, _ = second.communicate()
    assert float(said) == (2 if killed else 1) and (tmp_path / "other").exists() == killed


def test_a_sweep_keeps_it_while_something_is_left_to_do(
    tiny: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Together or as an array's tasks; gone when the last is done."""
    ran = fork_instead(monkeypatch, tmp_path)
    folder = tmp_path / "out" / "s" / "full-of-divergence"
    argv = ["--name", "s", "--outputs", str(tmp_path / "out"), "--caches", "quantize_kv", "--sinks", "2"]
    rest = ["--", "--checkpoint_path", str(tiny), "--text", str(text), "--context", "60", "--windows", "1"]
    argv += ["--windows", "8", "16"]
    times: set[float] = set()
    for i in ("2", "0"):
        sweep.main([*argv, "--index", i, *rest])
        (states,) = folder.glob("*/states-0-0.safetensors")
        times.add(states.stat().st_mtime)
    assert len(times) == 1  # written once
    sweep.main([*argv, *rest])
    assert not folder.exists() and len(ran) == 3
    rows = [json.loads(f.read_text())["rows"] for f in sorted((tmp_path / "out" / "s").glob("*.json"))]
    shutil.rmtree(tmp_path / "out")
    sweep.main([*argv, *rest])
    assert [json.loads(f.read_text())["rows"] for f in sorted((tmp_path / "out" / "s").glob("*.json"))] == rows
    record = json.loads(next((tmp_path / "out" / "s").glob("*full*")).read_text())
    assert "--keep_full" not in record["command"]  # it gives the same without
    assert Forked("evaluate.py", ["-h"], tmp_path / "help.txt").wait() == 0
    assert "--keep_full" in (tmp_path / "help.txt").read_text()
