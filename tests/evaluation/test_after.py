"""evaluate.py --load_cache: a text scored after one that a saved cache holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES

import generate
from checkpoint import load_model, open_checkpoint
from evaluation import command as evaluate
from evaluation import scoring
from kv_cache import ModelCache, parse_policy
from selective_kv import Shape

BEFORE, TEXT, N = " ".join(SENTENCES[:4]), "\n".join(SENTENCES[4:40]), 40
CACHES = ["quantize_kv:sink_size=2,window_size=8", "compress_kv:sink_size=2,window_size=8"]
CPU = torch.device("cpu")


def rows(*argv: object) -> list[dict[str, Any]]:
    evaluate.main(["perplexity", *map(str, argv)])
    return json.loads(Path(str(argv[-1])).read_text())["rows"]


def test_a_text_is_scored_after_one_that_a_saved_cache_holds(tiny: Path, tmp_path: Path) -> None:
    """As each cache would go on that had read that one itself; what it takes is that of both."""
    file, text, out = tmp_path / "before.cache", tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(TEXT)
    model_at = ["--checkpoint_path", str(tiny)]
    generate.main([*model_at, "--prompt", BEFORE, "--max_new_tokens", "1", "--save_cache", str(file)])
    base = [*model_at, "--text", text, "--context", N, "--windows", 1, "--caches", *CACHES]
    after, alone = rows(*base, "--load_cache", file, "--json", out), rows(*base, "--json", out)
    checkpoint = open_checkpoint(tiny)
    model, c, tokenizer = load_model(checkpoint, CPU, torch.float32), checkpoint.config, checkpoint.tokenizer()
    assert tokenizer is not None
    read, tokens = tokenizer.encode(BEFORE), torch.tensor(tokenizer.encode(TEXT, bos=False)[:N])
    assert len(read) > 2 + 8 + 128  # a tile has left
    for row, fewer in zip(after, alone, strict=True):
        cache: Any = ModelCache(
            parse_policy(row["cache"]), c.n_layer, Shape(1, c.n_kv_head, c.head_dim, len(read) + N, torch.float32, CPU)
        )
        with torch.inference_mode():
            model.read(torch.tensor([read]), cache)
            states = torch.cat([model.read(token[None, None], cache)[0] for token in tokens])
        assert row["nll"] == pytest.approx(scoring.score(model, tokens, states).nll.mean().item(), abs=1e-4)
        assert abs(row["nll"] - fewer["nll"]) > 1e-3
        assert row["cache_bytes"] == sum(cache.nbytes().values())
    assert after[0]["cache_bytes"] > 2 * alone[0]["cache_bytes"]
