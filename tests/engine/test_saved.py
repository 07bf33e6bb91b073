"""A cache in a file: the run that starts from it goes on as the one that wrote it, to the bit, and takes no other."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from common import tensor_file
from common.errors import UserError
from engine import Engine, Sampling
from engine.saved import KIND, SavedCache, Talk, require_saveable, save_cache
from kv_cache import ModelCache
from model import Config, Transformer
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

CONFIG = Config(97, 64, 2, 2, 1, 48, 512, head_dim=64)  # 4 bits want 64
CPU = torch.device("cpu")
POLICIES = [
    FullCache(),
    SelectiveCache(sink_size=3, window_size=12),
    SelectiveCache(sink_size=0, window_size=1, k_bits=4, v_bits=4),
    SinkWindowCache(sink_size=3, window_size=12),
]


def new_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(CONFIG).eval()
    for p in model.parameters():
        torch.nn.init.ones_(p) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.3)
    return model


MODEL = new_model()


def shape(capacity: int = 400, batch: int = 1, dtype: torch.dtype = torch.float32) -> Shape:
    return Shape(batch, CONFIG.n_kv_head, CONFIG.head_dim, capacity, dtype, CPU)


def engine_of(policy: KVCache, capacity: int = 400, batch: int = 1, seed: int = 5) -> Engine:
    return Engine(MODEL, ModelCache(policy, CONFIG.n_layer, shape(capacity, batch)), Sampling(1.0, seed=seed))


def text(n: int, seed: int = 1) -> list[int]:
    return torch.randint(97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def written(engine: Engine, prompts: list[list[int]], n: int = 8) -> list[list[int | None]]:
    return list(engine.generate(prompts, n))


def loaded(path: Path, policy: KVCache, prompts: list[list[int]], capacity: int = 400) -> tuple[Engine, list[int]]:
    saved = SavedCache(path)
    saved.require(CONFIG, policy, shape(capacity, len(prompts)))
    kept = saved.kept(prompts, policy, shape(capacity, len(prompts)))
    engine = engine_of(policy, capacity, len(prompts))
    saved.load(engine, kept)
    return engine, kept


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("n_token", [1, 5, 15, 16, 150, 300])
def test_the_same_prompt_goes_on_to_the_bit(policy: KVCache, n_token: int, tmp_path: Path) -> None:
    """Sampled tokens and all logits, nothing read; also where the other cache is larger, or just large enough."""
    prompt, file = text(n_token), tmp_path / "cache.safetensors"
    first = engine_of(policy)
    first.read([prompt])
    save_cache(file, first, [prompt])
    first.reset()
    want = written(first, [prompt])
    for capacity in (400, 500, n_token + 8):
        second, kept = loaded(file, policy, [prompt], capacity)
        assert kept == [n_token]
        assert written(second, [[]]) == want
        assert second.timing.n_read == 0
        assert torch.equal(second.logits, first.logits)


@given(
    policy=st.sampled_from(POLICIES),
    lengths=st.lists(st.integers(1, 180), min_size=1, max_size=3),
    more=st.integers(1, 40),
    capacity=st.integers(230, 300),
)
def test_a_longer_prompt_goes_on_as_in_memory(
    tmp_path_factory: pytest.TempPathFactory, policy: KVCache, lengths: list[int], more: int, capacity: int
) -> None:
    """Batches of different lengths; the rest of each prompt is read after what was saved, as if it had stayed there."""
    file = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    prompts = [text(n, seed) for seed, n in enumerate(lengths)]
    longer = [prompt + text(more, 9) for prompt in prompts]
    stays = engine_of(policy, 230, len(prompts))
    stays.read(prompts)
    save_cache(file, stays, prompts)
    stays.generator.manual_seed(5)
    want = written(stays, [text(more, 9)] * len(prompts))
    goes_on, kept = loaded(file, policy, longer, capacity)
    assert kept == lengths
    assert written(goes_on, [text(more, 9)] * len(prompts)) == want
    assert torch.equal(goes_on.logits, stays.logits)


def test_a_prompt_that_parts_earlier(tmp_path: Path) -> None:
    """The full cache goes back to where it parts; the others do while they have forgotten nothing, and then not."""
    prompt, file = text(200), tmp_path / "cache.safetensors"
    for policy, n_saved, at, want in (
        (FullCache(), 200, 120, 120),
        (SelectiveCache(sink_size=3, window_size=12), 200, 120, 0),
        (SelectiveCache(sink_size=3, window_size=12), 15, 9, 9),
        (SinkWindowCache(sink_size=3, window_size=12), 16, 15, 0),
        (SinkWindowCache(sink_size=3, window_size=12), 15, 0, 0),
    ):
        first = engine_of(policy)
        first.read([prompt[:n_saved]])
        save_cache(file, first, [prompt[:n_saved]])
        other = [*prompt[:at], (prompt[at] + 1) % 97, 4, 5]
        second, kept = loaded(file, policy, [other], 150)  # less than what was saved
        assert kept == [want]
        fresh = engine_of(policy, 150)
        if want:
            fresh.read([other[:want]])
            fresh.generator.manual_seed(5)
        assert written(second, [other[want:]]) == written(fresh, [other[want:]])
    # a beginning of it: its last token is read again, for the logits after it
    first = engine_of(FullCache())
    first.read([prompt])
    save_cache(file, first, [prompt])
    assert SavedCache(file).kept([prompt[:50]], FullCache(), shape()) == [49]


def test_a_conversation_has_no_logits(tmp_path: Path) -> None:
    prompt, file = text(20), tmp_path / "cache.safetensors"
    engine = engine_of(FullCache())
    engine.read([prompt])
    talk = Talk((7,), ({"role": "user", "content": "hi"},), "[user] hi", "and")
    save_cache(file, engine, [prompt], talk)
    saved = SavedCache(file)
    assert saved.talk == talk and saved.tokens == [prompt]
    assert saved.kept([prompt], FullCache(), shape()) == [19]


def saved_file(folder: Path) -> Path:
    engine, file = engine_of(POLICIES[1]), folder / "cache.safetensors"
    engine.read([text(150)])
    save_cache(file, engine, [text(150)])
    return file


def test_the_library_reads_it(tmp_path: Path) -> None:
    with safe_open(saved_file(tmp_path), "pt") as file:
        assert file.get_tensor("sequences.0.tokens").tolist() == text(150)
        record = json.loads(file.metadata()[KIND])
    assert record["cache"]["window_size"] == 12 and record["model"]["vocab_size"] == 97


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config": dataclasses.replace(CONFIG, rope_theta=5.0)},
            "another model: rope_theta is 10000.0 there, 5.0 here",
        ),
        ({"policy": FullCache()}, "another cache: name is quantize_kv there, full here"),
        ({"policy": SelectiveCache(3, 12, k_bits=4)}, "another cache: k_bits is 8 there, 4 here"),
        ({"shape": shape(dtype=torch.bfloat16)}, "another dtype: float32 there, bfloat16 here"),
        ({"shape": shape(batch=3)}, "it holds 1 sequence, and the run has 3"),
    ],
)
def test_what_it_does_not_belong_to(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved = SavedCache(saved_file(tmp_path))
    with pytest.raises(UserError, match=message):
        saved.require(**{"config": CONFIG, "policy": POLICIES[1], "shape": shape(), **change})


def test_other_weights(tmp_path: Path) -> None:
    """Even where one element of one matrix differs, or two have changed places."""
    saved = SavedCache(saved_file(tmp_path))
    for change in ("one", "swapped"):
        model = new_model()
        with torch.no_grad():
            w = model.layers[1].feed_forward.w2.weight.view(-1)
            if change == "one":
                w[77] += 1e-3
            else:
                w[:2] = w[:2].flip(0)
        engine = engine_of(POLICIES[1])
        engine.model = model
        with pytest.raises(UserError, match="of other weights"):
            saved.load(engine, [150])


def test_damage_is_found(tmp_path: Path) -> None:
    """A byte changed anywhere, a file cut short, a file of something else."""
    file = saved_file(tmp_path)
    whole = file.read_bytes()
    n_header = 8 + int.from_bytes(whole[:8], "little")
    places = [3, 9, n_header // 2, n_header - 40, n_header + 1, n_header + 700, len(whole) // 2, len(whole) - 1]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 4
        file.write_bytes(changed)
        with pytest.raises(UserError) as error:
            loaded(file, POLICIES[1], [text(150)])
        assert "\n" not in str(error.value) and str(file) in str(error.value)
    for n in (0, 5, n_header - 1, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(UserError, match="cut short"):
            SavedCache(file)
    save_file({"a": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="not a saved cache"):
        SavedCache(file)
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "not a file")):
        with pytest.raises(UserError, match=message):
            SavedCache(path)


def test_a_run_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved_file(tmp_path)
    whole, calls = file.read_bytes(), []

    def full_disk(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tensor_file, "_write_at", full_disk)
    with pytest.raises(UserError, match="No space left"):
        saved_file(tmp_path)
    assert file.read_bytes() == whole and list(tmp_path.iterdir()) == [file]


@dataclass
class Mine(KVCache):
    """A cache of a user's own, which says nothing of what it holds."""

    name: ClassVar[str] = ""


