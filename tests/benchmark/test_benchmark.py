"""The benchmark: its gate, its figures, and transformers beside us."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import ROOT
from forks import run_forked
from torch import Tensor

from benchmark import attention_kernels, memory, peers
from benchmark import command as benchmark
from benchmark import contestant as contest
from benchmark import gate as gates
from benchmark.rows import no_slower_from
from checkpoint import load_model, open_checkpoint
from cli.plan import make_plan
from common.errors import UserError
from engine.kernels import PYTORCH as STEP
from model import Config, Transformer
from selective_kv import FullCache, KVCache, SelectiveCache, Shape
from selective_kv.kernels import PYTORCH
from selective_kv.kernels import pytorch as eager

CPU = torch.device("cpu")


def run(folder: Path, *more: str) -> list[dict[str, Any]]:
    """The records that a benchmark of a tiny model wrote."""
    if not (folder / "model").exists():
        families.make("llama3", folder / "model")
    out = folder / "out.json"
    quick = ["--rounds", "2", "--device", "cpu", "--json", str(out)]
    quick += [] if "--kernels" in more else ["--steps", "2"]
    benchmark.main(["--checkpoint_path", str(folder / "model"), *quick, *more])
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_peer_is_the_same_model_in_the_same_memory(family: str, tmp_path: Path) -> None:
    families.make(family, tmp_path)
    model = load_model(open_checkpoint(tmp_path), CPU, torch.float32)
    theirs = peers.transformers_model(model)
    assert peers.gate(model, theirs) < 1e-5
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in theirs.parameters()} <= ours


def test_a_peer_with_other_weights_is_refused(tmp_path: Path) -> None:
    families.make("llama3", tmp_path)
    model = load_model(open_checkpoint(tmp_path), CPU, torch.float32)
    theirs = peers.transformers_model(model)
    theirs.model.norm.weight = torch.nn.Parameter(2 * theirs.model.norm.weight)
    with pytest.raises(UserError, match="from ours"):
        peers.gate(model, theirs)


def test_every_cache_and_the_peer_are_timed_at_every_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--context", "80", "60", "--peer", "transformers", "--png", str(tmp_path / "speed.png")]
    (record,) = run(tmp_path, *more)
    names = [r["cache"] for r in record["rows"]]
    assert [r["context"] for r in record["rows"]] == sorted(r["context"] for r in record["rows"])
    for name in ("full", "compress_kv", "quantize_kv", "transformers dynamic", "transformers quantized fp8 8 bit"):
        assert sum(n.startswith(name) for n in names) == 2, name
    full = [r["cache_bytes"] for r in record["rows"] if r["cache"] == "full"]
    assert full == [2 * 3 * 2 * 8 * 4 * n for n in (60, 80)]  # K and V, layers, KV heads, head_dim, float32
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "us per 1,000 tokens" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With neither quantised one there it was a traceback: a plan had nobody to belong to."""
    original = peers.caches
    monkeypatch.setattr(peers, "caches", lambda theirs: dict([*original(theirs).items()][:1]))
    (record,) = run(tmp_path, "--context", "60", "--peer", "transformers", "--caches", "full")
    assert [row["cache"] for row in record["rows"]] == ["full", "transformers dynamic"]


def test_steps_are_timed_one_by_one_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = "quantize_kv:sink_size=4,window_size=8"
    (record,) = run(tmp_path, "--context", "300", "--batch", "3", "--caches", "full", cache, "--each_step", "5")
    for row in record["rows"]:
        assert row["each_step"]["steps"] == 5 and row["each_step"]["longest_over_median"] >= 1
    assert capsys.readouterr().out.count("5 steps one by one: mean") == 2


