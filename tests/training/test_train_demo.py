"""Training the bundled checkpoint, in miniature, and the checkpoint itself."""

from __future__ import annotations

import hashlib
import itertools
import json
import lzma
import random
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, SENTENCES, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import load_model, load_tokenizer, open_checkpoint
from common.errors import UserError
from evaluation import passkey
from training import command as train_demo
from training import data as demo_data
from training import scores as demo_scores

DEMO = ROOT / "assets" / "demo"
SMALL = "--vocab_size 400 --dim 32 --n_layer 2 --n_head 2 --n_kv_head 1 --ffn_dim 48 --context 256 --seed 3"
SHORT = "--batch_tokens 512 --part_tokens 512 --trials 1 --no-compile --device cpu --minutes 100"


def write_text(path: Path, seed: int, n: int = 400) -> Path:
    rng = random.Random(seed)
    texts = ["\n".join(rng.choices(SENTENCES, k=8)) for _ in range(n // 8)]
    path.write_text(f"\n{demo_data.END}\n".join(texts) + f"\n{demo_data.END}\n")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """10 steps at once, and 5 steps, an interruption, and 5 more."""
    folder = tmp_path_factory.mktemp("train")
    text, val = write_text(folder / "text.txt", 0), write_text(folder / "val.txt", 1, 120)
    states = {}
    for name, runs in {
        "once": [["--max_steps", "10"]],
        "twice": [["--max_steps", "5"], ["--max_steps", "10", "--resume"]],
    }.items():
        for extra in runs:
            train_demo.main(
                ["--text", str(text), "--val", str(val), "--export", str(folder / name), "--state",
                 str(folder / f"{name}.pt"), *SMALL.split(), *SHORT.split(), *extra]
            )  # fmt: skip
        states[name] = torch.load(folder / f"{name}.pt", weights_only=True)
    return {"folder": folder, **states}


def test_an_interrupted_run_goes_on(trained: dict[str, Any]) -> None:
    assert trained["once"]["n_step"] == trained["twice"]["n_step"] == 10
    assert trained["once"]["n_token"] == trained["twice"]["n_token"] == 10 * 512
    momentum = [s["optimizers"][0]["state"][0]["momentum_buffer"].norm() for s in (trained["once"], trained["twice"])]
    assert momentum[1] / momentum[0] == pytest.approx(1, abs=0.5)  # kept, not begun anew


@pytest.mark.parametrize("where", ["_update", "_loss"])
def test_ctrl_c_keeps_the_state_and_says_how_to_go_on(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the third step. Once all was lost that was not a multiple of 20 steps and a minute old; and half an
    update is not kept: what was interrupted in it is finished, what was interrupted before it is not counted.
    """
    monkeypatch.chdir(tmp_path)
    write_text(Path("text.txt"), 0)
    words = f"--text text.txt --val text.txt --export out --state state.pt {SMALL} {SHORT}".split()
    method, calls = getattr(train_demo.Trainer, where), itertools.count(1)

    def interrupted(self: train_demo.Trainer, *tensors: torch.Tensor) -> Any:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return method(self, *tensors)

    with monkeypatch.context() as patch:
        patch.setattr(train_demo.Trainer, where, interrupted)
        with pytest.raises(SystemExit) as exit_:
            train_demo.main(words)
    said = capsys.readouterr().err
    assert exit_.value.code == 130 and said.count("\n") == 1 and not Path("out").joinpath("config.json").exists()
    n_step = 3 if where == "_update" else 2
    assert f"interrupted after {n_step} steps" in said
    state = torch.load("state.pt", weights_only=True)
    assert state["n_step"] == n_step == state["curve"][-1]["step"] and 0 < state["done"] < 1
    command = shlex.split(said.partition("go on with: ")[2])
    assert command[:2] == ["python", "scripts/train_demo.py"] and command[-1] == "--resume"
    train_demo.main([*command[2:], "--max_steps", "5"])
    assert torch.load("state.pt", weights_only=True)["n_step"] == 5


def test_a_run_without_a_step_leaves_an_earlier_ones_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path("text.txt"), 0)
    Path("state.pt").write_bytes(b"hours")
    monkeypatch.setattr(train_demo.Trainer, "_loss", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as exit_:
        train_demo.main(f"--text text.txt --val text.txt --export out --state state.pt {SMALL} {SHORT}".split())
    assert exit_.value.code == 130 and "nothing is kept" in capsys.readouterr().err
    assert Path("state.pt").read_bytes() == b"hours"


def test_a_run_on_a_cpu_keeps_to_its_minutes_and_shows_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock was looked at every 20 steps, and a step had 262,144 tokens: a minute's run took hours."""
    monkeypatch.chdir(tmp_path)
    write_text(Path("text.txt"), 0)
    words = "--text text.txt --val text.txt --export out --state state.pt --trials 1 --device cpu --minutes 0.0001"
    train_demo.main([*words.split(), *SMALL.split()])
    state = torch.load("state.pt", weights_only=True)
    assert state["n_step"] == len(state["curve"]) < 5 and state["done"] == 1
    assert state["n_token"] == 2048 * state["n_step"]
    assert "step 1 length 256" in capsys.readouterr().out


def test_a_gpus_batches_are_as_they_were() -> None:
    args = train_demo.make_parser(None).parse(["--text", "a", "--val", "b", "--export", "c"])
    train_demo.settle(args, torch.device("cuda", 0))
    assert (args.batch_tokens, args.part_tokens, args.trials, args.compile) == (262_144, 65_536, 50, True)


def test_a_gpus_loss_is_read_every_20_steps_or_at_the_end_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading makes the host wait. And the learning rate's clock is of the last reading."""
    now = 100.0
    monkeypatch.setattr(train_demo, "time", SimpleNamespace(monotonic=lambda: now))
    trainer = SimpleNamespace(device=torch.device("cuda"), done=0.25, n_step=0, n_token=0, curve=[])
    watch = train_demo.Watch(trainer, SimpleNamespace(state=None, minutes=1))
    for _ in range(43):
        now += 0.5
        trainer.n_step += 1
        trainer.unread = torch.tensor(2.0)
        watch.after_step(2048, 0.6)
    assert [point["step"] for point in trainer.curve] == [20, 40, 42, 43]  # 15 s were spent before, and 36 is the end
    assert [point["seconds"] for point in trainer.curve] == [25, 35, 36, 36.5]


def test_what_is_exported_is_what_was_trained(trained: dict[str, Any]) -> None:
    """Through the ordinary loader, from bfloat16."""
    checkpoint = open_checkpoint(trained["folder"] / "once", None)
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    for name, tensor in trained["once"]["model"].items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16().float()), name


def test_the_card_has_the_runs_figures_and_no_ones_folders(trained: dict[str, Any]) -> None:
    """It once said of any run's model that it was the bundled one, and what that had read."""
    folder = trained["folder"]
    card = (folder / "once" / "README.md").read_text()
    assert card.startswith("# once\n") and "10 steps, 5,120 tokens" in card and "bits per byte" in card
    assert "--max_steps 10" in card and str(folder) not in card
    assert "books" not in card and "TinyStories" not in card and "bundled" not in card
    for role, name in (("training", "text.txt"), ("held-out", "val.txt")):
        data = (folder / name).read_bytes()
        assert f"`{name}` ({role} text): {len(data):,} bytes, sha256 `{hashlib.sha256(data).hexdigest()}`" in card


def test_the_card_has_every_command_of_a_run_that_was_interrupted(trained: dict[str, Any]) -> None:
    card = (trained["folder"] / "twice" / "README.md").read_text()
    commands = [line for line in card.splitlines() if line.startswith("- Command:")]
    assert ["--resume" in line for line in commands] == [False, True]
    assert "--max_steps 5`" in commands[0] and "--max_steps 10 --resume`" in commands[1]
    assert card.count("sha256") == 2  # the same files both times


def test_the_card_names_the_device_that_was_used(trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the CPU of a machine with a GPU was said to be that GPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"NVIDIA {device}")
    assert demo_scores.device_name(torch.device("cpu")) == "CPU"
    assert demo_scores.device_name(torch.device("cuda", 1)) == "NVIDIA cuda:1"
    assert ", one CPU, torch" in (trained["folder"] / "once" / "README.md").read_text()


def test_the_command_can_be_given_again() -> None:
    """--text=./small.txt became small.txt, without its flag."""
    words = ["--text=./small.txt", "--val", "/home/me/my val.txt", "--extra=a.txt", "--export", "out/", "--minutes=9"]
    told = demo_scores.shown(words)
    assert shlex.split(told)[2:] == [
        "--text=small.txt", "--val", "my val.txt", "--extra=a.txt", "--export", "out", "--minutes=9"
    ]  # fmt: skip
    if not DEMO.exists():
        return
    bundled = (DEMO / "README.md").read_text().partition("Command: `")[2].partition("`")[0]
    assert demo_scores.shown(shlex.split(bundled)[2:]) == bundled


@settings(max_examples=50, deadline=None)
@given(st.integers(60, 200), st.floats(0, 1), st.integers(0, 99))
def test_a_passkey_prompt_is_what_it_says(length: int, depth: float, seed: int) -> None:
    """Exactly as long as asked, the needle at its depth, the key nowhere else, and what follows is the key."""

    def encode(text: str) -> list[int]:
        return [*text.encode()]

    name, key = passkey.draw(random.Random(seed))
    length *= 5
    filler = [ord(".")] * length
    ids, reply = passkey.make_prompt(encode, filler, length, depth, name, key, bos=[0])
    assert len(ids) == length and ids[0] == 0
    text = bytes(ids[1:]).decode()
    hidden = passkey.needle(name, key)
    assert text.count(hidden) == 1 and text.replace(hidden, "").count(key) == 0
    assert text.endswith(passkey.question(name)) and bytes(reply).decode() == f" {key}"
    filler_before = text.index(hidden)
    assert abs(filler_before - depth * text.count(".", 0, -len(passkey.question(name)))) <= len(hidden)


def test_a_passkey_prompt_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="takes at least"):
        passkey.make_prompt(lambda text: [*text.encode()], [1] * 999, 50, 0.5, "red box", "12345")
    with pytest.raises(ValueError, match="of filler are needed"):
        passkey.make_prompt(lambda text: [*text.encode()], [1] * 9, 900, 0.5, "red box", "12345")


def test_sequences_that_need_the_far_past(trained: dict[str, Any]) -> None:
    """Every asked key was hidden before, its digits carry the weight, and copies are copies."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained["folder"] / "once" / "tokenizer.model"))
    text = (trained["folder"] / "text.txt").read_text()
    tokens = demo_data.encode_texts(processor, text)
    far = demo_data.FarSequences(tokens, processor, 3000, 0)
    for _ in range(20):
        ids, weights = far.passkeys()
        assert len(ids) == len(weights) == 3000
        runs = np.flatnonzero(np.diff(np.concatenate(([0], weights > 1, [0]))))
        for lo, hi in runs.reshape(-1, 2):
            key = processor.decode(ids[lo:hi].tolist()).strip()
            if hi < 3000:
                assert len(key) == 5 and f"is {key}. Remember" in processor.decode(ids[:lo].tolist())
    ids, _ = far.copies()
    found = {tuple(ids[i : i + 48]) for i in range(len(ids) - 48)}
    assert len(found) < len(ids) - 48


def test_documents_become_tokens_and_back(trained: dict[str, Any]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained["folder"] / "once" / "tokenizer.model"))
    text = "One  two.\n\n  Three \u00e9 \N{SLIGHTLY SMILING FACE} 123\nfour\n"
    ids = demo_data.encode_texts(processor, f"{text}{demo_data.END}\nfive\n{demo_data.END}\n").tolist()
    assert ids.count(processor.eos_id()) == ids.count(processor.bos_id()) == 2
    sizes = demo_data.token_bytes(processor)
    assert processor.decode(ids[1 : ids.index(processor.eos_id())]) == text.strip("\n")
    assert sizes[ids].sum() == len((text.strip("\n") + "five").encode())


def refusal(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line that the script says to these words on its way out."""
    with pytest.raises(SystemExit) as exit_:
        train_demo.main(words)
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.count("\n") == 1 and said.startswith("train_demo.py: error: "), said
    return said


def write_inputs(folder: Path) -> None:
    """One of every kind of input that is no good, beside a good text."""
    write_text(folder / "text.txt", 0)
    (folder / "folder").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "ends.txt").write_text(f"{demo_data.END}\n" * 9)
    (folder / "short.txt").write_text("One line.\n")
    (folder / "latin.txt").write_bytes(b"abc \xff")
    (folder / "cut.xz").write_bytes(lzma.compress(b"text\n" * 99)[:-20])
    (folder / "junk").write_bytes(bytes(range(256)))
    torch.save({"model": 1}, folder / "other.pt")