@dataclass
class Changed(FullCache):
    """Derived from one that does, and maybe holding more."""

    name: ClassVar[str] = ""


@pytest.mark.parametrize("policy", [Mine(), Changed()])
def test_a_cache_of_ones_own_is_refused(policy: KVCache) -> None:
    with pytest.raises(UserError, match="does not say what it holds"):
        require_saveable(policy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_on_a_gpu_to_the_bit(policy: KVCache, tmp_path: Path) -> None:
    """With the captured step: the same prompt, and a longer one after what was saved."""
    device = torch.device("cuda", 0)
    model = new_model().to(device, torch.bfloat16)
    at = dataclasses.replace(shape(700, dtype=torch.bfloat16), device=device)

    def new_engine() -> Engine:
        return Engine(model, ModelCache(policy, CONFIG.n_layer, at), Sampling(1.0, seed=5))

    prompt, more, file = text(600), text(40, 9), tmp_path / "cache.safetensors"
    first = new_engine()
    first.read([prompt])
    save_cache(file, first, [prompt])
    first.reset()
    want = written(first, [prompt])
    first.reset()
    first.read([prompt])
    first.generator.manual_seed(5)
    want_more = written(first, [more])
    for rest, wanted in (([], want), (more, want_more)):
        second = new_engine()
        SavedCache(file).load(second, [600])
        assert written(second, [rest]) == wanted
