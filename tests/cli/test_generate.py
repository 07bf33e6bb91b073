"""generate.py as its users call it: the caches, the outputs, the mistakes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STORIES, needs, write_checkpoint
from forks import Forked
from safetensors.torch import load_file, save_file

import cli.ranks
import generate
from checkpoint import load_model, open_checkpoint
from checkpoint.tokenizer_files import load_tokenizer
from cli import run
from common.errors import UserError
from engine import Engine, Sampling
from kv_cache import ModelCache
from selective_kv import FullCache, Shape

QUANTIZE = ["quantize_kv", "--sink_size", "4", "--window_size", "8"]
COMPRESS = ["compress_kv", "--sink_size", "4", "--window_size", "8"]


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, dict[str, object], str]:
    """Run generate.main: the text on stdout, the JSON report, and stderr."""
    generate.main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    text, _, last = out.rstrip("\n").rpartition("\n")
    return text, json.loads(last), err


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistake gets; exit code 2 and nothing on stdout."""
    with pytest.raises(SystemExit) as exit_:
        generate.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("generate.py: error: "), err
    return err


def test_options_in_any_order_mean_the_same(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published commands put --max_new_tokens and --device after the subcommand's own flags."""
    common = [
        "--checkpoint_path",
        tiny,
        "--prompt",
        "The red fox",
        "--max_new_tokens",
        "20",
        "--device",
        "cpu",
    ]
    texts = []
    parts = [common[:4], common[4:6], common[6:], QUANTIZE[1:3], QUANTIZE[3:]]
    for seed in range(6):
        order = random.Random(seed).sample(parts, len(parts))
        for at in (0, 2, 5):
            argv = [*chain(*order[:at]), "quantize_kv", *chain(*order[at:])]
            text, report, _ = call(capsys, *argv)
            assert report["cache"].items() >= {"name": "quantize_kv", "sink_size": 4, "window_size": 8}.items()
            texts.append(text)
    assert len(set(texts)) == 1


def test_json_before_the_subcommand_and_into_a_file(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json quantize_kv` must not write a file of that name."""
    base = ["--checkpoint_path", str(tiny), "--prompt", "The", "--max_new_tokens", "3"]
    generate.main([*base, "--json", *QUANTIZE])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cache"]["name"] == "quantize_kv"
    generate.main([*base, "--json", str(tmp_path / "new" / "r.json")])
    assert json.loads((tmp_path / "new" / "r.json").read_text())["tokens_written"] == 3
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["r.json"]


def test_the_report_and_the_text_go_apart(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--checkpoint_path", str(tiny), "--prompt", "The old clock", "--max_new_tokens", "5"])
    out, err = capsys.readouterr()
    assert out.startswith("The old clock") and out.endswith("\n")
    assert "tokens/s" in err and "time to first token" in err and "peak memory" in err


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when a process began")
def test_the_report_counts_from_the_start_of_the_process(tiny: Path) -> None:
    """Python's own start, the imports and the weights are in it, and nothing that comes after the first token."""
    began = time.monotonic()
    argv = ["--checkpoint_path", tiny, "--prompt", "The", "--max_new_tokens", 3, "--json"]
    run = subprocess.run([sys.executable, ROOT / "generate.py", *map(str, argv)], capture_output=True, text=True)
    whole = time.monotonic() - began
    report = json.loads(run.stdout.splitlines()[-1])
    assert 0.5 < report["start_to_first_token_s"] < whole + 0.1
    assert 0 < report["load_weights_s"] < report["start_to_first_token_s"] - report["time_to_first_token_s"]


def test_sampling_is_seeded_and_greedy_is_the_likeliest(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint_path", tiny, "--prompt", "The", "--max_new_tokens", 12, "--ignore_eos"]
    a, b, c = (call(capsys, *base, "--seed", s)[0] for s in (1, 1, 2))
    assert a == b != c
    greedy = call(capsys, *base, "--temperature", 0)[0]
    assert greedy == call(capsys, *base, "--top_k", 1, "--seed", 5)[0]
    assert greedy == call(capsys, *base, "--top_p", 1e-6, "--seed", 6)[0]


def test_a_ragged_batch_writes_what_each_prompt_writes_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["The red fox jumped over the river, and then it went home", "The", "A small boat", "Old stone"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts[2:]) + "\n\n")
    for cache in ([], QUANTIZE, COMPRESS):
        base = ["--checkpoint_path", tiny, "--max_new_tokens", 24, "--temperature", 0, *cache]
        _, report, _ = call(capsys, *base, "--prompt", prompts[0], "--prompt", prompts[1], "--prompt_file", file)
        alone = [call(capsys, *base, "--prompt", p)[1]["texts"][0] for p in prompts]  # type: ignore[index]
        assert report["texts"] == alone
        assert report["batch"] == 4


def test_num_samples_and_order_on_stdout(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint_path", tiny, "--prompt", "The", "--prompt", "One", "--num_samples", 2]
    text, report, _ = call(capsys, *base, "--max_new_tokens", 6, "--no-echo")
    assert text == "\n".join(report["texts"])  # type: ignore[arg-type]
    assert report["batch"] == 4 and report["tokens_written"] <= 24


def test_an_integer_is_a_synthetic_prompt(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report, _ = call(capsys, "--checkpoint_path", tiny, "--prompt", 100, "--max_new_tokens", 4)
    assert report["tokens_read"] == 100


def test_random_weights_need_no_checkpoint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ranks, "device_memory", lambda device: 20 << 30)
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--random_weights", "--prompt", "8"])
    assert exit_.value.code == 2
    assert "--random_weights needs --model" in capsys.readouterr().err
    generate.main(["--random_weights", "--model", "llama-3.1-8b", "--prompt", "8", "--dry_run", "--dtype", "bfloat16"])
    out = capsys.readouterr().out
    assert "weights" in out and "14.96 GiB" in out  # 8.03e9 parameters of 2 bytes


def test_end_tokens_end_a_sequence_and_ignore_eos_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3 has several end tokens: every id in the list ends a sequence."""
    folder = write_checkpoint(tmp_path / "c")
    base = ["--checkpoint_path", folder, "--prompt", "The red", "--max_new_tokens", 30, "--temperature", 0]
    generate.main([*map(str, base), "--ignore_eos", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["tokens_written"] == 30
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = [2, *range(3, 320)]
    (folder / "config.json").write_text(json.dumps(config))
    _, report, _ = call(capsys, *base)
    assert report["tokens_written"] == 1
    assert report["texts"] == [""]


def test_a_conversation_stays_in_the_cache(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn reads only its own tokens, and the tokens are those of one long run over the same text."""
    lines = ["The red fox jumped over the river", "and the old clock looked", "One"]
    read: list[list[int]] = []
    written: list[int] = []
    original = Engine.generate

    def spy(self, prompts, n):  # type: ignore[no-untyped-def]
        read.append(list(prompts[0]))
        for row in original(self, prompts, n):
            written.append(row[0])
            yield row

    monkeypatch.setattr(Engine, "generate", spy)
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("\n".join(lines) + "\n"))
    argv = ["--checkpoint_path", str(tiny), "--interactive", "--temperature", "0", "--max_new_tokens", "9"]
    generate.main([*argv, "--ignore_eos"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) >= 3
    assert len(read) == 3 and len(written) == 27
    tokenizer = load_tokenizer(tiny / "tokenizer.model")
    assert read[1] == [written[8], *tokenizer.encode(lines[1], bos=False)]
    # The same tokens through a fresh full cache, in one go, choose the same next token.
    checkpoint = open_checkpoint(tiny, None)
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    history = [*read[0], *written[:8], *read[1], *written[9:17], *read[2]]
    shape = Shape(1, 2, 8, 256, torch.float32, torch.device("cpu"))
    cache = ModelCache(FullCache(), 2, shape)
    with torch.inference_mode():
        logits = model(torch.tensor([history]), cache, last_only=True)
    assert int(logits.argmax()) == written[18]


def test_a_conversation_fills_its_context_to_the_last_token(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["The red fox jumped", "and the clock"]
    tokenizer = load_tokenizer(tiny / "tokenizer.model")
    first, second = len(tokenizer.encode(lines[0])), len(tokenizer.encode(lines[1], bos=False))
    seen = first + 9 - 1  # the last token written is read with the second line
    argv = ["--checkpoint_path", str(tiny), "--interactive", "--temperature", "0", "--max_new_tokens", "9", "--json"]
    for spare, written in ((0, 10), (1, 11), (-1, 9)):  # the last token of all is written, not read
        monkeypatch.setattr("sys.stdin", __import__("io").StringIO("\n".join(lines) + "\n"))
        generate.main([*argv, "--ignore_eos", "--context", str(seen + 1 + second + spare)])
        out, err = capsys.readouterr()
        assert json.loads(out.splitlines()[-1])["tokens_written"] == written
        assert ("no room: that is 1 tokens past" in err) == (spare < 0)


@pytest.mark.parametrize("line", [b"\xff\xfe", b"a\xed\xa0\x80b"])
def test_a_line_that_is_no_text_is_told_and_the_conversation_goes_on(line: bytes, tiny: Path, tmp_path: Path) -> None:
    """A traceback of a codec's, in the middle of a conversation."""
    (tmp_path / "lines").write_bytes(line + b"\nThe fox\n")
    argv = ["--checkpoint_path", tiny, "--interactive", "--max_new_tokens", 3]
    assert Forked("generate.py", argv, tmp_path / "said", str(tmp_path / "lines")).wait() == 0
    said = (tmp_path / "said").read_text()
    assert said.count("not read: the line is not UTF-8") == 1 and "3 tokens written" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_runs_out_after_all_is_one_line(
    tiny: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(run, "ModelCache", no_room)
    assert "memory ran out" in fails(capsys, "--checkpoint_path", tiny, "--prompt", "x")
    error = RuntimeError("an illegal memory access")  # not that: the traceback is needed
    with pytest.raises(RuntimeError, match="illegal"):
        generate.main(["--checkpoint_path", str(tiny), "--prompt", "x"])


def test_reading_a_prompt_in_chunks_changes_nothing_in_the_full_cache(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--checkpoint_path", tiny, "--prompt", 90, "--max_new_tokens", 20, "--temperature", 0]
    assert call(capsys, *base)[0] == call(capsys, *base, "--prefill_chunk", 7)[0]


def test_sink_and_window_stream_far_past_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 times the trained context, the same bytes throughout, every number finite."""
    folder = write_checkpoint(tmp_path / "short", context=32)
    sizes = []
    for n in (60, 640):
        _, report, _ = call(
            capsys,
            "--checkpoint_path",
            folder,
            "--prompt",
            5,
            *COMPRESS,
            "--max_new_tokens",
            n,
            "--ignore_eos",
        )
        assert report["tokens_written"] == n
        sizes.append(report["cache_bytes"])
    assert sizes[0] == sizes[1]
    _, report, _ = call(
        capsys, "--checkpoint_path", folder, "--prompt", 100, *COMPRESS, "--max_new_tokens", 8, "--ignore_eos"
    )
    assert report["tokens_read"] == 100


def test_a_fourth_cache_is_one_class(tiny: Path, tmp_path: Path) -> None:
    """The README's own example: a subcommand with flags, and the full cache at stride 1."""
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python\n# my_cache.py\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    plugin = tmp_path / "my_cache.py"
    plugin.write_text(code)
    base = [sys.executable, "generate.py", "--checkpoint_path", str(tiny), "--prompt", "The red fox"]
    base += ["--max_new_tokens", "12", "--temperature", "0", "--plugin", str(plugin)]

    def out(*extra: str) -> str:
        return subprocess.run([*base, *extra], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert out("strided_kv", "--stride", "1") == out()
    assert out("strided_kv", "--stride", "3") != out()
    assert "--stride" in out("--help") and "keep one token in this many" in out("--help")


# ---- a real checkpoint ----


@needs(STORIES)
@pytest.mark.parametrize("cache", [[], ["quantize_kv"], ["compress_kv"]], ids=["full", "quantize", "compress"])
@pytest.mark.parametrize("extra", [[], ["--reference"]], ids=["fast", "reference"])
def test_stories260k_writes_the_golden_ids(
    cache: list[str], extra: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An independent float32 implementation wrote golden.json; a batch of 5 and chunks change nothing."""
    golden = json.loads((STORIES / "golden.json").read_text())
    n_new = len(golden["greedy_ids"]) - 1
    if cache:
        cache = [*cache, "--sink_size", "4", "--window_size", str(n_new + 8)]
    tokenizer = load_tokenizer(STORIES / "tokenizer.model")
    ids = golden["greedy_ids"]
    checkpoint = open_checkpoint(STORIES, None)
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    policy = run.chosen_policy(generate.make_parser().parse([*cache]))
    prompts = [ids[:1], ids[:20], tokenizer.encode("A dog"), ids[:7], tokenizer.encode("The sun was hot and")]
    batches = [prompts] if extra else [[ids[:1]], prompts]
    for batch in batches:
        for chunk in (8192, 6):
            shape = Shape(len(batch), 4, 8, n_new + 30, torch.float32, torch.device("cpu"))
            kv = ModelCache(policy, checkpoint.config.n_layer, shape)
            for layer in kv.layers:
                if extra:
                    layer.use_reference()
            engine = Engine(model, kv, Sampling(temperature=0), prefill_chunk=chunk)
            n = n_new if not extra else 40
            rows = list(engine.generate(batch, n))
            for b, prompt in enumerate(batch):
                if prompt == ids[: len(prompt)]:
                    got = [*prompt, *(row[b] for row in rows)]
                    end = min(len(got), len(ids))
                    assert got[:end] == ids[:end]


# ---- mistakes ----


def test_flags_that_are_wrong(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint_path", tiny, "--prompt", "The"]
    assert "did you mean --sink_size?" in fails(capsys, *base, "quantize_kv", "--sink_sise", 4)
    assert "did you mean --max_new_tokens?" in fails(capsys, *base, "--max_tokens", 4)
    assert "--max_new_tokens" in fails(capsys, *base, "--max_new_tokens", 0)
    assert "--window_size must be at least 1, not 0" in fails(capsys, *base, "quantize_kv", "--window_size", 0)
    assert "--sink_size must be at least 0" in fails(capsys, *base, "compress_kv", "--sink_size", -1)
    assert "--sink_size takes a value of type int" in fails(capsys, *base, "compress_kv", "--sink_size", "four")
    assert "--sink_size is a flag of compress_kv and quantize_kv" in fails(capsys, *base, "--sink_size", 4)
    assert "invalid choice" in fails(capsys, *base, "quantise_kv")
    assert "--temperature" in fails(capsys, *base, "--temperature", -1)
    assert "--top_p" in fails(capsys, *base, "--top_p", 0)
    assert "--top_k" in fails(capsys, *base, "--top_k", -3)
    assert "--profile" in fails(capsys, *base, "--profile", "../x")


def test_prompts_that_are_wrong(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint_path", tiny]
    assert "empty" in fails(capsys, *base, "--prompt", "")
    assert "not UTF-8" in fails(capsys, *base, "--prompt", os.fsdecode(b"caf\xe9"))
    assert "300 tokens, 44 more than the model's context of 256" in fails(capsys, *base, "--prompt", 300)
    assert "280, 24 past the model's context" in fails(
        capsys, *base, "--prompt", "a", "compress_kv", "--sink_size", 40, "--window_size", 240
    )
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n\xff\xfe\n")
    assert "not UTF-8 at byte 5" in fails(capsys, *base, "--prompt_file", bad)
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "line 2" in fails(capsys, *base, "--prompt_file", bad)
    bad.write_text("\n")
    assert "no prompt" in fails(capsys, *base, "--prompt_file", bad)
    assert "No such file" in fails(capsys, *base, "--prompt_file", tmp_path / "none.txt")


def test_checkpoints_that_are_wrong(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = fails(capsys, "--checkpoint_path", tmp_path / "nothing.pth", "--prompt", "a")
    assert "nothing.pth" in missing
    garbage = tmp_path / "model.pth"
    garbage.write_bytes(b"this is no checkpoint")
    assert "model.pth" in fails(capsys, "--checkpoint_path", garbage, "--prompt", "a")
    if not torch.cuda.is_available():
        assert "cuda" in fails(capsys, "--checkpoint_path", tiny, "--prompt", "a", "--device", "cuda").lower()


def test_what_cannot_fit_is_said_before_loading(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.ranks, "device_memory", lambda device: 20 << 30)
    line = fails(capsys, "--random_weights", "--model", "llama-3.1-8b", "--prompt", 100_000, "--dtype", "bfloat16")
    assert "the largest context that fits is" in line
    fits = int(line.split("fits is ")[1].split()[0])
    base = [
        "--random_weights",
        "--model",
        "llama-3.1-8b",
        "--dtype",
        "bfloat16",
        "--dry_run",
        "--max_new_tokens",
        1,
    ]
    generate.main([str(a) for a in [*base, "--prompt", fits - 1]])
    with pytest.raises(SystemExit) as exit_:
        generate.main([str(a) for a in [*base, "--prompt", fits + 1]])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and "total" in out and "largest context" in err


def test_numbers_that_are_not_finite_name_the_first_bad_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--checkpoint_path", str(folder), "--prompt", "The", "--no-echo"])
    assert exit_.value.code == 2
    assert "layers.1.feed_forward.w2" in capsys.readouterr().err
    checkpoint, cpu = open_checkpoint(folder, None), torch.device("cpu")
    cache = ModelCache(FullCache(), 2, Shape(1, 2, 8, 32, torch.float32, cpu))
    model = load_model(checkpoint, cpu, torch.float32)
    engine = Engine(model, cache, Sampling(temperature=0), lag=2)  # as on a GPU: steps on, unseen
    with pytest.raises(UserError, match=r"layers\.1\.feed_forward\.w2"):
        list(engine.generate([[1, 2, 3]], 8))
    tensors = load_file(write_checkpoint(folder) / "model.safetensors")
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= 1e30  # finite, but their product overflows
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        generate.main(["--checkpoint_path", str(folder), "--prompt", "The"])
    assert "the output of layers.0.feed_forward" in capsys.readouterr().err


# ---- the ends of a process ----


def start(*argv: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "generate.py", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, **options)  # type: ignore[call-overload]


def test_ctrl_c_reports_what_was_done_and_exits_130(tiny: Path) -> None:
    long = ["--max_new_tokens", 100_000, "--ignore_eos", *COMPRESS]
    process = start("--checkpoint_path", tiny, "--prompt", "The red", *long)
    assert process.stdout is not None
    process.stdout.read(40)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "tokens/s" in err and "Traceback" not in err


def test_a_closed_pipe_ends_quietly(tiny: Path) -> None:
    process = start("--checkpoint_path", tiny, "--prompt", "The red", "--max_new_tokens", 100_000, *COMPRESS)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in err and "Error" not in err


def test_help_tells_what_each_flag_does_to_memory_and_quality(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        generate.main(["quantize_kv", "--help"])
    assert exit_.value.code == 0
    out = textwrap.dedent(capsys.readouterr().out)
    assert "quantize_kv: Keep the first and the most recent tokens in full precision" in out
    assert "--window_size" in out and "memory grows with it" in " ".join(out.split())


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    base = ["--random_weights", "--model", "llama-3.1-8b", "--dtype", "bfloat16", "--prompt", "100000", "--dry_run"]
    generate.main([*base, "quantize_kv", *argv])
    return capsys.readouterr()


def test_bits_for_both_and_bits_by_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """The most bits that fit, keys' before values', and the reason; a dry run plans for other machines too."""
    both = planned(capsys, "--bits", "4", "--memory_budget", "100GiB")[0]
    apart = planned(capsys, "--k_bits", "4", "--v_bits", "4", "--memory_budget", "100GiB")[0]
    assert both == apart
    sizes = {}
    for budget in ("100GiB", "22.5GiB", "20.5GiB"):
        out, err = planned(capsys, "--bits", "auto", "--memory_budget", budget)
        sizes[budget] = float(out.split("cache")[1].split()[0])
        assert f"and {float(budget[:-3]):.2f} GiB are there" in err
    assert sizes["100GiB"] > sizes["22.5GiB"] > sizes["20.5GiB"]
    with pytest.raises(SystemExit) as exit_:
        planned(capsys, "--bits", "auto", "--memory_budget", "16GiB")
    assert exit_.value.code == 2 and "3-bit keys and 2-bit values need" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bits", "4"], "--bits is a flag of quantize_kv, and the cache is full"),
        (["quantize_kv", "--bits", "4", "--k_bits", "8"], "--bits says both"),
        (["quantize_kv", "--k_bits", "5"], "--k_bits must be one of 8, 4, 3, 2, not 5"),
        (["--memory_budget", "20XB"], "'20XB' is not a size"),
        (["--memory_budget", "1MiB"], "1.00 MiB are free"),
    ],
)
def test_mistakes_about_bits_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        generate.main(argv)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and message in err and err.count("\n") == 1


def test_four_bits_write_text(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--prompt", "Once upon a time", "--max_new_tokens", "30", "--temperature", "0", "quantize_kv"]
    generate.main([*argv, "--sink_size", "2", "--window_size", "4", "--bits", "4"])
    out, err = capsys.readouterr()
    assert len(out) > 40 and "k_bits 4, v_bits 4" in err


@pytest.mark.parametrize("target", ["a file/r.json", "a folder"])
def test_a_report_that_cannot_be_written_is_told_before_the_work(
    target: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--checkpoint_path", str(tiny), "--prompt", "The", "--json", str(tmp_path / target)])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and len(err.splitlines()) == 1 and "--json" in err
    assert {f.name for f in tmp_path.iterdir()} == {"a file", "a folder"}
