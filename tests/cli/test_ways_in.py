"""Prompts from pipes, seeds of batches, hints, plans: what a new user tries first."""

from __future__ import annotations

import argparse
import io
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import generate
from benchmark import command as benchmark
from cli import limits
from cli.options import positive
from cli.plan import make_plan
from engine import Engine, Sampling
from evaluation import command as evaluate
from model import CONFIGS
from selective_kv import FullCache, Shape


def run(*argv: object) -> None:
    generate.main([str(word) for word in argv])


def said(capsys: pytest.CaptureFixture[str], main: object, *argv: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in argv])  # type: ignore[operator]
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


class Piped(io.TextIOWrapper):
    """Standard input as a pipe has it; without a file number, as in a notebook."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))


# --- Prompts ----------------------------------------------------------------------------------------


def test_a_prompt_comes_through_a_pipe(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`echo … | generate.py` wrote about something else, exit 0."""
    file = tmp_path / "stdin"
    base = ["--checkpoint_path", tiny, "--max_new_tokens", 3, "--temperature", 0]
    for data, argv, starts in (
        (b"The red fox\n", [], ["The red fox"]),
        ("\ufeffThe red fox\r\n".encode(), [], ["The red fox"]),
        (b"The red fox\n", ["--prompt", "-"], ["The red fox"]),
        (b"The red\nThe quick\n", ["--prompt_file", "-"], ["The red", "The quick"]),
        (b"The red fox\n", ["--prompt", "One"], ["One"]),
        (b"\n", [], ["Once upon a time"]),
        (b"", [], ["Once upon a time"]),
    ):
        file.write_bytes(data)
        with file.open() as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            run(*base, *argv)
        out = capsys.readouterr().out
        assert all(start in out for start in starts) and out.startswith(starts[0]), (data, argv)
    for data, argv, words in (
        (b"\xff", [], "standard input: not UTF-8 at byte 0"),
        (b"", ["--prompt", "-"], "--prompt -: standard input is empty"),
        (b"The", ["--prompt", "-", "--prompt_file", "-"], "can be read once"),
        (b"The", ["--prompt", "-", "--interactive"], "--interactive takes its turns from standard input"),
    ):
        monkeypatch.setattr("sys.stdin", Piped(data))
        assert words in said(capsys, generate.main, *base, *argv)


