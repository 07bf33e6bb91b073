"""Train the bundled checkpoint: a small Llama with 8,192 tokens of context that uses them.

  python scripts/train_demo.py --text train_books.txt.xz --val val_books.txt.xz --minutes 9 --export assets/demo

Any text file will do. Matrices learn with Muon, the rest with AdamW; the first part of the time goes to
short sequences (attention over 8k tokens costs three times the rest), the second to whole ones. A tenth
of the sequences need the far past (demo_data.py). The schedule follows the clock, so a run ends when it
was told to, on any hardware; `--resume` goes on after an interruption. At its end it scores itself on
held-out text and on passkeys, and writes weights, config, tokenizer and a model card with its figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo_data
from demo_data import Batches
from demo_model import TrainingCache, export, new_model
from demo_scores import card, score_passkeys, score_text

from checkpoint import load_model, open_checkpoint
from console import require_writable
from model import Attention, Config, FeedForward, Transformer
from options import Parser, positive
from tokenizer import UserError

SHORT = 2048  # tokens of a sequence in the first part of the training
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
        # Compiled for each of the two lengths.
        self.loss = torch.compile(self._loss, dynamic=False) if args.compile else self._loss

    def _loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(ids[:, :-1], self.cache)
        each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        return (each * weight).sum() / weight.sum()

    def step(self, batches: Batches) -> Tensor:
        total = torch.zeros((), device=self.device)
        n_part = max(1, self.args.batch_tokens // (batches.rows * batches.length))
        for _ in range(n_part):
            loss = self.loss(*batches.next(self.device)) / n_part
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.n_step + 1) / 100)
        scale = warm * min(1.0, (1 - self.done) / (1 - PEAK_SHARE))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * max(scale, 1e-4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.n_step += 1
        self.n_token += n_part * batches.rows * batches.length
        return total

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "done": self.done, "n_step": self.n_step, "n_token": self.n_token, "curve": self.curve,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.done, self.n_step, self.n_token = state["done"], state["n_step"], state["n_token"]
        self.curve = state["curve"]


def train(trainer: Trainer, tokens: np.ndarray, processor: Any, args: argparse.Namespace, state: Path) -> None:
    """Until the time is spent; a part of it already spent before an interruption counts."""
    seconds = args.minutes * 60
    began = time.perf_counter() - trainer.done * seconds
    saved = time.perf_counter()
    bar = tqdm(total=100, unit="%", disable=not sys.stderr.isatty())
    for length, until in ((min(SHORT, args.context), args.short_share), (args.context, 1.0)):
        if trainer.done >= until:
            continue
        rows = max(1, args.part_tokens // length)
        batches = Batches(tokens, processor, rows, length, args.seed + trainer.n_step)
        while trainer.done < until:
            loss = trainer.step(batches)
            if trainer.n_step % 20 == 0:
                value = loss.item()  # also keeps the host from running ahead of the clock
                if not math.isfinite(value):
                    raise UserError(f"the loss is not finite at step {trainer.n_step}")
                spent = time.perf_counter() - began
                trainer.curve.append({"step": trainer.n_step, "seconds": round(spent, 1), "loss": round(value, 4)})
                bar.set_postfix(loss=f"{value:.3f}", length=length, refresh=False)
                if trainer.n_step % 200 == 0:
                    print(f"step {trainer.n_step} length {length} tokens {trainer.n_token / 1e6:.0f}M "
                          f"loss {value:.4f} {spent:.0f} s", flush=True)  # fmt: skip
                trainer.done = min(1.0, spent / seconds)
                bar.update(round(trainer.done * 100 - bar.n, 1))
                if time.perf_counter() - saved > 60:
                    trainer.save(state)
                    saved = time.perf_counter()
            if args.max_steps and trainer.n_step >= args.max_steps:
                batches.stop()
                return
        batches.stop()
    bar.close()


def make_parser() -> Parser:
    p = Parser("train_demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, nargs="+", required=True, help="training text, plain or .xz")
    p.add_argument("--extra", type=Path, nargs="*", default=[], help="more text, read --extra_passes times a pass")
    p.add_argument("--extra_passes", type=positive, default=1)
    p.add_argument("--val", type=Path, required=True, help="held-out text")
    p.add_argument("--export", type=Path, required=True, help="the folder that the checkpoint is written to")
    p.add_argument("--state", type=Path, default=Path("outputs/train_demo.pt"), help="where a run is kept")
    p.add_argument("--resume", action="store_true", help="go on from --state")
    p.add_argument("--init", type=Path, metavar="FOLDER", help="start from an exported checkpoint")
    p.add_argument("--tokenizer", type=Path, help="a SentencePiece model, instead of training one")
    p.add_argument("--minutes", type=float, default=9.0, help="of training (default: 9)")
    p.add_argument("--max_steps", type=int, default=0, help="stop after so many steps, as if interrupted")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument(
        "--weight_decay", type=float, default=0.6,
        help="of matrices; many passes over little text want much: what is learnt is forgotten in "
        "1 / (lr * weight_decay) steps, and the text's details before its rules (default: 0.6)",
    )  # fmt: skip
    p.add_argument("--embedding_decay", type=float, default=0.1, help="the same, of the embeddings (default: 0.1)")
    p.add_argument("--dropout", type=float, default=0.1, help="while training; for many passes too (default: 0.1)")
    p.add_argument("--short_share", type=float, default=0.6, help=f"of the time, on {SHORT} tokens (default: 0.6)")
    p.add_argument("--batch_tokens", type=positive, default=262_144, help="of one step")
    p.add_argument("--part_tokens", type=positive, default=65_536, help="of one forward and backward pass")
    p.add_argument("--vocab_size", type=positive, default=4096)
    p.add_argument("--dim", type=positive, default=256)
    p.add_argument("--n_layer", type=positive, default=10)
    p.add_argument("--n_head", type=positive, default=4)
    p.add_argument("--n_kv_head", type=positive, default=2)
    p.add_argument("--ffn_dim", type=positive, default=672)
    p.add_argument("--context", type=positive, default=8192)
    p.add_argument("--rope_theta", type=float, default=500_000.0)
    p.add_argument("--trials", type=positive, default=50, help="passkeys a cell in the final scores")
    return p


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    for path in [*args.text, *args.extra, args.val]:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    texts = [demo_data.read_text(path) for path in args.text]
    extra = [demo_data.read_text(path) for path in args.extra]
    given = args.init / "tokenizer.model" if args.init else args.tokenizer
    model_bytes = given.read_bytes() if given else demo_data.train_tokenizer(texts + extra, args.vocab_size, args.seed)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    parts = [demo_data.encode_texts(processor, text) for text in texts + extra * args.extra_passes]
    tokens = np.concatenate(parts)
    val = demo_data.encode_texts(processor, demo_data.read_text(args.val))
    if min(len(tokens), len(val)) < 2 * args.context:
        raise UserError(f"the text is too short: a context of {args.context} needs twice as many tokens")
    config = Config(
        processor.vocab_size(), args.dim, args.n_layer, args.n_head, args.n_kv_head, args.ffn_dim, args.context,
        rope_theta=args.rope_theta, tied_embeddings=True,
    )  # fmt: skip
    model = new_model(config, device, args.seed)
    if args.init:
        model.load_state_dict(load_model(open_checkpoint(args.init, None), device, torch.float32).state_dict())
    model.rope(torch.zeros(1, 1, dtype=torch.int64, device=device))  # moves its frequencies, before compiling
    trainer = Trainer(model, args, device)
    require_writable(args.state, "--state")
    require_writable(args.export / "model.safetensors", "--export")
    if args.resume:
        trainer.load(args.state)
    n = sum(p.numel() for p in model.parameters())
    print(f"{n / 1e6:.2f} M parameters, {len(tokens) / 1e6:.1f} M tokens of text", flush=True)
    train(trainer, tokens, processor, args, args.state)
    trainer.save(args.state)
    export(model, model_bytes, args.export)
    model.eval()
    sizes = demo_data.token_bytes(processor)
    scores = {
        "text": score_text(model, trainer.cache, val, sizes),
        "training_text": score_text(model, trainer.cache, tokens[: min(len(val), len(tokens))], sizes),
        "passkeys": score_passkeys(model, trainer.cache, val, processor, args.trials, args.seed),
    }
    (args.export / "README.md").write_text(card(model, vars(trainer), scores, args))
    print(json.dumps(scores))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = make_parser().parse(argv)
        args.shown = [Path(word).name if "/" in word else word for word in argv]  # no one's folders in the card
        run(args)
    except UserError as error:
        print(f"train_demo.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
