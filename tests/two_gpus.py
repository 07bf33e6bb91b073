"""What each of two ranks does on its own GPU for tests/engine/test_two_gpus.py, which starts it by torchrun: the same
texts first with the whole model, alone, and then with its share of it. Rank 0 writes what it found to
FOLDER/found.json. By hand, for every cache and dtype, from the project's folder; 4 and 8 ranks have copies of heads:

    PYTHONPATH=.:tests torchrun --standalone --nproc_per_node 2 tests/two_gpus.py FOLDER all
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import SENTENCES
from safetensors.torch import load_file, save_file

from checkpoint import find_demo, load_model, open_checkpoint
from common.messages import say
from engine import PREFILL_CHUNK, Engine, Sampling, chunk_sums
from engine.link import linked
from engine.parallel import Parallel, connect, rank_device
from engine.precompile import Run, compiled_ahead, prompt_parts
from engine.saved import SavedCache, save_cache
from engine.sums import PeerSums
from kv_cache import ModelCache, parse_policy
from selective_kv import Shape
from selective_kv.kernels.launch import capturing

REGIONS = "sink_size=4,window_size=32"
CACHES = [
    "full", f"compress_kv:{REGIONS}", f"quantize_kv:{REGIONS}", f"quantize_kv:{REGIONS},k_bits=4,v_bits=4",
    f"quantize_kv:{REGIONS},k_bits=3,v_bits=3",
]  # fmt: skip
FP32, BF16 = torch.float32, torch.bfloat16
TESTED = [(FP32, CACHES[0]), (FP32, CACHES[2]), (BF16, CACHES[3])]
N_NEW = 60
CHUNK = 100  # tokens: of the long prompt, alone; what is left of it goes with the short one


def with_heads(n_kv_head: int, folder: Path) -> Path:
    """A folder with the bundled model, whose heads are there several times until there are n_kv_head for keys and
    values; it computes the same.
    """
    shutil.copytree(find_demo(), folder)
    config = json.loads((folder / "config.json").read_text())
    n_head, kv_copies = config["num_attention_heads"], n_kv_head // config["num_key_value_heads"]
    copies = max(1, n_kv_head // n_head)
    config |= {"num_attention_heads": n_head * copies, "num_key_value_heads": n_kv_head}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        kind = name.rsplit(".", 2)[-2]
        n = {"q_proj": copies, "k_proj": kv_copies, "v_proj": kv_copies}.get(kind, 1)
        if n > 1:
            heads = weight.view(-1, config["head_dim"], weight.shape[1])
            weights[name] = heads.repeat_interleave(n, 0).flatten(0, 1)
        if kind == "o_proj" and copies > 1:
            heads = weight.view(len(weight), n_head, -1) / copies
            weights[name] = heads.repeat_interleave(copies, 1).flatten(1)
    save_file(weights, folder / "model.safetensors")
    return folder


class Runs:
    """A model on this GPU, or a rank's share of it: the same prompts through every cache."""

    def __init__(
        self, model: Path, dtype: torch.dtype, device: torch.device, caches: list[str], ranks: Parallel | None = None
    ) -> None:
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer()
        assert tokenizer is not None
        texts = [" ".join(SENTENCES[:12]), "Once upon a time"]  # the first closes a tile
        self.prompts = [tokenizer.encode(text) for text in texts]
        assert len(self.prompts[0]) > 4 + 128 + 32
        if ranks is not None:
            checkpoint = checkpoint.share_of(ranks.rank, ranks.size)
        self.device, self.ranks, self.share = device, ranks, checkpoint.share
        self.config = checkpoint.config
        self.shape = Shape(2, self.config.n_kv_head, self.config.head_dim, 400, dtype, device)
        parts = prompt_parts([len(prompt) for prompt in self.prompts], PREFILL_CHUNK)
        runs = [Run(parse_policy(cache), self.shape, parts) for cache in caches]
        with compiled_ahead(self.config, runs, Sampling(0), ranks):
            self.model = load_model(checkpoint, device, dtype, ranks=ranks)

    def engine(self, cache: str, sampling: Sampling, chunk: int = PREFILL_CHUNK) -> Engine:
        model_cache = ModelCache(parse_policy(cache), self.config.n_layer, self.shape)
        return Engine(self.model, model_cache, sampling, prefill_chunk=chunk, ranks=self.ranks)

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [batch, vocabulary], of all ranks."""
        every = logits if self.ranks is None else self.ranks.gather(logits, self.config.vocab_size)
        return every.float().clone()

    def write(self, cache: str, sampling: Sampling) -> list[list[int | None]]:
        engine = self.engine(cache, sampling)
        assert engine.captures
        return list(engine.generate(self.prompts, N_NEW))

    @torch.inference_mode()
    def score(self, cache: str, tokens: list[list[int | None]], chunk: int = PREFILL_CHUNK) -> torch.Tensor:
        """Logits after the prompts and after each of these tokens, fed one by one: [step, batch, vocabulary]."""
        engine = self.engine(cache, Sampling(0), chunk)
        engine.read(self.prompts)
        assert engine.logits is not None
        found = [self.whole(engine.logits)]
        for row in tokens[:-1]:
            found.append(self.whole(engine.forward(torch.tensor(row, device=self.device)[:, None])))
        return torch.stack(found)

    def save(self, cache: str, file: Path) -> None:
        engine = self.engine(cache, Sampling(0))
        engine.read(self.prompts)
        save_cache(file, engine, self.prompts, share=self.share)

    def go_on(self, cache: str, file: Path) -> list[list[int | None]]:
        engine, saved = self.engine(cache, Sampling(0)), SavedCache(file)
        saved.load(engine, [len(prompt) for prompt in self.prompts], self.share)
        return list(engine.generate([[], []], N_NEW))


def sums_of(ranks: Parallel) -> dict[str, float]:
    """By the GPUs' memory, of every dtype: the largest error over what one rounding makes of it. Five sums each, so
    that both halves of the memory are used again, and a captured one.
    """
    (sums, _) = ranks.sums
    assert isinstance(sums, PeerSums)
    worst = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        worst[str(dtype)] = 0.0
        for shape in ((1, 4096), (3, 1000), (8, 4096)):
            x = torch.empty(shape, device=ranks.device, dtype=dtype)
            residual = torch.empty_like(x)
            graph = torch.cuda.CUDAGraph()
            sums.sum(x, residual)
            torch.cuda.synchronize()
            with capturing(graph, ranks.device, capture_error_mode="thread_local"):
                out = sums.sum(x, residual)
            for seed in range(5):
                generator = torch.Generator(ranks.device).manual_seed(seed)
                residual.copy_(torch.randn(shape, generator=generator, device=ranks.device))
                generator.manual_seed(100 + 10 * seed + ranks.rank)
                x.copy_(torch.randn(shape, generator=generator, device=ranks.device))
                parts = [torch.empty_like(x) for _ in range(ranks.size)]
                dist.all_gather(parts, x, ranks.group)
                want = sum((part.double() for part in parts), residual.double())
                eager = sums.sum(x, residual)
                graph.replay()
                assert torch.equal(eager, out)
                allowed = torch.finfo(dtype).eps * sum((part.double().abs() for part in parts), residual.double().abs())
                worst[str(dtype)] = max(worst[str(dtype)], float(((out.double() - want).abs() / allowed).max()))
    return worst


@contextmanager
def every_chunk_long() -> Iterator[None]:
    """Chunks of two tokens and more are summed by rows, beside their products."""
    before, chunk_sums.LEAST_WORK = chunk_sums.LEAST_WORK, 1
    yield
    chunk_sums.LEAST_WORK = before


def equal_steps(one: list[Any], other: list[Any]) -> int:
    """How many steps two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def compared(one: torch.Tensor, both: torch.Tensor) -> dict[str, float]:
    """Of logits [step, batch, vocabulary]: the largest difference, and how many likeliest tokens differ."""
    error = (both - one).abs().amax() / one.abs().amax()
    return {"error": float(error), "differ": int((both.argmax(-1) != one.argmax(-1)).sum())}


