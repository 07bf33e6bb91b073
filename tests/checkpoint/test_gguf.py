"""GGUF files against transformers' own reading of them; what is damaged or unknown is refused in one line."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import families
import gguf
import gguf_files
import numpy as np
import pytest
import torch
from checkpoints import CPU, TOKENS, forward, load
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantize
from checkpoint import load_model, open_checkpoint
from common.errors import UserError
from model import RopeScaling
from quantize import parse_weights
from weights.modules import QuantizedLinear

KINDS = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]


def theirs(path: Path) -> torch.Tensor:
    """Logits of transformers' reading of the same file."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return families.logits_of(model.eval(), TOKENS)


def assert_near(ours: torch.Tensor, other: torch.Tensor) -> None:
    """Within 1e-4 of the largest logit."""
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("family", ["llama2", "llama-linear", "mistral", "qwen2", "qwen2-yarn"])
def test_logits_equal_transformers(tmp_path: Path, family: str) -> None:
    """Tied heads and biases among them. transformers reads no scaling from a GGUF: there its model is the reference."""
    reference = families.make(family, tmp_path / "hf")
    path = gguf_files.write(tmp_path / "model.gguf", reference)
    assert_near(forward(load(path)), families.logits_of(reference, TOKENS))
    if family not in ("llama-linear", "qwen2-yarn"):
        assert_near(forward(load(path)), theirs(path))


def test_qwen3(tmp_path: Path) -> None:
    """head_dim is not dim / n_head there, and transformers takes it to be 128, whatever the file says."""
    reference = families.make("qwen3", tmp_path / "hf")
    assert_near(
        forward(load(gguf_files.write(tmp_path / "model.gguf", reference))), families.logits_of(reference, TOKENS)
    )


def test_rope_freqs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.1's scaling is a tensor of factors in a GGUF; transformers does not read it."""
    config, model, changes = families.FAMILIES["llama3"]
    rope = changes["rope_parameters"] | dict(original_max_position_embeddings=128)  # one frequency is between
    monkeypatch.setitem(families.FAMILIES, "llama3", (config, model, changes | dict(rope_parameters=rope)))
    reference = families.make("llama3", tmp_path / "hf")
    factors = gguf_files.llama3_factors(reference.config.rope_parameters, 8).numpy()
    assert len(set(factors.tolist())) > 2

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", factors)

    path = gguf_files.write(tmp_path / "model.gguf", reference, add=add)
    assert open_checkpoint(path).config.rope_scaling == RopeScaling("factors", 1.0, factors=tuple(factors.tolist()))
    assert_near(forward(load(path)), families.logits_of(reference, TOKENS))


