"""Eager steps recorded as CUDA graphs: a layer's attention at a time, and in `captured_decoding` all of a step.

On a CPU with stand-ins that remember what to run; on a GPU as it is.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from test_transformers_compiled import POLICIES, bundled, gpu_prompts, needs_gpu
from torch import Tensor
from transformers_models import LONG, PROMPTS, padded, tiny, write

from selective_kv import KVCache
from selective_kv.transformers import NAME, PolicyKVCache, captured_decoding
from selective_kv.transformers.captured import CapturedSteps
from selective_kv.transformers.decoding import CapturedStep


class RememberedLayers(CapturedSteps):
    """Inputs go by way of fixed places, as in a graph."""

    recorded: ClassVar[list[int]] = []

    def replay(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Any) -> Tensor:
        torch._foreach_copy_(self.inputs, [q, k, v])
        if layer not in self.graphs:
            self.recorded.append(layer)
            self.graphs[layer] = step
        self.out.copy_(self.graphs[layer](*self.inputs))  # type: ignore[misc, operator]
        return self.out


class RememberedStep(CapturedStep):
    """Recording changes nothing that is held, and a replayed step runs what was recorded, on the inputs' places."""

    capturing = False
    recorded: ClassVar[list[int]] = []  # the host's count of columns, each time; and -1 for each cut

    def record(self, sequences: Any, step: Any) -> Any:
        self.step = step
        for tensor in self.inputs.values():
            tensor.zero_()
        held = [t for layer in sequences.layers for t in layer.storage()] + [sequences.counts]
        before, n_column = [t.clone() for t in held], sequences.n_column
        self.recorded.append(n_column)
        with sequences.recorded(lambda: self.recorded.append(-1)):
            out = self.run()
        for tensor, old in zip(held, before, strict=True):
            tensor.copy_(old)
        sequences.n_column = n_column
        return out

    def run(self) -> Any:
        RememberedStep.capturing = True
        try:
            return self.step()
        finally:
            RememberedStep.capturing = False

    def replay(self, inputs: dict[str, Tensor], cache: PolicyKVCache) -> Any:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        n_column = cache.sequences.n_column
        out = self.run()
        cache.sequences.n_column = n_column  # as when nothing of it runs
        return out


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for both kinds of graph, and memory that has to grow soon."""
    monkeypatch.setattr("selective_kv.transformers.sequences.CapturedSteps", RememberedLayers)
    monkeypatch.setattr("selective_kv.transformers.decoding.CapturedStep", RememberedStep)
    monkeypatch.setattr("selective_kv.transformers.sequences.ROOM", 12)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: RememberedStep.capturing)
    for policy in POLICIES.values():
        monkeypatch.setattr(type(policy), "capturable", True)
    RememberedLayers.recorded, RememberedStep.recorded = [], []
    yield


@pytest.mark.parametrize("name", POLICIES)
def test_an_eager_step_by_graphs_of_each_layer(name: str, request: pytest.FixtureRequest) -> None:
    """Inputs by way of fixed places, memory that grows, beams reordered."""
    model, policy = tiny("llama3"), POLICIES[name]
    ids, mask = padded([LONG[0, :120], LONG[1, :110]])
    expected = write(model, ids, PolicyKVCache(model.config, policy), 30, attention_mask=mask, num_beams=2)
    request.getfixturevalue("remembering")
    out = write(model, ids, PolicyKVCache(model.config, policy), 30, attention_mask=mask, num_beams=2)
    assert out.equal(expected)
    assert RememberedLayers.recorded == [0, 1, 2] * (1 if policy.endless else 3)  # once in each place that memory had


@pytest.mark.parametrize("beams", (1, 2))
@pytest.mark.parametrize("name", POLICIES)
def test_a_whole_step(name: str, beams: int, request: pytest.FixtureRequest) -> None:
    """Recorded anew where memory has moved, and else once, over two texts in one cache; nothing is compiled."""
    model, policy = tiny("llama3"), POLICIES[name]
    ids, mask = padded([LONG[0, :120], LONG[1, :110]])
    settings: dict[str, Any] = dict(attention_mask=mask, num_beams=beams)
    expected = write(model, ids, PolicyKVCache(model.config, policy), 30, **settings)
    request.getfixturevalue("remembering")
    forward = model.forward
    for fixed in (None, 160):
        cache = PolicyKVCache(model.config, policy, max_cache_len=fixed)
        RememberedStep.recorded = []
        with captured_decoding(model):
            assert not cache.is_compileable
            assert write(model, ids, cache, 30, **settings).equal(expected)
            once = list(RememberedStep.recorded)
            assert once == ([121, -1] if policy.endless or fixed else [121, -1, 133, -1, 146, -1])
            cache.reset()
            assert write(model, ids, cache, 30, **settings).equal(expected)
        assert int(cache.get_seq_length()) == cache.sequences.n_column == 149
        assert cache.is_compileable == (fixed is not None or policy.endless)
    assert model.forward == forward


def test_steps_that_are_not_recorded(remembering: None) -> None:
    """Chunks, a chunk of one token, one without a position, a first token, a text that goes on in another batch."""
    model = tiny("llama3")
    ids, mask = padded([LONG[0, :12], LONG[1, :4]])
    policy = POLICIES["full"]
    expected = write(model, ids, PolicyKVCache(model.config, policy), 3, attention_mask=mask, prefill_chunk_size=1)
    with captured_decoding(model):
        cache = PolicyKVCache(model.config, policy)
        out = write(model, ids, cache, 3, attention_mask=mask, prefill_chunk_size=1)
        assert out.equal(expected)
        n = len(RememberedStep.recorded)
        with torch.no_grad():
            logits = model(ids[:, :1], past_key_values=cache).logits
        assert len(RememberedStep.recorded) == n
        other = PolicyKVCache(model.config, policy)
        write(model, out, other, 1)
    assert logits.shape[:2] == (2, 1)


def test_what_a_recorded_step_cannot_do(remembering: None) -> None:
    model = tiny.__wrapped__("llama3")  # one of its own: transformers leaves hooks in it

    def step(hook: bool = False, **settings: Any) -> None:
        cache = PolicyKVCache(model.config, POLICIES["full"])
        handle = model.model.layers[1].register_forward_hook(lambda *_: None) if hook else None
        try:
            with captured_decoding(model):
                write(model, PROMPTS, cache, 4, **settings)
        finally:
            if handle is not None:
                handle.remove()

    with pytest.raises(ValueError, match=r"model\.layers\.1 has forward hooks"):
        step(hook=True)
    with pytest.raises(ValueError, match="logits alone, and this model also hidden_states"):
        step(output_hidden_states=True, return_dict_in_generate=True)
    step()  # with the hooks that transformers leaves after that


def test_a_cache_that_is_full_says_so_in_captured_steps(remembering: None) -> None:
    model = tiny("llama3")
    cache = PolicyKVCache(model.config, POLICIES["full"], max_cache_len=30)
    with captured_decoding(model), pytest.raises(ValueError, match="max_cache_len=30"):
        write(model, PROMPTS[:1], cache, 20)


def test_on_a_cpu_nothing_is_recorded() -> None:
    model = tiny("llama3")
    expected = write(model, PROMPTS, PolicyKVCache(model.config, POLICIES["full"]), 5)
    with captured_decoding(model):
        assert write(model, PROMPTS, PolicyKVCache(model.config, POLICIES["full"]), 5).equal(expected)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_whole_steps_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager step's tokens, in memory that grows and in beams; a sampled text; memory comes back with its cache."""
    monkeypatch.setattr("selective_kv.transformers.sequences.ROOM", 12)
    model, policy = bundled(torch.float32), POLICIES[name]
    model.set_attn_implementation(NAME)
    ids, mask = (t.cuda() for t in padded(gpu_prompts()))
    for settings in (dict(num_beams=2), dict(do_sample=True, top_k=20)):
        both = []
        for captured in (False, True):
            torch.manual_seed(1)
            cache = PolicyKVCache(model.config, policy)
            if captured:
                with captured_decoding(model):
                    both.append(write(model, ids, cache, 40, attention_mask=mask, **settings))
            else:
                both.append(write(model, ids, cache, 40, attention_mask=mask, **settings))
        assert both[0].equal(both[1])
    with captured_decoding(model):
        held = []
        for _ in range(3):
            cache = PolicyKVCache(model.config, policy)
            write(model, ids, cache, 10, attention_mask=mask)
            del cache
            gc.collect()
            held.append(torch.cuda.memory_allocated())
    assert held[2] == held[1]


