"""What a run took, as lines for people and as JSON. Sizes are bytes, times seconds."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

import kv_cache
from cli.fidelity import fidelity_line
from cli.plan import bytes_read, parameter_bytes
from cli.provenance import device_name
from cli.ranks import peak_of
from common.messages import size
from engine import Engine, Timing
from kv_cache import format_policy
from selective_kv import FullCache, KVCache


def make_report(engine: Engine, name: str, timing: Timing, weight_setting: str = "16") -> dict[str, Any]:
    """What a run took, for JSON. name: the model's; timing: of the run, or of all turns of a conversation.

    Bandwidth counts what a decode step must read: every weight (of the embedding, the rows used) and the
    cache's bytes at the mean length of the run, not its capacity.
    """
    model, cache = engine.model, engine.cache
    lengths = cache.lengths.tolist()
    policy, shape = cache.policy, cache.shape
    weights = bytes_read(model)
    n_layer = model.config.n_layer

    def held(p: KVCache, n: float) -> int:
        at = replace(shape, batch=1, capacity=max(1, int(n)))
        return sum(kv_cache.plan(p, n_layer, at).values())

    n_step = (timing.n_written - timing.n_first) / shape.batch
    read_cache = sum(held(policy, length - n_step / 2) for length in lengths)
    seconds_per_step = timing.decode_seconds / n_step if n_step >= 1 else 0.0
    return {
        "model": name,
        "cache": {"name": policy.name, **asdict(policy)},
        "setting": format_policy(policy),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": device_name(shape.device),
        "path": f"{cache.layers[0].path}, {engine.step_path}",
        "torch": torch.__version__,
        "batch": shape.batch,
        "tokens_read": timing.n_read,
        "tokens_written": timing.n_written,
        "time_to_first_token_s": timing.first_token_seconds,
        "prefill_s": timing.prefill_seconds,
        "decode_s": timing.decode_seconds,
        "decode_tokens_per_s": timing.decode_tokens_per_second,
        "bits_per_element": kv_cache.bits_per_element(policy, shape.head_dim),
        "cache_bytes": cache.nbytes(),
        "full_cache_bytes": sum(kv_cache.plan(FullCache(), n_layer, shape).values()),
        "cache_bytes_held": sum(held(policy, n) for n in lengths),
        "full_cache_bytes_held": sum(held(FullCache(), n) for n in lengths),
        "weights": weight_setting,
        "weight_bytes": parameter_bytes(model),
        "peak_memory_bytes": peak_of(engine),
        "bandwidth_bytes_per_s": (weights + read_cache) / seconds_per_step if seconds_per_step else 0.0,
    }


def rank_lines(parts: list[dict[str, Any]]) -> list[str]:
    """Lines for people with each rank's bytes and their sum. A rank that could not be asked has no numbers."""

    def column(key: str) -> str:
        found = [part.get(key) for part in parts]
        each = ", ".join("?" if n is None else size(n) for n in found)
        return each + f" = {size(sum(n or 0 for n in found))}"

    words = (("peak memory", "peak_memory_bytes"), ("weights", "weight_bytes"), ("cache", "cache_bytes"))
    return [f"{len(parts)} ranks; the figures above are rank 0's"] + [f"  {word} {column(key)}" for word, key in words]


def startup(age: float, loading: float, timing: Timing) -> dict[str, float]:
    """What a report says of the way to the first token. age: of the process when the prompt's reading began;
    loading: seconds of it that went into the weights."""
    return {"load_weights_s": loading, "start_to_first_token_s": age + timing.first_token_seconds}


def report_lines(r: dict[str, Any]) -> list[str]:
    """The report for people."""
    name, _, knobs = r["setting"].partition(":")  # the rare knobs only where they are set
    cache, full = sum(r["cache_bytes"].values()), r["full_cache_bytes"]
    regions = ", ".join(f"{name} {size(n)}" for name, n in r["cache_bytes"].items())
    allocated = f"{size(cache)} allocated ({regions}); the full cache: {size(full)} ({cache / full:.1%})"
    held = f"{size(r['cache_bytes_held'])} held at the end; the full cache: {size(r['full_cache_bytes_held'])}"
    first = f"time to first token {r['time_to_first_token_s']:.3f} s, {r['tokens_read']} tokens read; "
    first += f"{r['start_to_first_token_s']:.2f} s after the program began, {r['load_weights_s']:.2f} loading weights"
    weights = "" if r["weights"] == "16" else f", weights {r['weights']}"
    where = "device" if r["device"] != "cpu" else "process"
    return [
        f"{r['model']}, {r['dtype']} on {r['device']}{weights}; cache {name}"
        + (f" ({knobs.replace('=', ' ').replace(',', ', ')})" if knobs else "")
        + f"; {r['path']}",
        first if r["tokens_written"] else f"no token written, {r['tokens_read']} tokens read",
        f"decode {r['decode_tokens_per_s']:.2f} tokens/s, {r['tokens_written']} tokens written",
        *_saving_lines(r),
        *([f"cache {allocated}", f"cache {held}"] if r["cache_bytes"] else ["cache bytes: this cache does not say"]),
        *fidelity_line(r),
        f"peak memory {size(r['peak_memory_bytes'])} ({where}), weights {size(r['weight_bytes'])} of it; "
        f"bandwidth {r['bandwidth_bytes_per_s'] / 1e9:.2f} GB/s, weights and cache",
        *(rank_lines(r["ranks"]) if "ranks" in r else []),
    ]


def _saving_lines(r: dict[str, Any]) -> list[str]:
    """What a run had from a saved cache, and what it saved."""
    lines = []
    if "load_cache" in r:
        loaded = r["load_cache"]
        lines.append(f"loaded {sum(loaded['tokens'])} tokens from {loaded['file']} in {loaded['seconds']:.2f} s")
    if "save_cache" in r:
        saved = r["save_cache"]
        lines.append(f"saved {size(saved['bytes'])} to {saved['file']} in {saved['seconds']:.2f} s")
    return lines
