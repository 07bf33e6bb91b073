"""The scripts that write gpt-fast's format and that fetch a model, on local folders."""

from __future__ import annotations

import fnmatch
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import families
import pytest
import torch
from checkpoints import (
    SMALL,
    forward,
    fused,
    load,
    random_gpt_fast,
    write_hugging_face_config,
)
from huggingface_hub import errors

from checkpoint import convert as convert_hf_checkpoint
from checkpoint import download
from cli import convert as convert_command
from cli import download as download_command
from common.errors import UserError


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.make("llama2", tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(b"tiktoken")
    convert_command.main(["--checkpoint_dir", str(tmp_path)])  # into the same folder, as gpt-fast's
    assert "model.pth" in capsys.readouterr().out
    assert (tmp_path / "tokenizer.model").read_bytes() == b"tiktoken"
    with pytest.raises(SystemExit) as caught:
        convert_command.main(["--checkpoint_dir", str(tmp_path / "gone")])
    assert caught.value.code == 2 and "no such file or folder" in capsys.readouterr().err


def test_convert_of_what_is_interleaved_already(tmp_path: Path) -> None:
    """Meta's names with q, k and v apart become gpt-fast's with the three fused; no row moves."""
    state = random_gpt_fast(SMALL)
    torch.save(state, tmp_path / "consolidated.00.pth")
    write_hugging_face_config(tmp_path)
    written = torch.load(convert_hf_checkpoint.convert(tmp_path, tmp_path / "out"), weights_only=True)
    expected = fused(state, SMALL)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_convert_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.make("llama2", tmp_path / "hf")

    def full_disk(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nbacktrace")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"failed writing file$"):
        convert_hf_checkpoint.convert(tmp_path / "hf", tmp_path / "out")
    assert not list((tmp_path / "out").glob("model.pth*"))


def test_convert_mixes_no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A's config.json stayed beside B's weights; and one that a kill had cut in half stayed for ever."""
    families.make("llama2", tmp_path / "a")
    families.make("qwen3", tmp_path / "b")
    (tmp_path / "a" / "added_tokens.json").write_text("{}")
    out = tmp_path / "out"
    convert_hf_checkpoint.convert(tmp_path / "a", out)
    with pytest.raises(UserError, match=r"out: holds added_tokens.json, of another checkpoint: give an empty folder$"):
        convert_hf_checkpoint.convert(tmp_path / "b", out)
    assert torch.equal(load(out).output.weight, load(tmp_path / "a").output.weight)
    (out / "added_tokens.json").unlink()
    (out / "config.json").write_text('{"cut')
    (out / "config.json.part").write_text('{"left by a kill')
    convert_hf_checkpoint.convert(tmp_path / "b", out)
    for ours, theirs in zip(load(out).parameters(), load(tmp_path / "b").parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not list(out.glob("*.part"))
    (out / "model.safetensors").touch()  # which would be loaded instead
    with pytest.raises(UserError, match=r"out: holds model.safetensors, of another"):
        convert_hf_checkpoint.convert(tmp_path / "b", out)


@pytest.mark.parametrize("step", ["copyfile", "save", "replace"])
def test_convert_that_dies_leaves_no_mixture(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it was doing: the folder holds the old checkpoint, the new one, or none."""
    families.make("llama2", tmp_path / "a")
    families.make("qwen3", tmp_path / "b")
    out = tmp_path / "out"
    convert_hf_checkpoint.convert(tmp_path / "a", out)
    before = load(out).output.weight
    calls = itertools.count()
    where, name = {"copyfile": (shutil, "copyfile"), "save": (torch, "save"), "replace": (Path, "replace")}[step]
    original = getattr(where, name)

    def dying(*args: object) -> object:
        if next(calls) == 1 or step == "save":
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, dying)
        with pytest.raises(KeyboardInterrupt):
            convert_hf_checkpoint.convert(tmp_path / "b", out)
    assert not list(out.glob("*.part"))
    if step == "replace":
        with pytest.raises(UserError, match="no weights in this folder"):
            load(out)
    else:
        assert torch.equal(load(out).output.weight, before)


@pytest.mark.parametrize("out", ["file", "file/inside", "n" * 300, "n" * 5000])
def test_convert_into_what_is_no_folder(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--out README.md` ended in a traceback, from tidying up."""
    families.make("llama2", tmp_path / "hf")
    (tmp_path / "file").write_text("mine")
    capsys.readouterr()  # transformers' progress
    with pytest.raises(SystemExit) as caught:
        convert_command.main(["--checkpoint_dir", str(tmp_path / "hf"), "--out", str(tmp_path / out)])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1
    assert re.search("not a folder|Not a directory|File name too long", err, re.IGNORECASE)
    assert {f.name for f in tmp_path.iterdir()} == {"hf", "file"} and (tmp_path / "file").read_text() == "mine"


def test_convert_of_a_file(tmp_path: Path) -> None:
    families.make("llama2", tmp_path)
    with pytest.raises(UserError, match=r"model.safetensors: not a folder$"):
        convert_hf_checkpoint.convert(tmp_path / "model.safetensors", tmp_path / "out")


@pytest.mark.parametrize("script", [convert_command, download_command])
@pytest.mark.parametrize("argv", [[], ["--ou", "x"], ["--out"], ["--out", ""], ["--nothing"]])
def test_argument_errors_are_one_line(script: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(
        {convert_command: "convert_hf_checkpoint", download_command: "download"}[script] + ".py: error: "
    )


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.make("llama2", tmp_path / "hub")
    (tmp_path / "hub" / "added_tokens.json").write_text("{}")

    def files(repo_id: str, *, token: str | None) -> list[str]:
        return [path.name for path in (tmp_path / "hub").iterdir()]

    def snapshot(repo_id: str, *, local_dir: Path, allow_patterns: list[str], token: str | None) -> None:
        assert (repo_id, token) == ("owner/name", "secret")
        local_dir.mkdir()
        for pattern in allow_patterns:
            for file in (tmp_path / "hub").glob(pattern):
                shutil.copyfile(file, local_dir / file.name)

    monkeypatch.setattr("huggingface_hub.list_repo_files", files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    out = tmp_path / "out"
    download_command.main(["--repo_id", "owner/name", "--out", str(out), "--hf_token", "secret"])
    assert forward(load(out)).isfinite().all() and (out / "added_tokens.json").exists()


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"], {"model.safetensors"}),
        (["model-00001-of-00002.safetensors", "pytorch_model.bin"], {"model-00001-of-00002.safetensors"}),
        (["consolidated.safetensors", "params.json", "tokenizer.model.v3"],
         {"consolidated.safetensors", "params.json", "tokenizer.model.v3"}),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"],
         {"pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"}),
        (["a.Q4_K_M.gguf", "README.md"], {"a.Q4_K_M.gguf"}),
        (["a.Q4_0.gguf", "a.Q8_0.gguf", "b.gguf", "c.gguf"], "4 GGUF files .a.Q4_0.gguf, a.Q8_0.gguf, b.gguf, ...."),
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter and no model of its own"),
        (["tf_model.h5", "flax_model.msgpack"], r"no weights that are read here: .* .it has .h5, .msgpack"),
        (["README.md"], "no weights that are read here"),
    ],
)  # fmt: skip
def test_what_is_fetched_of_a_repository(files: list[str], fetched: set[str] | str) -> None:
    """One of .bin files alone was fetched without its weights."""
    if isinstance(fetched, str):
        with pytest.raises(UserError, match=f"owner/name: {fetched}"):
            download.wanted("owner/name", files)
    else:
        patterns = download.wanted("owner/name", files)
        assert {name for name in files if any(fnmatch.fnmatch(name, p) for p in patterns)} == fetched


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: errors.GatedRepoError("no", response=RESPONSE), "is gated: accept its licence"),
        (lambda: errors.RepositoryNotFoundError("no", response=RESPONSE), "no such model on the Hub"),
        (lambda: errors.HFValidationError("no"), "not a repository's name"),
        (lambda: errors.LocalEntryNotFoundError("no connection\nmore"), "not downloaded: no connection$"),
        (lambda: OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_download_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: Callable[[], Exception],
    message: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error()

    monkeypatch.setattr("huggingface_hub.list_repo_files", fail)
    with pytest.raises(SystemExit) as caught:
        download_command.main(["--repo_id", "owner/name", "--out", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1
    assert re.search(message, lines[0])


def test_where_no_folder_can_be_nothing_is_asked_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *args, **options: pytest.fail("it was asked"))
    (tmp_path / "file").write_text("a")
    with pytest.raises(SystemExit) as caught:
        download_command.main(["--repo_id", "owner/name", "--out", str(tmp_path / "file")])
    assert caught.value.code == 2 and "--out" in capsys.readouterr().err
