"""Checkpoints against transformers and against gpt-fast's own arithmetic; and files that are none."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import convert_hf_checkpoint
import download
import families
import pytest
import torch
import torch.nn.functional as F
from conftest import STORIES, needs, train_tokenizer
from huggingface_hub import errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint as checkpoint_module
from checkpoint import (
    Checkpoint,
    check_tokenizer,
    end_ids,
    find_demo,
    first_bad_parameter,
    load_model,
    open_checkpoint,
    parse_device,
    parse_dtype,
)
from layout import hugging_face_name, slots_of
from model import CONFIGS, Config, Rope, RopeScaling, Transformer
from model_config import config_from_hugging_face, config_from_params, find_name, named_config
from tokenizer import UserError, load_tokenizer

CPU = torch.device("cpu")
TOKENS = torch.randint(families.N_VOCAB, (2, 80), generator=torch.Generator().manual_seed(1))


class PlainCache:
    """No cache: causal attention within the one chunk that is read."""

    def __init__(self, config: Config, batch: int) -> None:
        self.layers, self.batch = [self] * config.n_layer, batch

    def begin(self, n_token: int) -> PlainCache:
        self.positions = torch.arange(n_token).expand(self.batch, n_token)
        return self

    def advance(self, step: PlainCache) -> None:
        pass

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: PlainCache, rope: Rope) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def forward(model: Transformer, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens, PlainCache(model.config, tokens.shape[0]))


def load(path: Path | None, model: str | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(open_checkpoint(path, model), CPU, dtype)


def gpt_fast_logits(state: dict[str, Tensor], config: Config, tokens: Tensor = TOKENS) -> Tensor:
    """gpt-fast's arithmetic on gpt-fast's tensors (its model.py): neighbours rotate, as complex numbers."""
    batch, n_token = tokens.shape
    n_q, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    angle = torch.outer(torch.arange(n_token), config.rope_frequencies)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [token, 1, head_dim / 2]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight

    def heads(x: Tensor, rotated: bool) -> Tensor:
        x = x.view(batch, n_token, -1, config.head_dim)
        if rotated:
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn
            x = torch.view_as_real(pairs).flatten(-2).float()
        return x.transpose(1, 2)

    x = state["tok_embeddings.weight"][tokens]
    for n in range(config.n_layer):
        w = {name.removeprefix(f"layers.{n}."): v for name, v in state.items() if f"layers.{n}." in name}
        qkv = F.linear(norm(x, w["attention_norm.weight"]), w["attention.wqkv.weight"], w.get("attention.wqkv.bias"))
        q, k, v = qkv.split([n_q, n_kv, n_kv], -1)
        if config.qk_norm:  # not in gpt-fast: its naming, continued
            q = norm(q.unflatten(-1, (-1, config.head_dim)), w["attention.q_norm.weight"])
            k = norm(k.unflatten(-1, (-1, config.head_dim)), w["attention.k_norm.weight"])
        y = F.scaled_dot_product_attention(
            heads(q, True), heads(k, True), heads(v, False), is_causal=True, enable_gqa=True
        )
        x = x + F.linear(y.transpose(1, 2).flatten(2), w["attention.wo.weight"])
        h = norm(x, w["ffn_norm.weight"])
        gate, up = F.linear(h, w["feed_forward.w1.weight"]), F.linear(h, w["feed_forward.w3.weight"])
        x = x + F.linear(F.silu(gate) * up, w["feed_forward.w2.weight"])
    return F.linear(norm(x, state["norm.weight"]), state["output.weight"])


def random_gpt_fast(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """A state dict as gpt-fast names it, q, k and v apart."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: 0.3 * torch.randn(slot.shape, generator=generator) + ("norm" in name)
        for name, slot in slots_of(config).items()
    }
    if config.tied_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def fused(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    state = dict(state)
    for n in range(config.n_layer):
        parts = [state.pop(f"layers.{n}.attention.{part}.weight") for part in ("wq", "wk", "wv")]
        state[f"layers.{n}.attention.wqkv.weight"] = torch.cat(parts)
    return state


SMALL = Config(families.N_VOCAB, 48, 3, 6, 2, 256, 4096)  # ffn_dim: what params.json computes


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# --- The same logits --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_logits_equal_transformers(tmp_path: Path, family: str, shard: str) -> None:
    reference = families.make(family, tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    model = load(tmp_path)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert_close(forward(model), families.logits_of(reference, TOKENS))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_conversion_round_trip(tmp_path: Path, family: str) -> None:
    """The .pth is what gpt-fast's arithmetic takes, and loads to the same parameters, bit for bit."""
    reference = families.make(family, tmp_path / "hf", max_shard_size="20KB")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"any")
    file = convert_hf_checkpoint.convert(tmp_path / "hf", tmp_path / "pth")
    assert sorted(path.name for path in (tmp_path / "pth").iterdir()) == sorted(
        ["model.pth", "config.json", "generation_config.json", "tokenizer.model"]
    )
    config = open_checkpoint(file).config
    state = torch.load(file, weights_only=True)
    assert_close(gpt_fast_logits(state, config), families.logits_of(reference, TOKENS))
    ours, direct = load(file), load(tmp_path / "hf")
    for (name, a), (_, b) in zip(ours.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    n_bytes = sum(p.numel() * 4 for p in direct.parameters())
    assert file.stat().st_size < 1.2 * n_bytes + 20_000  # no storage is written twice


@pytest.mark.parametrize("together", [True, False])
def test_gpt_fast_pth(tmp_path: Path, together: bool) -> None:
    """q, k and v in one tensor or apart; neighbours rotate."""
    state = random_gpt_fast(SMALL)
    torch.save(fused(state, SMALL) if together else state, tmp_path / "model.pth")
    write_hugging_face_config(tmp_path)
    for path in (tmp_path, tmp_path / "model.pth"):
        assert_close(forward(load(path)), gpt_fast_logits(fused(state, SMALL), SMALL))


def test_meta_folder(tmp_path: Path) -> None:
    """consolidated.00.pth and params.json, with the table of frequencies that Llama 2 carries along."""
    state = random_gpt_fast(SMALL)
    torch.save(state | {"rope.freqs": torch.ones(4)}, tmp_path / "consolidated.00.pth")
    params = dict(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=-1, multiple_of=256, norm_eps=1e-5)
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert open_checkpoint(tmp_path).config == SMALL
    assert_close(forward(load(tmp_path)), gpt_fast_logits(fused(state, SMALL), SMALL))
    del state["output.weight"]  # then the embedding is the output, for params.json has no word on it
    torch.save(state, tmp_path / "consolidated.00.pth")
    assert open_checkpoint(tmp_path).config == replace(SMALL, tied_embeddings=True)
    (tmp_path / "consolidated.01.pth").write_bytes(b"")
    with pytest.raises(UserError, match="model-parallel parts"):
        open_checkpoint(tmp_path)


@needs(STORIES)
def test_stories260k_greedy() -> None:
    """A trained model: the ids of an independent forward pass, the whole text read again for each."""
    golden = json.loads((STORIES / "golden.json").read_text())
    checkpoint = open_checkpoint(STORIES)
    model, tokenizer = load_model(checkpoint, CPU, torch.float32), load_tokenizer(STORIES)
    check_tokenizer(checkpoint.config, tokenizer)
    ids = torch.tensor([golden["greedy_ids"]])
    n_prompt = len(golden["prompt_ids"])
    picked = forward(model, ids)[0].argmax(-1)  # greedy ids, teacher-forced: the same by induction
    assert picked[n_prompt - 1 : -1].tolist() == golden["greedy_ids"][n_prompt:]
    assert tokenizer.decode(golden["greedy_ids"]).startswith(golden["text"][:400])
    assert end_ids(checkpoint, tokenizer) == {2}


def test_dtypes(tmp_path: Path) -> None:
    families.make("llama3", tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        model = load(tmp_path, dtype=dtype)
        for ours, exact in zip(model.parameters(), load(tmp_path).parameters(), strict=True):
            assert ours.dtype == dtype and torch.equal(ours, exact.to(dtype))
        assert forward(model).dtype == dtype


# --- Memory -----------------------------------------------------------------------------------------


def anonymous_memory() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status")
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_peak_is_one_copy_of_the_weights(tmp_path: Path, kind: str) -> None:
    """Memory other than file pages, looked at after each tensor: the parameters alone, and all mapped."""
    config = Config(4000, 768, 4, 12, 4, 2048, 128)
    if kind == "pth":
        torch.save(random_gpt_fast(config), tmp_path / "model.pth")
    else:
        tensors = {hugging_face_name(name): tensor for name, tensor in random_gpt_fast(config).items()}
        save_file(tensors, tmp_path / "model.safetensors")
        del tensors
    write_hugging_face_config(
        tmp_path,
        vocab_size=4000,
        hidden_size=768,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
    )
    before, seen = anonymous_memory(), []
    checkpoint = open_checkpoint(tmp_path)
    opened = anonymous_memory()
    model = load_model(checkpoint, CPU, torch.float32, progress=lambda done, of: seen.append(anonymous_memory()))
    n_bytes = sum(p.numel() * 4 for p in model.parameters())
    assert n_bytes > 100e6 and opened - before < 0.1 * n_bytes
    assert max(seen) - before < 1.15 * n_bytes


# --- Configs ----------------------------------------------------------------------------------------


def write_hugging_face_config(folder: Path, **changes: object) -> Path:
    """A config.json for SMALL, in the form of transformers 4."""
    fields = dict(
        model_type="llama",
        vocab_size=families.N_VOCAB,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
    )
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (fields | changes).items() if v != "absent"}))
    return path


