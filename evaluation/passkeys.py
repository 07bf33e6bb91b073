"""Passkeys through the caches: numbers hidden at several depths of texts of several lengths, and asked for."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.messages import progress
from evaluation import passkey
from evaluation.subject import Subject, Text, groups, read_text, sha256_of
from kv_cache import format_policy

ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Trial:
    """One hidden key. cell: its length and depth, as the record names them."""

    cell: tuple[str, str]
    ids: list[int]  # up to where the key must follow
    n_body: int  # tokens before the question
    key: str


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share of n trials (Wilson 1927): sensible at 0 and at n, where a standard error is not."""
    share = right / n
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def filler_of(subject: Subject, longest: int) -> tuple[str, str, list[int]]:
    """Text to hide keys in: its name, its sha256 and its ids, 2 * longest of them or more."""
    if subject.args.text:
        path = subject.args.text[0]
        text = read_text(path)
        name, digest, ids = path.name, sha256_of(text), subject.encode(text)
    else:
        own: Text = subject.own_text(8, min(512, subject.config.context))
        name, digest, ids = own.name, own.sha256, [i for window in own.windows for i in window[1:].tolist()]
    if len(ids) < longest:
        print(f"{name}: {len(ids)} tokens are repeated to fill {longest}", file=sys.stderr)
    return name, digest, ids * -(-2 * longest // len(ids))


def make_trials(subject: Subject, filler: Sequence[int]) -> list[Trial]:
    """`trials` passkeys for every length and depth, in a fixed order from --seed. Raises UserError."""
    args = subject.args
    rng = random.Random(args.seed)
    bos = [] if subject.tokenizer.bos_id is None else [subject.tokenizer.bos_id]
    made = []
    for length, depth, _ in itertools.product(args.lengths, args.depths, range(args.trials)):
        start = rng.randrange(len(filler) - length)
        name, key = passkey.draw(rng)
        try:
            ids, _ = passkey.make_prompt(
                subject.encode, filler[start : start + length], length, depth, name, key, bos
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"--lengths {length}: {error}") from None
        n_body = len(ids) - len(subject.encode(passkey.question(name)))
        made.append(Trial((str(length), f"{depth:g}"), ids, n_body, key))
    return made


def score_passkeys(subject: Subject, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Greedy answers from the real caches. All but the question is read first, so that the answer can only
    come from what the cache holds of it."""
    args = subject.args
    longest = max(args.lengths)
    if longest + ANSWER_TOKENS > subject.config.context:
        raise UserError(f"--lengths {longest} and the answer are past the model's context of {subject.config.context}")
    name, digest, filler = filler_of(subject, longest)
    trials = make_trials(subject, filler)
    right: list[dict[tuple[str, str], list[bool]]] = [{} for _ in subject.policies]
    bar = progress(None, len(trials) * len(subject.policies), "passkeys")
    rows: list[dict[str, Any]] = []
    for g, group in enumerate(groups(trials, args.batch)):
        bodies, questions = [t.ids[: t.n_body] for t in group], [t.ids[t.n_body :] for t in group]
        answers = subject.written_after(f"passkey-{g}", bodies, questions, longest + ANSWER_TOKENS, ANSWER_TOKENS)
        for results, written in zip(right, answers, strict=True):
            for trial, ids in zip(group, written, strict=True):
                answer = subject.tokenizer.decode(ids)
                results.setdefault(trial.cell, []).append(recalled(answer) == trial.key)
            bar.update(len(group))
        rows = [
            {"text": name, "sha256": digest, "cache": format_policy(policy), **shares(results),
             "tokens": sum(int(length) * len(found) for (length, _), found in results.items()),
             "trials_per_cell": args.trials, **subject.memory(policy, longest)}
            for policy, results in zip(subject.policies, right, strict=True)
        ]  # fmt: skip
        save(rows)
    bar.close()
    return rows


def shares(results: dict[tuple[str, str], list[bool]]) -> dict[str, Any]:
    """What was recalled by length and depth, and over all trials with its interval."""
    recalled: dict[str, dict[str, float]] = {}
    for (length, depth), found in results.items():
        recalled.setdefault(length, {})[depth] = sum(found) / len(found)
    n_right, n = (sum(count(found) for found in results.values()) for count in (sum, len))
    low, high = wilson(n_right, n)
    return {"recalled": recalled, "mean": n_right / n, "low": low, "high": high, "trials": n}


def recalled(answer: str) -> str:
    """The number that an answer begins with."""
    return "".join(itertools.takewhile(str.isdigit, answer.strip()))
