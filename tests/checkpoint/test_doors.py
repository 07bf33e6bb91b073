"""Checkpoints as people have them: links, caches, several files of which one counts, and hostile ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from checkpoints import SMALL, TOKENS, assert_close, forward, fused, gpt_fast_logits, load, random_gpt_fast
from conftest import write_checkpoint
from safetensors.torch import load_file, save_file

import generate
from checkpoint import check_tokenizer, load_tokenizer, open_checkpoint
from common.errors import UserError, printable
from common.files import parse_json, read_file


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1200


# --- Which files count ----------------------------------------------------------------------------


def hub_cache(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A model as the Hub's cache keeps it: a snapshot's files are links into blobs. Also: its logits."""
    reference = families.make("llama2", tmp_path / "plain")
    repository = tmp_path / "models--me--model"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for n, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.move(file, repository / "blobs" / f"blob{n}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{n}")
    return snapshot, families.logits_of(reference, TOKENS)


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    """The config was looked for among the blobs."""
    snapshot, logits = hub_cache(tmp_path)
    for path in (snapshot, snapshot / "model.safetensors", snapshot.parents[1]):
        assert_close(forward(load(path)), logits)
    (snapshot.parent / "other").mkdir()
    refused(snapshot.parents[1], "2 snapshots: name one of them")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc\n")
    assert_close(forward(load(snapshot.parents[1])), logits)


def test_a_link_to_weights_that_lie_with_their_config(tmp_path: Path) -> None:
    logits = families.logits_of(families.make("llama2", tmp_path / "model"), TOKENS)
    (tmp_path / "link").symlink_to("model/model.safetensors")
    assert_close(forward(load(tmp_path / "link")), logits)