def config_of(folder: Path, **changes: object) -> Config:
    path = write_hugging_face_config(folder, **changes)
    return config_from_hugging_face(json.loads(path.read_text()), path)


def test_old_and_new_rope_fields(tmp_path: Path) -> None:
    llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    old = config_of(tmp_path, rope_theta=5e5, rope_scaling=llama3 | {"rope_type": "llama3"})
    new = config_of(tmp_path, rope_theta="absent", rope_parameters=llama3 | {"rope_type": "llama3", "rope_theta": 5e5})
    assert old == new and old.rope_scaling == expected and old.rope_theta == 5e5
    linear = config_of(tmp_path, rope_scaling={"type": "linear", "factor": 4})
    assert linear.rope_scaling == RopeScaling("linear", 4.0) and linear.rope_theta == 1e4
    assert config_of(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7
    assert config_of(tmp_path, rope_theta="absent", num_key_value_heads="absent").n_kv_head == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt2"), "model_type 'gpt2' is not supported"),
        (dict(model_type="absent"), "model_type None is not supported"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope scaling 'yarn' is not supported"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope scaling 'dynamic'"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope scaling 'per layer'"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor is missing"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0.5}), "factor 0.5 is below 1"),
        (dict(rope_scaling="linear"), "rope_scaling is 'linear', not an object"),
        (dict(rope_theta=0), "rope_theta is 0.0"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(attention_bias=True), "attention_bias True is not supported"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantization_config .*gptq"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (dict(hidden_size="absent"), "hidden_size is missing"),
        (dict(hidden_size="48"), "hidden_size is '48', not a number"),
        (dict(hidden_size=48.5), "hidden_size is 48.5, not a whole number"),
        (dict(num_hidden_layers=True), "num_hidden_layers is True"),
        (dict(num_key_value_heads=4), "n_head 6 is not a multiple of n_kv_head 4"),
        (dict(num_attention_heads=0), "must be positive"),
        (dict(vocab_size=-1), "vocab_size must be positive"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_of(tmp_path, **changes)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_sliding_windows_bound_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the window, full attention is what the model was trained with; past it, it is not."""
    assert config_of(tmp_path, model_type="mistral", sliding_window=1024).context == 1024
    assert "compress_kv --sink_size 0 --window_size 1024 --positions original" in capsys.readouterr().err
    assert config_of(tmp_path, model_type="mistral", sliding_window=None).context == 4096
    assert config_of(tmp_path, model_type="mistral", max_position_embeddings=8192).context == 4096  # unsaid
    capsys.readouterr()
    qwen = dict(model_type="qwen2", sliding_window=1024)
    assert config_of(tmp_path, **qwen, use_sliding_window=False).context == 4096
    assert capsys.readouterr().err == ""
    assert config_of(tmp_path, **qwen, use_sliding_window=True).context == 1024


META = {"norm_eps": 1e-5, "vocab_size": 128256, "rope_theta": 500000.0, "n_heads": 32, "n_kv_heads": 8}
LLAMA3_8B = META | {"dim": 4096, "n_layers": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}
LLAMA32_1B = META | {"dim": 2048, "n_layers": 16, "multiple_of": 256, "ffn_dim_multiplier": 1.5}
LLAMA2 = {"norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 256}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama-3-8b", LLAMA3_8B),
        ("llama-3.1-8b", LLAMA3_8B | {"use_scaled_rope": True}),
        ("llama-3.2-1b", LLAMA32_1B | {"use_scaled_rope": True}),
        ("llama-2-7b", LLAMA2 | {"dim": 4096, "n_heads": 32, "n_layers": 32}),
        ("llama-2-13b", LLAMA2 | {"dim": 5120, "n_heads": 40, "n_layers": 40}),
        (
            "llama-2-70b",
            LLAMA2
            | {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80}
            | {"multiple_of": 4096, "ffn_dim_multiplier": 1.3},
        ),
    ],
)
def test_published_params_json(name: str, params: dict[str, object]) -> None:
    expected = CONFIGS[name]
    path = Path("params.json")
    assert config_from_params(params, path, expected.vocab_size, expected.tied_embeddings) == expected


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Meta-Llama-3-8B", "llama-3-8b"),
        ("llama3-8b", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Qwen2.5-7B-Instruct", "qwen-2.5-7b"),
        ("Qwen/Qwen3-0.6B", "qwen-3-0.6b"),
        ("Mistral-7B-Instruct-v0.2", "mistral-7b"),
        ("Mistral-7B-v0.1", None),  # another window, another RoPE
        ("Mistral-7B-v0.3", None),  # another vocabulary
        ("llama-3-9b", None),
        ("", None),
    ],
)
def test_lenient_names(spelled: str, name: str | None) -> None:
    assert find_name(spelled) == name


def test_every_name_finds_itself() -> None:
    assert [named_config(name)[0] for name in CONFIGS] == list(CONFIGS)


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--model llama-3-9b: unknown; did you mean .*llama-3-8b"):
        open_checkpoint(None, "llama-3-9b")
    with pytest.raises(UserError, match="no --model"):
        open_checkpoint(None, None)


def test_config_by_the_folders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where all shapes agree, and never without saying so."""
    monkeypatch.setitem(CONFIGS, "tiny-1k", SMALL)
    folder = tmp_path / "Meta-Tiny-1K-hf"
    folder.mkdir()
    state = random_gpt_fast(SMALL)
    torch.save(state, folder / "model.pth")
    checkpoint = open_checkpoint(folder / "model.pth")
    assert (checkpoint.config, checkpoint.name) == (SMALL, "tiny-1k")
    assert "tiny-1k by the name Meta-Tiny-1K-hf" in capsys.readouterr().err
    monkeypatch.chdir(folder)
    assert open_checkpoint(Path("model.pth")).name == "tiny-1k"
    state["layers.1.feed_forward.w2.weight"] = torch.zeros(48, 255)
    torch.save(state, folder / "model.pth")
    with pytest.raises(UserError, match=r"is not tiny-1k .*w2.weight has shape \[48, 255\].*\[48, 256\]"):
        open_checkpoint(folder / "model.pth")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no config.json or params.json beside other.pth: give --model"):
        open_checkpoint(tmp_path / "other.pth")


def test_model_flag_gives_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "tiny-1k", SMALL)
    torch.save(random_gpt_fast(SMALL), tmp_path / "weights.pth")
    assert open_checkpoint(tmp_path / "weights.pth", "Tiny_1K").config == SMALL
    with pytest.raises(UserError, match=r"tok_embeddings.weight has shape"):
        open_checkpoint(tmp_path / "weights.pth", "llama-3.2-1b")


# --- Tensors that do not fit ------------------------------------------------------------------------


def edited(tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], family: str = "llama2") -> Path:
    families.make(family, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({Q: torch.zeros(40, 48)}), rf"{Q} has shape \[40, 48\], .*\[48, 48\]"),
        (
            lambda t: t.update({"model.layers.1.mlp.down_proj.weight": torch.zeros(80, 48)}),
            r"down_proj.weight has shape \[80, 48\], .*\[48, 80\]",  # as many numbers, the wrong way round
        ),
        (lambda t: t.pop(Q), f"missing {Q}"),
        (lambda t: t.pop("lm_head.weight"), "missing lm_head.weight"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), "extra.weight have no place"),
        (lambda t: t.update({Q.replace("weight", "bias"): torch.zeros(48)}), "q_proj.bias have no place"),
        (lambda t: t.update({Q.replace("1", "3"): torch.zeros(48, 48)}), r"layers.3.*have no place"),
        (lambda t: t.update({Q.removeprefix("model."): t[Q].clone()}), "the same weights twice"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} is I8; only F64, F32"),
        (lambda t: t.update({Q: torch.zeros(())}), rf"{Q} has shape \[\]"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.2" in n], "missing .* and 6 more"),
    ],
)
def test_tensors_and_config_must_fit(tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(edited(tmp_path, edit))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_absurdly_many_layers(tmp_path: Path) -> None:
    """A damaged number must not cost an hour of making names."""
    torch.save(random_gpt_fast(SMALL), tmp_path / "model.pth")
    write_hugging_face_config(tmp_path, num_hidden_layers=10**9)
    with pytest.raises(UserError, match="30 tensors, and the config has 1000000000 layers"):
        open_checkpoint(tmp_path)


def test_fused_shape_is_checked(tmp_path: Path) -> None:
    state = fused(random_gpt_fast(SMALL), SMALL)
    state["layers.0.attention.wqkv.weight"] = torch.zeros(79, 48)
    torch.save(state, tmp_path / "model.pth")
    write_hugging_face_config(tmp_path)
    with pytest.raises(UserError, match=r"layers.0.attention.wqkv.weight has shape \[79, 48\].*\[80, 48\]"):
        open_checkpoint(tmp_path)
    torch.save(random_gpt_fast(SMALL) | fused(random_gpt_fast(SMALL), SMALL), tmp_path / "model.pth")
    with pytest.raises(UserError, match="twice"):
        open_checkpoint(tmp_path)


def test_derived_buffers_are_ignored(tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert load(edited(tmp_path, lambda t: t.update({buffer: torch.ones(4)})))


def test_tied_output_must_equal_the_embedding(tmp_path: Path) -> None:
    embedding = "model.embed_tokens.weight"
    path = edited(tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}), "llama3")
    model = load(path)
    assert model.output.weight is model.tok_embeddings.weight
    path = edited(tmp_path, lambda t: t.update({"lm_head.weight": t[embedding] + 1}), "llama3")
    with pytest.raises(UserError, match=r"lm_head.weight differs from the embedding"):
        load(path)


