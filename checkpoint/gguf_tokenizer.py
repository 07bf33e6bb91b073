"""A tokenizer and a chat template from a GGUF file's metadata (`tokenizer.*`).

Byte-level BPE ("gpt2") states its merges, and how text is cut before merging only by a name, `tokenizer.ggml.pre`:
a name that is not known here is refused, for with another cut the ids would be others and nothing would tell.
SentencePiece ("llama") states pieces, scores and types: they are put back into the protobuf that sentencepiece
reads, so that it is the original's algorithm that encodes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from checkpoint.gguf import GGUF
from checkpoint.tokenizer_json import LibraryTokenizer
from common.errors import UserError
from tokenizer import BYTE_OF, LLAMA3_PATTERN, SentencePieceTokenizer, Tokenizer

_TYPES = range(1, 7)
_LARGEST_SCORE = 3.4e38  # of float32, in which they are stored
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = _TYPES  # gguf's TokenType, and sentencepiece's
# Control tokens that end a text or a turn, which a file need not name beside its eos_token_id (Llama 3 has three).
_ENDS = frozenset(
    ["</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"]
)


@dataclass(frozen=True)
class _Cut:
    """How a byte-level tokenizer cuts text into words: by each pattern in turn. whole: a word that is a token is not
    put together from its parts (tokenizers' ignore_merges). bos: begins a text where the file does not say."""

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # openai/gpt-2, encoder.py
)
_QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")  # Qwen2's tokenizer.json
_TEKKEN_PATTERN = (  # Mistral Nemo's tokenizer.json
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _LLAMA3 = _Cut((_GPT2_PATTERN,)), _Cut((LLAMA3_PATTERN,), whole=True, bos=True)
_DIGITS, _QWEN2 = _Cut((r"\p{N}", _GPT2_PATTERN)), _Cut((_QWEN2_PATTERN,))
_CUTS = {  # by tokenizer.ggml.pre, as llama.cpp's llama-vocab.cpp has them
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Cut((LLAMA3_PATTERN,))),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), _QWEN2),
    "qwen2": _Cut((_QWEN2_PATTERN,), nfc=True),  # its tokenizer.json composes letters and accents; llama.cpp does not
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), _GPT2),
    "tekken": _Cut((_TEKKEN_PATTERN,), whole=True, bos=True),
}