@needs_gpu
@pytest.mark.gpu
def test_a_step_that_looks_at_the_device_is_not_captured() -> None:
    """A cache of one's own, and a model that asks the device: each says so, and the card goes on."""

    class Looking(KVCache):
        def allocate(self, shape: Any) -> None:
            self.rows: list[Any] = [None] * shape.batch

        def update(self, row: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
            held = self.rows[row] or (k[:, :0], v[:, :0])
            self.rows[row] = k, v = tuple(torch.cat(both, 1) for both in zip(held, (k, v), strict=True))
            return k, v, torch.arange(k.shape[1], device=k.device)

    model = bundled(torch.float32)
    model.set_attn_implementation(NAME)
    ids = gpu_prompts()[2][None].cuda()
    with captured_decoding(model), pytest.raises(ValueError, match="a step of Looking cannot be captured"):
        write(model, ids, PolicyKVCache(model.config, Looking(), max_cache_len=400), 4)
    with pytest.MonkeyPatch.context() as patch, captured_decoding(model):
        norm = type(model.model.norm).forward
        patch.setattr(type(model.model.norm), "forward", lambda self, x: norm(self, x + 0 * float(x.max())))
        with pytest.raises(ValueError, match="this model's step cannot be captured"):
            write(model, ids, PolicyKVCache(model.config, POLICIES["full"]), 4)
    write(model, ids, PolicyKVCache(model.config, POLICIES["full"]), 4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_gpu_that_is_not_the_current_one() -> None:
    """Triton launches on the current GPU, and torch.cuda.graph records on that of the process's first capture."""
    model, policy = bundled(torch.float32), POLICIES["selective"]
    model.set_attn_implementation(NAME)
    texts = []
    for device in ("cuda:0", "cuda:1"):
        model.to(device)
        ids, mask = (t.to(device) for t in padded(gpu_prompts()))
        texts.append(write(model, ids, PolicyKVCache(model.config, policy), 40, attention_mask=mask).cpu())
        with captured_decoding(model):
            texts.append(write(model, ids, PolicyKVCache(model.config, policy), 40, attention_mask=mask).cpu())
    assert torch.cuda.current_device() == 0
    assert all(text.equal(texts[0]) for text in texts)
