"""Caches of somebody's own, the words of --help, and the nearest name to one that is unknown."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import generate
from benchmark import flags as benchmark
from cli import download
from cli.options import load_plugin, parse_size
from common.errors import UserError
from evaluation import flags as evaluate
from kv_cache import make_policy, parse_policy
from selective_kv import SelectiveCache, SinkWindowCache, caches


@pytest.fixture(autouse=True)
def caches_go_with_their_test() -> Iterator[None]:
    before = set(caches())
    yield
    for name in [name for name in sys.modules if name.startswith("_plugin_")]:
        del sys.modules[name]
    gc.collect()  # a class is its parent's child until then
    assert set(caches()) <= before


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistake gets."""
    with pytest.raises(SystemExit) as exit_:
        generate.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err.removeprefix("generate.py: error: ").rstrip("\n")


# ---- plugins ----

HEAD = """from __future__ import annotations
from dataclasses import dataclass, field
from typing import ClassVar
from selective_kv import FullCache, KVCache, SelectiveCache, knob
"""
UPDATE = "    def update(self, row, k, v, start): raise ZeroDivisionError\n"


def written(tmp_path: Path, text: str | bytes, name: str = "mine.py") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef f(:\n", "line 2: SyntaxError: invalid syntax"),
        ("import os\nimport there_is_no_such\n", "line 2: ModuleNotFoundError: No module named 'there_is_no_such'"),
        ("def f():\n    1 / 0\n\nf()\n", "line 2: ZeroDivisionError: division by zero"),
        ("import json\njson.loads('')\n", "line 2: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("raise ValueError('a\\nb')\n", "line 1: ValueError: a b"),
        ("raise SystemExit(5)\n", "line 1: SystemExit: 5"),
        ("open('/there/is/no/such')\n", "line 1: FileNotFoundError: [Errno 2] No such file or directory: "),
        (b'x = "caf\xe9"\n', "line 1: SyntaxError: (unicode error) 'utf-8' codec can't decode byte 0xe9"),
        (b"x = 1\n\0\n", "SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(
    text: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, text)
    assert fails(capsys, "--plugin", path).startswith(f"--plugin {path}: {message}")
    assert "_plugin_mine" not in sys.modules


def test_a_plugin_that_is_no_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in fails(capsys, "--plugin", tmp_path / "none.py")
    assert "not a Python file" in fails(capsys, "--plugin", tmp_path)
    assert "File name too long" in fails(capsys, "--plugin", "a" * 5000 + ".py")
    assert "argument --plugin: expected one argument" in fails(capsys, "--plugin")
    assert "argument --plugin: expected one argument" in fails(capsys, "--plugin", "--prompt", "a")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "it defines no cache"),
        ("@dataclass\nclass Mine(KVCache):\n" + UPDATE, "it defines no cache"),
        ("@dataclass\nclass Mine(KVCache):\n    name = 'mine'\n", "class Mine: it defines no update"),
        ("class Mine(FullCache):\n    name = 'mine'\n    n: int = knob(3, '')\n", "class Mine: .* no @dataclass"),
        ("@dataclass\nclass Mine(FullCache):\n    name = 5\n", "class Mine: the name 5 is not one word"),
        ("@dataclass\nclass Mine(FullCache):\n    name = 'a:b'\n", "class Mine: the name 'a:b' is not one word"),
        ("@dataclass\nclass Mine(KVCache):\n    name = 'full'\n" + UPDATE, "'full' is FullCache's already"),
        ("@dataclass\nclass Mine(SelectiveCache):\n    pass\n", "'quantize_kv' is SelectiveCache's already"),
        (
            "@dataclass\nclass A(FullCache):\n    name = 'mine'\n\n@dataclass\nclass B(A):\n    n: int = 3\n",
            "class B: the name 'mine' is A's already",
        ),
        ("@dataclass\nclass Mine(FullCache):\n    name = 'mine'\n    n: int\n", "class Mine, field n: .* no default"),
        (
            "@dataclass\nclass Mine(FullCache):\n    name = 'mine'\n    n: list = field(default_factory=list)\n",
            "class Mine, field n: it has no default",
        ),
        (
            "@dataclass\nclass Mine(FullCache):\n    name = 'mine'\n    n: int | None = None\n",
            "class Mine, field n: its default is a NoneType",
        ),
    ],
)  # fmt: skip
def test_a_plugin_that_is_no_cache_is_one_line(
    body: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, HEAD + body)
    assert re.search(message, fails(capsys, "--plugin", path).removeprefix(f"--plugin {path}: "))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("seed: int = 3", "class Mine, field seed: generate.py has an argument of that name already"),
        ("cache: int = 3", "class Mine, field cache: generate.py has an argument of that name already"),
        ("rotate: int = 3", "class Mine, field rotate: SelectiveCache has it too"),
    ],
)
def test_a_field_that_cannot_be_a_flag_is_named(
    field: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, f"{HEAD}@dataclass\nclass Mine(FullCache):\n    name = 'mine'\n    {field}\n")
    assert message in fails(capsys, "--plugin", path, "mine")


