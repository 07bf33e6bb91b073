"""What each cache costs in quality, through the cache: perplexity, divergence, passkeys, RULER, ROUGE-L.

  python scripts/evaluate.py perplexity --text val_books.txt.xz --context 8192 --windows 8
  python scripts/evaluate.py divergence --text my.txt --caches quantize_kv:sink_size=16,window_size=32
  python scripts/evaluate.py passkey --lengths 1024 8192 --trials 4
  python scripts/evaluate.py ruler --lengths 1024 4096 --trials 10 --tasks niah_single vt
  python scripts/evaluate.py rouge --text stories.jsonl --context 8192

The full cache is always the reference, and always run. Texts are scored as token-by-token decoding would
leave the cache (scoring.py: the exact parallel form, or `--sequential`). Without a text the model writes
one with the full cache, whose entropy the same run tells. A table goes to standard output; with
`--json FILE` a record with everything needed to repeat it.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin long while they wait take the processor from whoever else needs it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
from torch import Tensor

from cli.console import shown
from cli.options import Parser, add_plugin_flag, load_plugin, positive
from cli.provenance import FORMAT, made_from
from common.errors import UserError
from common.files import require_writable, to_json, write_whole
from common.messages import note, progress
from common.program import program
from evaluation import scoring
from evaluation.after import After
from evaluation.kept import FLAG, Kept, without_flag
from evaluation.passkeys import score_passkeys
from evaluation.ruler import score_ruler
from evaluation.ruler_tasks import TASKS
from evaluation.subject import Subject, Text, groups
from evaluation.summaries import score_summaries
from evaluation.tables import PRINTERS
from kv_cache import format_policy
from model import Transformer
from selective_kv import FullCache, KVCache

ROOT = Path(__file__).parents[1]
CACHES = [
    "quantize_kv:sink_size=16,window_size=32",
    "quantize_kv:sink_size=4,window_size=256",
    "compress_kv:sink_size=16,window_size=32",
    "compress_kv:sink_size=4,window_size=256",
]
CACHES_HELP = (
    "beside the full cache: a name, and knobs after a colon, as in quantize_kv:window_size=128,k_bits=4,v_bits=4 "
    f"(default: {' '.join(CACHES)})"
)
MOST_NLL = 700.0  # nats: the exponential of more is no number any more
SETTINGS = {  # what a record names of the command line, defaults included
    "perplexity": ("context", "windows", "sequential", "batch"),
    "divergence": ("context", "windows", "sequential", "batch"),
    "passkey": ("lengths", "depths", "trials", "batch"),
    "ruler": ("lengths", "tasks", "trials", "chat", "batch"),
    "rouge": ("context", "documents", "max_new_tokens", "batch"),
}
Save = Callable[[list[dict[str, Any]]], None]  # called with the rows that are done


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error over windows; none from a single one."""
    t = torch.tensor(values, dtype=torch.float64)
    return t.mean().item(), (t.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def score_texts(subject: Subject, save: Save) -> list[dict[str, Any]]:
    """One row per text and setting, with everything that perplexity and divergence report."""
    rows: list[dict[str, Any]] = []
    texts = subject.texts()
    runs = [(subject.model, str(subject.weights or 16), policy) for policy in subject.policies]
    if subject.reference is not subject.model:
        runs.insert(0, (subject.reference, "16", FullCache()))
    longest = max(len(window) for text in texts for window in text.windows)
    path = subject.args.load_cache
    after = None if path is None else After(path, subject, longest)

    def states_of(model: Transformer, policy: KVCache, tokens: Tensor) -> Tensor:
        """[text, token, dim]"""
        if after is not None:
            return torch.stack([after.read(policy, text) for text in tokens])
        return scoring.reader(policy, subject.args.sequential)(model, policy, tokens)

    def full_states(name: str, tokens: Tensor) -> Tensor:
        def make() -> dict[str, Tensor]:
            return {"states": states_of(subject.reference, FullCache(), tokens)}

        return subject.kept.result(f"states-{name}", tokens.flatten().tolist(), make)["states"].to(subject.device)

    def scores(model: Transformer, tokens: Tensor, states: Tensor, full: Tensor) -> list[scoring.Scored]:
        return [scoring.score(model, *w, subject.reference) for w in zip(tokens, states, full, strict=True)]

    def full_scores(n: int, name: str, tokens: Tensor, full: Tensor) -> list[scoring.Scored]:
        """The full cache's in run n."""
        model = runs[n][0]

        def make() -> dict[str, Tensor]:
            states = full if model is subject.reference else states_of(model, FullCache(), tokens)
            found = [vars(scored) for scored in scores(model, tokens, states, full)]
            return {field: torch.stack([scored[field] for scored in found]) for field in found[0]}

        kept = subject.kept.result(f"score-{n}-{name}", tokens.flatten().tolist(), make)
        return [scoring.Scored(**{field: values[w] for field, values in kept.items()}) for w in range(len(tokens))]

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
                row_of(text, subject, policy, results, scored[0], n_bytes) | {"weights": weights}
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
        "by_position": by_position(results), **subject.memory(policy, subject.args.context),
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
        "made_from": made_from(subject.path, read_files(subject.args), subject.dtype, subject.device),
    }  # fmt: skip


