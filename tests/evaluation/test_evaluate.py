"""evaluate.py as its users call it: tables, records, mistakes. What it computes is tested in test_scoring.py."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SENTENCES, write_checkpoint
from evaluate_calls import CACHES, TEXT, fails, record, text_file
from safetensors.torch import load_file, save_file

from evaluation import command as evaluate
from evaluation import passkeys as retrieval
from evaluation import scoring, subject

BLANK = """
from dataclasses import dataclass
from typing import ClassVar
from selective_kv import SelectiveCache

@dataclass
class Blank(SelectiveCache):
    "Sees nothing from position 50 on."
    name: ClassVar[str] = "blank_kv"

    def attend(self, q, k, v, chunk, rope):
        return super().attend(q, k, v, chunk, rope) * (chunk.positions < 50)[:, None, :, None]
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_file(tmp_path)


def test_perplexity_and_divergence_of_a_text(
    tiny: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--checkpoint_path", tiny, "--text", text, "--context", 200, "--windows", 2, *CACHES]  # a tile leaves
    r = record(tmp_path, "perplexity", *base)
    full, quantised, dropped = r["rows"]
    assert full["cache"] == "full" and full["kl"] == 0 and full["perplexity_rise"] == 0 and full["same_top"] == 1
    assert full["tokens"] == 398 and full["windows"] == 2
    assert abs(quantised["perplexity_rise"]) < 0.01 and 0 < quantised["kl"] < 1e-2 < dropped["kl"]
    assert (
        quantised["bits_per_quantised_element"] == 8 + (32 / 128 + 32 / 8) / 2
    )  # a key's channel over 128 tokens, a value's head_dim of 8
    assert full["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert r["command"][0] == "scripts/evaluate.py" and str(tmp_path) not in json.dumps(r)
    assert TEXT[:40] not in json.dumps(r)  # figures travel, texts do not
    sequential = record(tmp_path, "perplexity", *base, "--sequential")
    for a, b in zip(r["rows"], sequential["rows"], strict=True):
        assert abs(a["nll"] - b["nll"]) < 1e-3
    out = capsys.readouterr().out
    assert "bits/byte" in out and "quantize_kv:sink_size=2,window_size=8" in out
    record(tmp_path, "divergence", *base)
    assert "mean KL" in capsys.readouterr().out


def test_a_cache_of_ones_own_is_scored_through_itself(tiny: Path, tmp_path: Path, text: Path) -> None:
    """Token by token: nobody knows its parallel form, even where it is derived from a cache that has one."""
    plugin, out = tmp_path / "mine.py", tmp_path / "out.json"
    plugin.write_text(BLANK)
    argv = ["--checkpoint_path", tiny, "--text", text, "--context", 100, "--windows", 1, "--plugin", plugin]
    argv += ["--caches", "quantize_kv", "blank_kv", "--json", out]
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", "divergence", *map(str, argv)]
    subprocess.run(command, check=True, capture_output=True)  # a process of its own: the class stays known in this one
    kl = {r["cache"].partition(":")[0]: r["kl"] for r in json.loads(out.read_text())["rows"]}
    assert kl["quantize_kv"] < 1e-2 < kl["blank_kv"]


def test_without_a_text_the_model_writes_one(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["divergence", "--checkpoint_path", tiny, "--context", 60, "--windows", 2, *CACHES]
    a, b = record(tmp_path, *base), record(tmp_path, *base)
    assert a["rows"] == b["rows"] and a["rows"][0]["sampled"]
    assert "the text's entropy" in capsys.readouterr().out


def test_another_checkpoint_is_what_is_compared_with(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a GGUF file with the original; itself is no different, and another vocabulary cannot be compared."""
    base = ["divergence", "--checkpoint_path", tiny, "--text", text, "--context", 60, "--windows", 1, *CACHES]
    alone = record(tmp_path, *base)["rows"]
    same = record(tmp_path, *base, "--reference_path", tiny)["rows"]
    assert [r["kl"] for r in same] == pytest.approx([0, *(r["kl"] for r in alone)], abs=1e-7)
    other = write_checkpoint(tmp_path / "other" / "small", seed=1)
    found = record(tmp_path, *base, "--reference_path", other)
    assert [(r["cache"], r["weights"]) for r in found["rows"]][:2] == [("full", "16"), ("full", tiny.name)]
    assert found["rows"][0]["kl"] == 0 and all(r["kl"] > 1e-3 for r in found["rows"][1:])
    assert f"full, weights {tiny.name}" in capsys.readouterr().out
    assert "--reference_path goes with" in fails(capsys, "passkey", "--reference_path", other)
    assert "its vocabulary has" in fails(capsys, *base, "--reference_path", ROOT / "assets" / "demo")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("divergence", ["--context", 200, "--windows", 3]),
        ("passkey", ["--lengths", 200, 240, "--depths", 0, 1, "--trials", 3]),
        ("ruler", ["--lengths", 800, "--trials", 3, "--tasks", "niah_single"]),
        ("rouge", ["--context", 220, "--max_new_tokens", 5, "--documents", 3]),
    ],
)
def test_what_is_read_together_is_what_is_read_alone(
    kind: str, options: list[object], tiny: Path, text: Path, tmp_path: Path
) -> None:
    """--batch changes how long it takes. Three in twos: the last group is smaller."""
    stories = tmp_path / "stories.jsonl"
    stories.write_text("".join(json.dumps({"text": TEXT[: 600 + n], "summary": "A fox."}) + "\n" for n in (0, 40, 90)))
    folder = write_checkpoint(tmp_path / "model", context=1024) if kind == "ruler" else tiny
    base = [kind, "--checkpoint_path", folder, *CACHES, *options]
    if kind != "ruler":
        base += ["--text", stories if kind == "rouge" else text]
    alone, together = record(tmp_path, *base), record(tmp_path, *base, "--batch", 2)
    assert len(alone["rows"]) == len(together["rows"]) == 3
    for a, b in zip(alone["rows"], together["rows"], strict=True):
        if kind == "divergence":
            assert a["nll"] == pytest.approx(b["nll"], rel=1e-4) and a["kl"] == pytest.approx(b["kl"], abs=1e-4)
            assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-4) and a["windows"] == b["windows"]
        else:
            assert a == b


@pytest.mark.parametrize(
    ("kind", "where", "options"),
    [
        ("perplexity", scoring, ["--context", "60", "--windows", "3"]),
        ("passkey", retrieval, ["--lengths", "200", "--depths", "0", "0.5", "1"]),
    ],
)
def test_a_crash_loses_no_finished_result(
    kind: str, where: Any, options: list[str], tiny: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a text: what was done stands beside the record of an earlier run, which is whole still."""
    out, kept = tmp_path / "out.json", tmp_path / "out.unfinished.json"
    argv = [kind, "--checkpoint_path", str(tiny), "--text", str(text), "--json", str(out), *CACHES, *options]
    evaluate.main(argv)
    before = out.read_text()
    name = "score" if where is scoring else "recalled"
    original, calls = getattr(where, name), 0

    def crash(*args):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(where, name, crash)
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(argv)
    saved = json.loads(kept.read_text())
    assert exit_.value.code == 130 and not saved["finished"] and len(saved["rows"]) == 3
    assert out.read_text() == before
    monkeypatch.setattr(where, name, original)
    evaluate.main(argv)
    assert not kept.exists() and json.loads(out.read_text())["finished"]


def test_a_record_for_a_pipe_leaves_no_file_beside_it(tiny: Path, tmp_path: Path, text: Path) -> None:
    """For /dev/stdout an unfinished record was written to /dev: refused after the work, or left there."""
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "pipe.unfinished").mkdir()  # where such a file would stand, it could not be written
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((folder / "pipe").read_text()), daemon=True)
    reader.start()
    argv = ["perplexity", "--checkpoint_path", tiny, "--text", text, "--context", 60, "--windows", 1, *CACHES]
    evaluate.main([*map(str, argv), "--json", str(folder / "pipe")])
    reader.join(10)
    assert json.loads(got[0])["finished"]


def test_jsonl_is_read_for_its_texts(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not as the source that it is; U+2028 in a string ends no line."""
    lines = [{"text": SENTENCES[0] + "\u2028" + SENTENCES[1]}, {"document": TEXT}]
    path, plain = tmp_path / "t.jsonl", tmp_path / "t.txt"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    plain.write_text("\n\n".join([lines[0]["text"], TEXT]))
    base = ["perplexity", "--checkpoint_path", tiny, "--context", 60, "--windows", 2, "--text"]
    a, b = record(tmp_path, *base, path), record(tmp_path, *base, plain)
    assert [r["nll"] for r in a["rows"]] == [r["nll"] for r in b["rows"]]
    assert a["rows"][0]["sha256"] == b["rows"][0]["sha256"]
    capsys.readouterr()
    for last, message in (('{"title": "x"}', "line 3: the field 'text'"), ("[1]", "line 3: not a JSON object")):
        path.write_text('{"text": "a"}\n\n' + last)
        assert message in fails(capsys, *base, path)


def test_mistakes_are_one_line(tiny: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["perplexity", "--checkpoint_path", tiny, "--context", 100]
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "an empty text" in fails(capsys, *base, "--text", empty)
    short = tmp_path / "short.txt"
    short.write_text("The red fox")
    assert "tokens, and a window has 100" in fails(capsys, *base, "--text", short)
    assert "none.txt" in fails(capsys, *base, "--text", tmp_path / "none.txt")
    assert "past the model's context of 256" in fails(capsys, "perplexity", "--checkpoint_path", tiny, "--context", 300)
    assert "no cache is called 'quantise'" in fails(capsys, *base, "--text", text, "--caches", "quantise")
    assert "takes a value of type int" in fails(capsys, *base, "--caches", "quantize_kv:sink_size=x")
    passkey = ["passkey", "--checkpoint_path", tiny, "--text", text]
    assert "a passkey test takes at least" in fails(capsys, *passkey, "--lengths", 20)
    assert "past the model's context" in fails(capsys, *passkey, "--lengths", 256)
    assert "the first token has no score" in fails(capsys, *base, "--context", 1)
    assert "--context goes with perplexity and divergence and rouge, not passkey" in fails(
        capsys, *passkey, "--context", 100
    )
    assert "--lengths goes with passkey and ruler, not perplexity" in fails(capsys, *base, "--lengths", 100)
    assert "--sequential goes with perplexity" in fails(capsys, *passkey, "--sequential")
    assert "--text goes with" in fails(capsys, "ruler", "--checkpoint_path", tiny, "--text", text)
    assert "passkey takes one --text" in fails(capsys, *passkey, short, "--lengths", 100)
    assert "--k_bits must be one of 8, 4, 3, 2, not 5" in fails(capsys, *base, "--caches", "quantize_kv:k_bits=5")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe")
    assert "bad.txt" in fails(capsys, *base, "--text", bad)


@pytest.mark.parametrize("bad", ["weight", "logits"])
def test_numbers_that_are_none_are_an_error(
    bad: str, tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 0, a table of nan, and a record that was no JSON."""
    shutil.copytree(tiny, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    if bad == "weight":
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    else:
        tensors["model.norm.weight"] *= 3e38
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    out = tmp_path / "out.json"
    argv = ["perplexity", "--checkpoint_path", tmp_path / "m", "--text", text, "--context", 32, "--json", out]
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([*map(str, argv)])
    said = "the weight layers.1.feed_forward.w13.weight holds a NaN" if bad == "weight" else "the logits are not finite"
    assert exit_.value.code == 2 and said in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("kind", ["perplexity", "divergence", "passkey", "rouge"])
def test_a_weight_that_is_not_finite_is_named(
    kind: str, tiny: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 0, a table of nan, `"finished": true`, and NaN in the JSON."""
    bad, out = tmp_path / "bad", tmp_path / "out" / "r.json"
    shutil.copytree(tiny, bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, bad / "model.safetensors")
    short = {"passkey": "--lengths 200 --trials 1", "rouge": "--context 100 --max_new_tokens 4"}
    argv = [kind, "--checkpoint_path", bad, *short.get(kind, "--context 100 --windows 1").split(), *CACHES]
    stories = tmp_path / "stories.jsonl"
    stories.write_text(json.dumps({"text": TEXT[:200], "summary": "A fox."}))
    argv += ["--text", stories if kind == "rouge" else text, "--json", out]
    assert "layers.1.feed_forward.w2.weight" in fails(capsys, *argv)
    assert not list(out.parent.iterdir())


def test_texts_and_numbers_without_bounds(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Devices without an end, kilobytes of .xz that hold gigabytes, more texts than memory: gigabytes were taken."""
    bomb, cut, base = tmp_path / "b.xz", tmp_path / "c.xz", ["perplexity", "--checkpoint_path", tiny, "--context", 60]
    bomb.write_bytes(lzma.compress(bytes(1 << 26)) * 5)  # several streams in a file are one text
    cut.write_bytes(lzma.compress(TEXT.encode())[:-20])
    for argv, message in (
        ([*base, "--text", "/dev/zero"], "/dev/zero: more than 268,435,456 bytes"),
        ([*base, "--text", bomb], "more than 268,435,456 bytes when decompressed"),
        ([*base, "--text", cut], "damaged, or not made by xz"),
        ([*base, "--windows", 99_999_999], "99999999 texts of 60 tokens, which the model would write at once: "),
        (["passkey", "--trials", 10**9], "--trials: 1000000000 is more than 10,000"),
        ([*base, "--caches", "quantize_kv:window_size=" + "9" * 20], "--window_size must be at most 2,147,483,647"),
    ):
        assert message in fails(capsys, *argv)


def test_weights_that_do_not_fit_are_told_before_they_are_read(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subject, "device_memory", lambda device: 1000)
    monkeypatch.setattr(subject, "load_model", lambda *args, **options: pytest.fail("they were read"))
    err = fails(capsys, "perplexity", "--checkpoint_path", tiny, "--text", text, "--context", 60)
    assert "the weights need 112.62 KiB, and 1000 B are free" in err


def test_what_a_record_was_made_from(tiny: Path, tmp_path: Path, text: Path) -> None:
    argv = ["divergence", "--checkpoint_path", tiny, "--text", text, "--context", 60, "--windows", 1, *CACHES]
    r = record(tmp_path, *argv)
    files = r["made_from"]["files"]
    assert r["format"] == 2 and [name for name, _ in files] == [text.name]
    assert len(r["made_from"]["checkpoint"]) == 64 and r["made_from"]["device"] == "cpu"
    assert record(tmp_path, *argv)["made_from"] == r["made_from"]
