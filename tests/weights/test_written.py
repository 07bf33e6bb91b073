"""--weights end to end: quantised while loading, or written by quantize.py and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import gguf_files
import pytest
import torch
from checkpoints import CPU, forward
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint import Checkpoint, find_demo, load_model, open_checkpoint
from checkpoint.convert import convert
from checkpoint.gguf_tokenizer import gguf_chat_template
from cli import quantize as command
from cli.plan import make_plan, parameter_bytes, weight_bytes
from common.errors import UserError
from model import CONFIGS, Config, Transformer
from quantize import parse_weights
from selective_kv import FullCache, Shape
from weights.modules import QuantizedLinear


def same(a: Transformer, b: Transformer) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(p, theirs[name]) for name, p in ours.items())


@pytest.fixture(scope="module")
def source() -> Path:
    return find_demo()


@pytest.mark.parametrize(
    "weights", ["int8", "int8:group_size=64", "int4:group_size=32", "int4:group_size=32,embedding_bits=16,down_bits=8"]
)
def test_what_is_written_is_what_loading_would_make(source: Path, tmp_path: Path, weights: str) -> None:
    command.main(["--checkpoint_path", str(source), "--weights", weights, "--out", str(tmp_path), "--device", "cpu"])
    before, after = open_checkpoint(source), open_checkpoint(tmp_path)
    assert str(after.weights) == weights and after.config == before.config
    assert after.tokenizer_path is not None and after.eos_ids == before.eos_ids
    loaded = load_model(after, CPU, torch.bfloat16)
    assert same(loaded, load_model(before, CPU, torch.bfloat16, weights=parse_weights(weights)))
    assert not list(tmp_path.glob("*.part"))


def test_a_program_that_does_not_know_it_says_so(source: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    command.main(["--checkpoint_path", str(source), "--out", str(tmp_path), "--device", "cpu"])
    with pytest.raises(ValueError, match="selective_kv"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_a_ggufs_tokenizer_and_template_go_along(source: Path, tmp_path: Path) -> None:
    """It was refused: a GGUF's tokenizer could not be written."""
    metadata = gguf_files.sentencepiece_metadata((source / "tokenizer.model").read_bytes())
    template = "{{ messages[0].content }}"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(metadata["tokenizer.ggml.tokens"]), **shape))

    def add(writer: gguf.GGUFWriter) -> None:
        for key, value in (metadata | {"tokenizer.chat_template": template}).items():
            gguf_files.put(writer, key, value)

    file, out = gguf_files.write(tmp_path / "model.gguf", model, add=add), tmp_path / "out"
    command.main(["--checkpoint_path", str(file), "--weights", "int8", "--out", str(out), "--device", "cpu"])
    before, after = open_checkpoint(file), open_checkpoint(out)
    ours, theirs = after.tokenizer(), before.tokenizer()
    assert ours is not None and theirs is not None and after.weights is not None
    assert ours.encode("Once upon a time") == theirs.encode("Once upon a time") and ours.eos_ids == theirs.eos_ids
    assert after.gguf is not None and gguf_chat_template(after.gguf)[0] == template
    assert same(load_model(after, CPU, torch.bfloat16), load_model(before, CPU, torch.bfloat16, weights=after.weights))
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1  # who may read the config may read the weights
    with pytest.raises(UserError, match="give its source"):
        convert(out, tmp_path / "pth")
    whole = (out / "vocabulary.gguf").read_bytes()
    (out / "vocabulary.gguf").write_bytes(whole[:1000])
    with pytest.raises(UserError, match="cut off or damaged"):
        open_checkpoint(out)
    command.main(["--checkpoint_path", str(source), "--weights", "int8", "--out", str(out), "--device", "cpu"])
    assert not (out / "vocabulary.gguf").exists()


@pytest.fixture
def written(source: Path, tmp_path: Path) -> Path:
    command.main(["--checkpoint_path", str(source), "--weights", "int4", "--out", str(tmp_path), "--device", "cpu"])
    return tmp_path