def make_parser() -> Parser:
    p = Parser("evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=tuple(SETTINGS))
    p.add_argument("--checkpoint_path", type=Path, help="(default: the bundled model)")
    p.add_argument("--model", metavar="NAME")
    p.add_argument(
        "--weights", metavar="SETTING",
        help="as for generate.py; perplexity and divergence compare with the full cache and weights as they are",
    )  # fmt: skip
    p.add_argument("--dtype", default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument("--caches", nargs="+", default=CACHES, metavar="CACHE", help=CACHES_HELP)
    add_plugin_flag(p)
    p.add_argument("--text", type=Path, nargs="+", default=[], help="plain or .xz; passkey: filler; rouge: JSONL")
    p.add_argument("--context", type=positive, default=2048, help="tokens of a window (default: 2048)")
    p.add_argument("--windows", type=positive, default=4, help="windows of each text, evenly spread (default: 4)")
    p.add_argument(
        "--batch", type=positive, default=1,
        help="windows, passkeys, samples or documents that the model reads together: faster on a GPU (default: 1)",
    )  # fmt: skip
    p.add_argument("--sequential", action="store_true", help="token by token through the cache: slow, the same")
    p.add_argument(
        "--load_cache", type=Path, metavar="FILE",
        help="perplexity, divergence: texts are scored after the one that this full cache of generate.py's holds",
    )  # fmt: skip
    p.add_argument("--lengths", nargs="+", type=positive, default=[1024, 2048, 4096])
    p.add_argument("--depths", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    p.add_argument("--trials", type=positive, default=4, help="passkeys or RULER samples a cell (default: 4)")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"RULER's: {', '.join(TASKS)}")
    p.add_argument("--chat", action="store_true", help="RULER's prompts as a user's turn, by the checkpoint's template")
    p.add_argument("--documents", type=positive, default=25, help="rouge: how many (default: 25)")
    p.add_argument("--max_new_tokens", type=positive, default=128, help="rouge: of a summary (default: 128)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    p.add_argument(
        FLAG, type=Path, metavar="FOLDER",
        help="keep there what the full cache gives, for other runs over the same, and take it from there",
    )  # fmt: skip
    return p


def unfinished(path: Path) -> Path:
    """Where a record stands until it is whole: a crash loses none of it, and none of an older one."""
    return path.with_name(f"{path.stem}.unfinished{path.suffix}")


def run(args: argparse.Namespace, argv: list[str]) -> None:
    if any(not 0 <= depth <= 1 for depth in args.depths):
        raise UserError("--depths lie between 0 and 1")
    args.lengths, args.depths = sorted(set(args.lengths)), sorted(set(args.depths))
    if args.kind in ("perplexity", "divergence") and args.context < 2:
        raise UserError("--context 1: the first token has no score")
    if args.json:
        require_writable(args.json, "--json")
    if args.model is not None and args.checkpoint_path is None:
        raise UserError(f"--model {args.model} is a shape, and its weights are evaluated: give --checkpoint_path")
    if args.load_cache and args.kind not in ("perplexity", "divergence"):
        raise UserError(f"--load_cache goes with perplexity and divergence, not {args.kind}")
    note("loading the model")
    subject = Subject(args)
    if args.kind not in ("passkey", "ruler") and args.context > subject.config.context:
        raise UserError(f"--context {args.context} is past the model's context of {subject.config.context}")
    about: dict[str, Any] = {}
    if args.json or args.keep_full:
        note("fingerprints of weights and texts")
        about = record(subject, argv)
    subject.kept = Kept(args.keep_full, about)

    def save(rows: list[dict[str, Any]], path: Path | None = None) -> None:
        if args.json:
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
        unfinished(args.json).unlink(missing_ok=True)
    PRINTERS[args.kind](rows)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with program("evaluate.py", "interrupted; with --json FILE, what was done is in FILE's .unfinished.json"):
        load_plugin(argv)
        run(make_parser().parse(argv), argv)
