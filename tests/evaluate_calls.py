"""Calls of evaluate.py in this process, for tests: a run's record, and the line that a mistake gets."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from conftest import SENTENCES

from evaluation import command as evaluate
from evaluation import subject

TEXT = "\n".join(SENTENCES * 2)
CACHES = ["--caches", "quantize_kv:sink_size=2,window_size=8", "compress_kv:sink_size=2,window_size=8"]


def record(tmp_path: Path, *argv: object) -> dict:  # type: ignore[type-arg]
    out = tmp_path / "new" / "out.json"
    evaluate.main([*map(str, argv), "--json", str(out)])
    assert [f.name for f in out.parent.iterdir()] == ["out.json"]
    return json.loads(out.read_text())


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def text_file(folder: Path) -> Path:
    path = folder / "text.txt.xz"
    path.write_bytes(lzma.compress(TEXT.encode()))
    return path


def spied_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Of each prompt that an engine reads from here on: the cache's name, what it held before, the prompt's tokens."""
    reads: list[tuple[str, int, int]] = []
    original = subject.Engine.read

    def spy(self, prompts):  # type: ignore[no-untyped-def]
        reads.append((self.cache.policy.name, int(self.cache.lengths[0]), len(prompts[0])))
        return original(self, prompts)

    monkeypatch.setattr(subject.Engine, "read", spy)
    return reads