BAD_INPUTS = {
    "--text no.txt": "no.txt: no such file",
    "--text empty.txt": "an empty text",
    "--text ends.txt": "an empty text",
    "--text folder": "Is a directory",
    "--text latin.txt": "not UTF-8 at byte 4",
    "--text cut.xz": "damaged, or not made by xz",
    "--text short.txt": "--vocab_size 400: the text gives 2",
    "--val short.txt": "too short a text",
    "--vocab_size 30000": "--vocab_size 30000: the text gives ",
    "--vocab_size 99": "the text's characters alone are ",
    "--vocab_size 70000": "65536 at most",
    "--resume": "state.pt to go on from",
    "--resume --state junk": "junk: damaged, or not the state of a run",
    "--resume --state other.pt": "not the state of a run with these options",
    "--state folder": "folder: not a file",
    "--export text.txt": "text.txt is not a folder",
    "--tokenizer no.model": "no.model: No such file",
    "--tokenizer junk": "damaged one",
    "--init no": "No such file",
    "--init assets": "its dim is 256, and 32 is asked for",
    "--init assets --tokenizer junk": "no --tokenizer",
    "--n_head 3": "--dim 32 is not a multiple of --n_head 3",
    "--n_head 32": "head_dim 1 is not even",
    "--n_kv_head 3": "not a multiple of n_kv_head 3",
    "--minutes 0": "'0' is not a number above zero",
    "--minutes -1": "'-1' is not a number above zero",
    "--minutes inf": "'inf' is not a number above zero",
    "--seed -1": "'-1' is not a whole number",
    "--dropout 1": "'1' is not a share",
    "--max_steps -1": "'-1' is not a whole number above zero",
    "--context 16": "--context 16: passkeys and copies take 196 tokens",
    "--device bogus": "--device bogus: give cpu, cuda",
    "--device cuda:99": "--device cuda:99: ",
}