def test_weights_are_timed_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record for each, of the same steps; where they do not fit together, each cache over all weights."""
    more = ["--context", "60", "70", "--caches", "full", "quantize_kv", "--weights", "16", "int4:group_size=32", "int8"]
    dense, *small = run(tmp_path, *more)
    said = capsys.readouterr()
    assert [r["weights"] for r in small] == ["int4:group_size=32", "int8"] and dense["weights"] == "16"
    for record in (dense, *small):
        assert [(r["cache"], r["context"]) for r in record["rows"]] == [
            (cache, context) for context in (60, 70) for cache in ("full", "quantize_kv:sink_size=16,window_size=32")
        ]
        assert all(r["interleaved"] and r["weights"] == record["weights"] for r in record["rows"])
        assert len(record["slope_us_per_1000_tokens"]) == 2
    assert "window_size=32, weights int8, within" in said.err and "weights int8, batch 1, full:" in said.out
    order: list[str] = []
    original = benchmark.Contestant.round

    def noted(self: benchmark.Contestant, steps: int) -> None:
        order.append(self.name)
        original(self, steps)

    monkeypatch.setattr(benchmark.Contestant, "round", noted)
    monkeypatch.setattr(memory, "together", lambda entries, weights: 1 << 60 if len(entries) > 3 else 0)
    run(tmp_path, *more)
    assert order[:12] == ["full"] * 6 + ["quantize_kv:sink_size=16,window_size=32"] * 6


def test_a_prompt_is_read_and_what_storing_took_is_told(tmp_path: Path) -> None:
    (record,) = run(tmp_path, "--context", "100", "--prefill")
    for row in record["rows"]:
        assert 0 < row["store_s"] < row["prefill_s"]


def test_kernels_alone(tmp_path: Path) -> None:
    (record,) = run(tmp_path, "--kernels", "--context", "100")
    assert {"full", "quantize_kv", "SDPA, packed group"} <= set(record["rows"][0]["ms"])


def test_attention_alone_is_timed_in_every_combination_of_heads() -> None:
    found = attention_kernels.combinations([8, 56], [8], [64, 128])
    assert [(h.n_head, h.n_kv_head, h.head_dim) for h in found] == [(8, 8, 64), (8, 8, 128), (56, 8, 64), (56, 8, 128)]
    with pytest.raises(UserError, match="30 query heads do not divide among 8 KV heads"):
        attention_kernels.combinations([32, 30], [8], [128])


def test_the_largest_batch_fits_and_one_more_does_not(tmp_path: Path) -> None:
    (record,) = run(tmp_path, "--largest_batch", "--context", "200", "--memory_budget", "3MB")
    config = open_checkpoint(tmp_path / "model").config
    policies: list[KVCache] = [FullCache(), SelectiveCache(16, 32)]
    for policy in policies:
        row = next(r for r in record["rows"] if r["cache"].startswith(policy.name))
        shape = Shape(row["batch"], config.n_kv_head, config.head_dim, 204, torch.float32, CPU)
        assert make_plan(config, policy, shape, 1).total <= 3e6
        assert make_plan(config, policy, replace(shape, batch=row["batch"] + 1), 1).total > 3e6
    with pytest.raises(SystemExit):  # it was as many as fit, and the flag was nothing
        run(tmp_path, "--largest_batch", "--batch", "2", "--context", "200", "--memory_budget", "3MB")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), torch.AcceleratorError("CUDA error: out of memory")])
def test_a_plan_that_is_wrong_is_told_and_one_sequence_less_is_tried(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Tight(contest.Contestant):
        def __init__(self, model: Any, policy: KVCache, shape: Shape, context: int) -> None:
            if shape.batch > 7:
                raise error
            super().__init__(model, policy, shape, context)

    monkeypatch.setattr(benchmark, "Contestant", Tight)
    monkeypatch.setattr(benchmark, "largest_batch", lambda *_: 9)
    (record,) = run(tmp_path, "--largest_batch", "--context", "60", "--caches", "full")
    assert [r["batch"] for r in record["rows"]] == [7]
    err = capsys.readouterr().err
    assert "says 9 sequences fit" in err and "says 8 sequences fit" in err


@pytest.mark.parametrize("budget", [0, 10**5, 10**7])
def test_largest_batch_is_the_largest(budget: int) -> None:
    config = Config(97, 48, 2, 6, 2, 80, 256)
    shape = Shape(1, 2, 8, 100, torch.float32, CPU)
    fits = [n for n in range(1, 400) if make_plan(config, FullCache(), replace(shape, batch=n), 1).total <= budget]
    assert memory.largest_batch(config, FullCache(), shape, budget) == max(fits, default=0)


@pytest.mark.parametrize(
    ("ours", "base", "expected"),
    [([1, 2, 3], [1, 2, 3], 10), ([2, 2, 3], [1, 2, 3], 20), ([2, 1, 4], [1, 2, 3], None), ([1, 3, 2], [1, 2, 3], 30)],
)
def test_no_slower_from(ours: list[float], base: list[float], expected: int | None) -> None:
    def rows(steps: list[float]) -> list[dict[str, Any]]:
        return [{"context": 10 * i, "step_ms": ms} for i, ms in enumerate(steps, 1)]

    assert no_slower_from(rows(ours), rows(base)) == expected


def tiny(folder: Path) -> tuple[Transformer, Shape]:
    families.make("llama3", folder)
    return load_model(open_checkpoint(folder), CPU, torch.float32), Shape(1, 2, 8, 1, torch.float32, CPU)


def test_a_wrong_kernel_is_never_timed(tmp_path: Path) -> None:
    model, shape = tiny(tmp_path)
    wrong = replace(PYTORCH, decode_attention=lambda *a: 1.01 * PYTORCH.decode_attention(*a))
    with pytest.raises(UserError, match="from its reference"):
        gates.gate(model, SelectiveCache(4, 8), shape, attention=wrong)


def test_the_gate_goes_past_any_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 200 tokens never left a window of 256, and what reads integers could be as wrong as it liked."""
    model, shape = tiny(tmp_path)
    assert gates.gate(model, SelectiveCache(4, 256), shape) < 1e-5
    right = eager._score_tiles
    monkeypatch.setattr(eager, "_score_tiles", lambda query, keys, n: 2 * right(query, keys, n))
    with pytest.raises(UserError, match="from its reference"):
        gates.gate(model, SelectiveCache(4, 256), shape)


