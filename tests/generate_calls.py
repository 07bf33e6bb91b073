"""Calls of generate.py in this process, for tests: a run that succeeds, and one that a mistake ends."""

from __future__ import annotations

import json

import pytest

import generate

QUANTIZE = ["quantize_kv", "--sink_size", "4", "--window_size", "8"]
COMPRESS = ["compress_kv", "--sink_size", "4", "--window_size", "8"]


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, dict[str, object], str]:
    """Run generate.main: the text on stdout, the JSON report, and stderr."""
    generate.main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    text, _, last = out.rstrip("\n").rpartition("\n")
    return text, json.loads(last), err


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistake gets; exit code 2 and nothing on stdout."""
    with pytest.raises(SystemExit) as exit_:
        generate.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("generate.py: error: "), err
    return err
