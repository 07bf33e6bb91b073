"""--save_cache and --load_cache as users give them: prompts, batches, conversations and chats."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from conftest import write_checkpoint
from generate_calls import call, fails

import generate

QUANTIZE = ["quantize_kv", "--sink_size", "2", "--window_size", "6"]
COMPRESS = ["compress_kv", "--sink_size", "2", "--window_size", "6"]


@pytest.mark.parametrize("cache", [[], QUANTIZE, COMPRESS], ids=lambda c: c[0] if c else "full")
def test_a_prompt_is_read_once(
    cache: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "a.safetensors", ["--checkpoint_path", tiny, "--max_new_tokens", 12, *cache]
    prompts = ["--prompt", "The red fox jumped over the river, and then", "--prompt", "A boat"]
    want, report, err = call(capsys, *run, *prompts, "--save_cache", file)
    assert report["save_cache"]["bytes"] == file.stat().st_size and "saved " in err
    for given in (prompts, []):  # the saved text again, or whatever it is
        text, report, err = call(capsys, *run, *given, "--load_cache", file)
        assert report["texts"] == json.loads(json.dumps(report["texts"])) and report["tokens_read"] == 0
        assert text.endswith(want[-12:]) if given else True
        assert "loaded " in err
    assert text in want or report["texts"] == call(capsys, *run, *prompts)[1]["texts"]


def test_only_what_is_new_is_read(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = tmp_path / "a.safetensors", ["--checkpoint_path", tiny, "--temperature", 0, "--max_new_tokens", 12]
    text = "The red fox jumped over the river, and then"
    call(capsys, *run, "--prompt", text, "--save_cache", file)
    longer = text + " it went home to sleep"
    want, fresh, _ = call(capsys, *run, "--prompt", longer)
    got, report, _ = call(capsys, *run, "--prompt", longer, "--load_cache", file)
    assert got == want and 0 < report["tokens_read"] < fresh["tokens_read"]
    want, fresh, _ = call(capsys, *run, "--prompt", "The red fox wandered")
    got, report, err = call(capsys, *run, "--prompt", "The red fox wandered", "--load_cache", file)
    assert got == want and report["tokens_read"] < fresh["tokens_read"] and "parts from the saved text" in err
    call(capsys, *run, "--prompt", " ".join([text] * 7), "--save_cache", file, *QUANTIZE)  # a tile has left the window
    got, report, err = call(capsys, *run, "--prompt", "The red fox wandered", "--load_cache", file, *QUANTIZE)
    assert "is read anew" in err and report["tokens_read"] == fresh["tokens_read"]


def talk(
    lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: object
) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return call(capsys, "--interactive", "--temperature", 0, "--max_new_tokens", 9, "--context", 200, *argv)[1]["texts"]


@pytest.mark.parametrize("cache", [[], QUANTIZE], ids=["full", "quantize_kv"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_conversation_goes_on(
    chat: bool, cache: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = write_checkpoint(tmp_path / "m"), tmp_path / "talk.safetensors"
    if chat:
        template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
        (folder / "chat_template.jinja").write_text(template)
    run = ["--checkpoint_path", folder, *(["--chat"] if chat else []), *cache]
    lines = ["The red fox", "and the boat", "one more"]
    want = talk(lines, capsys, monkeypatch, *run)
    assert talk(lines[:1], capsys, monkeypatch, *run, "--save_cache", file) == want[:1]
    assert talk(lines[1:2], capsys, monkeypatch, *run, "--load_cache", file, "--save_cache", file) == want[1:2]
    assert talk(lines[2:], capsys, monkeypatch, *run, "--load_cache", file) == want[2:]
    other = ["--checkpoint_path", folder, *([] if chat else ["--chat"]), *cache, "--interactive", "--load_cache", file]
    if chat:
        assert "it holds a chat: give --chat too" in fails(capsys, *other)
        assert "--system" in fails(capsys, *run, "--interactive", "--system", "x", "--load_cache", file)


def test_questions_about_a_saved_text(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation may begin with what a prompt left, and must leave a room for it."""
    file, run = tmp_path / "a.safetensors", ["--checkpoint_path", tiny]
    call(capsys, *run, "--prompt", "The red fox jumped over", "--max_new_tokens", 1, "--save_cache", file)
    assert talk([" the river"], capsys, monkeypatch, *run, "--load_cache", file)
    message = fails(capsys, *run, "--interactive", "--context", 3, "--load_cache", file)
    assert "and there is room for 3: see --context" in message
    nothing = tmp_path / "nothing.safetensors"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    generate.main(["--checkpoint_path", str(tiny), "--interactive", "--save_cache", str(nothing)])
    assert "nothing has been read" in capsys.readouterr().err and not nothing.exists()