@pytest.mark.parametrize("words", BAD_INPUTS)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once tracebacks, one of them in a thread whose end the run outlived with exit code 0; --minutes -1 had no end."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    if "assets" in words:
        if not DEMO.exists():
            pytest.skip("the bundled checkpoint is not here")
        (tmp_path / "assets").symlink_to(DEMO)
    before = sorted(tmp_path.rglob("*"))
    good = "--text text.txt --val text.txt --export out --state state.pt --max_steps 1"
    said = refusal(capsys, [*good.split(), *SMALL.split(), *SHORT.split(), *words.split()])
    assert BAD_INPUTS[words] in said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_state_of_another_shape_is_refused(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained["folder"]
    files = ["--text", f"{folder}/text.txt", "--val", f"{folder}/val.txt", "--export", f"{folder}/no", "--state"]
    words = [*files, f"{folder}/once.pt", *SMALL.split(), *SHORT.split(), "--resume"]
    for other in (["--ffn_dim", "64"], ["--n_layer", "3"]):
        assert "once.pt: not the state of a run with these options" in refusal(capsys, [*words, *other])
    assert not (folder / "no").exists()


def test_a_tokenizer_that_texts_cannot_be_told_with_is_refused(tmp_path: Path) -> None:
    """Every line's end became the unknown token without a word."""
    with pytest.raises(UserError, match="no piece for a line's end"):
        demo_data.open_tokenizer(train_tokenizer(), "given")


@pytest.mark.parametrize("n_good", [0, 3])
def test_what_fails_in_the_thread_ends_the_run(n_good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run took its few batches, and never learnt that the thread had died."""

    def a_few(self: demo_data.FarSequences) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from [(np.zeros(self.length, np.uint16), np.ones(self.length))] * n_good
        raise OverflowError("no more")

    monkeypatch.setattr(demo_data.FarSequences, "__iter__", a_few)
    monkeypatch.setattr(demo_data, "FAR_SHARE", 1.0)
    with (
        pytest.raises(RuntimeError, match="no batches can be made") as raised,
        demo_data.Batches(np.zeros(1000, np.uint16), SimpleNamespace(encode=None), 1, 200, 0) as batches,
    ):
        if n_good == 0:
            batches.next(torch.device("cpu"))
        else:  # the end of the block finds it out
            batches.thread.join()
    assert isinstance(raised.value.__cause__, OverflowError)


@pytest.mark.skipif(not DEMO.exists(), reason="the bundled checkpoint is not here")
def test_the_bundled_checkpoint() -> None:
    assert sum(f.stat().st_size for f in DEMO.iterdir()) <= 16 << 20
    config = json.loads((DEMO / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192 and config["head_dim"] == 64
    checkpoint = open_checkpoint(DEMO, None)
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer.n_vocab == checkpoint.config.vocab_size
    for text in ("Once upon a time", " two  spaces\n\nand lines\n", "na\u00efve \N{SLIGHTLY SMILING FACE} 12345"):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
