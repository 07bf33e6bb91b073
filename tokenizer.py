"""Text to token ids and back, behind one small interface; SentencePiece and tiktoken.

checkpoint/tokenizer_files.py finds a checkpoint's tokenizer and tells its kind; checkpoint/tokenizer_json.py is the
third one.

Text is decoded through bytes. A token is a few bytes, perhaps half a character, so a `StreamDecoder`
holds back an unfinished character until the rest comes; `decode` is that stream, joined. Bytes that
are no UTF-8 become U+FFFD, as in Python's "replace". Special tokens (begin of text, end of turn, ...)
are never text: they decode to nothing, and a text that spells one is encoded as the letters it has,
unless `special=True` asks otherwise.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from common.errors import UserError


@dataclass(frozen=True)
class AddedToken:
    """A token that lies outside the vocabulary proper. id: its number; None: the next one, or the vocabulary's own."""

    content: str
    id: int | None
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a tokenizer say of it, by transformers' names. None: nothing."""

    bos_token: str = ""
    eos_token: str = ""
    eos_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    legacy: bool | None = None  # a space in front of what follows a special token, too
    add_prefix_space: bool | None = None
    pieces_class: bool = False  # transformers would read a tokenizer.json with its LlamaTokenizer
    added: tuple[AddedToken, ...] = ()


class Tokenizer(ABC):
    """Ids are in [0, n_vocab). `bos_id` is None where a text has no begin token (Qwen)."""

    n_vocab: int
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    special_ids: dict[str, int]  # by name, those that `special=True` recognises
    drops_space: bool = False  # the first piece's leading space is the tokenizer's own, not the text's

    n_plain: int  # past the last token that a text can hold without naming it: special ones may lie beyond
    n_row: int | None = None  # of the model's embedding; a token past it is refused

    @abstractmethod
    def encode_text(self, text: str, begins: bool = True, special: bool = False) -> list[int]:
        """Ids of valid Unicode text; nothing is prepended.

        begins: it is the beginning of a text, where tokenizers of SentencePiece's kind put a space. special: names of
        special tokens in it become those tokens.
        """

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for a special token and for an id without one."""

    def encode(self, text: str, bos: bool = True, special: bool = False, begins: bool = True) -> list[int]:
        """Ids of `text`, after the begin token if `bos` and if the model has one.

        special: names of special tokens in the text become those tokens (for chat templates); begins: as for
        `encode_text`. Raises UserError where the text holds half a surrogate pair, or a token that the model lacks.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode at character {error.start}") from None
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        ids += self.encode_text(text, begins, special)
        if self.n_row is not None and max(ids, default=0) >= self.n_row:
            raise UserError(f"the text holds token {max(ids)}, and the model's embedding has {self.n_row} rows")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        stream = StreamDecoder(self)
        return "".join([*map(stream.push, ids), stream.flush()])


def split_at(text: str, names: Iterable[str]) -> list[str]:
    """The text's parts, those at odd places being names. The longest of two names that both match is taken."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if longest_first else [text]


class StreamDecoder:
    """Token by token to text, in whole characters only. `flush` ends it with what is left over."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.drop_space = tokenizer.drops_space

    def push(self, token: int) -> str:
        data = self.tokenizer.token_bytes(token)
        if data and self.drop_space:
            data, self.drop_space = data.removeprefix(b" "), False
        return self.utf8.decode(data)

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # byte fallback: how a piece spells a lone byte
SPACE = "\u2581"  # how a piece spells a space