@pytest.fixture(scope="module")
def wide() -> LlamaForCausalLM:
    """As small as a row of K-quants allows: blocks of 256."""
    shape = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    config = LlamaConfig(**families._SHAPE | shape)
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_type(tmp_path: Path, wide: LlamaForCausalLM, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_files.write(tmp_path / "model.gguf", wide, kind)
    reference = theirs(path)
    assert reference.isfinite().all() and reference.std() > 1e-3
    assert_near(forward(load(path)), reference)
    monkeypatch.setattr("checkpoint.loading._AT_ONCE", 256 * 64)  # a head at a time
    assert_near(forward(load(path)), reference)


def test_dtype_of_quantised_weights(tmp_path: Path, wide: LlamaForCausalLM) -> None:
    """--dtype auto on a GPU must not be float32 because dequantising makes that."""
    assert open_checkpoint(gguf_files.write(tmp_path / "a.gguf", wide, "Q4_K")).dtype == torch.bfloat16
    assert open_checkpoint(gguf_files.write(tmp_path / "b.gguf", wide, "F16")).dtype == torch.float16


def sharded(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    reference = families.make("llama2", tmp_path / "hf")
    folder = tmp_path / "shards"
    folder.mkdir()
    gguf_files.write(folder / "m.gguf", reference, writer=dict(split_max_tensors=12))
    return folder, families.logits_of(reference, TOKENS)


def test_shards(tmp_path: Path) -> None:
    folder, reference = sharded(tmp_path)
    shards = sorted(folder.iterdir())
    assert [path.name for path in shards] == [f"m-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    for path in (folder, shards[0], shards[2]):  # any of them, or the folder
        assert_near(forward(load(path)), reference)
    shards[1].unlink()
    for path in (folder, shards[0], shards[2]):
        with pytest.raises(UserError, match=r"one of 3 shards, and m-00002-of-00003\.gguf is not there"):
            open_checkpoint(path)
    shards[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(UserError, match="says that it is shard 2 of 3"):
        open_checkpoint(folder)
    shards[0].rename(folder / "first.gguf")
    with pytest.raises(UserError, match="one of 3 shards, and not called"):
        open_checkpoint(folder / "first.gguf")


def test_folders(tmp_path: Path) -> None:
    """One model in a folder is found; of two, one is to be named."""
    reference = families.make("llama2", tmp_path / "hf")
    folder = tmp_path / "models"
    folder.mkdir()
    path = gguf_files.write(folder / "a.gguf", reference)
    assert open_checkpoint(folder).config == open_checkpoint(path).config
    renamed = folder / "weights.bin"
    renamed.write_bytes(path.read_bytes())
    assert open_checkpoint(renamed).config == open_checkpoint(path).config  # by its first bytes, not its name
    (folder / "b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"several models \(a.gguf, b.gguf\)"):
        open_checkpoint(folder)


METADATA = [
    (dict(architecture="gemma3"), "architecture 'gemma3' is not supported"),
    (dict(block_count=None), "block_count is missing"),
    (dict(block_count=2**31), "missing|layers"),
    (dict(block_count="three"), "block_count is 'three', not a number"),
    (dict(block_count=4), "missing blk.3.attn_q.weight"),
    (dict(attention__head_count=0, rope__dimension_count=None), "n_head must be positive"),
    (dict(attention__head_count=[6, 6, 3]), "attention.head_count differs between layers"),
    (dict(attention__head_count_kv=3), "blk.0.attn_k.weight has shape"),
    (dict(attention__head_count_kv=4), "not a multiple"),
    (dict(embedding_length=96, rope__dimension_count=None), "token_embd.weight has shape"),
    (dict(rope__dimension_count=4), "rope.dimension_count 4 of 8"),
    (dict(attention__key_length=16), "rope.dimension_count 8 of 16"),
    (dict(rope__scaling__type="longrope"), "rope scaling 'longrope' is not supported"),
    (dict(rope__scaling__type="yarn", rope__scaling__factor=2.0), "original_context_length is missing"),
    (dict(rope__scaling__type="linear", rope__scaling__factor=0.5), "factor 0.5 is below 1"),
    (dict(rope__freq_base=-1.0), "rope.freq_base is -1.0"),
    (dict(attention__layer_norm_rms_epsilon=float("nan")), "not a finite number"),
    (dict(expert_count=8), "expert_count 8 is not supported"),
    (dict(drop=("blk.1.ffn_up.weight",)), "missing blk.1.ffn_up.weight"),
    (dict(drop=("token_embd.weight",)), "missing token_embd.weight"),
]


@pytest.mark.parametrize(("changes", "message"), METADATA)
def test_metadata_that_does_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    reference = families.make("llama2", tmp_path / "hf")
    path = gguf_files.write(tmp_path / "model.gguf", reference, **changes)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    reference = families.make("llama2", tmp_path / "hf")

    def extra(name: str, *shape: int, kind: str = "F32") -> Callable[[gguf.GGUFWriter], None]:
        data = np.zeros(shape, np.int32 if kind == "I32" else np.float32)
        return lambda writer: writer.add_tensor(name, data)

    for add, message in (
        (extra("blk.0.ffn_gate_exps.weight", 4, 4), "blk.0.ffn_gate_exps.weight have no place"),
        (extra("blk.0.attn_output.bias", 48), "blk.0.attn_output.bias have no place"),
        (extra("rope_freqs.weight", 3), "rope_freqs.weight has shape .3., and 4 pairs"),
        (extra("rope_freqs.weight", 4), "no positive numbers"),
        (extra("odd.weight", 4, kind="I32"), "odd.weight' is of type I32, which is not read"),
    ):
        with pytest.raises(UserError, match=message):
            open_checkpoint(gguf_files.write(tmp_path / "model.gguf", reference, add=add))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("good")
    return gguf_files.write(folder / "model.gguf", families.make("llama2", folder / "hf")).read_bytes()


def find(data: bytes, name: str) -> int:
    """Where a tensor's entry goes on after its name: dimensions, sizes, type, offset."""
    return data.index(name.encode(), data.index(b"token_embd.weight") - 8) + len(name)


def lying(data: bytes, at: int, form: str, value: int) -> bytes:
    return data[:at] + struct.pack(f"<{form}", value) + data[at + struct.calcsize(form) :]


def test_lies(tmp_path: Path, good: bytes) -> None:
    """Counts and offsets past the file are told at once, however large."""
    entry = find(good, "output.weight")  # 4 bytes of dimensions, two sizes of 8, type, offset
    first = find(good, "blk.0.attn_norm.weight")
    for data, message in (
        (b"GGUF", "cut off, or not a GGUF file"),
        (good[:1000], "cut off or damaged"),
        (good[:-100], "ends at byte"),
        (lying(good, 4, "I", 1), "GGUF version 1"),
        (lying(good, 4, ">I".strip(">"), 3 << 24), "big-endian"),
        (lying(good, 8, "Q", 2**62), "cut off or damaged"),
        (lying(good, 16, "Q", 2**62), "cut off or damaged"),
        (lying(good, 24, "Q", 2**63), "cut off or damaged"),
        (lying(good, entry, "I", 9), "has 9 dimensions"),
        (lying(good, entry + 4, "Q", 2**60), "ends at byte"),
        (lying(good, entry + 4, "Q", 0), "rows are not made of blocks"),
        (lying(good, entry + 20, "I", 99), "is of type 99, which is not known"),
        (lying(good, entry + 20, "I", 12), "not made of blocks of 256"),
        (lying(good, entry + 24, "Q", 2**63 - 32), "ends at byte"),
        (lying(good, entry + 24, "Q", 33), "not a multiple of 32"),
        (lying(good, first + 4 + 8 + 4, "Q", 0), "share bytes"),
    ):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)
    path.write_bytes(good)
    result = subprocess.run(
        [sys.executable, "generate.py", "--checkpoint_path", path, "--chat", "--dry_run"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2 and "needs a checkpoint with a tokenizer" in result.stderr
    assert result.stderr.count("\n") == 1


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_headers_are_told(tmp_path_factory: pytest.TempPathFactory, good: bytes, data: st.DataObject) -> None:
    """Any bytes changed in the header: it opens, or it is a UserError of one line, and soon."""
    end = good.index(b"token_embd.weight") + 2000
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(4, end))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(changed[: data.draw(st.sampled_from([len(changed), len(changed) // 2]))])
    try:
        open_checkpoint(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_nothing_lies_in_memory_twice(tmp_path: Path, wide: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a few rows are dequantised at a time."""
    monkeypatch.setattr("checkpoint.loading._AT_ONCE", 256 * 64)
    checkpoint = open_checkpoint(gguf_files.write(tmp_path / "model.gguf", wide, "Q4_0"))
    largest = 0
    for fill in checkpoint.fills:
        read_rows = fill.stored.read_rows
        if read_rows is None:
            continue

        def watched(start: int, stop: int, read_rows: Callable = read_rows) -> torch.Tensor:
            nonlocal largest
            rows = read_rows(start, stop)
            largest = max(largest, rows.numel())
            return rows

        object.__setattr__(fill.stored, "read_rows", watched)
        object.__setattr__(fill.stored, "read", None)
    load_model(checkpoint, CPU, torch.float32)
    assert largest == 256 * 64


def test_four_bits_stay_as_they_are(tmp_path: Path, wide: LlamaForCausalLM) -> None:
    """`--weights int4:group_size=32` has Q4_1's blocks, scales and bases: nothing is rounded twice."""
    checkpoint = open_checkpoint(gguf_files.write(tmp_path / "model.gguf", wide, "Q4_1"))
    setting = parse_weights("int4:group_size=32,embedding_bits=16,head_bits=4")
    packed, dense = (load_model(checkpoint, CPU, torch.float32, weights=w, to_run=False) for w in (setting, None))
    names = [name for name, module in packed.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(names) == 4 + 1  # wqkv, wo, w13, w2 and the head
    for name in names:
        module = packed.get_submodule(name)
        assert module.group == 32
        u = quantize.unpack4(module.ints, 32)
        kept = quantize.dequantize4(u, module.pairs, module.scale, module.k)
        torch.testing.assert_close(kept, dense.get_submodule(name).weight, rtol=1e-6, atol=1e-7)