def test_the_whole_file_stands_above_an_older_one_in_parts(tmp_path: Path) -> None:
    families.make("llama2", tmp_path, seed=1, max_shard_size="20KB")
    new = families.make("llama2", tmp_path / "new", seed=2)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_close(forward(load(tmp_path)), families.logits_of(new, TOKENS))


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_model_bin(tmp_path: Path, shards: int) -> None:
    """As older repositories have it: the same tensors, by torch.save."""
    reference = families.make("llama2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"pytorch_model-{n}.bin": names[n::shards] for n in range(shards)}
    for part, own in parts.items():
        torch.save({name: tensors[name] for name in own}, tmp_path / part)
    if shards == 1:
        (tmp_path / "pytorch_model-0.bin").rename(tmp_path / "pytorch_model.bin")
    else:
        index = {"weight_map": {name: part for part, own in parts.items() for name in own}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_close(forward(load(tmp_path)), families.logits_of(reference, TOKENS))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_that_a_wrapper_left_behind(tmp_path: Path, prefix: str) -> None:
    reference = families.make("llama2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert_close(forward(load(tmp_path)), families.logits_of(reference, TOKENS))


def test_mistrals_own_folder(tmp_path: Path) -> None:
    """params.json and consolidated.safetensors, by Meta's names; the RoPE's base tells the context."""
    params = {"dim": 48, "n_layers": 3, "head_dim": 8, "hidden_dim": 256, "n_heads": 6, "n_kv_heads": 2}
    params |= {"norm_eps": 1e-5, "vocab_size": families.N_VOCAB, "rope_theta": 1e6}
    (tmp_path / "params.json").write_text(json.dumps(params))
    state = random_gpt_fast(SMALL)
    save_file(state, tmp_path / "consolidated.safetensors")
    config = open_checkpoint(tmp_path).config
    assert (config.rope_theta, config.context) == (1e6, 32768)
    assert_close(forward(load(tmp_path)), gpt_fast_logits(fused(state, SMALL), config))
    for name in ("moe", "quantization"):
        (tmp_path / "params.json").write_text(json.dumps(params | {name: {"num_experts": 8}}))
        refused(tmp_path, f"params.json: {name} .* is not supported")


def test_an_adapter_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base\\u001b[2J"}')
    (tmp_path / "adapter_model.safetensors").touch()
    refused(tmp_path, r"a LoRA adapter of owner/base\\x1b\[2J and no model of its own: merge")


def test_a_pad_token_without_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fine-tunes add one and do not always resize the embedding: nothing ever reads it."""
    folder = write_checkpoint(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    tokenizer = load_tokenizer(folder)
    check_tokenizer(open_checkpoint(folder).config, tokenizer)
    assert "1 special tokens have no row in the embedding: [PAD]" in capsys.readouterr().err
    assert max(tokenizer.encode("The [PAD] fox")) < 320
    with pytest.raises(UserError, match="the text holds token 320, and the model's embedding has 320 rows"):
        tokenizer.encode("The [PAD] fox", special=True)


# --- Files that would hang, fill the memory or write to the terminal ------------------------------


ESCAPES = "\n\x1b[2J\udce9" + "x" * 10_000_000


@pytest.mark.parametrize(
    "path", ["config.json", "model.safetensors", "model.pth", "model.safetensors.index.json", "tokenizer.json",
             "tokenizer.model", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nothing"])
def test_what_is_no_file_is_not_read(path: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A git checkout can carry links to /dev/zero; a pipe nobody writes to was waited for, for ever."""
    folder = write_checkpoint(tmp_path / "m")
    if not path.startswith(("model", "config")):
        (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    (folder / path).unlink(missing_ok=True)
    if path.startswith("model"):
        (folder / "model.safetensors").unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / path)
    elif kind == "folder":
        (folder / path).mkdir()
    else:
        (folder / path).symlink_to({"device": "/dev/zero", "loop": path, "nothing": "gone"}[kind])
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--checkpoint_path", str(folder), "--prompt", "hi", "--chat", "--max_new_tokens", "1"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and err.count("\n") == 1 and str(folder) in err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"a": torch.zeros(1).expand(1 << 31)}, "larger than what is stored"),
        (lambda: {f"a{n}": t for n, t in enumerate([torch.zeros(10)] * 3)}, "larger than what is stored"),
        (lambda: {"a": torch.zeros(4, device="meta")}, "a is a shape without values"),
        (lambda: {ESCAPES: torch.zeros(4)}, "1 tensors, and the config has 2 layers"),
    ],
    ids=["stride 0", "three of one", "meta", "name"],
)  # fmt: skip
def test_hostile_pth(make: Callable[[], object], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(make(), tmp_path / "model.pth")
    refused(tmp_path, message)


def test_a_compressed_pth_is_refused_unread(tmp_path: Path) -> None:
    """A thousandth of the size on the disk: torch.save compresses nothing."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "model.pth", "w") as bomb:
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED)
    refused(tmp_path, "compressed, which torch.save never writes")


@pytest.mark.parametrize("name", ["\n", "\x1b[2J", "\udce9", "../x", "/etc/passwd", "x" * 10_000_000, "\x00", ""])
def test_names_of_shards(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "part")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, "index.json: names|half a surrogate pair")


@pytest.mark.parametrize("field", ["model_type", "quantization_config", "hidden_act", "rope_scaling", "hidden_size"])
def test_values_are_told_cut_and_escaped(field: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", **{field: ESCAPES.replace("\udce9", "")})
    refused(folder, r"config.json: .*\\n\\x1b\[2Jx+ … .* characters … x+")


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"a\x1b[2Jb"])
def test_paths_of_any_bytes(name: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They run, or they are refused in a line; "lost sys.stderr" was what became of it."""
    folder = write_checkpoint(tmp_path / os.fsdecode(name))
    arguments = ["--checkpoint_path", str(folder), "--prompt", "The", "--max_new_tokens", "1", "--temperature", "0"]
    try:
        generate.main([*arguments, "--dry_run"])
        generate.main(arguments)
    except SystemExit as exit_:
        assert exit_.code == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in err and "lost sys" not in err and "\x1b" not in out + err
    assert "error" in err or "tokens/s" in err


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "m.gguf"])
def test_a_path_that_is_no_utf8_is_told_so(name: str, tmp_path: Path) -> None:
    """ "damaged or truncated" was wrong, and GGUF a traceback."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / name).write_bytes(b"GGUF" + bytes(100))
    refused(folder, r"caf\\udce9/.*: weights are read by libraries that open only paths in UTF-8")


def test_a_checkpoint_is_called_what_can_be_printed(tmp_path: Path) -> None:
    """Its name stands in every report and table."""
    folder = write_checkpoint(tmp_path / "a\x1b[2J\nb")
    assert open_checkpoint(folder).name == "a\\x1b[2J\\nb"


# --- The two places that all of this goes through -------------------------------------------------


def test_printable() -> None:
    assert printable("plain é 日本") == "plain é 日本"
    assert printable("a\n\x1b[2J\udce9\x9b\u2028") == "a\\n\\x1b[2J\\udce9\\x9b\\u2028"
    assert re.fullmatch(r"a{20} … 970 characters … a{10}", printable("a" * 1000, 30))
    assert str(UserError("a\nb")) == "a\\nb" and len(str(UserError("a" * 10**7))) < 1100


def test_json_and_files_are_bounded(tmp_path: Path) -> None:
    for data, message in (
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": "\xff"}', "not JSON"),
    ):
        with pytest.raises(UserError, match=message):
            parse_json(data, "x")
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    (tmp_path / "large").write_bytes(b"12345")
    assert read_file(tmp_path / "large", 5) == b"12345"
    with pytest.raises(UserError, match="5 bytes, and at most 4 are read"):
        read_file(tmp_path / "large", 4)
