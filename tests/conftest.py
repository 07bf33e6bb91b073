"""Small checkpoints for tests: a tiny random one made on the spot, and the shared real one where it is."""

from __future__ import annotations

import io
import json
import os
import random
import signal
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

# A busy machine is no failure: no example has a deadline, and examples may be slow to make.
settings.register_profile("desk", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# In CI the same examples every time: a new one that fails belongs on a desk, not in someone else's landing.
settings.register_profile("ci", settings.get_profile("desk"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")

# Where the tests were started with Ctrl-C ignored (`nohup … &`), the programs that they start and interrupt would
# ignore it too, and run for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in another order: none needs another")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
STORIES = DATA / "checkpoints" / "stories260K"

# Every test process starts small: the tests' tensors gain nothing from threads.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

SENTENCES = [
    f"The {a} {b} {c} over the {d}, and then it went home to sleep until the morning came."
    for a in ("red", "small", "quick", "old")
    for b in ("fox", "boat", "clock", "child")
    for c in ("jumped", "looked", "wandered", "sang")
    for d in ("river", "garden", "stone wall", "quiet town")
]


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"needs {path.name} of the shared data, which is not here")


def train_tokenizer(vocab_size: int = 320) -> bytes:
    """A SentencePiece model with byte fallback, trained on the sentences above."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


def write_checkpoint(folder: Path, seed: int = 0, context: int = 256, **changes: object) -> Path:
    """A Hugging Face folder with a tiny random Llama and its tokenizer."""
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 320,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(train_tokenizer())
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    tensors = {"model.embed_tokens.weight": random(320, 32), "model.norm.weight": torch.ones(32)}
    for i in range(2):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": torch.ones(32),
            layer + "post_attention_layernorm.weight": torch.ones(32),
            layer + "self_attn.q_proj.weight": random(32, 32),
            layer + "self_attn.k_proj.weight": random(16, 32),
            layer + "self_attn.v_proj.weight": random(16, 32),
            layer + "self_attn.o_proj.weight": random(32, 32),
            layer + "mlp.gate_proj.weight": random(64, 32),
            layer + "mlp.up_proj.weight": random(64, 32),
            layer + "mlp.down_proj.weight": random(32, 64),
        }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama")
