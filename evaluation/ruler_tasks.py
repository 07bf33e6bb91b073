"""RULER's synthetic tasks, made on the spot (Hsieh et al. 2024, arXiv:2404.06654; github.com/NVIDIA/RULER).

Those that need no download, with the published sentences, counts and lengths of answers:

    niah_single     one needle in repeated sentences (niah_single_1: a word's number)
    niah_multikey   one needle asked for among needles of other keys (niah_multikey_2: words and numbers)
    niah_multiuuid  the same with random identifiers (niah_multikey_3)
    vt              variable tracking: a chain of four assignments (vt)
    cwe             the ten most common words of a numbered list (cwe)
    fwe             the three most frequent coded words, counts by a zeta law (fwe)

What differs: words are this project's list and not wonderwords'; random numbers are drawn from one seed a sample; a
text is as long as the asked length allows to the sentence, and not to 5 or 25 of them.
"""

from __future__ import annotations

import itertools
import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from evaluation.words import ADJECTIVES, NOUNS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Sample:
    """A prompt in two parts, and what must all occur in the answer. prefix: how the answer begins."""

    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]

    def score(self, written: str) -> float:
        """The share of the answers that occur in a text, case aside (RULER's string_match_all)."""
        return sum(answer.lower() in written.lower() for answer in self.answers) / len(self.answers)


Draw = Callable[[random.Random], str]
Make = Callable[[random.Random, int, int], Sample]  # of so many units of filler, for a length in tokens


@dataclass(frozen=True)
class Task:
    """n_new: tokens of an answer. least: the fewest units of filler."""

    make: Make
    n_new: int
    least: int


