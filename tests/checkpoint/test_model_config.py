"""Shapes read from config.json and params.json or found by name, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from checkpoints import (
    SMALL,
    TOKENS,
    assert_close,
    forward,
    load,
    random_gpt_fast,
    write_hugging_face_config,
)
from transformers import AutoModelForCausalLM

from checkpoint import (
    open_checkpoint,
)
from checkpoint.configs import config_from_hugging_face, config_from_params, find_name, named_config
from common.errors import UserError
from model import CONFIGS, Config, RopeScaling


def config_of(folder: Path, **changes: object) -> Config:
    path = write_hugging_face_config(folder, **changes)
    return config_from_hugging_face(json.loads(path.read_text()), path)


LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def test_old_and_new_rope_fields(tmp_path: Path) -> None:
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    old = config_of(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3)
    new = config_of(tmp_path, rope_theta="absent", rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    assert old == new and old.rope_scaling == expected and old.rope_theta == 5e5
    linear = config_of(tmp_path, rope_scaling={"type": "linear", "factor": 4})
    assert linear.rope_scaling == RopeScaling("linear", 4.0) and linear.rope_theta == 1e4
    assert config_of(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7
    assert config_of(tmp_path, rope_theta="absent", num_key_value_heads="absent").n_kv_head == 6


@pytest.mark.parametrize(
    "added",
    [LLAMA3, {"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 777.0}, {}],
    ids=str,
)
def test_a_scaling_added_to_a_newer_config_is_the_one(tmp_path: Path, added: dict[str, object]) -> None:
    """Qwen's cards tell people to add rope_scaling: it was dropped, and the logits were off by 14."""
    families.make("qwen2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"rope_scaling": added}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(forward(load(tmp_path)), families.logits_of(reference, TOKENS))


def test_yarn_widens_the_context(tmp_path: Path) -> None:
    """A card adds the scaling to a config that still states the context before it."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert config_of(tmp_path, rope_scaling=yarn).context == 4 * 4096
    assert config_of(tmp_path, rope_scaling=yarn | {"original_max_position_embeddings": 512}).context == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="gpt2"), "model_type 'gpt2' is not supported"),
        (dict(model_type="absent"), "model_type None is not supported"),
        (dict(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "rope scaling 'longrope' is not supported"),
        (dict(rope_scaling={"rope_type": "yarn"}), "factor is missing"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 1}), "beta_fast 1.0 is not above"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_theta=1), "yarn needs a rope_theta above 1"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "attention_factor": -1}), "attention_factor is -1"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope scaling 'dynamic'"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope scaling 'per layer'"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor is missing"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0.5}), "factor 0.5 is below 1"),
        (dict(rope_scaling="linear"), "rope_scaling is 'linear', not an object"),
        (dict(rope_theta=0), "rope_theta is 0.0"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantised by fp8 .*--weights int4"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (dict(hidden_size="absent"), "hidden_size is missing"),
        (dict(hidden_size="48"), "hidden_size is '48', not a number"),
        (dict(hidden_size=48.5), "hidden_size is 48.5, not a whole number"),
        (dict(hidden_size=float("inf")), "hidden_size is not a finite number"),
        (dict(hidden_size=float("nan")), "hidden_size is not a finite number"),
        (dict(hidden_size=10**400), "hidden_size is not a finite number"),
        (dict(hidden_size=10**30), "hidden_size is 10+, and must be at most"),
        (dict(rope_theta=float("nan")), "rope_theta is not a finite number"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps is not a finite number"),
        (dict(rms_norm_eps=-1e-5), "rms_norm_eps is -1e-05, and must be at least 0"),
        (dict(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 0}), "original_max_position_embeddings is 0"),
        (dict(rope_scaling=LLAMA3 | {"low_freq_factor": float("nan")}), "low_freq_factor is not a finite number"),
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


def test_sliding_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the window every cache is right; past it, those that keep to the window."""

    def spans(**changes: object) -> tuple[int, int, int]:
        config = config_of(tmp_path, **changes)
        return config.context, config.reach, config.far_context

    assert spans(model_type="mistral", sliding_window=1024) == (1024, 1024, 4096)
    assert spans(model_type="mistral", sliding_window=None) == (4096, 0, 0)
    assert spans(model_type="mistral", max_position_embeddings=8192) == (4096, 4096, 8192)  # unsaid
    qwen = dict(model_type="qwen2", sliding_window=1024)
    assert spans(**qwen, use_sliding_window=False) == (4096, 0, 0)
    assert spans(**qwen, use_sliding_window=True, max_window_layers=3) == (
        4096,
        0,
        0,
    )  # was ignored: all three are full
    assert spans(**qwen, use_sliding_window=True, max_window_layers=0) == (1024, 1024, 4096)
    assert spans(**qwen, use_sliding_window=True, layer_types=["sliding_attention"] * 3) == (1024, 1024, 4096)
    assert capsys.readouterr().err == ""
    assert spans(**qwen, use_sliding_window=True, max_window_layers=1) == (1024, 0, 0)
    assert "2 of 3 layers attend to the last 1024 tokens only, so its context is 1024" in capsys.readouterr().err


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
    ("changes", "message"),
    [
        ({"multiple_of": 0}, "multiple_of is 0, and must be at least 1"),
        ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier is 1e[+]300, and must be at most"),
        ({"norm_eps": float("nan")}, "norm_eps is not a finite number"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0, and must be at least 0"),
        ({"rope_theta": -5.0}, "rope_theta is -5.0, not a positive number"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0}, "rope_scaling_factor is 0, and must be at least 1"),
    ],
)
def test_params_json_that_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^params.json: {message}"):
        config_from_params(LLAMA3_8B | changes, Path("params.json"), 128256, False)


def test_a_config_that_is_nested_too_deeply(tmp_path: Path) -> None:
    torch.save(random_gpt_fast(SMALL), tmp_path / "model.pth")
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(UserError, match=r"config.json: the JSON is nested too deeply$"):
        open_checkpoint(tmp_path)


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