class _Vocabulary:
    """What both kinds state in the same way: the tokens, their types, which begin and which end a text."""

    def __init__(self, gguf: GGUF) -> None:
        self.gguf, self.path = gguf, gguf.path
        self.tokens: list[str] = self._list("tokens", str)
        if not self.tokens:
            raise UserError(f"{self.path}: tokenizer.ggml.tokens is empty")
        self.types: list[int] = self._list("token_type", int) or [_NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise UserError(f"{self.path}: {len(self.tokens)} tokens, and types of {len(self.types)}")
        strange = next((kind for kind in self.types if kind not in _TYPES), None)
        if strange is not None:
            raise UserError(f"{self.path}: tokenizer.ggml.token_type has a {strange}, and types are 1 to 6")

    def _list(self, name: str, kind: type) -> list[Any]:
        values = self.gguf.get(f"tokenizer.ggml.{name}", list, [])
        if any(type(value) is not kind for value in values):
            raise UserError(f"{self.path}: tokenizer.ggml.{name} holds others than {kind.__name__}")
        return values

    def id(self, name: str) -> int | None:
        """tokenizer.ggml.{name}_token_id. Raises UserError where it is no token's."""
        key = f"tokenizer.ggml.{name}_token_id"
        token = self.gguf.get(key, int)
        if token is not None and not 0 <= token < len(self.tokens):
            raise UserError(f"{self.path}: {key} is {token}, and there are {len(self.tokens)} tokens")
        return token

    def bos_id(self, add: bool, default: int | None) -> int | None:
        """The token that begins a text, if one does. add: where the file does not say; default: llama.cpp's."""
        if not self.gguf.get("tokenizer.ggml.add_bos_token", bool, add):
            return None
        stated = self.id("bos")
        token = default if stated is None else stated
        if token is None:
            raise UserError(f"{self.path}: a text begins with a token, and there is no tokenizer.ggml.bos_token_id")
        return token

    def end_ids(self, default: int | None = None) -> tuple[int, ...]:
        eos = self.id("eos")
        stated = [default if eos is None else eos, self.id("eot"), self.id("eom")]
        named = [n for n, token in self.controls().items() if token in _ENDS]
        return tuple(dict.fromkeys([*(token for token in stated if token is not None), *named]))

    def controls(self) -> dict[int, str]:
        return {n: token for n, token in enumerate(self.tokens) if self.types[n] == _CONTROL}

    def added(self) -> dict[int, str]:
        return {n: token for n, token in enumerate(self.tokens) if self.types[n] == _USER_DEFINED}


class ByteLevelTokenizer(LibraryTokenizer):
    """Byte-level BPE, as in Llama 3, Qwen and SmolLM, by the tokenizers library."""

    def __init__(self, gguf: GGUF) -> None:
        from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Model

        vocabulary = _Vocabulary(gguf)
        cut = _cut(gguf)
        vocab = {token: n for n, token in enumerate(vocabulary.tokens)}
        if len(vocab) != len(vocabulary.tokens):
            raise UserError(f"{gguf.path}: a token is there twice")
        merges = [_halves(merge, gguf) for merge in vocabulary._list("merges", str)]
        if not merges:
            raise UserError(f"{gguf.path}: tokenizer.ggml.merges is missing")
        try:
            self.model = model = Model(models.BPE(vocab, merges, ignore_merges=cut.whole))
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises the bare class, and nothing narrower
                raise
            raise UserError(f"{gguf.path}: tokenizer.ggml.merges: {error}") from None
        if cut.nfc:
            model.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = pre_tokenizers.Sequence([*splits, by_bytes])
        model.decoder = decoders.ByteLevel()
        controls, added = vocabulary.controls(), vocabulary.added()
        model.add_special_tokens([AddedToken(token, normalized=False) for token in controls.values()])
        model.add_tokens([AddedToken(token, normalized=False) for token in added.values()])
        model.encode_special_tokens = True  # a special token's name in a text is only text
        self.n_vocab = self.n_plain = len(vocabulary.tokens)
        self.special_ids = {token: n for n, token in controls.items()}
        self.bos_id = vocabulary.bos_id(cut.bos, None)
        self.eos_ids = vocabulary.end_ids()
        silent = {n for n, kind in enumerate(vocabulary.types) if kind in (_CONTROL, _UNUSED)}
        self.pieces = [
            b"" if n in silent else token.encode() if n in added else _spelled(token)
            for n, token in enumerate(vocabulary.tokens)
        ]

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token] if 0 <= token < self.n_vocab else b""


def _cut(gguf: GGUF) -> _Cut:
    name = gguf.get("tokenizer.ggml.pre", str)
    if name is None:
        raise UserError(f"{gguf.path}: no tokenizer.ggml.pre: which pre-tokenizer cuts text is not said (an old file?)")
    if name not in _CUTS:
        raise UserError(f"{gguf.path}: pre-tokenizer {name!r} is not supported ({', '.join(_CUTS)} are)")
    return _CUTS[name]


def _halves(merge: str, gguf: GGUF) -> tuple[str, str]:
    left, space, right = merge[:1] + merge[1:].partition(" ")[0], *merge[1:].partition(" ")[1:]
    if not space or not right:
        raise UserError(f"{gguf.path}: tokenizer.ggml.merges: {merge!r} is not two parts")
    return left, right


def _spelled(piece: str) -> bytes:
    """The bytes that a byte-level piece stands for; one of other letters stands for itself."""
    return bytes(BYTE_OF[char] for char in piece) if all(char in BYTE_OF for char in piece) else piece.encode()


