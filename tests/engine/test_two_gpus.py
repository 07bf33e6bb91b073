"""Two ranks on two GPUs: NCCL and sums through each other's memory, captured, and the programs under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SENTENCES
from ranks import free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
TESTS = ROOT / "tests"
PROMPT = ["--prompt", "Once upon a time", "--temperature", "0", "--ignore_eos"]
DEADLINE = 30  # seconds for everybody to end once one has


def torchrun(*words: object) -> list[str]:
    ports = ["--nproc_per_node", "2", "--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *ports, *map(str, words)]


def test_two_ranks_do_as_one_gpu(tmp_path: Path) -> None:
    """Sums of every dtype, a long chunk's too; texts, greedy and sampled, in float32, and logits in bfloat16, where a
    text may part at two tokens that are equally likely; caches saved by two ranks, for two and for one.
    """
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    argv = torchrun(TESTS / "two_gpus.py", tmp_path)
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    print(json.dumps(found, indent=1))
    assert found["path"] == "sums over 2 ranks by peers' memory"
    assert max(found["sums"].values()) <= 1, found["sums"]
    for row in found["rows"]:
        exact = row["dtype"] == "torch.float32"
        assert max(row["error"], row["long error"]) < (1e-4 if exact else 2e-2), row
        assert row["greedy by all"] and row["sampled by all"] and row["loaded by two"], row
        if exact:
            assert row["greedy"] == row["sampled"] == row["loaded by one"] == 60, row


def test_a_cache_saved_by_two_ranks_goes_on(tmp_path: Path) -> None:
    """generate.py: what two wrote, one reads."""
    argv = [ROOT / "generate.py", *PROMPT, "--max_new_tokens", 40, "--dtype", "float32"]
    caches = ["quantize_kv", "--bits", 4]
    file, texts = tmp_path / "cache", []
    for words in (
        torchrun(*argv, "--save_cache", file, *caches),
        [sys.executable, *map(str, [*argv, "--load_cache", file, *caches])],
    ):
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert len(texts[0]) > 100 and texts[1] == texts[0]


def started(tmp_path: Path) -> tuple[subprocess.Popen[bytes], Path, Path, dict[int, int]]:
    """generate.py on two ranks, amid a text without end: torchrun, what it wrote, and its ranks' processes."""
    out, err = tmp_path / "out", tmp_path / "err"
    argv = torchrun(ROOT / "generate.py", *PROMPT, "--max_new_tokens", 10**6, "compress_kv")
    with out.open("w") as o, err.open("w") as e:
        process = subprocess.Popen(argv, stdout=o, stderr=e, start_new_session=True)
    until = time.monotonic() + 100
    while len(out.read_text()) < 400:
        assert process.poll() is None and time.monotonic() < until, err.read_text()[-2000:]
        time.sleep(0.1)
    ranks = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        ranks |= {int(v.removeprefix("RANK=")): int(child) for v in variables if v.startswith("RANK=")}
    assert sorted(ranks) == [0, 1]
    return process, out, err, ranks


def all_ended(ranks: dict[int, int]) -> bool:
    """A zombie has ended, and waits for somebody to ask."""
    states = [Path(f"/proc/{pid}/stat") for pid in ranks.values()]
    return all(not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z" for state in states)


def test_a_killed_rank_ends_the_other(tmp_path: Path) -> None:
    """Amid captured steps, whose sums would wait for ever."""
    process, _, err, ranks = started(tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(DEADLINE) not in (0, None)
    assert all_ended(ranks)
    lines = [line for line in err.read_text().splitlines() if "error:" in line and "has ended" in line]
    assert len(lines) == 1 and "rank 1 has ended" in lines[0], err.read_text()
    assert err.read_text().count("Traceback") <= 1  # torchrun's own


DYING = """
import os, sys
import generate
from engine import chunk_sums
from engine.fused_chunk import FusedChunk
in_parts, left = FusedChunk._in_parts, 5  # layers

def dies(*args):
    global left
    left -= 1
    if not left and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return in_parts(*args)

FusedChunk._in_parts, chunk_sums.LEAST_WORK = dies, 1
generate.main(sys.argv[1:])
"""


def test_a_rank_killed_amid_a_long_prompt_ends_the_other(tmp_path: Path) -> None:
    """Whose kernels wait for rows that never come."""
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "text").write_text(" ".join(SENTENCES)[:20000])
    argv = ["--prompt_file", tmp_path / "text", "--max_new_tokens", 5]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = torchrun(tmp_path / "dying.py", *argv)
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error:" in line and "has ended" in line]
    assert len(lines) == 1 and "rank 1 has ended" in lines[0], done.stderr


def test_ctrl_c_prints_one_report(tmp_path: Path) -> None:
    """A terminal sends it to torchrun and every rank at once."""
    process, _, err, ranks = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(DEADLINE) != 0
    assert all_ended(ranks)
    assert err.read_text().count("tokens/s") == 1, err.read_text()
