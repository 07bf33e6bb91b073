"""On a CUDA device: the captured step, the kernels behind it, and the command line's default there."""

from __future__ import annotations

import functools
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, STORIES, needs

from benchmark import command as benchmark
from benchmark import gate as gates
from checkpoint import load_model, open_checkpoint
from engine import Engine, FusedStep, Sampling
from engine.precompile import Run, compiled_ahead, prompt_parts
from generate import main as generate_main
from kv_cache import ModelCache
from model import Config, Transformer
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
POLICIES: list[KVCache] = [FullCache(), SelectiveCache(4, 16), SinkWindowCache(4, 16), SelectiveCache(0, 1)]


def generate(
    policy: KVCache, prompts: list[list[int]], n: int, path: str = "captured", **options: int
) -> list[list[int]]:
    checkpoint = open_checkpoint(None, "llama-3.2-1b")
    config = checkpoint.config
    shape = Shape(len(prompts), config.n_kv_head, config.head_dim, 400, torch.bfloat16, CUDA)
    cache = ModelCache(policy, config.n_layer, shape)
    if path == "reference":
        for layer in cache.layers:
            layer.use_reference()
    engine = Engine(small_model(), cache, Sampling(temperature=0), capture=path == "captured", **options)
    assert engine.to_capture == (path == "captured")
    rows = [[t for t in row if t is not None] for row in engine.generate(prompts, n)]
    assert (engine.graph is not None) == (path == "captured")
    return rows


@functools.cache
def small_model() -> Transformer:
    return load_model(open_checkpoint(None, "llama-3.2-1b"), CUDA, torch.bfloat16, random_weights=True)


