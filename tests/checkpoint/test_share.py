"""One rank's share of a model: its parameters are slices of the whole one's, whatever they come from."""

from __future__ import annotations

from pathlib import Path

import families
import gguf_files
import pytest
import torch
from checkpoints import CPU, SMALL, assert_shares, fused, random_gpt_fast, write_hugging_face_config
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint import Checkpoint, Share, load_model, open_checkpoint
from common.errors import UserError
from model import CONFIGS, Config, Transformer

FP32 = torch.float32


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2", "qwen3"])  # a head of its own, tied; biases; norms
def test_a_rank_loads_its_share(family: str, tmp_path: Path) -> None:
    families.make(family, tmp_path, max_shard_size="20KB")
    assert_shares(lambda c: load_model(c, CPU, FP32), open_checkpoint(tmp_path), 2)


@pytest.mark.parametrize("together", [True, False])
def test_a_rank_loads_its_share_of_gpt_fasts_file(together: bool, tmp_path: Path) -> None:
    """q, k and v in one tensor, whose pairs lie side by side."""
    state = random_gpt_fast(SMALL)
    torch.save(fused(state, SMALL) if together else state, tmp_path / "model.pth")
    write_hugging_face_config(tmp_path)
    assert_shares(lambda c: load_model(c, CPU, FP32), open_checkpoint(tmp_path), 2)


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_cut_from_the_same_noise(tied: bool) -> None:
    config = Config(101, 48, 2, 8, 4, 96, 64, tied_embeddings=tied, qkv_bias=True)
    for n_rank in (2, 4):
        assert_shares(lambda c: load_model(c, CPU, FP32, True, 7), Checkpoint(None, "made", config), n_rank)


@pytest.mark.parametrize(
    ("config", "n_rank", "message"),
    [
        (CONFIGS["llama-3.1-8b"], 3, "3 ranks cannot share 8 KV heads.* goes on 1 or 2 or 4 or 8"),
        (CONFIGS["llama-3.1-8b"], 16, "16 ranks cannot share 8 KV heads"),
        (Config(97, 576, 2, 9, 3, 1536, 64), 2, "2 ranks cannot share 3 KV heads.* goes on 1 or 3"),
        (Config(97, 64, 2, 4, 4, 90, 64), 4, "4 ranks cannot share a feed-forward of 90 columns"),
        (Config(5, 64, 2, 4, 4, 64, 64), 4, "4 ranks cannot share a vocabulary of 5"),
    ],
)
def test_what_cannot_be_cut_is_refused(config: Config, n_rank: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Share(config, 0, n_rank)


def test_a_layer_cache_has_its_own_heads_bytes() -> None:
    """Of 70B on 8 ranks, each has one KV head: an eighth of the cache and, the embedding apart, of the weights."""
    whole = CONFIGS["llama-3.1-70b"]
    shares = [Share(whole, rank, 8).config for rank in range(8)]
    with torch.device("meta"):
        n = [sum(p.numel() for p in Transformer(c).parameters()) - c.vocab_size * c.dim for c in (whole, *shares)]
    norms = (2 * whole.n_layer + 1) * whole.dim
    assert sum(n[1:]) - 8 * norms == n[0] - norms
    assert {c.n_kv_head for c in shares} == {1} and sum(c.vocab_rows for c in shares) == whole.vocab_size


@pytest.mark.parametrize(("kind", "width"), [("Q8_0", 128), ("Q4_K", 512), ("Q4_K", 768), ("F16", 128)])
def test_a_rank_loads_its_share_of_a_gguf(kind: str, width: int, tmp_path: Path) -> None:
    """Columns are of whole blocks (32 or 256 values) where the share begins at one, and cut out of them elsewhere."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = gguf_files.write(tmp_path / "model.gguf", LlamaForCausalLM(config).eval(), kind)
    assert_shares(lambda c: load_model(c, CPU, FP32), open_checkpoint(path), 2)