class PieceTokenizer(SentencePieceTokenizer):
    """SentencePiece, as in Llama 2 and Mistral, with the begin and end tokens that the file states."""

    def __init__(self, gguf: GGUF) -> None:
        vocabulary = _Vocabulary(gguf)
        super().__init__(_sentencepiece_model(gguf, vocabulary), str(gguf.path))
        self.bos_id = vocabulary.bos_id(True, 1)
        self.eos_ids = vocabulary.end_ids(2)


def _sentencepiece_model(gguf: GGUF, vocabulary: _Vocabulary) -> bytes:
    """The file that sentencepiece would have written (sentencepiece_model.proto in google/sentencepiece).

    Which algorithm it was trained with is not in a GGUF. The scores tell: of BPE they are ranks, whole numbers that
    fall by one a piece, and of a unigram model logarithms of probabilities.
    """
    scores = vocabulary._list("scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise UserError(f"{gguf.path}: {len(vocabulary.tokens)} tokens, and scores of {len(scores)}")
    if not all(abs(score) <= _LARGEST_SCORE for score in scores):
        raise UserError(f"{gguf.path}: tokenizer.ggml.scores has one that is no finite float32")
    normal = [score for score, kind in zip(scores, vocabulary.types, strict=True) if kind == _NORMAL]
    if len(set(normal)) < len(normal) / 2:
        raise UserError(f"{gguf.path}: tokenizer.ggml.scores are mostly the same: they do not say what to merge")
    ranks = all(score == int(score) for score in normal)
    pieces = b""
    for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        if kind == _USER_DEFINED:  # llama.cpp's converter undoes what sentencepiece looks for in a text
            token = token.replace(" ", "\u2581")
        pieces += _field(1, _field(1, token.encode()) + _field(2, score) + _field(3, kind))
    unknown = vocabulary.id("unknown")
    names = {n: vocabulary.id(name) for n, name in {46: "bos", 47: "eos"}.items()}
    trainer = [_field(3, 2 if ranks else 1), _field(4, len(scores)), _field(35, int(_BYTE in vocabulary.types))]
    trainer += [_field(45, vocabulary.tokens[0 if unknown is None else unknown].encode())]
    trainer += [_field(n, vocabulary.tokens[token].encode()) for n, token in names.items() if token is not None]
    prefix = gguf.get("tokenizer.ggml.add_space_prefix", bool, True)
    extra = gguf.get("tokenizer.ggml.remove_extra_whitespaces", bool, False)
    normalizer = [_field(1, b"identity"), _field(3, int(prefix)), _field(4, int(extra)), _field(5, 1)]
    return pieces + _field(2, b"".join(trainer)) + _field(3, b"".join(normalizer))


def _field(number: int, value: int | float | bytes) -> bytes:
    """A protobuf field: a varint, a float32 or bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def gguf_tokenizer(gguf: GGUF) -> Tokenizer | None:
    """The tokenizer that a file holds; None if it holds none. Raises UserError."""
    kind = gguf.get("tokenizer.ggml.model", str)
    if kind in (None, "none", "no_vocab"):
        return None
    if kind == "gpt2":
        return ByteLevelTokenizer(gguf)
    if kind == "llama":
        return PieceTokenizer(gguf)
    raise UserError(f"{gguf.path}: a tokenizer of the kind {kind!r} is not supported (gpt2 and llama are)")


def gguf_chat_template(gguf: GGUF) -> tuple[str | None, dict[str, str]]:
    """The template's source, None without one, and the texts of the special tokens that it may name."""
    vocabulary = _Vocabulary(gguf)
    kinds: Iterable[tuple[str, str]] = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    ids = {f"{name}_token": vocabulary.id(key) for name, key in kinds}
    names = {name: vocabulary.tokens[token] for name, token in ids.items() if token is not None}
    return gguf.get("tokenizer.chat_template", str), names
