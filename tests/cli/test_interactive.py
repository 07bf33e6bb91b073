"""generate.py --interactive: a conversation, its cache and its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forks import Forked

import generate
from checkpoint import load_model, open_checkpoint
from checkpoint.tokenizer_files import load_tokenizer
from engine import Engine
from kv_cache import ModelCache
from selective_kv import FullCache, Shape


def test_a_conversation_stays_in_the_cache(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn reads only its own tokens, and the tokens are those of one long run over the same text."""
    lines = ["The red fox jumped over the river", "and the old clock looked", "One"]
    read: list[list[int]] = []
    written: list[int] = []
    original = Engine.generate

    def spy(self, prompts, n):  # type: ignore[no-untyped-def]
        read.append(list(prompts[0]))
        for row in original(self, prompts, n):
            written.append(row[0])
            yield row

    monkeypatch.setattr(Engine, "generate", spy)
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("\n".join(lines) + "\n"))
    argv = ["--checkpoint_path", str(tiny), "--interactive", "--temperature", "0", "--max_new_tokens", "9"]
    generate.main([*argv, "--ignore_eos"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) >= 3
    assert len(read) == 3 and len(written) == 27
    tokenizer = load_tokenizer(tiny / "tokenizer.model")
    assert read[1] == [written[8], *tokenizer.encode(lines[1], bos=False)]
    # The same tokens through a fresh full cache, in one go, choose the same next token.
    checkpoint = open_checkpoint(tiny, None)
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    history = [*read[0], *written[:8], *read[1], *written[9:17], *read[2]]
    shape = Shape(1, 2, 8, 256, torch.float32, torch.device("cpu"))
    cache = ModelCache(FullCache(), 2, shape)
    with torch.inference_mode():
        logits = model(torch.tensor([history]), cache, last_only=True)
    assert int(logits.argmax()) == written[18]


def test_a_conversation_fills_its_context_to_the_last_token(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["The red fox jumped", "and the clock"]
    tokenizer = load_tokenizer(tiny / "tokenizer.model")
    first, second = len(tokenizer.encode(lines[0])), len(tokenizer.encode(lines[1], bos=False))
    seen = first + 9 - 1  # the last token written is read with the second line
    argv = ["--checkpoint_path", str(tiny), "--interactive", "--temperature", "0", "--max_new_tokens", "9", "--json"]
    for spare, written in ((0, 10), (1, 11), (-1, 9)):  # the last token of all is written, not read
        monkeypatch.setattr("sys.stdin", __import__("io").StringIO("\n".join(lines) + "\n"))
        generate.main([*argv, "--ignore_eos", "--context", str(seen + 1 + second + spare)])
        out, err = capsys.readouterr()
        assert json.loads(out.splitlines()[-1])["tokens_written"] == written
        assert ("no room: that is 1 tokens past" in err) == (spare < 0)


@pytest.mark.parametrize("line", [b"\xff\xfe", b"a\xed\xa0\x80b"])
def test_a_line_that_is_no_text_is_told_and_the_conversation_goes_on(line: bytes, tiny: Path, tmp_path: Path) -> None:
    """A traceback of a codec's, in the middle of a conversation."""
    (tmp_path / "lines").write_bytes(line + b"\nThe fox\n")
    argv = ["--checkpoint_path", tiny, "--interactive", "--max_new_tokens", 3]
    assert Forked("generate.py", argv, tmp_path / "said", str(tmp_path / "lines")).wait() == 0
    said = (tmp_path / "said").read_text()
    assert said.count("not read: the line is not UTF-8") == 1 and "3 tokens written" in said