PROMPTS = [list(range(5, 5 + n)) for n in (1, 3, 40, 129)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_captured_step_writes_what_the_eager_step_writes(policy: KVCache) -> None:
    assert generate(policy, PROMPTS, 60) == generate(policy, PROMPTS, 60, "eager")


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_kernels_agree_with_the_reference(policy: KVCache) -> None:
    """Attention by attention, on the q, k and v of a model: what `gate` allows before anything is timed."""
    config = open_checkpoint(None, "llama-3.2-1b").config
    shape = Shape(1, config.n_kv_head, config.head_dim, gates.GATE_TOKENS, torch.bfloat16, CUDA)
    gates.gate(small_model(), policy, shape)


def test_the_host_may_run_ahead_and_an_end_token_still_ends() -> None:
    rows = generate(FullCache(), [PROMPTS[2]], 30)
    end = rows[10][0]
    first = next(i for i, row in enumerate(rows) if row[0] == end)
    checkpoint = open_checkpoint(None, "llama-3.2-1b")
    config = checkpoint.config
    shape = Shape(1, config.n_kv_head, config.head_dim, 400, torch.bfloat16, CUDA)
    for lag in (0, 1, 5):
        cache = ModelCache(FullCache(), config.n_layer, shape)
        engine = Engine(small_model(), cache, Sampling(temperature=0), frozenset({end}), lag=lag)
        assert [row[0] for row in engine.generate([PROMPTS[2]], 30)] == [r[0] for r in rows[: first + 1]]


def test_sampling_in_a_captured_step_is_seeded() -> None:
    checkpoint = open_checkpoint(None, "llama-3.2-1b")
    config = checkpoint.config
    shape = Shape(2, config.n_kv_head, config.head_dim, 100, torch.bfloat16, CUDA)
    texts = []
    for seed in (1, 1, 2):
        cache = ModelCache(FullCache(), config.n_layer, shape)
        engine = Engine(small_model(), cache, Sampling(1.0, top_k=50, top_p=0.9, seed=seed))
        runs = []
        for _ in range(2):
            runs.append(list(engine.generate(PROMPTS[:2], 20)))
            engine.reset()
        assert runs[0] == runs[1]
        texts.append(runs[0])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("policy", [FullCache(), SelectiveCache(4, 16)], ids=str)
def test_a_decode_step_takes_no_memory_and_waits_for_nothing(policy: KVCache) -> None:
    checkpoint = open_checkpoint(None, "llama-3.2-1b")
    config = checkpoint.config
    shape = Shape(1, config.n_kv_head, config.head_dim, 400, torch.bfloat16, CUDA)
    engine = Engine(small_model(), ModelCache(policy, config.n_layer, shape), Sampling(0))
    engine.read([PROMPTS[2]])
    engine.step()  # the first one is captured
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")  # raises on any operation that waits
    try:
        for _ in range(20):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


@needs(STORIES)
@pytest.mark.parametrize("policy", [FullCache(), SelectiveCache(4, 300), SinkWindowCache(4, 300)], ids=str)
def test_stories260k_writes_the_golden_ids(policy: KVCache) -> None:
    golden = json.loads((STORIES / "golden.json").read_text())["greedy_ids"]
    checkpoint = open_checkpoint(STORIES, None)
    model = load_model(checkpoint, CUDA, torch.float32)
    shape = Shape(2, 4, 8, len(golden) + 30, torch.float32, CUDA)
    engine = Engine(model, ModelCache(policy, checkpoint.config.n_layer, shape), Sampling(temperature=0))
    rows = list(engine.generate([golden[:1], golden[:30]], len(golden) - 1))
    assert [golden[0], *(row[0] for row in rows)] == golden
    assert [*golden[:30], *(row[1] for row in rows)][: len(golden)] == golden


COMPILED_AHEAD = {"full": FullCache(), "4 bits": SelectiveCache(4, 16, 4, 4)}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", COMPILED_AHEAD)
def test_after_compiling_ahead_a_run_compiles_nothing(name: str, batch: int) -> None:
    """In a process of its own: where an earlier test had compiled the kernels, nothing was compiled ahead, and whether
    one had was a matter of the card and of the tests' order."""
    folders = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)]
    code = f"import sys; sys.path[:0] = {folders}; import test_gpu; test_gpu.compile_ahead_and_run({name!r}, {batch})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def compile_ahead_and_run(name: str, batch: int) -> None:
    import triton

    policy = COMPILED_AHEAD[name]
    config = Config(1000, 384 + 128 * batch, 2, 8, 2, 1024, 4096, 64)
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model.materialize(CUDA).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    device = torch.device("cuda", torch.cuda.current_device())
    shape = Shape(batch, config.n_kv_head, config.head_dim, 400, torch.bfloat16, device)
    greedy, compiled = Sampling(temperature=0), []
    triton.knobs.runtime.jit_post_compile_hook = lambda **it: compiled.append(it["fn"].name)
    with compiled_ahead(config, [Run(policy, shape, prompt_parts([300] * batch, 128))], greedy):
        pass
    assert compiled
    compiled.clear()
    engine = Engine(model, ModelCache(policy, config.n_layer, shape), greedy, prefill_chunk=128)
    assert len(list(engine.generate([list(range(300))] * batch, 5))) == 5
    assert engine.graph is not None
    assert compiled == [], compiled


@pytest.mark.parametrize("more", [[], ["--first_token"]], ids=str)
def test_a_benchmark_compiles_ahead_what_its_gate_and_its_caches_launch(more: list[str]) -> None:
    """One after the other, kernels of nine caches took longer than all that was timed."""
    folders = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)]
    code = f"import sys; sys.path[:0] = {folders}; import test_gpu; test_gpu.benchmark_and_tell({more})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert compiled["ahead"] > 20 and compiled["late"] == []


def benchmark_and_tell(more: list[str]) -> None:
    import triton

    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **it: compiled.append(
        (threading.current_thread().name, it["fn"].name)
    )
    caches = ["full", "quantize_kv", "quantize_kv:k_bits=4,v_bits=4", "compress_kv"]
    argv = ["--random_weights", "--model", "llama-3.2-1b", "--batch", "1", "3", "--context", "2500", "--rounds", "1"]
    benchmark.main([*argv, "--caches", *caches, *more])
    late = [name for thread, name in compiled if thread == "MainThread"]
    print(json.dumps({"ahead": len(compiled) - len(late), "late": late}))


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 200}, {"top_k": 200, "top_p": 0.9}], ids=str)
def test_the_plan_holds_what_sampling_takes(options: dict[str, Any]) -> None:
    """Vocabulary 131k, batch 256, top_p 0.9 took 2.5 times what was planned."""
    batch, n_vocab = 128, 1 << 17
    sampling, generator = Sampling(0.8, **options), torch.Generator("cuda").manual_seed(0)
    sampling.pick(torch.randn(2, n_vocab, device="cuda", dtype=torch.bfloat16), generator)  # workspaces
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logits = torch.randn(batch, n_vocab, device="cuda", dtype=torch.bfloat16)
    sampling.pick(logits, generator)
    taken = (torch.cuda.max_memory_allocated() - before) / logits.numel()
    print(f"{options}: {taken:.1f} bytes a logit, {sampling.bytes_per_logit} planned")
    assert 0.4 * sampling.bytes_per_logit < taken <= sampling.bytes_per_logit


