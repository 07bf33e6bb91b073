"""Programs that are killed at random moments: no traceback, nothing half written, and the next run is whole.

A short run of what found the faults in 70 kills: every program, by Ctrl-C, TERM and KILL.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import SENTENCES
from forks import Forked

from engine.saved import SavedCache

N_KILL = 4  # of each program


def argv_of(program: str, tiny: Path, folder: Path) -> list[object]:
    out = folder / "out"
    score = [
        "--text",
        folder / "t.txt",
        "--context",
        60,
        "--windows",
        2,
        "--caches",
        "quantize_kv:sink_size=2,window_size=8",
    ]
    return {
        "generate.py": ["--checkpoint_path", tiny, "--prompt", "The", "--ignore_eos", "--max_new_tokens", 60,
                        "--json", out / "r.json", "--save_cache", out / "cache",
                        "quantize_kv", "--sink_size", 2, "--window_size", 8],
        "evaluate.py": ["divergence", "--checkpoint_path", tiny, *score, "--json", out / "r.json"],
        "benchmark.py": ["--checkpoint_path", tiny, "--context", 60, "--rounds", 2, "--steps", 4, "--caches", "full",
                         "--json", out / "r.json"],
        "convert_hf_checkpoint.py": ["--checkpoint_dir", tiny, "--out", out],
    }[program]  # fmt: skip


def whole(folder: Path) -> None:
    """Whatever is there under its own name is all there."""
    for file in folder.glob("*.json"):
        for line in file.read_text().splitlines() if file.name.startswith("r.") else [file.read_text()]:
            json.loads(line)
    if (folder / "cache").exists():
        saved = SavedCache(folder / "cache")
        assert len(list(saved.file.read(saved.file.sums))) > 2


@pytest.mark.parametrize("program", ["generate.py", "evaluate.py", "benchmark.py", "convert_hf_checkpoint.py"])
def test_a_kill_at_any_moment_leaves_nothing_half_done(program: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(SENTENCES))
    argv, said, out = argv_of(program, tiny, tmp_path), tmp_path / "said.txt", tmp_path / "out"
    began = time.monotonic()
    assert Forked(program, argv, said).wait() == 0, said.read_text()
    seconds = time.monotonic() - began
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    rng = random.Random(program)
    for i in range(N_KILL):
        number = (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[i % 4]
        code = Forked(program, argv, said).stop(number, rng.uniform(0, seconds))
        assert code in ((0, 130) if number == signal.SIGINT else (0, -number)), said.read_text()
        assert "Traceback" not in said.read_text()
        whole(out)
    assert Forked(program, argv, said).wait() == 0, said.read_text()
    assert not [file for file in out.iterdir() if file.name.endswith(".part")]
    assert {file.name for file in out.iterdir()} >= set(first)
    if program == "evaluate.py":
        last = json.loads((out / "r.json").read_text())
        assert last["finished"] and last["rows"] == json.loads(first["r.json"])["rows"]