def _word(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _asked(kind: str, key: str, value: str, sentences: list[str]) -> Sample:
    one = kind[:-1]
    begin = (
        f"A special magic {one} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {one} afterwards.\n"
    )
    question = f"\nWhat is the special magic {one} for {key} mentioned in the provided text?"
    prefix = f" The special magic {one} for {key} mentioned in the provided text is"
    return Sample(begin + "\n".join(sentences), question, prefix, (value,))


def niah_single(rng: random.Random, units: int, length: int) -> Sample:
    """One needle at a random place among `units` repetitions of NOISE."""
    key, value = _word(rng), _number(rng)
    sentences = [NOISE] * units
    sentences.insert(rng.randrange(units), _needle("numbers", key, value))
    return _asked("numbers", key, value, sentences)


def _among_needles(
    draw_key: Callable[[random.Random], str], draw: Callable[[random.Random], str], kind: str
) -> Callable:
    def make(rng: random.Random, units: int, length: int) -> Sample:
        key, value = draw_key(rng), draw(rng)
        others = (k for _ in itertools.count() if (k := draw_key(rng)) != key)  # a key has one value
        sentences = [_needle(kind, other, draw(rng)) for other in itertools.islice(others, units)]
        sentences.insert(rng.randrange(units), _needle(kind, key, value))
        return _asked(kind, key, value, sentences)

    return make


VT_TEMPLATE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def _chain(rng: random.Random, n_letter: int, units: int) -> tuple[str, str, tuple[str, ...]]:
    """Text with a chain of assignments hidden in it in order, the value, and the variables."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=n_letter))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))]
    sentences = [NOISE + "\n"] * units
    for n, at in enumerate(sorted(rng.sample(range(units), len(chain)))):
        sentences.insert(at + n, chain[n])
    return " ".join(sentences), value, tuple(names)


def _vt_question(value: str) -> tuple[str, str]:
    question = f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        f"value {value}, they are:"
    )
    return question, prefix


def variable_tracking(rng: random.Random, units: int, length: int) -> Sample:
    """A chain of assignments that ends in one value, with `units` sentences of noise; the answer is all of its
    names."""
    shown, shown_value, shown_names = _chain(rng, 3, 5)  # an example comes first, of shorter names
    text, value, names = _chain(rng, 5, units)
    question, prefix = _vt_question(value)
    example = VT_TEMPLATE + shown + "".join(_vt_question(shown_value)) + " " + " ".join(shown_names) + "\n\n\n"
    return Sample(example + VT_TEMPLATE + text, question, prefix, names)


CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
SINGLE_WORDS = tuple(sorted({*NOUNS, *ADJECTIVES}))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{n}. {word}" for n, word in enumerate(words, 1))


def _words(rng: random.Random, n: int) -> list[str]:
    """n different words; past the list's length, pairs of words."""
    found = dict.fromkeys(rng.sample(SINGLE_WORDS, min(n, len(SINGLE_WORDS))))
    while len(found) < n:
        found[_word(rng)] = None
    return list(found)


def _list(rng: random.Random, n: int, common: int, other: int) -> tuple[str, list[str]]:
    words = _words(rng, n)
    repeated = words[:10] * common + words[10:] * other
    rng.shuffle(repeated)
    return _numbered(repeated), words[:10]


def common_words(rng: random.Random, units: int, length: int) -> Sample:
    """A numbered list in which ten words occur more often than the other `units`; the answer is the ten."""
    short = length < 4096
    shown, shown_answer = _list(rng, *((20, 3, 1) if short else (40, 10, 3)))
    text, answer = _list(rng, 10 + units, *((6, 1) if short else (30, 3)))
    example = CWE_TEMPLATE + shown + CWE_QUESTION + CWE_PREFIX + " " + _numbered(shown_answer) + "\n"
    return Sample(example + CWE_TEMPLATE + text, CWE_QUESTION, CWE_PREFIX, tuple(answer))


def frequent_words(rng: random.Random, units: int, length: int) -> Sample:
    """The word of rank k occurs in proportion to k^-2; rank 1 is dots."""
    n_word = max(length // 50, 8)
    coded: dict[str, None] = {"...": None}
    while len(coded) < n_word:
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    vocabulary = list(coded)
    zeta = 1.6449340668482264  # pi^2 / 6
    words = [word for k, word in enumerate(vocabulary, 1) for _ in range(int(units / (k * k * zeta)))]
    rng.shuffle(words)
    begin = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Sample(begin + " ".join(words), question, prefix, tuple(vocabulary[1:4]))


TASKS = {
    "niah_single": Task(niah_single, 128, 1),
    "niah_multikey": Task(_among_needles(_word, _number, "numbers"), 128, 1),
    "niah_multiuuid": Task(_among_needles(_uuid, _uuid, "uuids"), 128, 1),
    "vt": Task(variable_tracking, 30, 5),
    "cwe": Task(common_words, 120, 0),
    "fwe": Task(frequent_words, 50, 60),  # enough that three words occur
}


def fitted(
    task: Task, length: int, seed: str, n_token: Callable[[Sample], int], near: int | None = None
) -> tuple[Sample, int] | None:
    """The longest sample of a seed that with its answer is no longer than `length` tokens, and how many units of filler
    it has; None if none is so short.

    n_token: tokens of a whole prompt. They are nearly proportional to the units, so the next size to try is where a
    line meets the length, and `near` (what another seed has) is a good first: counting tokens takes the time.
    """

    def make(units: int) -> tuple[Sample, int]:
        """And how many tokens there is room for beyond it."""
        sample = task.make(random.Random(seed), units, length)
        return sample, length - task.n_new - n_token(sample)

    best: tuple[Sample, int] | None = None
    low, room = task.least - 1, length  # the largest size that fits, and what it leaves: at first a guess
    high, lack = None, 0  # the smallest that does not, and how much it is too long
    units = task.least if near is None else near
    while True:
        sample, left = make(units)
        if left >= 0:
            best, low, room = (sample, units), units, left
        else:
            high, lack = units, -left
        if high is not None and high - low <= 1:
            return best
        if high is None:
            per_unit = max(1.0, (length - task.n_new - room) / max(1, low))
            units = low + max(1, min(int(room / per_unit), 8 * low + 8))
        else:
            units = min(max(low + (high - low) * room // (room + lack), low + 1), high - 1)
