"""Print, as JSON, which binaries a real run asks Triton for and which `precompile.walk` does. Compiles none.

A process of its own: it needs Triton without its interpreter, and a driver that claims a Hopper GPU.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a program


class Hopper:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


driver.set_active(Hopper())  # type: ignore[arg-type]

import engine.kernels  # noqa: E402
import selective_kv.kernels  # noqa: E402
from selective_kv.kernels import decode_config as triton_plan  # noqa: E402

triton_plan.processor = lambda device: triton_plan.Processor(132, True, 232_448)  # type: ignore[assignment]

from benchmark.gate import gate, gate_runs  # noqa: E402
from common.errors import UserError  # noqa: E402
from engine import Engine, Sampling, chunk_size  # noqa: E402
from engine.fused import use_kernels  # noqa: E402
from engine.kernels.triton_backend import TRITON as STEP  # noqa: E402
from engine.precompile import prompt_parts, walk  # noqa: E402
from kv_cache import ModelCache  # noqa: E402
from model import Config, Transformer  # noqa: E402
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache  # noqa: E402
from selective_kv.kernels.launch import compiling  # noqa: E402

selective_kv.kernels.uses_triton = engine.kernels.uses_triton = lambda device: True
CONFIG = Config(100, 512, 2, 8, 2, 1024, 4096, 64)
POLICIES: list[KVCache] = [FullCache(), SinkWindowCache(4, 16), SelectiveCache(4, 16), SelectiveCache(4, 16, 4, 4)]
GREEDY, CHUNK = Sampling(temperature=0), 128
asked: list[str] = []


def note(*, key: str, fn: Any, **_: Any) -> bool:
    asked.append(f"{fn.name}: {key}")
    return True  # it is there already, says this


@torch.inference_mode()
def compare(policy: KVCache, batch: int, biased: bool = False) -> dict[str, Any]:
    """biased: a model whose keys have a bias, which one of its two layers keeps out of tiles."""
    config = replace(CONFIG, qkv_bias=biased)
    shape = Shape(batch, CONFIG.n_kv_head, CONFIG.head_dim, 400, torch.bfloat16, torch.device("cpu"))
    lengths = [(300, 130, 129, 1, 5)[b % 5] for b in range(batch)]  # 129: a chunk, and a token by itself
    asked.clear()
    with compiling():
        walk(config, policy, shape, GREEDY, prompt_parts(lengths, chunk_size(policy, CONFIG.context, CHUNK)))
    ahead = sorted(set(asked))
    asked.clear()
    model = Transformer(config).to(torch.bfloat16)
    if biased:
        model.layers[0].attention.wqkv.bias.fill_(50)  # type: ignore[union-attr, operator]
    engine = Engine(model, ModelCache(policy, CONFIG.n_layer, shape), GREEDY, prefill_chunk=CHUNK)
    assert engine.step_path == "fused step"
    with compiling():  # on the CPU nothing can be launched, but all that a launch asks for can be seen
        engine.read([[1] * n for n in lengths])
        engine.tokens.zero_()  # nobody wrote what `read` picked
        engine.step()
    return {"ahead": ahead, "run": sorted(set(asked))}


@torch.inference_mode()
def compare_gate(policy: KVCache) -> dict[str, Any]:
    """The gate of a benchmark, batch 8."""
    shape = Shape(8, CONFIG.n_kv_head, CONFIG.head_dim, 1, torch.bfloat16, torch.device("cpu"))
    asked.clear()
    with compiling():
        for run in gate_runs(policy, shape, None):
            walk(CONFIG, run.policy, run.shape, GREEDY, run.parts)
    ahead = sorted(set(asked))
    asked.clear()
    model = Transformer(CONFIG).to(torch.bfloat16)
    use_kernels(model, STEP)
    # What no kernel computes must be finite, or the reference refuses it; and it is not near the reference.
    with ExitStack() as stack:
        for name in ("torch.empty", "torch.empty_like", "torch.Tensor.new_empty"):
            stack.enter_context(patch(name, attrgetter(name.replace("empty", "zeros").removeprefix("torch."))(torch)))
        stack.enter_context(suppress(UserError))
        stack.enter_context(compiling())
        gate(model, policy, shape, STEP)
    return {"ahead": ahead, "run": sorted(set(asked))}


if __name__ == "__main__":
    triton.knobs.runtime.jit_cache_hook = note
    found = {f"{policy} x {batch}": compare(policy, batch) for policy in POLICIES for batch in (1, 8, 32)}
    gates = {str(policy): compare_gate(policy) for policy in POLICIES}
    print(json.dumps(found | {"biased": compare(POLICIES[-1], 1, biased=True), "gates": gates}))
