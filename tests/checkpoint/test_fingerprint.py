"""Fingerprints of checkpoints: by content, of every file that is read, and of no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoint import fingerprint as module
from checkpoint.fingerprint import files_of, fingerprint, sha256_of_file


def test_every_byte_that_is_read_counts_and_no_path_does(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "another-name"
    shutil.copytree(tiny, copy)
    assert fingerprint(copy) == fingerprint(tiny)
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert fingerprint(copy) != fingerprint(tiny), name
        (copy / name).write_bytes(data)
    (copy / "results.json").write_text("{}")  # what is written beside a checkpoint is not of it
    (copy / "README.md").write_text("A card.")
    assert fingerprint(copy) == fingerprint(tiny)
    (copy / "tokenizer.json").write_text("{}")
    assert fingerprint(copy) != fingerprint(tiny)


def test_of_a_file_its_shards_and_what_lies_beside_it_count(tmp_path: Path) -> None:
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf", "tokenizer.model"):
        (tmp_path / name).write_text(name)
    assert [f.name for f in files_of(tmp_path / "a-00002-of-00002.gguf")] == [
        "a-00001-of-00002.gguf",
        "a-00002-of-00002.gguf",
        "tokenizer.model",
    ]
    assert [f.name for f in files_of(tmp_path / "b.gguf")] == ["b.gguf", "tokenizer.model"]


def test_blocks_are_hashed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    digests = set()
    for text in ("aaaabbbb", "bbbbaaaa", "aaaabbbbc", ""):
        (tmp_path / "f").write_text(text)
        digests.add(sha256_of_file(tmp_path / "f"))
    assert len(digests) == 4
