"""A LoRA adapter merged into its base: the formula, tensor for tensor and in logits; all else refused, nothing left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TOKENS, assert_close, forward, load
from conftest import write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint import lora
from cli import merge_lora
from common.errors import UserError

RANK, ALPHA = 4, 10
# As PEFT writes it, defaults included
CONFIG = {
    "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": "owner/base",
    "bias": "none", "corda_config": None, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": ALPHA, "lora_bias": False, "lora_dropout": 0.1,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
    "qalora_group_size": 16, "r": RANK, "rank_pattern": {}, "revision": None, "target_modules": ["q_proj"],
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip
SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 64)}


def write_adapter(folder: Path, drop: str = "", **changes: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of both layers; A and B by the name of their matrix. drop: of a tensor that is left out."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    generator = torch.Generator().manual_seed(3)
    pairs, tensors = {}, {}
    for n in range(2):
        for module, (n_row, n_column) in SHAPES.items():
            name = f"model.layers.{n}.{module}"
            a, b = (0.3 * torch.randn(s, generator=generator) for s in ((RANK, n_column), (n_row, RANK)))
            pairs[f"{name}.weight"] = a, b
            tensors |= {f"base_model.model.{name}.lora_{kind}.weight": t for kind, t in (("A", a), ("B", b))}
    save_file({k: t for k, t in tensors.items() if k != drop}, folder / "adapter_model.safetensors")
    return pairs


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base")


@pytest.mark.parametrize("shard", [lora.SHARD_BYTES, 20_000])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_formula(
    rslora: bool, shard: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(lora, "SHARD_BYTES", shard)
    pairs, out = write_adapter(tmp_path / "adapter", use_rslora=rslora), tmp_path / "new" / "merged"
    merge_lora.main(["--checkpoint_dir", str(base), "--adapter", str(tmp_path / "adapter"), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n" and [f.name for f in out.parent.iterdir()] == ["merged"]
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) == 1) == (shard > 20_000)
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    before = load_file(base / "model.safetensors")
    assert merged.keys() == before.keys()
    scaling = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, tensor in before.items():
        want = tensor if name not in pairs else tensor + scaling * (pairs[name][1] @ pairs[name][0])
        torch.testing.assert_close(merged[name], want, rtol=1e-6, atol=1e-6)
        reference.get_parameter(name).data = want
    with torch.no_grad():
        assert_close(forward(load(out)), reference(TOKENS).logits)
    assert (out / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_in_16_bits_it_is_rounded_once(base: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors")
    pairs = write_adapter(tmp_path / "adapter")
    merged = load_file(lora.merge(base, tmp_path / "adapter", tmp_path / "out") / "model.safetensors")
    for name, (a, b) in pairs.items():
        want = (tensors[name].double() + ALPHA / RANK * (b.double() @ a.double())).bfloat16()
        assert merged[name].dtype == torch.bfloat16 and (merged[name] != want).float().mean() < 1e-2


def test_the_adapters_own_tokenizer_is_taken_whole(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer_config.json").write_text("{}")
    write_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    (tmp_path / "adapter" / "chat_template.jinja").write_text("a")
    out = lora.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert (out / "chat_template.jinja").exists() and not (out / "tokenizer_config.json").exists()


def test_a_folder_of_the_hubs_cache_is_merged_whole(base: Path, tmp_path: Path) -> None:
    """Config and tokenizer were looked for beside `snapshots`, and the merged folder had neither."""
    hub = tmp_path / "models--owner--base"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    (hub / "snapshots").mkdir()
    base.rename(hub / "snapshots" / "abc")
    write_adapter(tmp_path / "adapter")
    out = lora.merge(hub, tmp_path / "adapter", tmp_path / "out")
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= {file.name for file in out.iterdir()}
    load(out)


def test_a_base_in_4_bits_is_refused(base: Path, tmp_path: Path) -> None:
    """AWQ's: the merged matrices were dense, under a config that said 4 bits, which other programs believe."""
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    (base / "config.json").write_text(json.dumps(config))
    write_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match="a Hugging Face folder in 16 or 32 bits"):
        lora.merge(base, tmp_path / "adapter", tmp_path / "out")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"what_comes_next": 3}, "what_comes_next 3"),
        ({"r": 8}, "another rank than r, 8"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4', not a number"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"drop": f"{Q}.lora_B.weight"}, "has not both matrices"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(
    changes: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=message):
        lora.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_wrong_base_and_the_wrong_folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    write_adapter(adapter)
    file = adapter / "adapter_model.safetensors"
    good = load_file(file)
    for change, message in (
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 32),
          "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight": torch.zeros(64, 4)}, "is it another model's"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 48)}, r"has shape \[32, 32\], and the adapter's is \[32, 48\]"),
        ({"base_model.model.lm_head.weight": torch.zeros(4)}, "is no part of a LoRA matrix"),
        ({f"{Q}.lora_A.weight": torch.zeros(4)}, "has not both matrices"),
    ):  # fmt: skip
        save_file(good | change, file)
        with pytest.raises(UserError, match=message):
            lora.merge(base, adapter, out)
    file.write_bytes(b"abc")
    with pytest.raises(UserError, match="not a checkpoint"):
        lora.merge(base, adapter, out)
    save_file(good, file)
    for folder in (base, file):
        with pytest.raises(UserError, match="give a folder that is empty or not there"):
            lora.merge(base, adapter, folder)
    (tmp_path / ".out.part").mkdir()  # of a run that was killed
    monkeypatch.setattr(lora, "save_file", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="out: No space left on device"):
        lora.merge(base, adapter, out)
    assert not out.exists() and not (tmp_path / ".out.part").exists()
