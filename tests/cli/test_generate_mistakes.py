"""Mistakes in calls of generate.py, in its files and in weights: one line, exit code 2, nothing on standard output."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint
from generate_calls import fails
from safetensors.torch import load_file, save_file

import cli.ranks
import generate
from checkpoint import load_model, open_checkpoint
from cli import run
from common.errors import UserError
from engine import Engine, Sampling
from kv_cache import ModelCache
from selective_kv import FullCache, Shape


def test_flags_that_are_wrong(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint_path", tiny, "--prompt", "The"]
    assert "did you mean --sink_size?" in fails(capsys, *base, "quantize_kv", "--sink_sise", 4)
    assert "did you mean --max_new_tokens?" in fails(capsys, *base, "--max_tokens", 4)
    assert "--max_new_tokens" in fails(capsys, *base, "--max_new_tokens", 0)
    assert "--window_size must be at least 1, not 0" in fails(capsys, *base, "quantize_kv", "--window_size", 0)
    assert "--sink_size must be at least 0" in fails(capsys, *base, "compress_kv", "--sink_size", -1)
    assert "--sink_size takes a value of type int" in fails(capsys, *base, "compress_kv", "--sink_size", "four")
    assert "--sink_size is a flag of compress_kv and quantize_kv" in fails(capsys, *base, "--sink_size", 4)
    assert "invalid choice" in fails(capsys, *base, "quantise_kv")
    assert "--temperature" in fails(capsys, *base, "--temperature", -1)
    assert "--top_p" in fails(capsys, *base, "--top_p", 0)
    assert "--top_k" in fails(capsys, *base, "--top_k", -3)
    assert "--profile" in fails(capsys, *base, "--profile", "../x")


def test_prompts_that_are_wrong(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint_path", tiny]
    assert "empty" in fails(capsys, *base, "--prompt", "")
    assert "not UTF-8" in fails(capsys, *base, "--prompt", os.fsdecode(b"caf\xe9"))
    assert "300 tokens, 44 more than the model's context of 256" in fails(capsys, *base, "--prompt", 300)
    assert "280, 24 past the model's context" in fails(
        capsys, *base, "--prompt", "a", "compress_kv", "--sink_size", 40, "--window_size", 240
    )
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n\xff\xfe\n")
    assert "not UTF-8 at byte 5" in fails(capsys, *base, "--prompt_file", bad)
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "line 2" in fails(capsys, *base, "--prompt_file", bad)
    bad.write_text("\n")
    assert "no prompt" in fails(capsys, *base, "--prompt_file", bad)
    assert "No such file" in fails(capsys, *base, "--prompt_file", tmp_path / "none.txt")


def test_checkpoints_that_are_wrong(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = fails(capsys, "--checkpoint_path", tmp_path / "nothing.pth", "--prompt", "a")
    assert "nothing.pth" in missing
    garbage = tmp_path / "model.pth"
    garbage.write_bytes(b"this is no checkpoint")
    assert "model.pth" in fails(capsys, "--checkpoint_path", garbage, "--prompt", "a")
    if not torch.cuda.is_available():
        assert "cuda" in fails(capsys, "--checkpoint_path", tiny, "--prompt", "a", "--device", "cuda").lower()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bits", "4"], "--bits is a flag of quantize_kv, and the cache is full"),
        (["quantize_kv", "--bits", "4", "--k_bits", "8"], "--bits says both"),
        (["quantize_kv", "--k_bits", "5"], "--k_bits must be one of 8, 4, 3, 2, not 5"),
        (["--memory_budget", "20XB"], "'20XB' is not a size"),
        (["--memory_budget", "1MiB"], "1.00 MiB are free"),
    ],
)
def test_mistakes_about_bits_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        generate.main(argv)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("target", ["a file/r.json", "a folder"])
def test_a_report_that_cannot_be_written_is_told_before_the_work(
    target: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--checkpoint_path", str(tiny), "--prompt", "The", "--json", str(tmp_path / target)])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and len(err.splitlines()) == 1 and "--json" in err
    assert {f.name for f in tmp_path.iterdir()} == {"a file", "a folder"}


def test_what_cannot_fit_is_said_before_loading(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.ranks, "device_memory", lambda device: 20 << 30)
    line = fails(capsys, "--random_weights", "--model", "llama-3.1-8b", "--prompt", 100_000, "--dtype", "bfloat16")
    assert "the largest context that fits is" in line
    fits = int(line.split("fits is ")[1].split()[0])
    base = [
        "--random_weights",
        "--model",
        "llama-3.1-8b",
        "--dtype",
        "bfloat16",
        "--dry_run",
        "--max_new_tokens",
        1,
    ]
    generate.main([str(a) for a in [*base, "--prompt", fits - 1]])
    with pytest.raises(SystemExit) as exit_:
        generate.main([str(a) for a in [*base, "--prompt", fits + 1]])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and "total" in out and "largest context" in err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_runs_out_after_all_is_one_line(
    tiny: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(run, "ModelCache", no_room)
    assert "memory ran out" in fails(capsys, "--checkpoint_path", tiny, "--prompt", "x")
    error = RuntimeError("an illegal memory access")  # not that: the traceback is needed
    with pytest.raises(RuntimeError, match="illegal"):
        generate.main(["--checkpoint_path", str(tiny), "--prompt", "x"])


def test_numbers_that_are_not_finite_name_the_first_bad_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--checkpoint_path", str(folder), "--prompt", "The", "--no-echo"])
    assert exit_.value.code == 2
    assert "layers.1.feed_forward.w2" in capsys.readouterr().err
    checkpoint, cpu = open_checkpoint(folder, None), torch.device("cpu")
    cache = ModelCache(FullCache(), 2, Shape(1, 2, 8, 32, torch.float32, cpu))
    model = load_model(checkpoint, cpu, torch.float32)
    engine = Engine(model, cache, Sampling(temperature=0), lag=2)  # as on a GPU: steps on, unseen
    with pytest.raises(UserError, match=r"layers\.1\.feed_forward\.w2"):
        list(engine.generate([[1, 2, 3]], 8))
    tensors = load_file(write_checkpoint(folder) / "model.safetensors")
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= 1e30  # finite, but their product overflows
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        generate.main(["--checkpoint_path", str(folder), "--prompt", "The"])
    assert "the output of layers.0.feed_forward" in capsys.readouterr().err