def test_mistakes_are_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = tmp_path / "a.safetensors", ["--checkpoint_path", tiny, "--prompt", "A boat"]
    call(capsys, *run, "--save_cache", file)
    assert "of another cache" in fails(capsys, *run, "--load_cache", file, *QUANTIZE)
    assert "it holds 1 sequence, and the run has 2" in fails(capsys, *run, "--num_samples", 2, "--load_cache", file)
    other = write_checkpoint(tmp_path / "other", seed=1)
    message = fails(capsys, "--checkpoint_path", other, "--load_cache", file)
    assert "of other weights" in message and "bits" not in message
    assert "in 8 or 4 bits they differ" in fails(capsys, *run, "--weights", "int8", "--load_cache", file)
    assert "no such file" in fails(capsys, *run, "--load_cache", tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", "/dev/null"):
        assert "not a plain file" in fails(capsys, *run, "--save_cache", special)
    assert "not a folder" in fails(capsys, *run, "--save_cache", file / "below")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom selective_kv import FullCache\n"
        '@dataclass\nclass Mine(FullCache):\n    name: ClassVar[str] = "mine_saved"\n'
    )
    message = fails(capsys, *run, "--plugin", tmp_path / "mine.py", "mine_saved", "--save_cache", file)
    assert "mine_saved does not say what it holds" in message


def test_benchmark_and_evaluate_start_from_one(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text scored after a saved one costs what it costs at the end of both, in every cache."""
    from benchmark import command as benchmark
    from evaluation import command as evaluate

    full, int8 = tmp_path / "full.safetensors", tmp_path / "int8.safetensors"
    run = ["--checkpoint_path", tiny, "--max_new_tokens", 1, "--prompt", "The red fox jumped over the river. " * 8]
    call(capsys, *run, "--save_cache", full)
    _, report, _ = call(capsys, *run, "--save_cache", int8, *QUANTIZE)
    record = tmp_path / "speed.json"
    argv = ["--checkpoint_path", tiny, "--load_cache", full, int8, "--rounds", 1, "--steps", 2, "--json", record]
    benchmark.main([str(a) for a in argv])
    rows = json.loads(record.read_text())["rows"]
    assert [r["cache"].split(":")[0] for r in rows] == ["full", "quantize_kv"]
    assert {(r["batch"], r["context"]) for r in rows} == {(1, report["tokens_read"])}
    text = tmp_path / "text.txt"
    text.write_text("and the old clock looked over the stone wall until the morning came.")
    record = tmp_path / "score.json"
    argv = ["perplexity", "--checkpoint_path", tiny, "--text", text, "--context", 12, "--windows", 1]
    cache = "quantize_kv:sink_size=2,window_size=6"
    evaluate.main([str(a) for a in [*argv, "--caches", cache, "--json", record, "--load_cache", full]])
    after = json.loads(record.read_text())["rows"]
    evaluate.main([str(a) for a in [*argv, "--caches", cache, "--json", record]])
    alone = json.loads(record.read_text())["rows"]
    assert [r["tokens"] for r in after] == [11, 11] and after[0]["nll"] != alone[0]["nll"]
    assert after[0]["nll"] != after[1]["nll"]
    capsys.readouterr()
    for command, argv in (
        (benchmark, ["--load_cache", full, "--context", 5]),
        (evaluate, ["passkey", "--load_cache", full]),
        (evaluate, ["perplexity", "--load_cache", int8, "--text", text, "--context", 12]),
    ):
        with pytest.raises(SystemExit) as exit_:
            command.main([str(a) for a in [*argv, "--checkpoint_path", tiny]])
        assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1
