"""Text to token ids and back, behind one small interface: SentencePiece, tiktoken, tokenizer.json.

`load_tokenizer` looks at a file's content, never at its name: Llama 2 and Mistral ship SentencePiece
as `tokenizer.model`, and Llama 3 ships tiktoken ranks under the same name.

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
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import TOO_DEEP, read_json


class Tokenizer(ABC):
    """Ids are in [0, n_vocab). `bos_id` is None where a text has no begin token (Qwen)."""

    n_vocab: int
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    special_ids: dict[str, int]  # by name, those that `special=True` recognises
    drops_space: bool = False  # the first piece's leading space is the tokenizer's own, not the text's

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Ids of valid Unicode text; nothing is prepended, and no special token is made."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for a special token and for an id without one."""

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of `text`, after the begin token if `bos` and if the model has one.

        special: names of special tokens in the text become those tokens (for chat templates). Raises
        UserError where the text holds half a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode at character {error.start}") from None
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        if not (special and self.special_ids):
            return ids + self.encode_text(text)
        names = sorted(self.special_ids, key=len, reverse=True)  # the longest of two that both match
        for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
            ids += [self.special_ids[part]] if part in self.special_ids else self.encode_text(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        stream = StreamDecoder(self)
        return "".join([*map(stream.push, ids), stream.flush()])


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


_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # byte fallback: how a piece spells a lone byte
_SPACE = "\u2581"  # how a piece spells a space


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

    def __init__(self, data: bytes, name: str) -> None:
        import sentencepiece

        # Pieces, how they were trained, how text is normalised: sentencepiece would go on without the
        # last one, which a truncated file may lack, and encode differently
        damaged = UserError(f"{name}: not a SentencePiece or tiktoken model, or a damaged one")
        if not _protobuf_fields(data) >= {1, 2, 3}:
            raise damaged
        try:
            self.model = model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.n_vocab = model.vocab_size()
            self.pieces = [self._bytes(token) for token in range(self.n_vocab)]
        except (RuntimeError, UnicodeDecodeError):  # the latter from its own message about the file
            raise damaged from None
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.eos_ids = (model.eos_id(),) if model.eos_id() >= 0 else ()
        control = [token for token in range(self.n_vocab) if model.is_control(token)]
        self.special_ids = {model.id_to_piece(token): token for token in control}
        spaced = [t for t, piece in enumerate(self.pieces) if re.match(rb" \w", piece)]
        self.drops_space = bool(spaced) and not model.decode(spaced[:1]).startswith(" ")

    def _bytes(self, token: int) -> bytes:
        piece = self.model.id_to_piece(token)
        if self.model.is_control(token):
            return b""
        if self.model.is_byte(token):
            return bytes.fromhex(piece[3:5])
        if self.model.is_unknown(token):
            return " ⁇ ".encode()  # as sentencepiece has it
        return piece.replace(_SPACE, " ").encode()

    def encode_text(self, text: str) -> list[int]:
        return self.model.encode(text)

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token] if 0 <= token < self.n_vocab else b""


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
        self.n_vocab = LLAMA3_RANKS + len(self.special_ids)
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

    def encode_text(self, text: str) -> list[int]:
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


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. What stands beside it says which tokens begin and end a text."""

    def __init__(self, data: bytes, name: str, folder: Path) -> None:
        import tokenizers

        try:
            fields = json.loads(data)
        except ValueError as error:
            raise UserError(f"{name}: not JSON ({error}); is it truncated?") from None
        except RecursionError:
            raise UserError(f"{name}: {TOO_DEEP}") from None
        if not isinstance(fields, dict) or "model" not in fields:
            raise UserError(f"{name}: JSON, but not a tokenizer's")
        try:
            self.model = model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises the bare class, and nothing narrower
                raise
            raise UserError(f"{name}: {error}") from None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # a special token's name in a text is only text
        vocab = model.get_vocab()
        self.n_vocab = max(vocab.values(), default=-1) + 1
        added = model.get_added_tokens_decoder()
        self.special_ids = {token.content: n for n, token in added.items() if token.special}
        self.added = {n: token.content for n, token in added.items() if not token.special}
        self._read_decoder(fields.get("decoder"), name)
        specials = set(self.special_ids.values())
        self.pieces = {n: b"" if n in specials else self._bytes(n, piece) for piece, n in vocab.items()}
        settings = read_json(folder / "tokenizer_config.json", missing_ok=True)
        self.bos_id = self._bos_id(fields, settings, folder)
        end = vocab.get(token_name(settings.get("eos_token")))
        self.eos_ids = tuple(dict.fromkeys([*eos_ids_of(folder), *([end] if end is not None else [])]))

    def _read_decoder(self, decoder: Any, name: str) -> None:
        """Find out how pieces spell bytes. Sets byte_level, byte_fallback, drops_space."""
        steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
        kinds = {step["type"]: step for step in steps}
        unknown = set(kinds) - {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
        if not kinds or unknown:
            raise UserError(f"{name}: a decoder of type {', '.join(sorted(unknown)) or 'null'} is not supported")
        self.byte_level, self.byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        metaspace, strip = kinds.get("Metaspace", {}), kinds.get("Strip", {})
        self.drops_space = (
            metaspace.get("prepend_scheme", "never") != "never"
            or bool(metaspace.get("add_prefix_space"))
            or (strip.get("content") == " " and strip.get("start", 0) > 0)
        )

    def _bytes(self, token: int, piece: str) -> bytes:
        if self.byte_level:
            if token not in self.added and all(char in BYTE_OF for char in piece):
                return bytes(BYTE_OF[char] for char in piece)
            return piece.encode()
        if self.byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.replace(_SPACE, " ").encode()

    def _bos_id(self, fields: dict[str, Any], settings: dict[str, Any], folder: Path) -> int | None:
        """The begin token that this tokenizer itself would put in front of a text.

        Not simply config.json's bos_token_id: Qwen 2.5 names one there that no text is to begin with.
        """
        if settings.get("add_bos_token") is False:
            return None
        bos = self.model.token_to_id(token_name(settings.get("bos_token")))
        if settings.get("add_bos_token") and bos is not None:
            return bos
        if fields.get("post_processor") is not None:
            plain = self.model.encode("a", add_special_tokens=False).ids
            framed = self.model.encode("a", add_special_tokens=True).ids
            return framed[0] if framed[1 : len(plain) + 1] == plain else None
        if bos is not None:
            return bos
        stated = read_json(folder / "config.json", missing_ok=True).get("bos_token_id")
        if stated is not None and (type(stated) is not int or stated < 0):
            raise UserError(f"{folder / 'config.json'}: bos_token_id {stated!r} is not a token's number")
        return stated

    def encode_text(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        return self.pieces.get(token, b"")


BYTE_OF = _byte_level_alphabet()


def token_name(token: Any) -> str:
    """tokenizer_config.json writes a token as its text or as an object with "content"; "" for none."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def eos_ids_of(folder: Path) -> tuple[int, ...]:
    """End tokens named by generation_config.json and config.json in `folder`: all of them."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        stated = read_json(folder / name, missing_ok=True).get("eos_token_id")
        for token in stated if isinstance(stated, list) else [stated]:
            if isinstance(token, int):
                found.append(token)
            elif token is not None:
                raise UserError(f"{folder / name}: eos_token_id {token!r} is not a number")
    return tuple(dict.fromkeys(found))


TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "original/tokenizer.model")  # the first one found


def find_tokenizer(folder: Path) -> Path | None:
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, or in a folder that holds one of `TOKENIZER_FILES`.

    Raises UserError where there is none, or where the file is damaged or something else.
    """
    try:
        if path.is_dir():
            found = find_tokenizer(path)
            if found is None:
                raise UserError(f"{path}: no tokenizer.model or tokenizer.json in this folder")
            path = found
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not data:
        raise UserError(f"{path}: the tokenizer file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the tokenizer itself (git lfs pull fetches it)")
    if data.lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(data, str(path), path.parent)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return TiktokenTokenizer(data, str(path))
    return SentencePieceTokenizer(data, str(path))
