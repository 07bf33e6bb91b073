"""The three caches side by side, on a CPU, in a minute: a story that each continues, and a number to remember.

The passkey test hides a number in a text that the model has just written itself, far before the question,
and each cache then answers from what it holds. Dropping the middle forgets; quantising it does not.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin long while they wait take the processor from whoever else needs it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from tqdm import tqdm

from checkpoint import end_ids, find_demo, load_model, open_checkpoint, parse_device, parse_dtype
from cli.options import Parser, positive
from common.errors import UserError, printable
from common.messages import size
from common.program import program
from engine import Engine, Sampling
from evaluation import passkey
from kv_cache import ModelCache
from model import Transformer
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache
from tokenizer import Tokenizer

STORY = "Once upon a time there was a little girl who lived near the sea."
TRIALS = 3
ANSWER_TOKENS = 8


class Demo:
    """The demo's model, caches and trials."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        device = parse_device(args.device)
        self.checkpoint = open_checkpoint(args.checkpoint_path or find_demo(), None)
        tokenizer = self.checkpoint.tokenizer()
        if tokenizer is None:
            raise UserError(f"{self.checkpoint.path}: the demo needs a tokenizer with the weights")
        self.tokenizer: Tokenizer = tokenizer
        dtype = parse_dtype("auto", self.checkpoint, device)
        c = self.checkpoint.config
        self.length = min(args.length, c.context - ANSWER_TOKENS)
        least = max(self.shortest(trial) for trial in range(TRIALS))
        if self.length < least:
            raise UserError(f"--length {args.length}: the passkey test takes at least {least} tokens")
        self.shape = Shape(1, c.n_kv_head, c.head_dim, self.length + ANSWER_TOKENS, dtype, device)
        self.model: Transformer = load_model(self.checkpoint, device, dtype)
        self.policies: list[KVCache] = [FullCache(), SinkWindowCache(16, 32), SelectiveCache(16, 32)]
        self.bar = tqdm(total=3 + 1 + 3 * TRIALS, disable=not sys.stderr.isatty(), leave=False)

    def shortest(self, trial: int) -> int:
        """The least tokens of a prompt that hides this trial's number and asks for it."""
        name, key = passkey.draw(random.Random(trial))
        hidden = passkey.needle(name, key) + passkey.question(name)
        return len(self.tokenizer.encode(hidden, bos=False)) + 4  # a beginning, and halves that split otherwise

    def engine(self, policy: KVCache, sampling: Sampling, batch: int = 1, capacity: int = 0) -> Engine:
        shape = Shape(
            batch, self.shape.n_kv_head, self.shape.head_dim, capacity or self.shape.capacity,
            self.shape.dtype, self.shape.device,
        )  # fmt: skip
        cache = ModelCache(policy, self.checkpoint.config.n_layer, shape)
        return Engine(self.model, cache, sampling, end_ids(self.checkpoint, self.tokenizer), lag=0)

    def story(self, policy: KVCache) -> tuple[str, float]:
        """The story's next tokens and the speed of writing them."""
        ids = self.tokenizer.encode(STORY)
        n_new = min(self.args.story_tokens, self.checkpoint.config.context - len(ids))
        engine = self.engine(policy, Sampling(temperature=0.7, top_k=40, seed=7), capacity=len(ids) + n_new)
        new = [row[0] for row in engine.generate([ids], n_new)]
        self.bar.update()
        return self.tokenizer.decode([*ids, *(t for t in new if t is not None)]), engine.timing.decode_tokens_per_second

    def filler(self) -> list[int]:
        """Text to hide a number in: what the model writes itself, several stories at once."""
        starts = ["Once upon a time", "In the morning", "The old man", "It was a dark night"] * 2
        prompts = [self.tokenizer.encode(start, bos=False) for start in starts]
        n_new = -(-self.length // len(prompts))
        engine = self.engine(FullCache(), Sampling(seed=1), len(prompts), n_new + 16)
        engine.end_ids = frozenset()
        rows = list(engine.generate(prompts, n_new))
        self.bar.update()
        columns = zip(*rows, strict=True)
        return [t for p, column in zip(prompts, columns, strict=True) for t in (*p, *column) if t is not None]

    def remembers(self, policy: KVCache, filler: list[int], trial: int) -> tuple[str, str, dict[str, int]]:
        """Hide a key, ask for it: the key, the answer, and the cache's bytes. The body is read first, so that the
        question finds it only in the cache."""
        name, key = passkey.draw(random.Random(trial))

        def encode(text: str) -> list[int]:
            return self.tokenizer.encode(text, bos=False)

        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        ids, _ = passkey.make_prompt(encode, filler, self.length, (trial + 1) / (TRIALS + 2), name, key, bos)
        n_body = len(ids) - len(encode(passkey.question(name)))
        engine = self.engine(policy, Sampling(temperature=0))
        engine.read([ids[:n_body]])
        rows = engine.generate([ids[n_body:]], ANSWER_TOKENS)
        text = self.tokenizer.decode([t for row in rows for t in row if t is not None])
        self.bar.update()
        return key, "".join(itertools.takewhile(str.isdigit, text.strip())), engine.cache.nbytes()

    def run(self) -> None:
        stories = [self.story(policy) for policy in self.policies]
        filler = self.filler()
        trials = [[self.remembers(p, filler, t) for t in range(TRIALS)] for p in self.policies]
        self.bar.close()
        names = [p.name for p in self.policies]
        name = printable(self.checkpoint.name, 80)
        print(f"\n{name} on {self.shape.device}; sink 16, window 32. The same story, by each cache:\n")
        print_columns([f"{name}\n{'-' * len(name)}\n{text}" for name, (text, _) in zip(names, stories, strict=True)])
        print(f"\nA number hidden in {self.length} tokens, asked for at their end:\n")
        full = sum(trials[0][0][2].values())
        print(f"{'cache':<14}{'cache bytes':>14}{'of full':>9}{'story tok/s':>13}   answers (the number hidden)")
        for name, (_, speed), results in zip(names, stories, trials, strict=True):
            n_bytes = sum(results[0][2].values())
            answers = ", ".join(f"{answer or '(none)'} ({key})" for key, answer, _ in results)
            right = sum(answer == key for key, answer, _ in results)
            print(f"{name:<14}{size(n_bytes):>14}{n_bytes / full:>9.0%}{speed:>13.1f}   {right} of {TRIALS}: {answers}")


def print_columns(texts: list[str]) -> None:
    """Texts side by side, wrapped to the terminal."""
    width = max(24, min(130, shutil.get_terminal_size((110, 24)).columns) // len(texts) - 3)
    columns: list[list[Any]] = [
        [part for line in text.split("\n") for part in (textwrap.wrap(line, width) or [""])] for text in texts
    ]
    for cells in itertools.zip_longest(*columns, fillvalue=""):
        print(" | ".join(f"{cell:<{width}}" for cell in cells).rstrip())


def main(argv: list[str] | None = None) -> None:
    p = Parser("demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint_path", type=Path, help="another checkpoint than the bundled one")
    p.add_argument("--device", default="cpu")
    p.add_argument("--length", type=positive, default=2048, help="tokens of the passkey test (default: 2048)")
    p.add_argument("--story_tokens", type=positive, default=120, help="tokens written (default: 120)")
    with program("demo.py"):
        torch.manual_seed(0)
        Demo(p.parse(sys.argv[1:] if argv is None else argv)).run()
