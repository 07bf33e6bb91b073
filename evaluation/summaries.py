"""ROUGE-L of greedy summaries, against references and against the full cache's own words.

The figures are those of the `rouge_score` package (with stemming; the best of several references), which
differ from those of the package `rouge`. Intervals are 95% bootstrap intervals over documents.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.messages import progress
from common.packages import missing
from evaluation.subject import Subject, groups, read_lines, read_plain, sha256_of, text_field
from kv_cache import format_policy

RESAMPLES = 2000


@dataclass(frozen=True)
class Document:
    """A text to summarise, and what its summary is compared with."""

    text: str
    question: str  # what follows the text in the prompt
    references: list[str]  # none where the model wrote the text itself


def read_documents(path: Path, limit: int) -> list[Document]:
    """JSONL, plain or .xz: SQuALITY's as it is (its first question, on the plot), or objects with "document" or
    "prompt" or "text", and "references" or "summary". Raises UserError, naming the line, where a field is missing."""
    return [_document(path, n, fields) for n, fields in read_lines(path)[:limit]]


def _document(path: Path, n: int, fields: dict[str, Any]) -> Document:
    text, question = text_field(path, n, fields), "\n\nSummary:"
    try:
        if "questions" in fields:
            first = fields["questions"][0]
            references = [response["response_text"] for response in first["responses"]]
            question = f"\n\n{first['question_text']}\n\n"
        else:
            references = fields["references"] if "references" in fields else [fields["summary"]]
    except KeyError as error:
        raise UserError(f"{path}, line {n}: the field {error} is missing") from None
    except (IndexError, TypeError):
        raise UserError(f"{path}, line {n}: 'questions' are not a list of objects with 'responses'") from None
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise UserError(f"{path}, line {n}: the references are not a list of texts")
    return Document(text, question, references)


def rouge_l(candidate: str, references: list[str]) -> float:
    """The F-measure against the reference that fits best. Raises UserError where rouge_score is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise missing("rouge_score", "rouge") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return max(scorer.score(reference, candidate)["rougeL"].fmeasure for reference in references)


def mean_and_interval(values: list[float], seed: int = 0) -> dict[str, Any]:
    """The mean over documents, and its 95% bootstrap interval."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return {"mean": sum(values) / len(values), "low": low, "high": high}


def score_summaries(subject: Subject, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Greedy summaries by every cache. A document is cut at its end where the prompt would not fit."""
    args = subject.args
    rouge_l("", [""])  # that its package is there shows before hours of writing
    context = min(args.context, subject.config.context)
    name, digest, documents = documents_of(subject, context)
    bar = progress(None, len(documents) * len(subject.policies), "summaries")
    written: list[list[str]] = [[] for _ in subject.policies]
    n_token, n_cut = 0, 0
    rows: list[dict[str, Any]] = []
    for g, group in enumerate(groups(documents, args.batch)):
        questions = [subject.encode(document.question) for document in group]
        bodies = []
        for document, question in zip(group, questions, strict=True):
            room = context - args.max_new_tokens - len(question)
            if room < 1:
                most = args.max_new_tokens
                raise UserError(f"--context {context} has no room for a document beside {most} new tokens")
            ids = subject.tokenizer.encode(document.text)
            n_cut += len(ids) > room
            bodies.append(ids[:room])
        n_token += sum(map(len, bodies))
        # The document apart: the summary is written from what the cache holds.
        answers = subject.written_after(f"summary-{g}", bodies, questions, context, args.max_new_tokens)
        for texts, found in zip(written, answers, strict=True):
            texts += map(subject.tokenizer.decode, found)
            bar.update(len(group))
        i = len(written[0])
        about = {"text": name, "sha256": digest, "documents": i, "cut": n_cut, "tokens": n_token}
        rows = [
            about
            | {"cache": format_policy(policy)}
            | scores(texts, written[0], documents)
            | subject.memory(policy, context)
            for policy, texts in zip(subject.policies, written, strict=True)
        ]
        save(rows)
    bar.close()
    return rows


def documents_of(subject: Subject, context: int) -> tuple[str, str, list[Document]]:
    """The documents with their file's name and their text's sha256; without a file, texts that the model itself
    writes."""
    args = subject.args
    if args.text:
        return args.text[0].name, sha256_of(read_plain(args.text[0])), read_documents(args.text[0], args.documents)
    own = subject.own_text(args.documents, max(2, context // 2))
    texts = [subject.tokenizer.decode(window.tolist()) for window in own.windows]
    return own.name, own.sha256, [Document(text, "\n\nSummary:", []) for text in texts]


def scores(texts: list[str], full: list[str], documents: list[Document]) -> dict[str, Any]:
    """ROUGE-L to the references, how much better that is than the full cache's on the same documents, and ROUGE-L
    to the full cache's summary. Without references only the last."""
    to_full = [rouge_l(text, [whole]) for text, whole in zip(texts, full, strict=True)]
    found: dict[str, Any] = {"rouge_l_to_full": mean_and_interval(to_full)}
    if documents[0].references:
        mine, theirs = (
            [rouge_l(text, d.references) for text, d in zip(group, documents, strict=False)] for group in (texts, full)
        )
        found["rouge_l"] = mean_and_interval(mine)
        found["rouge_l_rise"] = mean_and_interval([a - b for a, b in zip(mine, theirs, strict=True)])
    return found
