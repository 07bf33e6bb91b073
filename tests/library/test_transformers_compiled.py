"""generate() compiles the model with one of our caches by itself: one graph for every step, every length and every
policy, and the tokens of the eager model. On a GPU the step is captured too."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel
from transformers_models import LONG, PROMPTS, padded, tiny, write

from benchmark.peers import transformers_model
from checkpoint import load_model, open_checkpoint
from selective_kv import FullCache, KVCache, SelectiveCache, SinkWindowCache
from selective_kv.transformers import NAME, PolicyKVCache

TRACED, GRAPH = (CompileConfig(backend=name, mode=None, fullgraph=True) for name in ("eager", "aot_eager"))
TRACED._compile_all_devices = GRAPH._compile_all_devices = True  # a CPU's generate compiles nothing otherwise
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
POLICIES = {
    "full": FullCache(),
    "selective": SelectiveCache(sink_size=2, window_size=6),
    "sink + window": SinkWindowCache(sink_size=2, window_size=6),
}


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()
    counters.clear()


def test_one_graph_for_every_step() -> None:
    """fullgraph: nothing breaks it. A second text compiles nothing, nor does a cache of another policy and size."""
    model = tiny("llama3")
    ids, mask = padded([LONG[0, :125], LONG[1, :4]])
    for made, policy in enumerate((SelectiveCache(sink_size=2, window_size=6), FullCache(), SinkWindowCache(2, 6))):
        eager = write(model, ids, PolicyKVCache(model.config, policy), 20, attention_mask=mask)
        cache = PolicyKVCache(model.config, policy, max_cache_len=150 + made)
        assert cache.is_compileable
        for _ in range(2):
            out = write(model, ids, cache, 20, attention_mask=mask, compile_config=GRAPH)
            assert out.equal(eager)
            cache.reset()
            assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_prefill_in_chunks_is_compiled_too() -> None:
    """With padding, and a last chunk that is shorter; memory made ahead as for StaticCache."""
    model = tiny("llama3")
    ids, mask = padded([LONG[0, :150], LONG[1, :4]])
    policy = SelectiveCache(sink_size=2, window_size=6)
    settings: dict[str, Any] = dict(attention_mask=mask, prefill_chunk_size=7)
    eager = write(model, ids, PolicyKVCache(model.config, policy), 10, **settings)
    cache = PolicyKVCache(model.config, policy, max_cache_len=200)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert write(model, ids, cache, 10, compile_config=TRACED, **settings).equal(eager)
    assert not counters["graph_break"]


def test_memory_is_not_made_in_a_compiled_graph() -> None:
    """The first chunk is the first call: on a GPU the memory was a graph's output, and the next replay ended in an
    error."""
    made = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.extend(node for node in graph.graph.nodes if "zeros" in str(node.target))
        return graph.forward

    settings = CompileConfig(backend=backend, mode=None)
    settings._compile_all_devices = True
    model, policy = tiny("llama3"), SelectiveCache(sink_size=2, window_size=6)
    expected = write(model, LONG, PolicyKVCache(model.config, policy), 10, prefill_chunk_size=150)
    for _ in range(2):
        cache = PolicyKVCache(model.config, policy, max_cache_len=220)
        out = write(model, LONG, cache, 10, prefill_chunk_size=150, compile_config=settings)
        assert out.equal(expected)
    assert counters["stats"]["unique_graphs"] and not made


@needs_gpu
@pytest.mark.gpu
def test_chunks_and_steps_are_captured_on_a_gpu() -> None:
    """Memory and kernels' output as inductor and CUDA graphs want them: `prefill_chunk_size` ended in an error."""
    model = copy.deepcopy(tiny("llama3")).cuda()
    ids, policy = LONG.cuda(), SelectiveCache(sink_size=2, window_size=6)
    settings: dict[str, Any] = dict(prefill_chunk_size=150)
    eager = write(model, ids, PolicyKVCache(model.config, policy, 220), 10, disable_compile=True, **settings)
    assert write(model, ids, PolicyKVCache(model.config, policy, 220), 10, **settings).equal(eager)


def test_a_full_cache_says_so_compiled() -> None:
    model = tiny("llama3")
    cache = PolicyKVCache(model.config, FullCache(), max_cache_len=30)
    with pytest.raises(ValueError, match="max_cache_len=30"):
        write(model, PROMPTS[:1], cache, 20, compile_config=TRACED)