def main(folder: Path, cases: list[tuple[torch.dtype, str]]) -> None:
    with linked("two_gpus") as link:
        assert link is not None
        device = rank_device("cuda", link)
        torch.cuda.set_device(device)
        samplings = {"greedy": Sampling(0), "sampled": Sampling(0.9, 50, 0.95, seed=3)}
        caches: dict[torch.dtype, list[str]] = {}
        for dtype, cache in cases:
            caches.setdefault(dtype, []).append(cache)
        most = open_checkpoint(find_demo()).config.n_kv_head
        model = find_demo() if link.size <= most else with_heads(link.size, folder / f"model{link.rank}")
        alone = {dtype: Runs(model, dtype, device, caches[dtype]) for dtype in caches}
        want = {
            (dtype, cache, name): alone[dtype].write(cache, sampling)
            for dtype, cache in cases for name, sampling in samplings.items()
        }  # fmt: skip
        say("written alone")
        ranks = connect(link, device)
        found: dict[str, Any] = {"sums": sums_of(ranks), "path": ranks.path, "rows": []}
        together = {dtype: Runs(model, dtype, device, caches[dtype], ranks) for dtype in caches}
        for dtype, cache in cases:
            one, both = alone[dtype], together[dtype]
            row: dict[str, Any] = {"dtype": str(dtype), "cache": cache}
            for name, sampling in samplings.items():
                text, expected = both.write(cache, sampling), want[dtype, cache, name]
                row[name] = equal_steps(text, expected)
                row[f"{name} by all"] = len({str(t) for t in ranks.from_all(text)}) == 1
            tokens = want[dtype, cache, "greedy"]
            row |= compared(one.score(cache, tokens), both.score(cache, tokens))
            with every_chunk_long():
                row["long error"] = compared(one.score(cache, tokens, CHUNK), both.score(cache, tokens, CHUNK))["error"]
            file = folder / f"{len(found['rows'])}"
            both.save(cache, file)
            row["loaded by two"] = both.go_on(cache, file) == both.write(cache, samplings["greedy"])
            row["loaded by one"] = equal_steps(one.go_on(cache, file), tokens)
            found["rows"].append(row)
            say(str(row))
        if ranks.rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        link.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(product((FP32, BF16), CACHES)) if sys.argv[2:] == ["all"] else TESTED)
