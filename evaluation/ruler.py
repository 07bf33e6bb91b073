"""RULER through the caches: made tasks of several lengths, greedy answers, and what of the answers occurs in them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cli.chat_template import ChatTemplate, chat_template_of
from common.errors import UserError
from common.messages import progress
from evaluation.passkeys import wilson
from evaluation.ruler_tasks import TASKS, Sample, fitted
from evaluation.subject import Subject, groups, sha256_of
from kv_cache import format_policy

LOOK_EVERY = 8  # tokens of an answer
LEAST_FULL = 0.2  # tasks that the full cache scores no better on say nothing about a cache


@dataclass(frozen=True)
class Trial:
    """A sample as tokens. The first `n_body` are read before the question: an answer comes from the cache alone."""

    task: str
    length: int
    sample: Sample
    ids: list[int]
    n_body: int
    n_new: int


def prompt_of(subject: Subject, template: ChatTemplate | None, sample: Sample) -> tuple[str, list[int]]:
    """The text up to where its answer's prefix begins, as a user's turn where there is a template; and all ids."""
    text = sample.context + sample.question
    if template is not None:
        text = template.render([{"role": "user", "content": text}])
    return text, subject.tokenizer.encode(text + sample.prefix, bos=template is None, special=template is not None)


def encode(subject: Subject, template: ChatTemplate | None, sample: Sample) -> tuple[list[int], int]:
    """A prompt's ids, and how many of them come before the question."""
    text, ids = prompt_of(subject, template, sample)
    body = text[: text.rindex(sample.question.strip())]
    begin = subject.tokenizer.encode(body, bos=template is None, special=template is not None)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(begin, ids, strict=False))
    return ids, sum(1 for _ in same)


def make_trials(subject: Subject, template: ChatTemplate | None) -> list[Trial]:
    """Every task at every length, `--trials` times. Raises UserError where a length is too short for a task."""

    def n_token(sample: Sample) -> int:
        return len(prompt_of(subject, template, sample)[1])

    args = subject.args
    made = []
    near: dict[tuple[int, str], int] = {}  # how much filler the last sample of a cell had
    numbers = groups(range(args.trials), args.batch)  # a group is of one task and length, and every cell fills up alike
    for some, length, name in itertools.product(numbers, args.lengths, args.tasks):
        task = TASKS[name]
        for n in some:
            seed = f"{args.seed} {name} {length} {n}"
            found = fitted(task, length, seed, n_token, near.get((length, name)))
            if found is None:
                raise UserError(f"--lengths {length}: too short for {name} and its answer of {task.n_new} tokens")
            sample, near[length, name] = found
            ids, n_body = encode(subject, template, sample)
            made.append(Trial(name, length, sample, ids, n_body, task.n_new))
    return made


def answered(subject: Subject, group: Sequence[Trial], b: int, ids: list[int]) -> bool:
    """Whether answer b is as long as its task's may be, or has all that is asked for: then its score is known."""
    trial = group[b]
    if len(ids) >= trial.n_new:
        return True
    return len(ids) % LOOK_EVERY == 0 and trial.sample.score(subject.tokenizer.decode(ids)) == 1


def score_ruler(subject: Subject, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """One row a cache: the mean score of every task and length, with intervals."""
    args = subject.args
    for name in args.tasks:
        if name not in TASKS:
            raise UserError(f"--tasks {name}: RULER's tasks here are {', '.join(TASKS)}")
    if max(args.lengths) > subject.config.context:
        raise UserError(f"--lengths {max(args.lengths)} is past the model's context of {subject.config.context}")
    template = chat_template_of(subject.checkpoint) if args.chat else None
    trials = make_trials(subject, template)
    digest = sha256_of("\0".join(sorted(t.sample.context + t.sample.question for t in trials)))
    scores: list[list[float]] = [[] for _ in subject.policies]
    # Of a group of several tasks the shorter answers go on as long as the others.
    capacity = max(len(t.ids) for t in trials) + max(t.n_new for t in trials)
    bar = progress(None, len(trials) * len(subject.policies), "RULER")
    rows: list[dict[str, Any]] = []
    for g, group in enumerate(groups(trials, args.batch)):
        bodies, questions = [t.ids[: t.n_body] for t in group], [t.ids[t.n_body :] for t in group]
        n_new = max(t.n_new for t in group)
        enough = functools.partial(answered, subject, group)
        answers = subject.written_after(f"ruler-{g}", bodies, questions, capacity, n_new, enough)
        for found, written in zip(scores, answers, strict=True):
            decoded = map(subject.tokenizer.decode, written)
            found += [trial.sample.score(text) for trial, text in zip(group, decoded, strict=True)]
            bar.update(len(group))
        n = len(scores[0])
        rows = [
            {"sha256": digest, "cache": format_policy(policy), "trials_per_cell": args.trials, "chat": args.chat}
            | summary(trials[:n], found, scores[0])
            | subject.memory(policy, max(args.lengths))
            for policy, found in zip(subject.policies, scores, strict=True)
        ]
        save(rows)
    bar.close()
    return rows


def summary(trials: Sequence[Trial], found: Sequence[float], full: Sequence[float]) -> dict[str, Any]:
    """A record's row of one cache, from its scores `found` and the full cache's, `full`, one for each trial.

    scores: mean by task and length; mean: of all trials; kept: the mean of those tasks and lengths on which the full
    cache scores above LEAST_FULL, and its difference from full; by_length: `kept` of each length alone. Intervals are
    Wilson's for shares, wider than needed for scores that are neither 0 nor 1.
    """
    cells: dict[tuple[str, str], list[int]] = {}
    for n, trial in enumerate(trials):
        cells.setdefault((trial.task, str(trial.length)), []).append(n)
    scores: dict[str, dict[str, float]] = {}
    kept: dict[str, dict[str, list[int]]] = {}  # length -> task -> trials
    for (task, length), numbers in cells.items():
        scores.setdefault(task, {})[length] = sum(found[n] for n in numbers) / len(numbers)
        of_length = kept.setdefault(length, {})
        if sum(full[n] for n in numbers) / len(numbers) > LEAST_FULL:
            of_length[task] = numbers
    low, high = wilson(sum(found), len(found))
    row: dict[str, Any] = {"scores": scores, "mean": sum(found) / len(found), "low": low, "high": high}
    row |= {"trials": len(found), "tokens": sum(len(t.ids) for t in trials)}
    row["by_length"] = {
        length: {"tasks": [*tasks]} | beside_full([n for numbers in tasks.values() for n in numbers], found, full)
        for length, tasks in kept.items()
    }
    return row | beside_full([n for tasks in kept.values() for ns in tasks.values() for n in ns], found, full)


def beside_full(kept: Sequence[int], found: Sequence[float], full: Sequence[float]) -> dict[str, Any]:
    """Of the trials with the indices `kept`: their number, the mean score with its interval, and the difference from
    the full cache's on the same trials with its standard error. Only the number, if there are none."""
    if not kept:
        return {"kept_trials": 0}
    lost = [found[n] - full[n] for n in kept]
    mean = sum(lost) / len(lost)
    spread = sum((x - mean) ** 2 for x in lost) / max(1, len(lost) - 1)
    low, high = wilson(sum(found[n] for n in kept), len(kept))
    return {
        "kept_trials": len(kept), "kept": sum(found[n] for n in kept) / len(kept), "kept_low": low, "kept_high": high,
        "kept_rise": mean, "kept_rise_error": math.sqrt(spread / len(lost)),
    }  # fmt: skip
