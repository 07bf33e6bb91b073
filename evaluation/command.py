"""What scripts/evaluate.py does once its flags have been read: runs, rows and the record of them."""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cli.console import shown
from cli.provenance import FORMAT, made_from
from common.errors import UserError
from common.files import is_special, require_writable, to_json, write_whole
from common.messages import note, progress
from evaluation import scoring
from evaluation.after import After
from evaluation.flags import SETTINGS, main, make_parser
from evaluation.full_results import FullResults, without_flag
from evaluation.passkeys import score_passkeys
from evaluation.ruler import score_ruler
from evaluation.subject import Subject, Text, groups
from evaluation.summaries import score_summaries
from evaluation.tables import PRINTERS
from kv_cache import format_policy
from model import Transformer
from selective_kv import FullCache, KVCache

__all__ = ["main", "make_parser", "run", "score_texts"]

ROOT = Path(__file__).parents[1]
MOST_NLL = 700.0  # nats: the exponential of more is no number any more
Save = Callable[[list[dict[str, Any]]], None]  # called with the rows that are done


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error over windows; none from a single one."""
    t = torch.tensor(values, dtype=torch.float64)
    return t.mean().item(), (t.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def score_texts(subject: Subject, save: Save) -> list[dict[str, Any]]:
    """One row per text and setting, with everything that perplexity and divergence report."""
    rows: list[dict[str, Any]] = []
    texts = subject.texts()
    runs = [(subject.model, subject.weights_name, policy) for policy in subject.policies]
    if subject.reference is not subject.model:
        runs.insert(0, (subject.reference, "16", FullCache()))
    longest = max(len(window) for text in texts for window in text.windows)
    path = subject.args.load_cache
    after = None if path is None else After(path, subject, longest)
    n_held = longest if after is None else after.n_token + longest

    def states_of(model: Transformer, policy: KVCache, tokens: Tensor) -> Tensor:
        """[text, token, dim]"""
        if after is not None:
            return torch.stack([after.read(policy, text) for text in tokens])
        return scoring.reader(policy, subject.args.sequential)(model, policy, tokens)

    def full_states(name: str, tokens: Tensor) -> Tensor:
        def make() -> dict[str, Tensor]:
            return {"states": states_of(subject.reference, FullCache(), tokens)}

        found = subject.full_results.result(f"states-{name}", tokens.flatten().tolist(), make)
        return found["states"].to(subject.device)

    def scores(model: Transformer, tokens: Tensor, states: Tensor, full: Tensor) -> list[scoring.Scored]:
        return [scoring.score(model, *w, subject.reference) for w in zip(tokens, states, full, strict=True)]

    def full_scores(n: int, name: str, tokens: Tensor, full: Tensor) -> list[scoring.Scored]:
        """The full cache's in run n."""
        model = runs[n][0]

        def make() -> dict[str, Tensor]:
            states = full if model is subject.reference else states_of(model, FullCache(), tokens)
            found = [vars(scored) for scored in scores(model, tokens, states, full)]
            return {field: torch.stack([scored[field] for scored in found]) for field in found[0]}

        found = subject.full_results.result(f"score-{n}-{name}", tokens.flatten().tolist(), make)
        return [scoring.Scored(**{field: values[w] for field, values in found.items()}) for w in range(len(tokens))]

    bar = progress(None, sum(len(t.windows) for t in texts) * len(runs), "scoring")
    for t, text in enumerate(texts):
        done = list(rows)
        scored: list[list[scoring.Scored]] = [[] for _ in runs]
        n_bytes = 0
        for g, group in enumerate(groups(text.windows, subject.args.batch)):  # the reference's states of one at a time
            tokens = torch.stack([*group]).to(subject.device)
            full = full_states(f"{t}-{g}", tokens)
            for n, (results, (model, _, policy)) in enumerate(zip(scored, runs, strict=True)):
                if policy.name == FullCache.name:
                    results += full_scores(n, f"{t}-{g}", tokens, full)
                else:
                    states = states_of(model, policy, tokens)
                    results += scores(model, tokens, states, full)
                bar.update(len(group))
            n_bytes += sum(subject.text_bytes(window[1:]) for window in group)
            rows = done + [
                row_of(text, subject, policy, results, scored[0], n_bytes)
                | {"weights": weights, **subject.memory(policy, n_held)}
                for (_, weights, policy), results in zip(runs, scored, strict=True)
            ]
            save(rows)
    bar.close()
    return rows


