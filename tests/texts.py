"""Varied texts for tokenizers: code, emoji, other scripts, spaces."""

from __future__ import annotations

import functools
import random

from conftest import SENTENCES

FRAGMENTS = [
    *("Hello", " the", " cat's", " I'LL", " they've", "don't", "naïve café", "ÀÉÎ", "Straße", "e\u0301"),
    *("def f(x):\n    return x**2\n", "\tif (a != b) { c[0] += 1; }\r\n", "#include <stdio.h>", "-->", "===", "`a`"),
    *("12", "1234567", "3.14159", "½", "٣٤", "2024-01-22", " 7", "x1y22"),
    *("日本語", "ひらがな", "中文字", "한국어", "Привет, мир", "שלום", "مرحبا", "हिन्दी", "ไทย", "ა"),
    *("😀", "👩‍👩‍👧", "🇫🇷", "\U0001f3fd", "…", "“quoted”", "—", "™", "\u200b", "\ufeff"),
    *(" ", "  ", "     ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", ""),
    *("<|im_start|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<0x0A>", "<think>", "▁", "Ġ", "\x00", "\x7f"),
    *SENTENCES[:6],
]


@functools.cache
def texts() -> tuple[str, ...]:
    """A thousand texts of a few fragments each, in any order."""
    rng = random.Random(17)
    return tuple("".join(rng.choices(FRAGMENTS, k=rng.randint(1, 8))) for _ in range(1000))