def test_the_gate_looks_at_every_sequence_of_a_batch(tmp_path: Path) -> None:
    model, shape = tiny(tmp_path)

    def wrong(q: Tensor, *rest: Any) -> Tensor:
        out = PYTORCH.decode_attention(q, *rest)
        out[3:4] *= 1.05  # of one sequence in four
        return out

    kernels = replace(PYTORCH, decode_attention=wrong)
    gates.gate(model, SelectiveCache(4, 8), shape, attention=kernels)
    with pytest.raises(UserError, match="batch 4: "):
        gates.gate(model, SelectiveCache(4, 8), replace(shape, batch=4), attention=kernels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
def test_the_gate_looks_at_the_fused_step(tmp_path: Path) -> None:
    """Its products are timed too: a wrong one is refused, though every attention is right."""
    from engine.kernels.triton_backend import TRITON

    model, shape = tiny(tmp_path)
    assert gates.gate(model, SelectiveCache(4, 8), shape, TRITON) < 1e-5
    wrong = replace(TRITON, linear=lambda *a, **k: 1.01 * TRITON.linear(*a, **k))
    with pytest.raises(UserError, match="from its reference"):
        gates.gate(model, SelectiveCache(4, 8), shape, wrong)


def test_the_gate_measures_products_against_float32() -> None:
    """A twin that rounds as often would hide, or double, what a kernel's own rounding is."""
    torch.manual_seed(0)
    x, norm, weight = (torch.randn(*shape).bfloat16() for shape in ((3, 64), (64,), (96, 64)))
    cos, sin = torch.rand(3, 16), torch.rand(3, 16)
    compared = gates.Compared(STEP)
    compared.linear(x, weight, norm=norm, eps=1e-5)
    assert 1e-4 < compared.error < 1e-2
    compared.error = 0.0
    compared.qkv(x, weight, None, norm, 1e-5, cos, sin, 2, 4, (torch.ones(16).bfloat16(),) * 2 + (1e-5,))
    assert 1e-4 < compared.error < 1e-2


def test_peak_memory_is_one_contestants_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants stand side by side; what one takes must not be counted as another's."""
    now, most = 100, 0  # the weights, say

    def take(n: int, n_passing: int = 0) -> None:
        nonlocal now, most
        most = max(most, now + n + n_passing)
        now += n

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: most)

    def reset(*_: object) -> None:
        nonlocal most
        most = now

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    a, b = contest.Peak(torch.device("cuda")), contest.Peak(torch.device("cuda"))
    with a.watch():
        take(30, 5)
    with b.watch():
        take(50)
    with a.watch():
        take(0, 7)
    assert (a.most, b.most) == (37, 50)