def row_of(
    text: Text, subject: Subject, policy: KVCache, results: list[scoring.Scored], full: list[scoring.Scored],
    n_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """NLLs are summed, divided, and exponentiated once. Errors are over windows, a rise's over paired ones."""
    nll = torch.cat([r.nll for r in results])
    kl = torch.cat([r.kl for r in results if r.kl is not None])
    mean, error = mean_and_error([r.nll.mean().item() for r in results])
    if mean > MOST_NLL:
        raise UserError(f"{format_policy(policy)} on {text.name}: {mean:.0f} nats a token: no model of this text")
    rise, rise_error = mean_and_error(
        [(r.nll.mean() - f.nll.mean()).item() for r, f in zip(results, full, strict=True)]
    )
    same, same_error = mean_and_error([r.same_top.mean().item() for r in results if r.same_top is not None])
    return {
        "text": text.name, "sha256": text.sha256, "sampled": text.sampled, "cache": format_policy(policy),
        "tokens": len(nll), "windows": len(results), "perplexity": math.exp(mean), "nll": mean, "nll_error": error,
        "bits_per_byte": nll.sum().item() / math.log(2) / n_bytes if n_bytes else None,
        "perplexity_rise": math.expm1(rise), "perplexity_rise_error": rise_error,
        "kl": kl.mean().item(),
        "kl_error": mean_and_error([r.kl.mean().item() for r in results if r.kl is not None])[1],
        "kl_p99": float(np.quantile(kl.numpy(), 0.99)), "same_top": same, "same_top_error": same_error,
        "by_position": by_position(results),
    }  # fmt: skip


def by_position(results: list[scoring.Scored]) -> dict[str, dict[str, float | None]]:
    """Mean NLL, with its error over windows, and KL of the tokens in each stretch of a window."""
    found: dict[str, dict[str, float | None]] = {}
    n_token = max(len(r.nll) for r in results)
    for lo, hi in pairwise(scoring.POSITIONS):
        if lo > n_token:
            break
        here = slice(max(lo, 1) - 1, hi - 1)  # token 0 has no score
        mean, error = mean_and_error([r.nll[here].mean().item() for r in results])
        kl = torch.stack([r.kl[here].mean() for r in results if r.kl is not None]).mean().item()
        found[f"{lo}-{hi}"] = {"nll": mean, "nll_error": error, "kl": kl}
    return found


def commit() -> str | None:
    """The checkout's, where git is there to ask."""
    if shutil.which("git") is None:
        return None
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


def read_files(args: argparse.Namespace) -> list[Path | None]:
    return [*args.text, args.plugin, args.load_cache]


def record(subject: Subject, argv: list[str]) -> dict[str, Any]:
    """What it takes to repeat a run; its rows come into it as they are made."""
    kind = subject.args.kind
    return {
        "kind": kind, "format": FORMAT, "model": subject.name, "dtype": str(subject.dtype).removeprefix("torch."),
        "weights": str(subject.weights or 16), "device": str(subject.device), "seed": subject.args.seed,
        "torch": torch.__version__, "python": sys.version.split()[0], "commit": commit(),
        "settings": {name: getattr(subject.args, name) for name in SETTINGS[kind]},
        "command": ["scripts/evaluate.py", *shown(without_flag(argv))],
        "made_from": made_from(
            subject.path, read_files(subject.args), subject.dtype, subject.device, subject.args.reference_path
        ),
    }  # fmt: skip


def unfinished(path: Path) -> Path:
    """Where a record stands until it is whole: a crash loses none of it, and none of an older one."""
    return path.with_name(f"{path.stem}.unfinished{path.suffix}")


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Load the model, score the settings, print a table and write the record. Raises UserError."""
    args.lengths, args.depths = sorted(set(args.lengths)), sorted(set(args.depths))
    if args.json:
        require_writable(args.json, "--json")
    note("loading the model")
    subject = Subject(args)
    if args.kind not in ("passkey", "ruler") and args.context > subject.config.context:
        raise UserError(f"--context {args.context} is past the model's context of {subject.config.context}")
    about: dict[str, Any] = {}
    if args.json or args.keep_full:
        note("fingerprints of weights and texts")
        about = record(subject, argv)
    subject.full_results = FullResults(args.keep_full, about)
    beside = args.json and not is_special(args.json)  # /dev, say, is no folder for files

    def save(rows: list[dict[str, Any]], path: Path | None = None) -> None:
        if args.json and (path is not None or beside):
            whole = about | {"finished": path is not None, "rows": rows}
            write_whole(path or unfinished(args.json), to_json(whole) + "\n")

    if args.kind == "passkey":
        rows = score_passkeys(subject, save)
    elif args.kind == "ruler":
        rows = score_ruler(subject, save)
    elif args.kind == "rouge":
        rows = score_summaries(subject, save)
    else:
        rows = score_texts(subject, save)
    if args.json:  # before the table, whose reader may have left
        save(rows, args.json)
    if beside:
        unfinished(args.json).unlink(missing_ok=True)
    PRINTERS[args.kind](rows)