@pytest.mark.parametrize("samples", [1, 2])
def test_a_prompt_in_a_batch_gets_the_random_numbers_it_gets_alone(samples: int) -> None:
    """In the captured graph, step after step."""
    logits = torch.randn(3 * samples, 1000, device="cuda")
    alone = Sampling(1.0, seed=5, samples=samples)
    picked: list[list[list[int]]] = []
    for rows in (logits, *logits.split(samples)):
        generator = torch.Generator("cuda").manual_seed(5)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            out = alone.pick(rows, generator)
        generator.manual_seed(5)
        steps = []
        for _ in range(4):
            graph.replay()
            steps.append(out.tolist())
        picked.append(steps)
    together, apart = picked[0], picked[1:]
    assert together == [[token for steps in apart for token in steps[i]] for i in range(4)]
    assert len({tuple(step) for step in together}) > 1


def test_a_capture_survives_the_garbage_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector ended an earlier engine's graph amid the capture of the next, which then failed."""
    step = FusedStep.__call__

    def littering(self: FusedStep, tokens: torch.Tensor, cache: ModelCache) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(1)
            _ = [[] for _ in range(100)]  # type: ignore[var-annotated]
            gc.set_threshold(10**6)
        return step(self, tokens, cache)

    before = gc.get_threshold()
    monkeypatch.setattr(FusedStep, "__call__", littering)
    try:
        gc.collect()
        gc.set_threshold(10**6)
        generate(POLICIES[0], PROMPTS[:1], 4)  # its engine refers to itself
        assert len(generate(POLICIES[0], PROMPTS[:1], 4)) == 4
    finally:
        gc.set_threshold(*before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_gpu_writes_what_the_first_does(capfd: pytest.CaptureFixture[str]) -> None:
    """The kernels, the graph and its events once went to the first device whatever --device said; so did a second
    graph, to that of the process's first one.
    """
    texts = []
    try:
        for device in ("cuda:0", "cuda:1"):
            generate_main(["--device", device, "--temperature", "0", "--max_new_tokens", "40", "quantize_kv"])
            texts.append(capfd.readouterr().out)
    finally:
        torch.cuda.set_device(0)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "more", [["--prefill"], ["--peer", "transformers"], ["--largest_batch", "--memory_budget", "6GiB"], ["--kernels"]]
)
def test_the_benchmark_in_every_mode(more: list[str], tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    argv = ["--random_weights", "--model", "llama-3.2-1b", "--device", "cuda", "--context", "2000", "--rounds", "2"]
    caches = [] if "--kernels" in more else ["--steps", "4", "--caches", "full", "quantize_kv"]
    benchmark.main([*argv, *caches, *more, "--json", str(out)])
    rows = {r.get("cache", r.get("version")): r for r in json.loads(out.read_text())["rows"]}
    if "--kernels" not in more:
        assert rows["full"]["peak_memory_bytes"] > rows["full"]["cache_bytes"] + 2 * 1.2e9
    if "--prefill" in more:
        assert all(0 < r["store_s"] < r["prefill_s"] for r in rows.values())
    if "--peer" in more:
        assert rows["transformers dynamic"]["cache_bytes"] >= rows["full"]["cache_bytes"]
    if "--largest_batch" in more:
        assert rows["quantize_kv:sink_size=16,window_size=32"]["batch"] > 1.6 * rows["full"]["batch"]
