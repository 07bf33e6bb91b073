"""generate.py on several ranks: who prints, reads and writes; and that nobody is left when one of them fails."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STORIES, needs
from ranks import Rank, finish, start

import generate
from benchmark import command as benchmark
from checkpoint import Share
from cli.plan import activation_bytes
from common.errors import UserError
from engine import Engine, link, parallel
from engine.chunk_sums import n_byte
from engine.link import Link
from engine.saved import SavedCache
from evaluation import flags as evaluate
from model import CONFIGS, Transformer
from selective_kv import Shape

QUANTIZE = ["quantize_kv", "--sink_size", "2", "--window_size", "4"]
DEADLINE = 30  # seconds for every rank to end once one has


def run(n: int, folder: Path, *argv: object, stdin: str = "") -> list[Rank]:
    return start(n, lambda rank: generate.main([str(a) for a in argv]), folder, stdin)


def alone(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    generate.main([str(a) for a in argv])
    return capsys.readouterr().out


def test_a_batch_as_on_one_device_and_one_report(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, JSON and the report are rank 0's; bytes are each rank's and their sum; a profile has a folder a rank."""
    monkeypatch.chdir(tmp_path)
    base = ["--checkpoint_path", tiny, "--prompt", "The red fox", "--prompt", "A", "--max_new_tokens", 12, *QUANTIZE]
    want = alone(capsys, *base)
    ranks = run(2, tmp_path / "run", *base, "--json", tmp_path / "r.json", "--profile", "p")
    assert finish(ranks) == [0, 0]
    assert ranks[0].out.read_text() == want
    assert ranks[1].out.read_text() == "" and "tokens/s" not in ranks[1].err.read_text()  # but the profiler's own lines
    report = json.loads((tmp_path / "r.json").read_text())
    assert [r["cache_bytes"] for r in report["ranks"]] == [sum(report["cache_bytes"].values())] * 2
    assert all(r["peak_memory_bytes"] > 0 for r in report["ranks"])
    err = ranks[0].err.read_text()
    assert err.count("tokens/s") == 1 and "2 ranks" in err and "sums over 2 ranks by gloo" in err
    for rank in "01":
        names = {path.name for path in (tmp_path / "outputs" / "p" / f"rank{rank}").iterdir()}
        assert {"prefill_trace.json", "decode_trace.json", "report.json"} <= names


def test_a_conversation_reads_lines_on_rank_0(tiny: Path, tmp_path: Path) -> None:
    """Lines, /reset and the end of the input reach every rank; sampling goes on with the same seed."""
    folder = tmp_path / "instruct"
    shutil.copytree(tiny, folder)  # `tiny` is every test's
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    base = ["--checkpoint_path", folder, "--interactive", "--chat", "--max_new_tokens", 6, "--ignore_eos"]
    lines = ["The fox", "went on", "/reset", "The fox"]
    ranks = run(2, tmp_path, *base, stdin="\n".join(lines) + "\n")
    single = start(1, lambda rank: _alone(base), tmp_path / "alone", "\n".join(lines) + "\n")
    assert finish(ranks) == [0, 0] and finish(single) == [0]
    text = ranks[0].out.read_text()
    assert text == single[0].out.read_text() and len(text) > 20
    assert ranks[1].out.read_text() == "" == ranks[1].err.read_text()
    assert ranks[0].err.read_text().count("tokens/s") == 1


def _alone(argv: list[object]) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    generate.main([str(a) for a in argv])


@pytest.mark.parametrize(
    ("n", "argv", "message"),
    [
        (2, ["--wrong"], "unknown argument --wrong"),
        (4, [], "4 ranks cannot share 2 KV heads"),
        (2, ["--world_size", "4"], "--world_size 4, and 2 ranks started"),
        (2, ["--device", "cuda:0"], "each takes its own GPU"),
    ],
)
def test_a_mistake_is_one_line_of_rank_0s(n: int, argv: list[str], message: str, tiny: Path, tmp_path: Path) -> None:
    ranks = run(n, tmp_path, "--checkpoint_path", tiny, "--prompt", "a", *argv)
    assert finish(ranks) == [2] * n
    lines = "".join(rank.err.read_text() for rank in ranks).splitlines()
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("generate.py: error: ")
    assert all(rank.out.read_text() == "" for rank in ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "9" * 20}, "torchrun sets them, all or none"),
        ({"RANK": "2"}, "torchrun sets them"),
        ({"MASTER_PORT": "abc"}, "torchrun sets them"),
        ({"MASTER_PORT": "99999"}, "torchrun sets them"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR no.such.host.invalid: "),
        ({"MASTER_ADDR": "a" * 70}, "MASTER_ADDR aaa"),
    ],
)
def test_variables_that_no_torchrun_sets(change: dict[str, str], message: str) -> None:
    """10^20 ranks took gigabytes and never ended; a host that is not found, a page of torch's addresses."""
    good = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    with pytest.raises(UserError, match=message):
        Link(good | change, "generate.py")