# --- Files that are no checkpoint -------------------------------------------------------------------


class Touch:
    """What a hostile pickle does: a call on unpickling."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint"),
        (b"just some text\n" * 20, "not a checkpoint"),
        (b"PK\x03\x04 no zip at all", "damaged or truncated"),
        (b"\x10\0\0\0\0\0\0\0{not a header at", "damaged or truncated"),
        (b"\x80\x02}q\0.", "a bare pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_other_files(tmp_path: Path, content: bytes, message: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no weights in this folder .*model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"only pytorch_model.bin"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(1)], "not a dict of tensors"),
        ({}, "not a dict of tensors"),
        ({"model": {"a": torch.zeros(1)}}, "'model' is a dict, not a tensor"),
        ({3: torch.zeros(1)}, "3 is a Tensor"),
        ({"a": torch.zeros(1, dtype=torch.int8)}, "a is torch.int8; quantised"),
    ],
)
def test_pth_of_other_things(tmp_path: Path, value: object, message: str) -> None:
    torch.save(value, tmp_path / "model.pth")
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


def test_no_code_in_a_pickle_runs(tmp_path: Path) -> None:
    torch.save({"a": Touch(tmp_path / "made")}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="not plain tensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.pth").write_bytes(pickle.dumps(Touch(tmp_path / "made")))
    with pytest.raises(UserError, match="bare pickle"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    families.make("llama2", folder)
    convert_hf_checkpoint.convert(folder, folder)
    return {name: (folder / name).read_bytes() for name in ("model.pth", "model.safetensors", "config.json")}


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "config.json"])
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_end_in_one_line(tmp_path: Path, good: dict[str, bytes], name: str, data: st.DataObject) -> None:
    """Cut short anywhere: refused. A byte changed anywhere: refused, or it made no difference to form."""
    for other, content in good.items():
        if other == name or other == "config.json":
            (tmp_path / other).write_bytes(content)
    content = good[name]
    cut = data.draw(st.booleans())
    place = data.draw(st.integers(0, len(content) - 2) | st.integers(0, min(3000, len(content) - 2)))
    damaged = (
        content[:place]
        if cut
        else content[:place] + data.draw(st.binary(min_size=1, max_size=3)) + content[place + 1 :]
    )
    (tmp_path / name).write_bytes(damaged)
    weights = tmp_path / ("model.safetensors" if name == "config.json" else name)
    (tmp_path / "model.safetensors").write_bytes(good["model.safetensors"]) if name == "config.json" else None
    try:
        load_model(open_checkpoint(weights), CPU, torch.float32)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert not cut


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is not there"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names ../model.safetensors, which is not there"),
    ],
)
def test_bad_indices(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors").touch()
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    families.make("llama2", tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        save_file({"model.norm.weight": torch.ones(4)}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "x": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model.norm.weight is in two shards"):
        open_checkpoint(tmp_path)


# --- Random weights ---------------------------------------------------------------------------------


def test_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Config(300, 64, 80, 4, 2, 128, 512, qkv_bias=True, qk_norm=True, tied_embeddings=True)
    monkeypatch.setitem(CONFIGS, "deep-1", deep)
    checkpoint = open_checkpoint(None, "deep-1")
    assert checkpoint.dtype == torch.bfloat16 and checkpoint.tokenizer_path is None
    with pytest.raises(UserError, match="deep-1 is a shape without weights"):
        load_model(checkpoint, CPU, torch.float32)
    a, b, c = (load_model(checkpoint, CPU, torch.float16, random_weights=True, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.output.weight, c.output.weight)
    assert a.output.weight is a.tok_embeddings.weight and not any(p.requires_grad for p in a.parameters())
    assert (a.layers[79].attention.q_norm.weight == 1).all() and (a.norm.weight == 1).all()
    stds = [layer.weight.float().std() for layer in (a.layers[5].attention.wqkv, a.layers[5].feed_forward.w2)]
    assert stds[0] == pytest.approx(0.02, rel=0.05) and stds[1] == pytest.approx(0.02 / 160**0.5, rel=0.05)
    assert forward(a, TOKENS).isfinite().all() and forward(a, TOKENS).std() > 0.01


def test_first_bad_parameter(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
        tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")

    assert first_bad_parameter(load(edited(tmp_path, spoil))) == "layers.1.feed_forward.w13.weight"
    families.make("llama2", tmp_path)
    assert first_bad_parameter(load(tmp_path)) is None


# --- What goes with it ------------------------------------------------------------------------------


def test_tokenizer_beside_the_weights(tmp_path: Path) -> None:
    families.make("llama3", tmp_path)
    assert open_checkpoint(tmp_path).tokenizer_path is None
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer())
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tokenizer_path is not None and checkpoint.eos_ids == (2, 5, 7)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    assert end_ids(checkpoint, tokenizer) == {2, 5, 7} and end_ids(checkpoint, None) == {2, 5, 7}
    with pytest.raises(UserError, match="the tokenizer has 320 tokens and the model's vocabulary 97"):
        check_tokenizer(checkpoint.config, tokenizer)


def test_parse_dtype() -> None:
    checkpoint = Checkpoint(None, "x", SMALL)
    for name, dtype in {"bf16": torch.bfloat16, "float16": torch.float16, "fp32": torch.float32}.items():
        assert parse_dtype(name, checkpoint, CPU) == dtype
    assert parse_dtype("auto", checkpoint, CPU) == torch.float32
    assert parse_dtype("auto", checkpoint, torch.device("cuda:0")) == torch.bfloat16
    with pytest.raises(UserError, match="--dtype int8: give one of bf16"):
        parse_dtype("int8", checkpoint, CPU)


def test_auto_dtype_is_the_checkpoints_own(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: t.update({n: v.half() for n, v in t.items() if "norm" not in n}))
    assert parse_dtype("auto", open_checkpoint(path), torch.device("cuda:0")) == torch.float16


def test_parse_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert parse_device("auto") == CPU
    for name, message in {
        "cuda": "no CUDA device here",
        "cuda:1": "no CUDA device here",
        "mps": "no Apple GPU here",
        "tpu": "give cpu, cuda, cuda:N, mps or auto",
        "cuda:x": "give cpu, cuda",
        "cpu:1": "give cpu, cuda",
    }.items():
        with pytest.raises(UserError, match=f"--device {name}: {message}"):
            parse_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda") == parse_device("auto") == torch.device("cuda:0")
    assert parse_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:2: the last of the 2 CUDA devices here is cuda:1"):
        parse_device("cuda:2")


def test_the_bundled_model_is_found_or_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint_module, "__file__", str(tmp_path / "checkpoint.py"))
    with pytest.raises(UserError, match="assets/demo"):
        find_demo()
    (tmp_path / "assets" / "demo").mkdir(parents=True)
    assert find_demo() == tmp_path / "assets" / "demo"


# --- Scripts ----------------------------------------------------------------------------------------


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.make("llama2", tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(b"tiktoken")
    convert_hf_checkpoint.main(["--checkpoint_dir", str(tmp_path)])  # into the same folder, as gpt-fast's
    assert "model.pth" in capsys.readouterr().out
    assert (tmp_path / "tokenizer.model").read_bytes() == b"tiktoken"
    with pytest.raises(SystemExit) as caught:
        convert_hf_checkpoint.main(["--checkpoint_dir", str(tmp_path / "gone")])
    assert caught.value.code == 2 and "no such folder" in capsys.readouterr().err


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


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.make("llama2", tmp_path / "hub")

    def snapshot(repo_id: str, *, local_dir: Path, allow_patterns: list[str], token: str | None) -> None:
        assert (repo_id, token) == ("owner/name", "secret")
        local_dir.mkdir()
        for pattern in allow_patterns:
            for file in (tmp_path / "hub").glob(pattern):
                shutil.copyfile(file, local_dir / file.name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    out = tmp_path / "out"
    download.main(["--repo_id", "owner/name", "--out", str(out), "--hf_token", "secret"])
    assert forward(load(out)).isfinite().all()


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

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(SystemExit) as caught:
        download.main(["--repo_id", "owner/name", "--out", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1
    assert re.search(message, lines[0])