@pytest.mark.parametrize(
    "argv",
    [
        ["--random_weights"],
        ["--kernels", "--peer", "transformers"],
        ["--largest_batch", "--prefill"],
        ["--kernels", "--batch", "2"],
        ["--caches", "quantise_kv"],
        ["--largest_batch", "--memory_budget", "1kB"],
        ["--context", "0"],
        ["--caches", "full", "quantize_kv", "quantize_kv:sink_size=16"],
        ["--caches", "quantize_kv:k_bits=5"],
        ["--memory_budget", "1GiB"],
        ["--weights", "int8", "16", "int8"],
        ["--weights", "int8", "16", "--peer", "transformers"],
        ["--kernels", "--steps", "3"],
        ["--kernels", "--dtype", "float32"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.make("llama3", tmp_path / "model")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, *argv)
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("gate:")]
    assert exit_.value.code == 2 and len(err) == 1 and not (tmp_path / "out.json").exists()


def test_a_cache_of_ones_own_is_filled_through_its_update(tmp_path: Path) -> None:
    """README's own example was refused: "only caches with regions can be filled"."""
    code = re.search(r"```python\n(# my_cache.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "my_cache.py").write_text(code[1])
    argv = ["--plugin", tmp_path / "my_cache.py", "--caches", "full", "strided_kv:stride=2", "--context", 40]
    argv += ["--rounds", 2, "--steps", 2, "--json", tmp_path / "r.json"]
    command = ("python", "scripts/benchmark.py", *map(str, argv))
    done = run_forked(command, tmp_path / "said.txt")  # in a fork: the class stays known where it is loaded
    assert done.returncode == 0, done.stdout
    full, mine = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert mine["cache"] == "strided_kv:stride=2" and mine["step_ms"] > 0 and mine["cache_bytes"] is None
    assert full["cache_bytes"] > 0 and "not told" in done.stdout


def test_caches_that_do_not_fit_together_are_timed_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 x 30,000 tokens ended in CUDA's out-of-memory traceback."""
    argv = ["--context", "60", "--caches", "full", "quantize_kv:sink_size=2,window_size=8"]
    (record,) = run(tmp_path, *argv)
    assert all(row["interleaved"] for row in record["rows"])
    alive, most = 0, 0
    original = benchmark.Contestant.__init__

    def counted(self: benchmark.Contestant, *args: object) -> None:
        nonlocal alive, most
        original(self, *args)  # type: ignore[arg-type]
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(self, forget)

    def forget() -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(benchmark.Contestant, "__init__", counted)
    monkeypatch.setattr(memory, "together", lambda *_: 1 << 60)
    *_, record = run(tmp_path, *argv)
    assert not any(row["interleaved"] for row in record["rows"]) and most == 1
    assert "one after the other" in capsys.readouterr().err
    monkeypatch.setattr(benchmark, "free_memory", lambda device, ranks: 1 << 10)
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, *argv)
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.count("\n") == 1 and "full, 1 x 60 tokens:" in err and "are free" in err


def test_just_the_shapes_that_are_asked_for(tmp_path: Path) -> None:
    """Every batch at every context was more than a card holds, where a table wants one long and one wide shape."""
    (record,) = run(tmp_path, "--shapes", "3x40", "1x90", "1x60", "--caches", "full")
    assert [(r["batch"], r["context"]) for r in record["rows"]] == [(3, 40), (1, 90), (1, 60)]
    assert list(record["slope_us_per_1000_tokens"]) == ["full batch 1"]
    for argv in (["--batch", "1"], ["--context", "9"], ["--largest_batch"]):
        with pytest.raises(SystemExit):
            benchmark.main(["--shapes", "1x8", *argv])


def test_the_gate_takes_the_first_and_the_last_layer(tmp_path: Path) -> None:
    model, _ = tiny(tmp_path)
    short = gates.shallow(model, 2)
    assert [*short.layers] == [model.layers[0], model.layers[-1]] and short.config.n_layer == 2
    assert [*gates.shallow(model, 99).layers] == [*model.layers] and len(model.layers) == model.config.n_layer
    assert [*gates.shallow(model, 1).layers] == [model.layers[0]]


def test_a_picture_under_another_name_than_was_asked_for_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """speed.docx was drawn as speed.png, and /dev/full as /dev/full.png."""
    for name in ("speed.docx", "speed", "speed.v1"):
        with pytest.raises(SystemExit) as exit_:
            run(tmp_path, "--context", "60", "--png", str(tmp_path / name))
        assert exit_.value.code == 2 and "must end in .png" in capsys.readouterr().err
    assert not list(tmp_path.glob("speed*"))
