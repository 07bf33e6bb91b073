"""ROUGE-L of greedy summaries, against references and against the full cache's own words.

The figures are those of the `rouge_score` package (with stemming; the best of several references), which
differ from those of the package `rouge`. Intervals are 95% bootstrap intervals over documents.
"""

from __future__ import annotations

import json
import lzma
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from tokenizer import UserError

RESAMPLES = 2000


@dataclass(frozen=True)
class Document:
    text: str
    question: str  # what follows the text in the prompt
    references: list[str]


def read_documents(path: Path, limit: int) -> list[Document]:
    """JSONL, plain or .xz: SQuALITY's as it is (its first question, on the plot), or objects with "document" or
    "prompt", and "references" or "summary". Raises UserError, naming the line, where a field is missing."""
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        lines = [(n, line) for n, line in enumerate(data.decode("utf-8").splitlines(), 1) if line.strip()]
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    if not lines:
        raise UserError(f"{path}: no document in it")
    return [_document(path, n, line) for n, line in lines[:limit]]


def _document(path: Path, n: int, line: str) -> Document:
    try:
        fields = json.loads(line)
        text = fields["document"] if "document" in fields else fields["prompt"]
        if "questions" in fields:
            first = fields["questions"][0]
            references = [response["response_text"] for response in first["responses"]]
            return Document(text, f"\n\n{first['question_text']}\n\n", references)
        references = fields["references"] if "references" in fields else [fields["summary"]]
    except json.JSONDecodeError:
        raise UserError(f"{path}, line {n}: not JSON") from None
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}, line {n}: the field {error} is missing") from None
    if not isinstance(text, str) or not references or not all(isinstance(r, str) for r in references):
        raise UserError(f"{path}, line {n}: the text and its references must be text")
    return Document(text, "\n\nSummary:", references)


def rouge_l(candidate: str, references: list[str]) -> float:
    """The F-measure against the reference that fits best."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return max(scorer.score(reference, candidate)["rougeL"].fmeasure for reference in references)


def mean_and_interval(values: list[float], seed: int = 0) -> dict[str, Any]:
    """The mean over documents, and its 95% bootstrap interval."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return {"mean": sum(values) / len(values), "low": low, "high": high}
