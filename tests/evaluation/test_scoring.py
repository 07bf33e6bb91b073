"""The parallel form of scoring is what token-by-token decoding through the real caches gives."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from conftest import SENTENCES, STORIES, needs
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import find_demo, load_model, load_tokenizer, open_checkpoint
from evaluation import scoring
from model import Config, Transformer
from selective_kv import FullCache, KVCache, SelectiveCache, SinkWindowCache
from selective_kv.formats import TILE


@settings(max_examples=40, deadline=None)
@given(
    sink=st.integers(0, 5),
    window=st.integers(1, 9),
    n_token=st.integers(2, 40) | st.integers(TILE - 5, 2 * TILE + 20),
    queries=st.sampled_from([1, 3, 8, 64]),
    seed=st.integers(0, 99),
)
def test_every_logit_is_the_sequential_one(sink: int, window: int, n_token: int, queries: int, seed: int) -> None:
    torch.manual_seed(seed)
    # One layer, in double: its keys are the same in both forms. Where they differ by 1e-7, as in a second layer, one
    # in 300 texts has an element that rounds to another integer, and that moves a logit by more than the bound.
    model = Transformer(Config(50, 32, 1, 4, 2, 48, 64)).eval().double()
    for p in model.parameters():
        p.data.mul_(2)  # far from uniform
    tokens = torch.randint(50, (n_token,))
    policies: list[KVCache] = [
        FullCache(),
        SelectiveCache(sink, window),
        SelectiveCache(sink, window, 4, 2, rotate=False),
    ]
    policies += [SinkWindowCache(sink, window, positions) for positions in ("cache", "original")]
    before, scoring.QUERIES = scoring.QUERIES, queries
    try:
        for policy in policies:
            states = [read(model, policy, tokens) for read in (scoring.read_parallel, scoring.read_sequential)]
            assert (model.head(states[0]) - model.head(states[1])).abs().max() < 1e-3, policy
    finally:
        scoring.QUERIES = before


POLICIES: list[KVCache] = [
    FullCache(), SelectiveCache(4, 16), SelectiveCache(0, 1), SelectiveCache(4, 16, 8, 4), SelectiveCache(4, 16, 4, 4),
    SelectiveCache(4, 16, 3, 2, rotate=False),
    SinkWindowCache(4, 16), SinkWindowCache(4, 16, "original"),
]  # fmt: skip


@functools.cache
def bundled(dtype: torch.dtype) -> Transformer:
    return load_model(open_checkpoint(find_demo(), None), torch.device("cpu"), dtype)


def some_text(n_token: int) -> torch.Tensor:
    ids = load_tokenizer(find_demo() / "tokenizer.model").encode(" ".join(SENTENCES * 20))
    return torch.tensor(ids[:n_token])


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_in_double_every_logit_of_the_bundled_model_is_the_sequential_one(policy: KVCache) -> None:
    """All ten layers of it, where no rounding tips: the two forms are one definition."""
    model, tokens = bundled(torch.float64), some_text(290)
    parallel = scoring.read_parallel(model, policy, tokens)
    sequential = scoring.read_sequential(model, policy, tokens, reference=True)
    assert (model.head(parallel) - model.head(sequential)).abs().max() < 1e-6


def both_forms(model: Transformer, policy: KVCache, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [token, vocabulary] of the parallel form, and of the sequential one through the fast path."""
    return model.head(scoring.read_parallel(model, policy, tokens)), model.head(
        scoring.read_sequential(model, policy, tokens)
    )


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_in_single_precision_a_rounding_that_tips_moves_less_than_rounding_does(policy: KVCache) -> None:
    """Through the fast path. How many elements round to the other integer depends on the order in which a processor
    adds up its products, so no number of logits bounds what they do; what quantising itself does to the same logits
    is the measure. In one layer, an element that tips moves by one step where every element moved by up to half a
    step. Over ten layers a tip makes others tip, at most until the two forms' roundings are independent.
    """
    model, tokens = bundled(torch.float32), some_text(600)
    first = copy.copy(model)
    first._modules = model._modules | {"layers": model.layers[:1]}
    first.config = replace(model.config, n_layer=1)
    for depth, share in ((first, 0.05), (model, 1.0)):
        parallel, sequential = both_forms(depth, policy, tokens)
        error = parallel - sequential
        if not isinstance(policy, SelectiveCache):
            assert error.abs().max() < 1e-3  # without integers nothing can tip
            continue
        full = depth.head(scoring.read_parallel(depth, FullCache(), tokens))
        assert error.square().mean().sqrt() < share * (parallel - full).square().mean().sqrt()
        assert depth is model or error.abs().max() < share * (parallel - full).abs().max()


