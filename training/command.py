"""Train the bundled checkpoint: a small Llama with 8,192 tokens of context that uses them.

  python scripts/train_demo.py --text train_books.txt.xz --val val_books.txt.xz --minutes 9 --export assets/demo

Any text file will do. Matrices learn with Muon, the rest with AdamW; the first part of the time goes to
short sequences (attention over 8k tokens costs three times the rest), the second to whole ones. A tenth
of the sequences need the far past (data.py). The schedule follows the clock, so a run ends when it
was told to, on any hardware; Ctrl-C keeps its state, and `--resume` goes on from there. At its end it
writes weights, config and tokenizer, scores itself on held-out text and on passkeys, and writes a model
card with its figures.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_model, open_checkpoint, parse_device
from checkpoint.stored import UNPICKLING_ERRORS
from common.errors import UserError
from common.files import replaced_whole, require_writable, write_whole
from common.messages import say
from common.program import interrupt_deferred, interrupts_ignored, program
from model import Attention, FeedForward, Transformer
from training import data as demo_data
from training.data import Batches
from training.demo_model import TrainingCache, export, new_model
from training.options import SHORT, check, make_parser, settle, shape_of
from training.scores import card, device_name, score_passkeys, score_text, shown

SAVE_SECONDS = 60  # between two saves of the state
PEAK_SHARE = 0.35  # of the time at the full learning rate; then it falls, linearly, to nothing


class Trainer:
    def __init__(self, model: Transformer, args: argparse.Namespace, device: torch.device) -> None:
        self.model, self.args, self.device = model, args, device
        self.cache = TrainingCache(model.config.n_layer, device)
        matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
        embeddings = [p for n, p in model.named_parameters() if "embed" in n]
        norms = [p for n, p in model.named_parameters() if p.dim() != 2]
        groups = [{"params": embeddings, "weight_decay": args.embedding_decay}, {"params": norms, "weight_decay": 0.0}]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda"),
        ]
        if args.dropout:  # of the embeddings and of what each branch adds: a hook, so that model.py needs no training
            for module in model.modules():
                if isinstance(module, Attention | FeedForward | torch.nn.Embedding):
                    module.register_forward_hook(lambda m, _, out: F.dropout(out, args.dropout, m.training))
        self.done = 0.0  # share of the time
        self.n_step = self.n_token = 0
        self.curve: list[dict[str, float]] = []
        self.runs: list[dict[str, Any]] = []  # the commands that led here, with their devices and files
        self.unread: Tensor | None = None  # the last step's loss, until `Watch` reads it
        # Compiled for each of the two lengths.
        self.loss = torch.compile(self._loss, dynamic=False) if args.compile else self._loss

    def _loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(ids[:, :-1], self.cache)
        each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        return (each * weight).sum() / weight.sum()

    def step(self, batches: Batches) -> None:
        total = torch.zeros((), device=self.device)
        n_part = max(1, self.args.batch_tokens // (batches.rows * batches.length))
        for _ in range(n_part):
            loss = self.loss(*batches.next(self.device)) / n_part
            loss.backward()
            total += loss.detach()
        with interrupt_deferred():
            self._update()
            self.n_step += 1
            self.n_token += n_part * batches.rows * batches.length
            self.unread = total

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.n_step + 1) / 100)
        scale = warm * min(1.0, (1 - self.done) / (1 - PEAK_SHARE))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * max(scale, 1e-4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "done": self.done, "n_step": self.n_step, "n_token": self.n_token, "curve": self.curve,
            "runs": self.runs,
        }  # fmt: skip
        try:
            with replaced_whole(path) as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
            raise UserError(f"--state {path}: {error}") from None

    def load(self, path: Path) -> None:
        """Raises UserError where `path` is no state, or that of a model of another shape."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except (pickle.UnpicklingError, *UNPICKLING_ERRORS):
            raise UserError(f"--state {path}: damaged, or not the state of a run") from None
        try:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.done, self.curve = float(state["done"]), list(state["curve"])
            self.n_step, self.n_token = int(state["n_step"]), int(state["n_token"])
            self.runs = list(state.get("runs", []))
        except UNPICKLING_ERRORS:
            raise UserError(f"--state {path}: not the state of a run with these options and this text") from None


class Watch:
    """The clock, looked at after every step, and the loss, for which the host waits for the device.

    On a GPU that wait would cost time, so a loss is read every 20 steps, and when a reading is overdue; it
    also keeps the host from running ahead of the clock. `Trainer.done`, which the learning rate follows,
    is of the last reading. On a CPU nothing runs ahead, and every step is read and shown.
    """

    def __init__(self, trainer: Trainer, args: argparse.Namespace) -> None:
        self.trainer, self.state, self.seconds = trainer, args.state, args.minutes * 60
        self.every = 1 if trainer.device.type == "cpu" else 20
        self.read_at = self.saved_at = time.monotonic()
        self.began = self.read_at - trainer.done * self.seconds  # what was spent before an interruption counts
        self.told_at = -math.inf
        self.bar = tqdm(total=100, unit="%", disable=not sys.stderr.isatty())

    def after_step(self, length: int, until: float) -> None:
        now = time.monotonic()
        overdue = now - self.began >= until * self.seconds or now - self.read_at > SAVE_SECONDS
        if overdue or self.trainer.n_step % self.every == 0:
            self.read(length)
        if now - self.saved_at > SAVE_SECONDS and self.trainer.unread is None:
            self.trainer.save(self.state)
            self.saved_at = time.monotonic()

    def read(self, length: int) -> None:
        """Read the last step's loss, if that was not done yet. Raises UserError where it is not finite."""
        if self.trainer.unread is None:
            return
        value, step = self.trainer.unread.item(), self.trainer.n_step
        self.trainer.unread = None
        if not math.isfinite(value):
            raise UserError(f"the loss is not finite at step {step}")
        self.read_at = time.monotonic()
        spent = self.read_at - self.began
        self.trainer.curve.append({"step": step, "seconds": round(spent, 1), "loss": round(value, 4)})
        self.trainer.done = min(1.0, spent / self.seconds)
        self._show(value, length, spent)

    def _show(self, loss: float, length: int, spent: float) -> None:
        self.bar.set_postfix(loss=f"{loss:.3f}", length=length, step=self.trainer.n_step, refresh=False)
        self.bar.n = round(self.trainer.done * 100, 1)
        self.bar.refresh()
        quiet = self.bar.disable and self.every == 1 and self.read_at - self.told_at > 10
        if quiet or self.trainer.n_step % 200 == 0:
            self.bar.clear()
            print(f"step {self.trainer.n_step} length {length} tokens {self.trainer.n_token / 1e6:.3g}M "
                  f"loss {loss:.4f} {spent:.0f} s", flush=True)  # fmt: skip
            self.told_at = self.read_at


