"""Checkpoints against transformers and against gpt-fast's arithmetic; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
from checkpoints import (
    CPU,
    SMALL,
    TOKENS,
    assert_close,
    edited,
    forward,
    fused,
    gpt_fast_logits,
    load,
    random_gpt_fast,
    write_hugging_face_config,
)
from conftest import STORIES, needs, train_tokenizer
from safetensors.torch import save_file
from torch import Tensor

import checkpoint as checkpoint_module
from checkpoint import (
    Checkpoint,
    check_tokenizer,
    end_ids,
    find_demo,
    first_bad_parameter,
    load_model,
    load_tokenizer,
    open_checkpoint,
    parse_device,
    parse_dtype,
)
from checkpoint import convert as convert_hf_checkpoint
from checkpoint.layout import hugging_face_name
from common.errors import UserError
from model import CONFIGS, Config


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
    del model
    before, seen = anonymous_memory(), []
    part = open_checkpoint(tmp_path).share_of(1, 2)  # and of a rank's share, that share
    model = load_model(part, CPU, torch.float32, progress=lambda done, of: seen.append(anonymous_memory()))
    n_share = sum(p.numel() * 4 for p in model.parameters())
    assert n_share < 0.6 * n_bytes
    assert max(seen) - before < 1.15 * n_share


# --- Tensors that do not fit ------------------------------------------------------------------------


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


def test_an_output_that_was_trained_apart_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fine-tune whose config still ties the two."""
    embedding = "model.embed_tokens.weight"
    path = edited(tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}), "llama3")
    model = load(path)
    assert model.output.weight is model.tok_embeddings.weight and "differs" not in capsys.readouterr().err
    path = edited(tmp_path, lambda t: t.update({"lm_head.weight": 2 * t[embedding]}), "llama3")
    apart = load(path)
    assert "lm_head.weight differs from the embedding" in capsys.readouterr().err
    assert_close(forward(apart), 2 * forward(model))


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
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
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
    monkeypatch.setattr(checkpoint_module, "__file__", str(tmp_path / "checkpoint" / "__init__.py"))
    with pytest.raises(UserError, match="assets/demo"):
        find_demo()
    (tmp_path / "assets" / "demo").mkdir(parents=True)
    assert find_demo() == tmp_path / "assets" / "demo"