def test_a_plan_for_ranks_that_are_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--random_weights", "--model", "llama-3.1-70b", "--prompt", "8", "--dtype", "bfloat16", "--dry_run"]
    generate.main([*argv, "--world_size", "8", "--memory_budget", "80GiB", "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    plan = json.loads(last)["plan"]
    assert "on each of 8 ranks" in lines[-2] and plan["sum"] == 8 * plan["total"]
    assert 18 * 2**30 < plan["weights"] < 20 * 2**30  # an eighth of 131.4 GiB, and the embedding's 1.96


def test_a_plan_counts_what_ranks_write_sums_into() -> None:
    """Of long chunks: as much work a rank as 6,144 tokens of an 8B on two."""
    shape = Shape(1, 1, 128, 40000, torch.bfloat16, torch.device("cuda"))
    for model, n_rank, n_token, counted in (
        ("llama-3.1-8b", 2, 6143, False), ("llama-3.1-8b", 2, 6144, True), ("llama-3.1-8b", 4, 8192, False),
        ("llama-3.1-70b", 4, 8192, True), ("llama-3.2-1b", 2, 8192, False),
    ):  # fmt: skip
        config = Share(CONFIGS[model], 0, n_rank).config
        alone = activation_bytes(replace(config, vocab_rows=0), shape, n_token)
        sums = n_byte(n_rank, n_token, config.dim, torch.bfloat16) if counted else 0
        assert activation_bytes(config, shape, n_token) - alone == sums


def test_a_mistake_that_one_rank_finds_is_told_by_rank_0(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank without its GPU: rank 0 has one and is already waiting for the other in a collective."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(parallel, "parse_device", lambda name: torch.device("cpu"))
    ranks = run(2, tmp_path, "--checkpoint_path", tiny, "--prompt", "a", "--device", "cuda")
    assert finish(ranks, DEADLINE) == [2, 2]
    (line,) = "".join(rank.err.read_text() for rank in ranks).splitlines()
    assert line == "rank 1: generate.py: error: rank 1 is without a GPU: 1 here (--nproc_per_node 1)"


def test_what_runs_on_one_device_is_not_started_twice(tiny: Path, tmp_path: Path) -> None:
    """Each rank would have evaluated all of it, and written the same file."""
    out = tmp_path / "r.json"
    argv = ["perplexity", "--checkpoint_path", tiny, "--json", out]
    ranks = start(2, lambda rank: evaluate.main([str(a) for a in argv]), tmp_path)
    assert finish(ranks) == [2, 2] and not out.exists()
    (line,) = "".join(rank.err.read_text() for rank in ranks).splitlines()
    assert line.startswith("evaluate.py: error: it runs on one device, and 2 ranks were started")


def test_ranks_that_never_come(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "JOIN_SECONDS", 1)
    ranks = start(2, lambda rank: generate.main(["--prompt", "a"]), tmp_path, missing=1)
    assert finish(ranks, DEADLINE) == [2]
    (line,) = ranks[0].err.read_text().splitlines()
    assert "not all of 2 ranks came within 1 s" in line


def when(name: str, rank: int, happens: Callable[[], object]) -> Callable[[Callable], Callable]:
    """Wraps a function so that on one rank something happens at its third call."""

    def wrap(function: Callable) -> Callable:
        calls = []

        def wrapped(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if os.environ.get("RANK") == str(rank) and len(calls) == 3:
                happens()
            return function(*args, **kwargs)

        return wrapped

    return wrap


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["loading", "prefill", "a step"])
def test_when_a_rank_is_killed_the_others_end(
    where: str, rank: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = {"loading": (torch.Tensor, "copy_"), "prefill": (Transformer, "read"), "a step": (Engine, "step")}[
        where
    ]
    monkeypatch.setattr(owner, name, when(name, rank, die)(getattr(owner, name)))
    ranks = run(2, tmp_path, "--checkpoint_path", tiny, "--prompt", "a b", "--prefill_chunk", 1, "--max_new_tokens", 50)
    statuses = finish(ranks, DEADLINE)
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1, statuses
    lines = ranks[1 - rank].err.read_text().splitlines()
    assert lines[-1].endswith(f"error: rank {rank} has ended: {'the others' if rank else 'rank 1'} cannot go on"), lines
    assert len(lines) == 1


def test_ctrl_c_prints_one_report(tiny: Path, tmp_path: Path) -> None:
    """torchrun sends it to every rank."""
    base = ["--checkpoint_path", tiny, "--prompt", "a", "--ignore_eos", "--max_new_tokens", 10**6, "compress_kv"]
    ranks = run(2, tmp_path, *base)
    time.sleep(0.5)
    until = time.monotonic() + 30
    while len(ranks[0].out.read_text()) < 40:
        assert time.monotonic() < until
        time.sleep(0.05)
    for rank in ranks:
        rank.kill(signal.SIGINT)
    assert finish(ranks, DEADLINE) == [130, 130]
    assert ranks[0].err.read_text().count("tokens/s") == 1 and "2 ranks" in ranks[0].err.read_text()
    assert ranks[1].out.read_text() == "" == ranks[1].err.read_text()


@needs(STORIES)
def test_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(a) for a in ("--checkpoint_path", STORIES, "--prompt", "Once upon", "--max_new_tokens", 20, *QUANTIZE)]
    want = alone(capsys, *argv)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, str(ROOT / "generate.py"), *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == want and done.stderr.count("tokens/s") == 1
    assert "FutureWarning" not in done.stderr  # sampling calls by a name that PyTorch still has


def test_a_prompt_is_read_once_whoever_reads_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch saved by two ranks goes on with one and with two; a conversation too. Rank 0 alone says so."""
    file, report = tmp_path / "cache", tmp_path / "r.json"
    base = ["--checkpoint_path", tiny, "--prompt", "The red fox jumped", "--prompt", "A", "--max_new_tokens", 9]
    base += [*QUANTIZE, "--json", report]
    want = alone(capsys, *base)
    assert finish(run(2, tmp_path / "save", *base, "--save_cache", file)) == [0, 0]
    assert json.loads(report.read_text())["save_cache"]["bytes"] == file.stat().st_size
    assert alone(capsys, *base, "--load_cache", file) == want
    ranks = run(2, tmp_path / "load", *base, "--load_cache", file)
    assert finish(ranks) == [0, 0] and ranks[0].out.read_text() == want
    assert json.loads(report.read_text())["tokens_read"] == 0
    assert ranks[0].err.read_text().count("loaded ") == 1 and ranks[1].err.read_text() == ""
    ranks = run(2, tmp_path / "other", *base, "--num_samples", 2, "--load_cache", file)
    assert finish(ranks) == [2, 2]
    (line,) = "".join(rank.err.read_text() for rank in ranks).splitlines()
    assert "it holds 2 sequences, and the run has 4" in line

    talk = ["--checkpoint_path", tiny, "--interactive", "--max_new_tokens", 6, "--temperature", 0, "--ignore_eos"]
    ranks = run(2, tmp_path / "all", *talk, stdin="The fox\nwent on\n")
    assert finish(ranks) == [0, 0]
    whole = ranks[0].out.read_text()
    ranks = run(2, tmp_path / "first", *talk, "--save_cache", file, stdin="The fox\n")
    assert finish(ranks) == [0, 0] and whole.startswith(ranks[0].out.read_text())
    rest = whole.removeprefix(ranks[0].out.read_text())
    ranks = run(2, tmp_path / "rest", *talk, "--load_cache", file, stdin="went on\n")
    assert finish(ranks) == [0, 0] and ranks[0].out.read_text() == rest
    monkeypatch.setattr("sys.stdin", io.StringIO("went on\n"))
    assert alone(capsys, *talk, "--load_cache", file) == rest


def test_the_benchmark_on_ranks_times_saved_caches_and_prompts(tiny: Path, tmp_path: Path) -> None:
    """Two ranks' file, of two sequences: rank 0 alone prints and writes, with every rank's peak."""
    files, out = [tmp_path / name for name in ("full", "int8")], tmp_path / "r.jsonl"
    for file, cache in zip(files, ([], QUANTIZE), strict=True):
        argv = ["--checkpoint_path", tiny, "--prompt", "The red fox", "--num_samples", 2, "--save_cache", file]
        assert finish(run(2, tmp_path / f"save-{file.name}", *argv, "--max_new_tokens", 2, *cache)) == [0, 0]
    argv = ["--checkpoint_path", tiny, "--load_cache", *files, "--rounds", 1, "--steps", 2, "--json", out]
    ranks = start(2, lambda rank: benchmark.main([str(a) for a in argv]), tmp_path / "time")
    assert finish(ranks) == [0, 0], ranks[0].err.read_text()
    record = json.loads(out.read_text())
    n_token = len(SavedCache(files[0]).tokens[0])
    assert record["world_size"] == 2
    assert [row["cache"].split(":")[0] for row in record["rows"]] == ["full", "quantize_kv"]
    for row in record["rows"]:
        assert (row["batch"], row["context"]) == (2, n_token) and len(row["rank_peak_memory_bytes"]) == 2
    assert ranks[1].out.read_text() == "" and ranks[0].out.read_text().count("read ceiling") == 1
    words = ["--checkpoint_path", tiny, "--first_token", "--context", 40, "--rounds", 1, "--json", out]
    out.unlink()  # a record more would be added
    ranks = start(2, lambda rank: benchmark.main([str(a) for a in words]), tmp_path / "first")
    assert finish(ranks) == [0, 0], ranks[0].err.read_text()
    assert [len(row["rank_peak_memory_bytes"]) for row in json.loads(out.read_text())["rows"]] == [2, 2, 2]
    other = start(2, lambda rank: benchmark.main([*map(str, argv), "--dtype", "float16"]), tmp_path / "other")
    assert finish(other) == [2, 2]
    (line,) = "".join(rank.err.read_text() for rank in other).splitlines()
    assert "of another dtype" in line
