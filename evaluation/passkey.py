"""The passkey test: a number hidden in a long text, asked for at its end (Mohtashami & Jaggi 2023,
arXiv:2305.16300).

One place fixes the wording, so that training, evaluation and the demo mean the same test. It works with
any tokenizer: an `encode` that turns text into ids. Filler is any text, as ids.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Encode = Callable[[str], list[int]]

COLORS = ("red", "green", "blue", "white", "black", "golden", "silver", "brown")
THINGS = ("door", "box", "house", "gate", "garden", "ship", "tower", "book", "horse", "wagon", "bridge", "chest")


def needle(name: str, key: str) -> str:
    """The sentence that is hidden."""
    return f"\n\nThe pass key of the {name} is {key}. Remember it: {key} is the pass key of the {name}.\n\n"


def question(name: str) -> str:
    """What is asked, up to where the key must follow."""
    return f"\n\nWhat is the pass key of the {name}? The pass key of the {name} is"


def answer(encode: Encode, name: str, key: str) -> list[int]:
    """The ids that follow `question`: the key's digits, with a space before them if the tokenizer makes one."""
    asked = encode(question(name))
    whole = encode(f"{question(name)} {key}")
    same = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
    if same < len(asked):
        raise ValueError("this tokenizer joins the question's last word with the answer")
    return whole[same:]


def draw(rng: random.Random) -> tuple[str, str]:
    """A name and a five-digit key."""
    return f"{rng.choice(COLORS)} {rng.choice(THINGS)}", f"{rng.randrange(10_000, 100_000)}"


def make_prompt(
    encode: Encode, filler_ids: Sequence[int], length: int, depth: float, name: str, key: str, bos: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """A prompt of exactly `length` tokens that ends where the key must follow, and the key's ids.

    encode must not add a beginning-of-text token; `bos` is put in front instead. depth: where the needle
    stands, 0 at the start, 1 right before the question. Raises ValueError if the filler is too short.
    """
    hidden, asked = encode(needle(name, key)), encode(question(name))
    n_filler = length - len(bos) - len(hidden) - len(asked)
    if n_filler < 0:
        raise ValueError(f"a passkey test takes at least {length - n_filler} tokens, not {length}")
    if n_filler > len(filler_ids):
        raise ValueError(f"{n_filler} tokens of filler are needed and {len(filler_ids)} are there")
    before = round(depth * n_filler)
    filler = list(filler_ids[:n_filler])
    return [*bos, *filler[:before], *hidden, *filler[before:], *asked], answer(encode, name, key)