def train(trainer: Trainer, inputs: demo_data.Inputs, args: argparse.Namespace) -> None:
    """Until the time is spent, or --max_steps are made."""
    watch = Watch(trainer, args)
    most = args.max_steps or math.inf
    length = args.context
    try:
        for length, until in ((min(SHORT, args.context), args.short_share), (args.context, 1.0)):
            if trainer.done >= until or trainer.n_step >= most:
                continue
            rows = max(1, args.part_tokens // length)
            with Batches(inputs.tokens, inputs.processor, rows, length, args.seed + trainer.n_step) as batches:
                while trainer.done < until and trainer.n_step < most:
                    trainer.step(batches)
                    watch.after_step(length, until)
        watch.read(length)
    except KeyboardInterrupt:
        watch.read(length)  # what is kept is known to be finite, and where it stands
        raise
    finally:
        watch.bar.close()


def start_from(folder: Path, model: Transformer, device: torch.device) -> None:
    """Copy an exported checkpoint's weights. Raises UserError where its shape is another."""
    checkpoint = open_checkpoint(folder, None)
    for name in ("vocab_size", "dim", "n_layer", "n_head", "n_kv_head", "ffn_dim", "head_dim"):
        theirs, ours = getattr(checkpoint.config, name), getattr(model.config, name)
        if theirs != ours:
            raise UserError(f"--init {folder}: its {name} is {theirs}, and {ours} is asked for")
    try:
        model.load_state_dict(load_model(checkpoint, device, torch.float32).state_dict())
    except RuntimeError:  # biases or norms that the bundled model has not
        raise UserError(f"--init {folder}: not a checkpoint of the bundled model's kind") from None


def run(args: argparse.Namespace) -> None:
    device = parse_device(args.device)
    settle(args, device)
    torch.set_float32_matmul_precision("high")
    check(args)
    inputs = demo_data.read_inputs(args)
    model = new_model(shape_of(args, inputs.processor.vocab_size()), device, args.seed)
    if args.init:
        start_from(args.init, model, device)
    model.rope(torch.zeros(1, 1, dtype=torch.int64, device=device))  # moves its frequencies, before compiling
    trainer = Trainer(model, args, device)
    if args.resume:
        trainer.load(args.state)
    trainer.runs.append({"command": shown(args.argv), "device": device_name(device), "files": inputs.files})
    require_writable(args.state, "--state")
    require_writable(args.export / "model.safetensors", "--export")
    n = sum(p.numel() for p in model.parameters())
    print(f"{n / 1e6:.2f} M parameters, {len(inputs.tokens) / 1e6:.3g} M tokens of text", flush=True)
    began_at = trainer.n_step
    if args.state.exists() and not args.resume:
        say(f"{args.state} holds an earlier run, and this one takes its place (--resume would have gone on)")
    try:
        train(trainer, inputs, args)
        trainer.save(args.state)
        finish(trainer, inputs, args)
    except KeyboardInterrupt:
        with interrupts_ignored():
            kept = "nothing is kept"
            if trainer.n_step > began_at:  # or else a run without a step would take an earlier one's place
                trainer.save(args.state)
            if trainer.n_step > began_at or args.resume:
                kept = f"go on with: {resuming(args.argv)}"
            say(f"train_demo.py: interrupted after {trainer.n_step} steps, {trainer.done:.0%} of the time; {kept}")
        sys.exit(130)


def resuming(argv: list[str]) -> str:
    """The command that goes on from where this one was interrupted."""
    words = argv if "--resume" in argv else [*argv, "--resume"]
    return shlex.join(["python", "scripts/train_demo.py", *words])


def finish(trainer: Trainer, inputs: demo_data.Inputs, args: argparse.Namespace) -> None:
    """Export the model, score it, and write its card."""
    model, cache, val = trainer.model, trainer.cache, inputs.held_out
    export(model, inputs.tokenizer, args.export)
    model.eval()
    print(f"{args.export} is written; its scores, on {len(val):,} tokens of held-out text, follow", flush=True)
    sizes = demo_data.token_bytes(inputs.processor)
    scores = {
        "text": score_text(model, cache, val, sizes),
        "training_text": score_text(model, cache, inputs.tokens[: len(val)], sizes),
        "passkeys": score_passkeys(model, cache, val, inputs.processor, args.trials, args.seed),
    }
    write_whole(args.export / "README.md", card(model, vars(trainer), scores, args))
    print(json.dumps(scores))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with program("train_demo.py", "train_demo.py: interrupted before the training began"):
        args = make_parser(__doc__).parse(argv)
        args.argv = argv
        try:
            run(args)
        except torch.OutOfMemoryError:
            raise UserError("the device's memory is too small for this model, or for --part_tokens at a time") from None
