"""A tokenizer.json, encoded by the library that wrote it.

What a file cannot say stands beside it (`TokenizerSettings`): tokens that were added later, and transformers' class
for it. Its LlamaTokenizer takes from the file only the vocabulary, the merges and what frames a text, and puts the
space of SentencePiece in front of a text by its own rule; so does this one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.errors import UserError
from common.files import parse_json
from tokenizer import BYTE_OF, BYTE_PIECE, SPACE, Tokenizer, TokenizerSettings

_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}

_TRIALS = ("Hello, world ", "  two  blanks, a tab\tand a line\n", " é日本 😀 \u2581 e_a", "a")


def llama_class(settings: TokenizerSettings) -> dict[str, Any]:
    """The parts of a tokenizer.json that transformers' LlamaTokenizer replaces (models/llama/tokenization_llama.py)."""
    prefix = settings.add_prefix_space is not False
    scheme = ("always" if settings.legacy else "first") if prefix else "never"
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    decoder = {"type": "Sequence", "decoders": decoders}
    return {"normalizer": None, "pre_tokenizer": space, "decoder": decoder}


@contextmanager
def library_errors(name: str) -> Iterator[None]:
    """What the tokenizers library raises becomes a UserError that begins with `name`."""
    try:
        yield
    except BaseException as error:  # its Rust panics are no Exception
        # It raises the bare class, and nothing narrower.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{name}: {error}") from None


@contextmanager
def silent_stderr() -> Iterator[None]:
    """A Rust panic prints itself, with a backtrace of a page, before it is raised."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


class LibraryTokenizer(Tokenizer):
    """Encoded by the tokenizers library, whole texts at a time."""

    model: Any  # a tokenizers.Tokenizer

    def encode_text(self, text: str, begins: bool = True, special: bool = False) -> list[int]:
        before = next(iter(self.special_ids), None)
        if begins or before is None:
            return self._encode(text, special)
        # After a special token the library is not at the beginning of a text; it is taken off again.
        if special:
            return self._encode(before + text, special)[1:]
        return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> list[int]:
        self.model.encode_special_tokens = not special
        try:
            with library_errors("the tokenizer fails at this text"):
                return self.model.encode(text, add_special_tokens=False).ids
        finally:
            self.model.encode_special_tokens = True


class HuggingFaceTokenizer(LibraryTokenizer):
    """data: the file; name: how errors name it."""

    def __init__(self, data: bytes, name: str, settings: TokenizerSettings) -> None:
        fields = parse_json(data, name)
        if "model" not in fields:
            raise UserError(f"{name}: JSON, but not a tokenizer's")
        if settings.pieces_class and b'"ByteLevel"' not in data:
            fields |= llama_class(settings)
            data = json.dumps(fields, ensure_ascii=False).encode()
        self.model = model = self._load(data, name)
        model.no_truncation()
        model.no_padding()
        self._add(settings)
        vocab = model.get_vocab()
        self.n_vocab = max(vocab.values(), default=-1) + 1
        added = model.get_added_tokens_decoder()
        self.n_plain = max((n for n in vocab.values() if n not in added), default=-1) + 1
        self.special_ids = {token.content: n for n, token in added.items() if token.special}
        self.added = {n: token.content for n, token in added.items() if not token.special}
        self._read_decoder(fields.get("decoder"), name)
        specials = set(self.special_ids.values())
        self.pieces = {n: b"" if n in specials else self._bytes(n, piece) for piece, n in vocab.items()}
        model.encode_special_tokens = True  # a special token's name in a text is only text
        self._require_same_decoding(name)
        self.bos_id = self._bos_id()
        end = vocab.get(settings.eos_token)
        self.eos_ids = tuple(dict.fromkeys([*settings.eos_ids, *([end] if end is not None else [])]))

    def _load(self, data: bytes, name: str) -> Any:
        import tokenizers

        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: not UTF-8 at byte {error.start}") from None
        with library_errors(name), silent_stderr():
            return tokenizers.Tokenizer.from_str(text)

    def _add(self, settings: TokenizerSettings) -> None:
        """Tokens that only the other files know: at the vocabulary's end, in the order of their numbers."""
        from tokenizers import AddedToken

        known = {token.content for token in self.model.get_added_tokens_decoder().values()}
        for token in settings.added:
            if token.content not in known:
                flags = dict(lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word)
                new = AddedToken(token.content, normalized=token.normalized, special=token.special, **flags)
                self.model.add_special_tokens([new]) if token.special else self.model.add_tokens([new])

    def _read_decoder(self, decoder: Any, name: str) -> None:
        """Find out how pieces spell bytes. Sets byte_level, byte_fallback, drops_space."""
        steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
        kinds = {step["type"]: step for step in steps}
        unknown = set(kinds) - _DECODERS
        if not kinds or unknown:
            raise UserError(f"{name}: a decoder of type {', '.join(sorted(unknown)) or 'null'} is not supported")
        self.byte_level, self.byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        metaspace, strip = kinds.get("Metaspace", {}), kinds.get("Strip", {})
        self.drops_space = (
            metaspace.get("prepend_scheme", "never") != "never"
            or bool(metaspace.get("add_prefix_space"))
            or (strip.get("content") == " " and strip.get("start", 0) > 0)
        )

    def _require_same_decoding(self, name: str) -> None:
        """Raises UserError where `_bytes` and `StreamDecoder` do not give the text that the file's decoder gives.

        The steps of a decoder can be put together in many ways, of which few are in use: those are known by trial.
        """
        with library_errors(name), silent_stderr():
            for text in _TRIALS:
                ids = self.model.encode(text, add_special_tokens=False).ids
                ours, theirs = self.decode(ids), self.model.decode(ids, skip_special_tokens=True)
                if ours != theirs:
                    raise UserError(
                        f"{name}: its decoder is not supported: it makes {theirs!r} of what would be {ours!r}"
                    )

    def _bytes(self, token: int, piece: str) -> bytes:
        if self.byte_level:
            if token not in self.added and all(char in BYTE_OF for char in piece):
                return bytes(BYTE_OF[char] for char in piece)
            return piece.encode()
        if self.byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.replace(SPACE, " ").encode()

    def _bos_id(self) -> int | None:
        """The begin token that the file itself puts in front of a text: nothing else counts, as in transformers.

        Not config.json's bos_token_id: Qwen 2.5 names one there that no text is to begin with, and SmolLM2's
        begin token is the one that begins a turn.
        """
        with library_errors("the tokenizer fails at a text"), silent_stderr():
            plain = self.model.encode("a", add_special_tokens=False).ids
            framed = self.model.encode("a", add_special_tokens=True).ids
        return framed[0] if framed[1 : len(plain) + 1] == plain and len(framed) > len(plain) else None

    def token_bytes(self, token: int) -> bytes:
        return self.pieces.get(token, b"")