@pytest.mark.parametrize("at", ["cli.quantising.load_model", "checkpoint.quantised.save_file"])
def test_what_is_interrupted_leaves_the_old_folder_or_none(
    at: str, written: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config was once gone before the new weights were there: no program took it any more."""

    def interrupted(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    before = {file.name: file.read_bytes() for file in written.iterdir() if file.is_file()}
    monkeypatch.setattr(at, interrupted)
    for out in (written, tmp_path / "new"):
        argv = ["--checkpoint_path", str(source), "--weights", "int8", "--out", str(out), "--device", "cpu"]
        with pytest.raises(SystemExit) as exit_:
            command.main(argv)
        assert exit_.value.code == 130
    assert {file.name: file.read_bytes() for file in written.iterdir() if file.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_damage_is_told(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    for change, said in (({"version": 9}, "version 9"), ({"weights": "int3"}, "int3"), ({"config": {}}, "is missing"),
                         ({"weights": "int8"}, "shape")):  # fmt: skip
        (written / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            open_checkpoint(written)
    (written / "config.json").write_text(json.dumps(config))
    tensors = load_file(written / "model.safetensors")
    name = "layers.0.attention.wqkv.scale"
    for other, said in (({name: tensors[name].half()}, "float16"), ({"odd": torch.zeros(1)}, "no place")):
        save_file(tensors | other, written / "model.safetensors")
        with pytest.raises(UserError, match=said):
            open_checkpoint(written)
    save_file({n: t for n, t in tensors.items() if n != name}, written / "model.safetensors")
    with pytest.raises(UserError, match=f"missing {name}"):
        open_checkpoint(written)


def test_a_folder_whose_8_bits_have_no_groups_though_it_names_them(source: Path, tmp_path: Path) -> None:
    """As they were written before there were any: the size was said of 4 bits alone."""
    command.main(["--checkpoint_path", str(source), "--weights", "int8", "--out", str(tmp_path), "--device", "cpu"])
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("int8:group_size=0", "int8:group_size=64"))
    with pytest.raises(UserError, match="8 bits had no groups when it was written: quantise it anew"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [None, -1, "x", 10**20, [], 1 << 50, float("nan")])
def test_every_value_of_the_config_is_judged(value: object, written: Path) -> None:
    """Tracebacks of "int too big to convert", and a hang for 10^20 layers."""
    config = json.loads((written / "config.json").read_text())
    for name in config["config"]:
        changed = config | {"config": config["config"] | {name: value}}
        (written / "config.json").write_text(json.dumps(changed))
        try:
            found = load_model(open_checkpoint(written), CPU, torch.float32).config
        except UserError:
            continue
        same = value == config["config"][name] or (value is None and name == "rope_scaling")
        assert (
            same
            or name in ("context", "reach", "far_context", "norm_eps", "rope_theta", "rope_scaling")
            or (isinstance(value, bool))
        ), (name, found)  # all that weights do not contradict
    rope = {
        "kind": "yarn",
        "factor": value,
        "factors": [],
        "magnitude": 1.0,
        "whole_pairs": True,
        "original_context": 64,
    }
    (written / "config.json").write_text(json.dumps(config | {"config": config["config"] | {"rope_scaling": rope}}))
    with pytest.raises(UserError):
        open_checkpoint(written)


def test_it_is_not_quantised_twice(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--checkpoint_path", str(written), "--out", str(tmp_path / "again")],
                 ["--checkpoint_path", str(written), "--out", str(tmp_path / "x"), "--weights", "16"]):  # fmt: skip
        with pytest.raises(SystemExit):
            command.main(argv)
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "again").exists()


def test_no_other_checkpoint_is_written_over(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.json went, and its weights; the source's own where it had no tokenizer."""
    bare, other = tmp_path / "bare", tmp_path / "other"
    for folder, names in ((bare, ("config.json", "model.safetensors")), (other, ("config.json",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes((source / name).read_bytes())
    for path, out, message in ((bare, bare, "the folder that the weights come from"),
                               (bare, other, "holds another checkpoint: give an empty folder")):  # fmt: skip
        with pytest.raises(SystemExit):
            command.main(["--checkpoint_path", str(path), "--out", str(out), "--device", "cpu"])
        assert message in capsys.readouterr().err
        assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (bare / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_weight_that_is_no_number_is_named(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    name = next(n for n in tensors if n.endswith("o_proj.weight"))
    tensors[name][0, 0] = float("nan")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name):
        load_model(open_checkpoint(tmp_path), CPU, torch.float32, weights=parse_weights("int4"))


def test_the_first_folders_of_8_bits_had_a_scale_a_row(source: Path, tmp_path: Path) -> None:
    """They say "int8" alone, whatever a default is now; a folder says its groups in full."""
    command.main(
        ["--checkpoint_path", str(source), "--weights", "int8:group_size=0,down_bits=16", "--out", str(tmp_path)]
    )
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["weights"] == "int8:group_size=0,down_bits=16"
    now = load_model(open_checkpoint(tmp_path), CPU, torch.bfloat16)
    file.write_text(json.dumps(config | {"weights": "int8:down_bits=16"}))
    assert same(now, load_model(open_checkpoint(tmp_path), CPU, torch.bfloat16))


@pytest.mark.parametrize("weights", ["int4:group_size=32", "int8:group_size=64", "int8:group_size=0"])
def test_a_plan_counts_what_will_be_allocated(source: Path, weights: str) -> None:
    checkpoint, setting = open_checkpoint(source), parse_weights(weights)
    config = checkpoint.config
    shape = Shape(1, config.n_kv_head, config.head_dim, 64, torch.bfloat16, CPU)
    plan = make_plan(config, FullCache(), shape, 16, setting)
    written, run = (
        load_model(checkpoint, CPU, torch.bfloat16, weights=setting, to_run=to_run) for to_run in (False, True)
    )
    assert plan.weights == parameter_bytes(run) < plan.dense_weights
    assert weight_bytes(config, torch.bfloat16, setting) == parameter_bytes(written)
    assert any(weights[:4] in line for line in plan.lines())


def test_an_8b_in_4_bits_fits_a_small_card() -> None:
    """4.25 bits a weight of the layers, 8 of the embedding and head, each with its scales."""
    config = CONFIGS["llama-3.1-8b"]
    shape = Shape(1, config.n_kv_head, config.head_dim, 64, torch.bfloat16, torch.device("meta"))
    plan = make_plan(config, FullCache(), shape, 16, parse_weights("int4"))
    layers = 32 * (6144 * 4096 + 4096 * 4096 + 3 * 4096 * 14336)
    assert plan.weights == pytest.approx(layers * 4.25 / 8 + 2 * 128256 * 4096, rel=2e-3)


@pytest.mark.parametrize("weights", ["int4", "int8:group_size=64"])
def test_random_weights_are_quantised_too(weights: str) -> None:
    setting = parse_weights(weights)
    checkpoint = Checkpoint(None, "small", Config(64, 64, 2, 2, 2, 96, 128, 32))
    model = load_model(checkpoint, CPU, torch.float32, random_weights=True, weights=setting, to_run=False)
    w2 = model.layers[1].feed_forward.w2
    assert isinstance(w2, QuantizedLinear)
    assert w2.weight.dense(torch.float32).std() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("weights", "most"), [("int8", 2e-3), ("int8:group_size=64", 1e-3), ("int4:group_size=64", 0.2)]
)
def test_a_model_says_nearly_the_same(source: Path, weights: str, most: float) -> None:
    """Mean KL from the weights as they are, through a CPU's products: one token and many."""
    checkpoint = open_checkpoint(source)
    tokens = torch.randint(checkpoint.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    logits = []
    for setting in (None, parse_weights(weights)):
        model = load_model(checkpoint, CPU, torch.float32, weights=setting)
        with torch.inference_mode():
            many, one = forward(model, tokens), forward(model, tokens[:, :1])
        assert torch.allclose(many[:, :1], one, atol=0.2 if setting else 1e-3)
        logits.append(many.log_softmax(-1))
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    assert 0 < kl < most
