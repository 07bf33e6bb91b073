"""The report says what a cache's bits are and, before the text comes, whether they suit the checkpoint."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file, save_file

import generate
from selective_kv import FullCache, SelectiveCache, Shape
from selective_kv.cache import Chunk
from selective_kv.formats import TILE
from selective_kv.score_error import BOUND

COARSE = ("quantize_kv", "--sink_size", "2", "--window_size", "16", "--k_bits", "2")
TEXT = " ".join(["The red fox jumped over the river."] * 3)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose queries and keys are both five times as large as the tiny one's."""
    folder = write_checkpoint(tmp_path_factory.mktemp("loud") / "loud-llama")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: 5 * t if "q_proj" in n or "k_proj" in n else t for n, t in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


def run(capsys: pytest.CaptureFixture[str], folder: Path, *argv: str, n: int = 150) -> tuple[dict, str]:
    generate.main(["--checkpoint_path", str(folder), "--ignore_eos", "--max_new_tokens", str(n), *argv, "--json"])
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


@pytest.mark.parametrize("prompt", [TEXT, " ".join([TEXT] * 2)])  # no tile is full yet, and some are
def test_a_format_that_does_not_suit_the_checkpoint_is_told_of(
    loud: Path, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    report, err = run(
        capsys, loud, *COARSE, "--prompt", prompt, "--prompt", prompt[:60], n=100 if len(prompt) > 150 else 150
    )
    errors = report["score_error"]
    assert len(errors["layers"]) == 2 and max(errors["layers"]) > BOUND == errors["bound"]
    lines = [line for line in err.splitlines() if line.startswith("warning")]
    assert len(lines) == 1 and "2-bit keys are a bad choice for this checkpoint" in lines[0]
    assert err.index("warning") < err.index("tokens/s")  # the report, which comes after the text
    better = lines[0].split("--k_bits ")[1][0]
    if len(prompt) > 150:
        many, err = run(capsys, loud, *COARSE, "--prompt", prompt, "--num_samples", "10", n=100)
        assert err.count("warning") == 1 and max(many["score_error"]["layers"]) > BOUND
    again, err = run(capsys, loud, *COARSE[:-1], better, "--prompt", prompt, n=100)
    assert "warning" not in err and max(again["score_error"]["layers"]) <= BOUND


def test_one_that_suits_it_is_not(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, err = run(capsys, tiny, *COARSE[:-1], "4", "--prompt", TEXT)
    assert "warning" not in err and 0 < max(report["score_error"]["layers"]) < BOUND
    assert report["bits_per_element"] == {"keys": 4 + 0.25 + 2, "values": 8 + 4}  # of 8 dims a factor is much
    assert "6.25 bits an element of keys, 12 of values, scales included; the last keys' scores are off by" in err


def test_nothing_is_measured_where_nothing_is_stored(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, err = run(capsys, tiny, *COARSE, "--prompt", TEXT, n=5)
    assert report["score_error"]["layers"] is None and "so short a run lets nothing leave the window" in err
    report, err = run(capsys, tiny, *COARSE, "--prompt", "The red fox", n=200)
    assert report["score_error"]["layers"] is None and "their error is not known" in err
    report, err = run(capsys, tiny, "full", "--prompt", TEXT, n=5)
    assert "score_error" not in report and report["bits_per_element"] is None and "quantised" not in err


class NoRope:
    frequencies = torch.ones(8, dtype=torch.float64)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("bits", [8, 2])
def test_the_error_is_that_of_the_tile_that_is_stored_next(bits: int, reference: bool, rotate: bool) -> None:
    """By the definition: scores over the tile as it will be, less those over its keys."""
    torch.manual_seed(0)
    n, sink, window = 3 + 2 * TILE + 60, 3, 80  # one tile is stored, and 128 of the tokens after it are there
    q, k, v = (torch.randn(1, h, n, 16) for h in (4, 2, 2))
    cache = SelectiveCache(sink, window, bits, bits, rotate)
    cache.allocate(Shape(1, 2, 16, n + TILE, torch.float32, torch.device("cpu")))
    if reference:
        cache.use_reference()
    cache.attend(q, k, v, Chunk(torch.arange(n)[None], 0, 0), NoRope())  # type: ignore[arg-type]
    tokens = k[0, :, sink + TILE : sink + 2 * TILE]
    form = cache.formats()[0]
    off = form.dequantize(form.quantize(tokens[:, None]))[:, 0] - tokens
    expected = (q[0, :, -1].view(2, 2, 16) @ off.transpose(-1, -2) / 4).square().mean().sqrt()
    found = cache.score_error(0, n)
    assert found is not None and torch.allclose(found, expected, rtol=1e-4)
    assert torch.equal(found, cache.score_error(0, n, bits))  # type: ignore[arg-type]
    assert FullCache().score_error(0, n) is None
    cache.reset()
    assert cache.score_error(0, n) is None


def test_a_conversation_is_measured_once_it_has_tokens_enough(
    loud: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"The\n{TEXT}\n{TEXT}\n"))
    report, err = run(capsys, loud, *COARSE, "--interactive", "--context", "250", n=3)
    assert err.count("warning: 2-bit keys") == 1 and max(report["score_error"]["layers"]) > BOUND


def test_the_warning_comes_before_the_text(loud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("cli.fidelity.say", lambda line: said.append(line))
    monkeypatch.setattr("cli.console.Printer.push", lambda *args: said.append("text"))
    generate.main(["--checkpoint_path", str(loud), "--max_new_tokens", "120", *COARSE, "--prompt", TEXT])
    assert said[0].startswith("warning") and said[1] == "text"