def test_a_plugin_takes_no_modules_name_and_may_be_read_again(tmp_path: Path) -> None:
    """One called torch.py became everybody's torch."""
    text = f"{HEAD}@dataclass\nclass Mine(FullCache):\n    name: ClassVar[str] = 'mine'\n    n: int = %d\n"
    for n in (3, 4):
        load_plugin(["--plugin", str(written(tmp_path, text % n, "torch.py"))])
        assert sys.modules["torch"] is torch and make_policy("mine", {}).n == n  # type: ignore[attr-defined]
        (tmp_path / "torch.py").unlink()


def test_a_plugin_with_slots(tmp_path: Path) -> None:
    """dataclass(slots=True) makes a second class of the same name."""
    text = f"{HEAD}@dataclass(slots=True)\nclass Mine(FullCache):\n    name: ClassVar[str] = 'mine'\n    n: int = 3\n"
    load_plugin(["--plugin", str(written(tmp_path, text))])
    assert make_policy("mine", {"n": "4"}).n == 4  # type: ignore[attr-defined]


def test_a_plugins_own_mistake_while_running_keeps_its_traceback(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, f"{HEAD}@dataclass\nclass Mine(KVCache):\n    name = 'mine'\n{UPDATE}")
    with pytest.raises(ZeroDivisionError):
        generate.main(["--checkpoint_path", str(tiny), "--plugin", str(path), "--prompt", "a", "mine"])


# ---- help ----


def test_each_cache_tells_what_its_flags_do_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    """quantize_kv's own words about --sink_size and --window_size were never shown."""
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert ".:" not in out
    for cls in (SinkWindowCache, SelectiveCache):
        group = re.split(r"\n\n(?=\w+: )", out.partition(f"\n{cls.name}: ")[2])[0]
        words = " ".join(group.split())
        for f in dataclasses.fields(cls):
            assert f"--{f.name}" in words and f"{f.metadata['help']} (default: {f.default})" in words
    for flag in ("--positions {cache,original}", "--k_bits {8,4,3,2}", "--v_bits {8,4,3,2}"):
        assert flag in out


def test_sizes() -> None:
    assert (
        parse_size("20GiB") == 20 << 30 and parse_size("1.5e9") == 1_500_000_000 and parse_size("20 gb") == 20 * 10**9
    )
    for text in ("1e999", "1e300T", "0", "0.1", "1.2.3", "GiB", "-1", "1e"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as 20GiB"):
            parse_size(text)


# ---- nearest names ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quantise_kv"], r"'quantise_kv' .*'quantize_kv'\); did you mean quantize_kv\?$"),
        (["quantize_kv:bits=4,k_bits=8"], "; knobs are flags here: quantize_kv --bits 4 --k_bits 8$"),
        (
            ["--caches", "quantize_kv:bits=4"],
            "--caches: the cache is a word here, .* quantize_kv --bits 4$",
        ),
        (["--temp", "1"], r"unknown argument --temp; did you mean --temperature\?$"),
        (["--top", "1"], r"unknown argument --top; did you mean --top_[kp]\?$"),
        (["--prompt", "--5 apples"], r"^unknown argument --5 apples \(a value that .* given as --prompt=...\)$"),
        (["--prompt", "--5\napples"], r"^unknown argument --5 apples \(a value that .* given as --prompt=...\)$"),
        (["--prompt", "--sede", "3"], r"unknown argument --sede; did you mean --seed\? \(.*--prompt=...\)$"),
        (["--chat", "--5 apples"], r"^unknown argument --5 apples$"),
        (["--checkpoint_path", ""], "argument --checkpoint_path: the path is empty"),
        (["--prompt_file="], "argument --prompt_file: the path is empty"),
    ],
)
def test_mistaken_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, fails(capsys, *argv))


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (benchmark.main, ["quantize_kv"], r"unrecognized arguments: quantize_kv \(is it for --caches\?\)$"),
        (benchmark.main, ["--bits", "4"], r"--bits: knobs stand behind .* --caches quantize_kv:k_bits=4,v_bits=4$"),
        (benchmark.main, ["--caches", "quantize_kv --bits 4"], r"knobs stand behind a colon, as in quantize_kv:k_b"),
        (
            benchmark.main,
            ["--batch", "1,8"],
            r"'1,8' is not a whole number above zero; several stand apart, as in 1 8$",
        ),
        (evaluate.main, ["perplexity", "my.txt"], r"unrecognized arguments: my.txt \(is it for --text\?\)$"),
        (evaluate.main, ["--caches", "full"], r"required: kind \(perplexity, divergence, passkey, ruler, rouge\)$"),
        (download.main, ["meta-llama/x"], "the following arguments are required: --repo_id OWNER/NAME$"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_of_a_hurried_person(
    main: Callable[[list[str]], None], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err.strip())


def test_a_value_that_begins_with_dashes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--checkpoint_path", str(tiny), "--prompt=--5 apples", "--max_new_tokens", "2"])
    assert capsys.readouterr().out.startswith("--5 apples")


def test_an_unknown_cache_in_a_setting() -> None:
    with pytest.raises(UserError, match=r"no cache is called 'quantise_kv': .*; did you mean quantize_kv\?$"):
        parse_policy("quantise_kv:sink_size=4")