@needs(STORIES)
@pytest.mark.parametrize(
    "policy", [FullCache(), SelectiveCache(4, 16), SinkWindowCache(4, 16), SinkWindowCache(4, 16, "original")], ids=str
)
def test_on_a_real_checkpoint(policy: KVCache) -> None:
    """1e-3 in the mean, 1e-2 in every logit, float32."""
    model = load_model(open_checkpoint(STORIES, None), torch.device("cpu"), torch.float32)
    tokens = torch.randint(3, 512, (300,), generator=torch.Generator().manual_seed(0))
    states = [read(model, policy, tokens) for read in (scoring.read_parallel, scoring.read_sequential)]
    assert (model.head(states[0]) - model.head(states[1])).abs().max() < 1e-2
    nll = [scoring.score(model, tokens, s).nll.mean() for s in states]
    assert abs(nll[0] - nll[1]) < 1e-3


@pytest.mark.parametrize("knobs", [{"k_bits": 4, "rotate": False}, {"v_bits": 3}], ids=str)
def test_few_bits_in_parallel_are_few_bits_in_turn(knobs: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Transformer(Config(50, 128, 2, 2, 1, 48, 64)).eval().double()  # in float32 a rounding may tip (LOG.md)
    for p in model.parameters():
        p.data.mul_(2)
    tokens, policy = torch.randint(50, (300,)), SelectiveCache(2, 5, **knobs)
    states = [scoring.read_parallel(model, policy, tokens)]
    states.append(scoring.read_sequential(model, policy, tokens, reference=True))  # which keeps float64
    assert (model.head(states[0]) - model.head(states[1])).abs().max() < 1e-6
    exact = scoring.read_parallel(model, FullCache(), tokens)
    assert (model.head(states[0]) - model.head(exact)).abs().max() > 1e-2  # and it is something else


def test_scores_against_a_reference() -> None:
    torch.manual_seed(0)
    model = Transformer(Config(50, 32, 2, 4, 2, 48, 64)).eval()
    tokens = torch.randint(50, (60,))
    full = scoring.read_parallel(model, FullCache(), tokens)
    same = scoring.score(model, tokens, full, full)
    assert same.kl is not None and same.same_top is not None
    assert same.kl.abs().max() < 1e-6 and same.same_top.all() and len(same.nll) == 59
    other = scoring.score(model, tokens, scoring.read_parallel(model, SinkWindowCache(1, 2), tokens), full)
    assert other.kl is not None and other.kl.min() > -1e-6 and other.kl.mean() > 1e-4
    direct = torch.nn.functional.cross_entropy(model.head(full)[:-1], tokens[1:]).item()
    assert abs(same.nll.mean().item() - direct) < 1e-5


def test_windows_are_whole_and_spread() -> None:
    text = torch.arange(103)
    starts = [int(w[0]) for w in scoring.windows(text, 10, 4)]
    assert starts == [0, 31, 62, 93] and all(len(w) == 10 for w in scoring.windows(text, 10, 4))
    assert len(list(scoring.windows(text, 50, 9))) == 2 and not list(scoring.windows(text, 200, 3))