def test_a_number_is_told_to_be_random_tokens(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told of a conversation's first line too, which is read as text."""
    run("--checkpoint_path", tiny, "--prompt", "12", "--max_new_tokens", 2)
    assert "--prompt 12 is 12 random tokens" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", Piped(b""))
    run("--checkpoint_path", tiny, "--interactive", "--prompt", "12", "--max_new_tokens", 2)
    err = capsys.readouterr().err
    assert "random" not in err and "12 tokens read" not in err


# --- Seeds ------------------------------------------------------------------------------------------


def texts(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    capsys.readouterr()
    run(*argv, "--json")
    return json.loads(capsys.readouterr().out.splitlines()[-1])["texts"]


def test_a_prompt_in_a_batch_gets_the_tokens_it_gets_alone(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the default temperature it did not: one stream of random numbers went through the whole batch."""
    prompts = ["The red fox", "One", "The quiet town and the river"]
    for extra in ([], ["--num_samples", 2], ["--top_p", 0.8, "--top_k", 40]):
        base = ["--checkpoint_path", tiny, "--max_new_tokens", 12, "--ignore_eos", *extra, "quantize_kv"]
        base += ["--sink_size", 2, "--window_size", 4]
        together = texts(capsys, *base, *(word for p in prompts for word in ("--prompt", p)))
        alone = [text for p in prompts for text in texts(capsys, *base, "--prompt", p)]
        assert together == alone and len(set(alone)) == len(alone)


@given(st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_what_is_picked_follows_the_probabilities_and_the_seed(n_prompt: int, samples: int, top: bool) -> None:
    """Against the definition: probabilities over exponential noise, row i with noise i % samples."""
    sampling = Sampling(0.7, top_k=5 if top else 0, top_p=0.8 if top else 1.0, seed=3, samples=samples)
    logits = torch.randn(n_prompt * samples, 11, generator=torch.Generator().manual_seed(n_prompt))
    picked = sampling.pick(logits, torch.Generator().manual_seed(3))
    noise = torch.empty(samples, 11).exponential_(1, generator=torch.Generator().manual_seed(3))
    for i, row in enumerate(logits):
        scores = row / 0.7
        if top:
            scores[scores < scores.topk(5).values[-1]] = float("-inf")
        probs = scores.softmax(-1)
        if top:
            order = probs.argsort(descending=True)
            kept, mass = torch.zeros(11, dtype=torch.bool), 0.0
            for token in order:
                kept[token] = mass <= 0.8
                mass += float(probs[token])
            probs = probs * kept
        assert picked[i] == (probs / noise[i % samples]).argmax()


# --- Hints ------------------------------------------------------------------------------------------


def test_hints_that_help(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main, argv, words in (
        (generate.main, ["-p", "hi"], "flags have two dashes; did you mean --prompt?"),
        (generate.main, ["Once upon a time"], "a text to continue is given as --prompt TEXT"),
        (generate.main, ["--checkpoint_path", "Qwen/Qwen3-0.6B"], "scripts/download.py --repo_id Qwen/Qwen3-0.6B"),
        (generate.main, ["--model", "llama-3.1-8b", "--prompt", "The"], "--random_weights runs it"),
        (benchmark.main, ["--model", "llama-3.1-8b"], "--random_weights runs it"),
        (evaluate.main, ["divergence", "--model", "llama-3.1-8b"], "give --checkpoint_path"),
        (evaluate.main, ["divergence", "--caches", "quantize_kv:bits=4"], "did you mean k_bits=4,v_bits=4?"),
        (evaluate.main, ["divergence", "--caches", "quantize_kv:windw_size=4"], "did you mean window_size?"),
        (evaluate.main, ["divergence", "--context", "9" * 20], "is more than 2,147,483,647"),
    ):
        assert words in said(capsys, main, *argv), argv
    with pytest.raises(SystemExit):
        evaluate.main(["-h"])
    out = " ".join(capsys.readouterr().out.split())
    assert "knobs after a colon" in out and "compress_kv:sink_size=4,window_size=256" in out


def test_numbers_of_many_digits_are_refused_in_a_line() -> None:
    for text in ("0", "00", "-1", "1.5", "", "9" * 20, "9" * 10_000, "2147483648"):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            positive(text)
        assert len(str(caught.value)) < 200
    assert positive("2147483647") == 2**31 - 1


# --- Plans ------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is here")
def test_a_plan_may_be_for_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Refused on a login node, where a plan is of use."""
    base = ["--random_weights", "--model", "llama-3.1-8b", "--prompt", 30000, "--dry_run", "--device", "cuda"]
    run(*base, "--memory_budget", "80GiB", "--json")
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["weights"] == 2 * 8_030_261_248  # bfloat16, as there
    run(*base)
    with pytest.raises(SystemExit):
        run(*base, "--memory_budget", "16GiB")
    assert "the largest context that fits is" in capsys.readouterr().err


def test_a_plan_counts_what_sampling_takes() -> None:
    """Vocabulary 131k, batch 256, top_p 0.9 took 2.5 times what was planned."""
    config = CONFIGS["llama-3.1-8b"]
    shape = Shape(256, config.n_kv_head, config.head_dim, 64, torch.bfloat16, torch.device("meta"))
    greedy, plain, top = (
        make_plan(config, FullCache(), shape, 16, None, sampling).activations
        for sampling in (None, Sampling(0.8), Sampling(0.8, top_p=0.9))
    )
    n_logit = 256 * config.vocab_size
    assert greedy + 12 * n_logit == plain and greedy + 40 * n_logit == top


def groups(tmp_path: Path, path: str, **files: str) -> tuple[Path, Path]:
    proc = tmp_path / "proc"
    proc.write_text(path)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "cgroup", proc


def test_a_control_groups_limit_counts(tmp_path: Path) -> None:
    """Slurm's and Docker's: the machine's free memory was planned with."""
    root, proc = groups(
        tmp_path, "0::/job_1/step_0\n",
        job_1__memory_DOT_max="8000\n", job_1__memory_DOT_current="5000\n",
        job_1__memory_DOT_stat="anon 4000\ninactive_file 700\n",
        job_1__step_0__memory_DOT_max="max\n", job_1__step_0__memory_DOT_current="4000\n",
    )  # fmt: skip
    assert limits.limited_memory(root, proc) == 8000 - 5000 + 700
    (root / "job_1" / "step_0" / "memory.max").write_text("4100\n")
    assert limits.limited_memory(root, proc) == 100
    (root / "job_1" / "memory.current").write_text("9000\n")
    assert limits.limited_memory(root, proc) == 0


def test_version_1_and_a_containers_own_root(tmp_path: Path) -> None:
    root, proc = groups(
        tmp_path, "12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n",
        memory__memory_DOT_limit_in_bytes="6000\n", memory__memory_DOT_usage_in_bytes="1000\n",
        memory__memory_DOT_stat="total_inactive_file 50\n",
    )  # fmt: skip
    assert limits.limited_memory(root, proc) == 5050  # its path is the host's, and not there
    (root / "memory" / "memory.limit_in_bytes").write_text(f"{(1 << 63) - 4096}\n")
    assert limits.limited_memory(root, proc) is None
    assert limits.limited_memory(root, tmp_path / "no such file") is None


def test_an_address_space_that_is_limited_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 62, 1 << 62))
    room = limits.limited_memory(tmp_path, tmp_path / "none")
    assert room is not None and (1 << 62) - (1 << 40) < room < 1 << 62


# --- Conversations ----------------------------------------------------------------------------------


def test_ctrl_c_stops_an_answer_and_not_the_conversation(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, steps = Engine.step, []

    def step(self: Engine) -> None:
        steps.append(0)
        original(self)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)

    base = ["--checkpoint_path", tiny, "--interactive", "--max_new_tokens", 12, "--ignore_eos", "--temperature", 0]
    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr("sys.stdin", io.StringIO("The fox\nThe boat\n"))
    run(*base, "--json", tmp_path / "r.json", "quantize_kv", "--sink_size", 2, "--window_size", 4)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["finished"] and len(report["texts"]) == 2 and report["tokens_written"] == 6 + 12
    assert "(stopped;" in capsys.readouterr().err
