"""A trained checkpoint's scores and its card: bits per byte by position, passkeys by length and depth."""

from __future__ import annotations

import argparse
import math
import random
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common.messages import progress
from evaluation import passkey
from evaluation.scoring import POSITIONS
from model import Cache, Transformer

PASSKEY_LENGTHS = (1024, 2048, 4096, 8192)


@torch.inference_mode()
def score_text(model: Transformer, cache: Cache, tokens: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """Bits per byte of whole windows of `context` tokens, over all and by position in the window."""
    context, device = model.config.context, model.norm.weight.device
    n = (len(tokens) - 1) // context
    sums = {lo: [0.0, 0] for lo in POSITIONS[:-1] if lo < context}
    for i in progress(range(n), n, "windows"):
        ids = torch.from_numpy(tokens[i * context : (i + 1) * context + 1].astype(np.int64)).to(device)[None]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(ids[:, :-1], cache)
        nll = F.cross_entropy(logits[0].float(), ids[0, 1:], reduction="none").double().cpu()
        size = sizes[ids[0, 1:].cpu().numpy()]
        for lo, hi in pairwise(POSITIONS):
            if lo < context:
                sums[lo][0] += float(nll[lo:hi].sum())
                sums[lo][1] += int(size[lo:hi].sum())
    by = {f"{lo}-{hi}": sums[lo][0] / math.log(2) / max(1, sums[lo][1])
          for lo, hi in pairwise(POSITIONS) if lo in sums}  # fmt: skip
    bits = sum(s for s, _ in sums.values()) / math.log(2) / sum(b for _, b in sums.values())
    return {"windows": n, "context": context, "bits_per_byte": bits, "by_position": by}


@torch.inference_mode()
def score_passkeys(
    model: Transformer, cache: Cache, tokens: np.ndarray, processor: Any, trials: int, seed: int
) -> dict[str, Any]:
    """Share of keys whose every digit is the likeliest token (which is greedy decoding), by length and depth."""
    rng, device = random.Random(seed), model.norm.weight.device
    table: dict[str, dict[str, float]] = {}
    for length in (n for n in PASSKEY_LENGTHS if n <= model.config.context):
        table[str(length)] = {}
        for tenth in progress(range(11), 11, f"passkeys at {length}"):
            right = 0
            for _ in range(trials):
                start = rng.randrange(len(tokens) - length)
                name, key = passkey.draw(rng)
                filler = tokens[start : start + length].tolist()
                ids, reply = passkey.make_prompt(
                    processor.encode, filler, length - 8, tenth / 10, name, key, [processor.bos_id()]
                )
                batch = torch.tensor([ids + reply[:-1]], device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = model(batch, cache)
                right += logits[0, len(ids) - 1 :].argmax(-1).tolist() == reply
            table[str(length)][f"{tenth * 10}%"] = right / trials
    return table


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def shown(argv: Sequence[str]) -> str:
    """The command for the card: as it was given, but for folders, which are no one else's business."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(flag + equals + ((Path(value).name or value) if "/" in value else value))
    return shlex.join(["python", "scripts/train_demo.py", *words])


def made_by(run: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The card's lines on files, commands, devices and time: what is known of every run since the first."""
    runs, minutes = run["runs"], run["done"] * args.minutes
    files = dict.fromkeys(line for each in runs for line in each["files"])
    commands = [f"`{each['command']}`" for each in runs]
    tokens = f"{run['n_token'] / 1e6:.0f} M" if run["n_token"] > 10e6 else f"{run['n_token']:,}"
    time = f"{minutes:.3g} minutes" if minutes >= 1 else f"{minutes * 60:.2g} seconds"
    devices = ", then one ".join(dict.fromkeys(each["device"] for each in runs))
    return [
        "Trained by `scripts/train_demo.py` on the files below; a tenth of the sequences hide passkeys or repeat a "
        "passage far on.",
        "",
        *(f"- {line}" for line in files),
        "",
        *(["Each command goes on from where the one before was interrupted:", ""] if len(runs) > 1 else []),
        *(f"- Command: {command}" for command in commands),
        f"- {run['n_step']} steps, {tokens} tokens, seed {args.seed}, one {devices}, torch {torch.__version__}, {time}",
    ]


def card(model: Transformer, run: dict[str, Any], scores: dict[str, Any], args: argparse.Namespace) -> str:
    """The model card, from the run's own figures: n_step, n_token, done, curve and runs."""
    c = model.config
    curve = run["curve"][:: max(1, len(run["curve"]) // 12)]
    curve += [point for point in run["curve"][-1:] if point not in curve]
    text, keys = scores["text"], scores["passkeys"]
    computed = "bfloat16" if model.norm.weight.device.type == "cuda" else "float32"
    lines = [
        f"# {args.export.resolve().name}",
        "",
        f"A Llama of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters: dim {c.dim}, {c.n_layer} "
        f"layers, {c.n_head} heads of {c.head_dim}, {c.n_kv_head} KV heads, SwiGLU {c.ffn_dim}, {c.vocab_size} pieces, "
        f"tied embeddings, RoPE theta {c.rope_theta:g}, {c.context} tokens of context; bfloat16.",
        "",
        *made_by(run, args),
        "",
        "| step | seconds | training loss (weighted, nats) |",
        "|---:|---:|---:|",
        *(f"| {p['step']} | {p['seconds']} | {p['loss']} |" for p in curve),
        "",
        f"Held-out text ({text['windows']} windows of {text['context']} tokens, full attention, {computed}): "
        f"**{text['bits_per_byte']:.4f} bits per byte**; by position in the window:",
        "",
        "| " + " | ".join(text["by_position"]) + " |",
        "|" + "---:|" * len(text["by_position"]),
        "| " + " | ".join(f"{v:.4f}" for v in text["by_position"].values()) + " |",
        "",
        f"As much of the text it was trained on: {scores['training_text']['bits_per_byte']:.4f} bits per byte.",
    ]
    if keys:
        lines += [
            "",
            f"Passkeys of five digits, exact, {args.trials} a cell, by length and depth:",
            "",
            "| length | " + " | ".join(next(iter(keys.values()))) + " |",
            "|---:|" + "---:|" * 11,
            *(f"| {n} | " + " | ".join(f"{v:.0%}" for v in row.values()) + " |" for n, row in keys.items()),
        ]
    return "\n".join(lines) + "\n"
