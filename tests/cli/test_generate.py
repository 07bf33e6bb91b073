"""generate.py as its users call it: options, outputs, caches. Mistakes: test_generate_mistakes.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STORIES, needs, write_checkpoint
from generate_calls import COMPRESS, QUANTIZE, call

import cli.ranks
import generate
from checkpoint import load_model, open_checkpoint
from checkpoint.tokenizer_files import load_tokenizer
from cli import run
from engine import Engine, Sampling
from kv_cache import ModelCache
from selective_kv import Shape


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


def test_four_bits_write_text(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--prompt", "Once upon a time", "--max_new_tokens", "30", "--temperature", "0", "quantize_kv"]
    generate.main([*argv, "--sink_size", "2", "--window_size", "4", "--bits", "4"])
    out, err = capsys.readouterr()
    assert len(out) > 40 and "k_bits 4, v_bits 4" in err
