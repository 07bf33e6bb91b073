"""Folders that AWQ and GPTQ made: against the dense model that they stand for, packed here as their programs do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from checkpoints import TOKENS, forward, load
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantize
from checkpoint import open_checkpoint
from common.errors import UserError

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
KINDS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "act_order": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
}


def together(u: Tensor) -> Tensor:
    """[m, 8 * j] of 0 to 15 to int32 [m, j], the first in the lowest bits."""
    words = (u.long().unflatten(1, (-1, 8)) << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def packed(n: int, k: int, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a module, and what they stand for, [n, k]."""
    group = KINDS[kind]["group_size"]
    group = k if group < 0 else group
    n_group = -(-k // group)
    u, zeros = torch.randint(16, (k, n)), torch.randint(16, (n_group, n))
    scales = (torch.rand(n_group, n) * 0.02 + 0.01).half()
    index = torch.arange(k) // group
    if kind == "act_order":
        index = index[torch.randperm(k)]
    dense = ((u - zeros[index]) * scales[index].float()).half().T.contiguous()
    if kind == "awq":
        order = (torch.arange(n).view(-1, 8)[:, AWQ_ORDER]).flatten()
        return {"qweight": together(u[:, order]), "qzeros": together(zeros[:, order]), "scales": scales}, dense
    stored = zeros if kind == "gptq_v2" else (zeros - 1) % 16
    tensors = {"qweight": together(u.T).T.contiguous(), "qzeros": together(stored), "scales": scales}
    return tensors | {"g_idx": index.int(), "bias": torch.zeros(n).half()}, dense


def write(folder: Path, kind: str, family: str = "llama3") -> torch.nn.Module:
    """A tiny model whose layers' matrices are packed; returns transformers' dense one."""
    torch.manual_seed(0)
    model = families.make(family, folder)
    tensors = load_file(folder / "model.safetensors")
    state = model.state_dict()
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        module = name.removesuffix(".weight")
        parts, dense = packed(*tensors.pop(name).shape, kind)
        state[name].copy_(dense)
        tensors = {f"{module}.{part}": t for part, t in parts.items()} | tensors  # a bias that is there stays
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": KINDS[kind]}))
    return model


@pytest.mark.parametrize(("kind", "family"), [*((kind, "llama3") for kind in KINDS), ("gptq", "qwen2")])
def test_logits_equal_the_dense_models(kind: str, family: str, tmp_path: Path) -> None:
    """Biases too: GPTQ writes zeros where a model has none."""
    model = write(tmp_path, kind, family)
    want = families.logits_of(model, TOKENS)
    torch.testing.assert_close(forward(load(tmp_path)), want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_matrix_are_its_parts(kind: str, tmp_path: Path) -> None:
    """Rows that begin within an int32, and columns, as several ranks read them."""
    write(tmp_path, kind)
    for fill in open_checkpoint(tmp_path).fills:
        stored = fill.stored
        if stored.read_rows is not None:
            whole = stored.read()
            assert torch.equal(stored.read_rows(3, 14), whole[3:14])
            assert torch.equal(stored.read_rows(3, 14, (5, 40)), whole[3:14, 5:40])


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int4_finds_the_integers_again(group: int, symmetric: bool, dtype: torch.dtype) -> None:
    """`--weights int4` of what had 4 bits loses what the dtype between them rounds. (Symmetric groups, which have 12 or
    13 of the 16 integers, lost 8%.)
    """
    torch.manual_seed(0)
    w = torch.randn(24, 512).view(24, -1, group)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if symmetric:
        scale, zero = w.abs().amax(-1, keepdim=True) / 7.5, torch.tensor(8.0)
    else:
        scale, zero = (high - low) / 15, (-low / (high - low) * 15).round()
    w = (((w / scale).round() + zero).clamp(0, 15) - zero) * scale.half()
    w = w.flatten(1).to(dtype).float()
    found = quantize.dequantize4(*quantize.quantize4(w, group), w.shape[1])
    assert (found - w).norm() / w.norm() < (5e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 3}, "awq in 3 bits"),
        ({"version": "gemv"}, "layout 'gemv'"),
        ({"zero_point": False}, "is not read"),
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes .*--weights int4"),
        ({"group_size": 32}, "qzeros has shape"),
    ],
)
def test_a_layout_that_is_not_read_is_told(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write(tmp_path, "awq")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": KINDS["awq"] | change}))
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path)


def test_tensors_that_do_not_fit_are_told(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"

    def refused(said: str, **changes: Tensor | None) -> None:
        changed = tensors | {f"{module}.{name}": t for name, t in changes.items()}
        save_file({n: t for n, t in changed.items() if t is not None}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=said):
            open_checkpoint(tmp_path)

    refused("has no scales", scales=None)
    refused("names a group", g_idx=torch.full_like(tensors[f"{module}.g_idx"], 99))
    refused("scales is torch.int32", scales=tensors[f"{module}.scales"].int())
    refused("bias", bias=torch.ones_like(tensors[f"{module}.bias"]))
