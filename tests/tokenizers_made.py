"""Small tokenizers of every kind, made on the spot, and the shared data's real ones where they are."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import tempfile
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from conftest import DATA, SENTENCES, STORIES

from checkpoint import load_tokenizer
from tokenizer import LLAMA3_RANKS, Tokenizer

LLAMA2, LLAMA3, MISTRAL = (DATA / "tokenizers" / f"{n}_tokenizer.model" for n in ("llama2", "llama3", "mistral_v1"))
SPECIAL = ["<s>", "</s>", "<|end|>"]
TEXTS = [
    "Hello",
    " Hello",
    "  two  and   three   blanks  ",
    "\n\nline\r\n\ttab\n",
    "I'LL say it's 1234567 o'clock",
    "héllo wörld, 日本語 and 😀👩‍👩‍👧",
    "\x00\x7f",
    "an added token: Ġé<think>",
    "",
    "<s>not special</s> <|end|> <|eot_id|>",
]


@functools.cache
def trained_sentencepiece() -> bytes:
    """As Llama 2's was trained: bytes for unknown letters, and no character is changed."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def synthetic_ranks() -> bytes:
    """As many ranks as Llama 3 has: all bytes, all pairs of them, and some words of three letters."""
    triples = itertools.product(range(97, 123), repeat=3)
    pairs = itertools.product(range(256), repeat=2)
    tokens = [bytes([b]) for b in range(256)] + [bytes(pair) for pair in pairs]
    tokens += [bytes(triple) for triple in triples]
    tokens += [b" " + bytes(c) for c in itertools.product(range(97, 123), repeat=4)]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens[:LLAMA3_RANKS]))


@functools.cache
def byte_level_json(bos: bool = True) -> str:
    """As Llama 3's and Qwen's tokenizer.json: bytes spelled as letters; the begin token by a template."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(SENTENCES, trainer)
    model.add_tokens(["<think>", "Ġé"])  # added and no special tokens: they are text as they stand
    if bos:
        model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    else:
        model.post_processor = tokenizers.processors.ByteLevel()
    return model.to_str()


@functools.cache
def byte_fallback_json() -> str:
    """As Llama 2's tokenizer.json: SentencePiece's pieces, with its leading space and its lone bytes."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece())
    pieces = {sp.id_to_piece(n): n for n in range(sp.vocab_size())}
    merges = []
    for piece, rank in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces and not sp.is_byte(rank) and not sp.is_control(rank):
                merges.append((rank, left, right))
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            pieces,
            [(a, b) for _, a, b in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    n, d = tokenizers.normalizers, tokenizers.decoders
    model.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    model.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    model.add_special_tokens(["<s>", "</s>"])
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return model.to_str()


MADE = {
    "sentencepiece": trained_sentencepiece,
    "tiktoken": synthetic_ranks,
    "byte-level": lambda: byte_level_json().encode(),
    "byte-fallback": lambda: byte_fallback_json().encode(),
}
REAL = {"llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "stories": STORIES / "tokenizer.model"}


@functools.cache
def get(name: str) -> Tokenizer:
    """A tokenizer by name: made on the spot, or one of the shared data's (the test is skipped without)."""
    if name in MADE:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.model"  # one name for all kinds: only the content tells
            path.write_bytes(MADE[name]())
            return load_tokenizer(path)
    if not REAL[name].exists():
        pytest.skip(f"needs {REAL[name].name} of the shared data, which is not here")
    return load_tokenizer(REAL[name])