@functools.cache
def bundled(dtype: torch.dtype) -> PreTrainedModel:
    device = torch.device("cuda")
    model = transformers_model(load_model(open_checkpoint(Path(ROOT / "assets" / "demo")), device, dtype))
    model.generation_config.eos_token_id = None
    return model


def gpu_prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 4000, (n,), generator=generator) for n in (600, 1, 300)]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_captured_on_a_gpu(name: str) -> None:
    """The captured step writes the eager step's tokens, a batch with padding what each sequence gets alone (full: what
    DynamicCache writes), and replaying compiles nothing."""
    model = bundled(torch.float32)
    prompts, policy = gpu_prompts(), POLICIES[name]
    ids, mask = (t.cuda() for t in padded(prompts))
    if name == "full":
        model.set_attn_implementation("sdpa")
        expected = write(model, ids, None, 40, attention_mask=mask)
    model.set_attn_implementation(NAME)
    eager = write(model, ids, PolicyKVCache(model.config, policy, 700), 40, attention_mask=mask, disable_compile=True)
    if name == "full":
        assert eager.equal(expected)
    cache = PolicyKVCache(model.config, policy, max_cache_len=700)
    for _ in range(2):
        out = write(model, ids, cache, 40, attention_mask=mask)
        assert out.equal(eager)
        cache.reset()
    another = PolicyKVCache(model.config, policy, max_cache_len=720)
    assert write(model, ids, another, 40, attention_mask=mask).equal(eager)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
    one = PolicyKVCache(model.config, policy, max_cache_len=700)
    alone = write(model, prompts[2][None].cuda(), one, 40, disable_compile=True)
    assert alone[0, 300:].equal(eager[2, 600:])
    if not policy.endless:  # a step that does not fit is an error of the host's, not the device's: the card goes on
        with pytest.raises(ValueError, match="701 tokens do not fit a cache made with max_cache_len=700"):
            write(model, ids, cache, 120, attention_mask=mask)
        cache.reset()
    assert write(model, ids, cache, 40, attention_mask=mask).equal(eager)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", (False, True))
def test_no_dense_copy_on_a_gpu(compiled: bool) -> None:
    """Peak memory of decoding over 30,000 tokens: less than one layer's dense keys beyond what is held."""
    model = bundled(torch.bfloat16)
    model.set_attn_implementation(NAME)
    cache = PolicyKVCache(model.config, SelectiveCache(16, 128, 4, 4), max_cache_len=32000)
    ids = torch.randint(3, 4000, (1, 30000), device="cuda")
    held = []

    def after_each_token(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
        if len(held) == 5:  # a step has been captured, where it is
            torch.cuda.reset_peak_memory_stats()
        return torch.zeros(1, dtype=torch.bool, device="cuda")

    write(model, ids, cache, 20, stopping_criteria=[after_each_token], disable_compile=not compiled)
    dense = 2 * 30000 * 64 * 2  # KV heads, tokens, head_dim, bytes of a bfloat16
    assert len(held) == 20
    assert torch.cuda.max_memory_allocated() - held[4] < dense


def test_the_operators_keep_their_word() -> None:
    """Fake implementations, what is mutated, tracing with sizes that vary: torch.library's own checks."""
    config = tiny("llama3").config
    cache = PolicyKVCache(config, FullCache(), max_cache_len=60)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    sequences = cache.sequences
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments: tuple[Any, ...] = (q, k, v, sequences.counts)
    sequences.layers = sequences.layers[:1]  # a pass of one layer
    torch.library.opcheck(torch.ops.selective_kv.decode.default, (*arguments, sequences.handle, 0), test_utils=checks)
    chunk = torch.ops.selective_kv.chunk.default
    torch.library.opcheck(chunk, (*arguments, None, sequences.handle, 0), test_utils=checks)
    for with_mask in (False, True):  # of a prompt, as a model lays it out: inductor stopped at where its output lay
        cache.reset()
        q, k, v = (torch.randn(2, 5, n_head, 8).transpose(1, 2) for n_head in (6, 2, 2))
        mask = torch.ones(2, 5, dtype=torch.bool) if with_mask else None
        assert chunk(q, k, v, sequences.counts, mask, sequences.handle, 0).is_contiguous()


def test_policies_that_cannot_be_captured_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, a cache whose step looks at the device from the host stays eager."""

    class Plain(KVCache):
        def allocate(self, shape: Any) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not PolicyKVCache(tiny("llama3").config, Plain(), max_cache_len=60).is_compileable
