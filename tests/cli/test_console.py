"""Files of prompts: a line is what ends with a newline, and JSON where it begins with a brace."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import write_checkpoint
from tokenizers_made import byte_level_json

from checkpoint import load_tokenizer
from cli.console import encode_prompt, read_prompts
from common.errors import UserError


def prompts_of(tmp_path: Path, content: bytes) -> list[str]:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    return read_prompts(Namespace(prompt=[], prompt_file=path))


def test_lines_end_with_a_newline_only(tmp_path: Path) -> None:
    """A form feed or U+2028 inside a line made several prompts of it, and broke valid JSON."""
    plain = "one\x0ctwo\u2028three\x85four\r\n\n \t \r\n last "
    assert prompts_of(tmp_path, plain.encode()) == ["one\x0ctwo\u2028three\x85four", " last "]
    assert prompts_of(tmp_path, '{"prompt": "a\u2028b"}\r\n{"prompt": "c\\nd"}'.encode()) == ["a\u2028b", "c\nd"]


@pytest.mark.parametrize("before", ["\ufeff", "  ", "\t", "\ufeff ", "\u00a0"])
def test_json_behind_a_mark_or_blanks_is_json(tmp_path: Path, before: str) -> None:
    assert prompts_of(tmp_path, f'{before}{{"prompt": "a"}} \n{{"prompt": "b"}}\n'.encode()) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'\n  {"prompt": "a"\n', "line 2: not a JSON object"),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", "line 1: not a JSON object"),  # more digits than Python reads
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "line 1: the JSON is nested too deeply"),
        (b"\xef\xbb\xbfabc\xff", "not UTF-8 at byte 6"),
        (b"\xef\xbb\xbf\n", "no prompt in it"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prompts_of(tmp_path, content)
    assert "\n" not in str(caught.value) and "prompts.txt" in str(caught.value)


def test_a_prompt_that_is_no_token_at_all(tmp_path: Path) -> None:
    """A normaliser that strips: the engine was given an empty prompt."""
    folder = write_checkpoint(tmp_path / "m", vocab_size=320)
    strips = {"type": "Replace", "pattern": {"String": "x"}, "content": ""}
    fields = json.loads(byte_level_json(False)) | {"normalizer": strips}
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="--prompt 'xx' is no token at all for this model's tokenizer"):
        encode_prompt("xx", load_tokenizer(folder), 320, 0, "m")
    assert encode_prompt("xax", load_tokenizer(folder), 320, 0, "m")


def test_an_empty_pipe_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`cat missing.txt | generate.py` wrote about something else without a word."""
    read, write = os.pipe()
    os.close(write)
    with open(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        args = Namespace(prompt=[], prompt_file=None, interactive=False, random_weights=False)
        assert read_prompts(args) == []
    assert "standard input is empty, so there is no prompt from it" in capsys.readouterr().err