def _protobuf_fields(data: bytes) -> set[int]:
    """Numbers of the top-level fields of a message that holds messages only; empty if data is none."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while data[at] & 0x80:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
        return value | data[at] << shift, at + 1

    fields, at = set(), 0
    try:
        while at < len(data):
            key, at = varint(at)
            size, at = varint(at)
            fields.add(key >> 3)
            at += size
    except IndexError:
        return set()
    return fields if at == len(data) else set()


class SentencePieceTokenizer(Tokenizer):
    """Llama 2, Mistral 7B. Encoding puts a space in front of a text, and decoding takes it off again."""

    def __init__(self, data: bytes, name: str, settings: TokenizerSettings | None = None) -> None:
        import sentencepiece

        settings = settings or TokenizerSettings()
        # Pieces, how they were trained, how text is normalised: sentencepiece would go on without the
        # last one, which a truncated file may lack, and encode differently
        damaged = UserError(f"{name}: not a SentencePiece or tiktoken model, or a damaged one")
        if not _protobuf_fields(data) >= {1, 2, 3}:
            raise damaged
        try:
            self.model = model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.n_vocab = self.n_plain = n_piece = model.vocab_size()
            self.pieces = [self._bytes(token) for token in range(n_piece)]
            # Of two normaliser fields the later one counts: this one turns add_dummy_prefix off.
            self.inside = sentencepiece.SentencePieceProcessor(model_proto=data + b"\x1a\x02\x18\x00")
        except (RuntimeError, UnicodeDecodeError):  # the latter from its own message about the file
            raise damaged from None
        self.legacy = bool(settings.legacy)
        control = [token for token in range(n_piece) if model.is_control(token)]
        self.special_ids = {model.id_to_piece(token): token for token in control}
        self.added: dict[str, int] = {}  # text as it stands, and one token
        self._add(settings.added)
        self.bos_id = self._frame(settings.bos_token, model.bos_id())
        if settings.add_bos is False:
            self.bos_id = None
        end = self._frame(settings.eos_token, model.eos_id())
        self.eos_ids = tuple(dict.fromkeys([*settings.eos_ids, *([end] if end is not None else [])]))
        spaced = [t for t in range(n_piece) if re.match(rb" \w", self.pieces[t])]
        self.drops_space = bool(spaced) and not model.decode(spaced[:1]).startswith(" ")

    def _bytes(self, token: int) -> bytes:
        piece = self.model.id_to_piece(token)
        if self.model.is_control(token):
            return b""
        if self.model.is_byte(token):
            return bytes.fromhex(piece[3:5])
        if self.model.is_unknown(token):
            return " ⁇ ".encode()  # as sentencepiece has it
        return piece.replace(SPACE, " ").encode()

    def _add(self, tokens: Sequence[AddedToken]) -> None:
        """Tokens that only the files beside the model know. One without a number is a piece, or the next one."""
        names = {self.model.id_to_piece(token): token for token in range(self.n_vocab)}
        for token in tokens:
            number = names.get(token.content, len(self.pieces)) if token.id is None else token.id
            if number >= len(self.pieces) + MOST_ADDED:
                raise UserError(f"the added token {token.content!r} has the number {number}, far past the vocabulary")
            self.pieces += [b""] * (number + 1 - len(self.pieces))
            if token.special:
                self.special_ids[token.content] = number
                if token.content not in names:
                    self.pieces[number] = b""
            elif number >= self.n_vocab:
                self.added[token.content] = number
                self.pieces[number] = token.content.encode()
        self.n_vocab = len(self.pieces)

    def _frame(self, name: str, own: int) -> int | None:
        """The token that begins or ends a text: the one that is named, or the model's own."""
        named = self.special_ids.get(name)
        return named if named is not None else own if own >= 0 else None

    def encode_text(self, text: str, begins: bool = True, special: bool = False) -> list[int]:
        known = self.added | (self.special_ids if special else {})
        ids: list[int] = []
        for n, part in enumerate(split_at(text, known)):
            if n % 2:
                ids.append(known[part])
            elif part:
                first = begins if n == 0 else self.legacy
                ids += (self.model if first else self.inside).encode(part)
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token] if 0 <= token < self.n_vocab else b""


MOST_ADDED = 1 << 16  # tokens past a vocabulary: a number beyond is a mistake


# llama3/tokenizer.py in meta-llama/llama-models
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A longer run of blanks, or of letters without one, overflows the pattern's stack: it is cut, as there.
_LONG_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")
LLAMA3_RANKS = 128_000
_LLAMA3_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}


def llama3_special_tokens() -> dict[str, int]:
    """The 256 names and ids as published with Llama 3.1; 3.0 differs only in which are reserved."""
    names, n_reserved = [], 0
    for slot in range(256):
        if slot in _LLAMA3_NAMED:
            names.append(f"<|{_LLAMA3_NAMED[slot]}|>")
        else:
            names.append(f"<|reserved_special_token_{n_reserved}|>")
            n_reserved += 1
    return {name: LLAMA3_RANKS + slot for slot, name in enumerate(names)}


class TiktokenTokenizer(Tokenizer):
    """Llama 3: a file of `base64 rank` lines; the pattern and the special tokens are not in it."""

    def __init__(self, data: bytes, name: str) -> None:
        import tiktoken

        ranks: dict[bytes, int] = {}
        for n, line in enumerate(data.splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise UserError(f"{name}: line {n} is not a tiktoken rank; the file is damaged") from None
        if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):  # fewer would shift the special tokens
            raise UserError(f"{name}: {len(ranks)} tiktoken ranks, where Llama 3 has {LLAMA3_RANKS}; is it truncated?")
        self.special_ids = llama3_special_tokens()
        self.n_plain, self.n_vocab = LLAMA3_RANKS, LLAMA3_RANKS + len(self.special_ids)
        self.bos_id = self.special_ids["<|begin_of_text|>"]
        ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        self.eos_ids = tuple(self.special_ids[end] for end in ends)
        self.tokens = sorted(ranks, key=ranks.__getitem__)
        try:
            self.model = tiktoken.Encoding(
                "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
            )
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None

    def encode_text(self, text: str, begins: bool = True, special: bool = False) -> list[int]:
        parts = split_at(text, self.special_ids if special else ())
        return [
            token
            for n, part in enumerate(parts)
            for token in ([self.special_ids[part]] if n % 2 else self._ordinary(part))
        ]

    def _ordinary(self, text: str) -> list[int]:
        cuts = [0, *(run.end() for run in _LONG_RUN.finditer(text)), len(text)]
        parts = [text[start:stop] for start, stop in pairwise(cuts)]
        return [token for part in parts for token in self.model.encode_ordinary(part)]

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token] if 0 <= token < LLAMA3_RANKS else b""


def _byte_level_alphabet() -> dict[str, int]:
    """How byte-level BPE spells bytes: the printable ones as themselves, the rest from U+0100 on.

    From `bytes_to_unicode` in openai/gpt-2, encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_level_alphabet()
