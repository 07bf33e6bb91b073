"""Which file of a folder is the tokenizer, and what the files beside it say of it.

A folder may hold several tokenizers, of which only one is the model's: a fine-tune of Llama 2 that adds ChatML's
tokens has them in tokenizer.json, beside its base model's tokenizer.model. So tokenizer.json stands first, and what
tokenizer_config.json, special_tokens_map.json and added_tokens.json add is added, as in transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint.tokenizer_json import HuggingFaceTokenizer
from common.errors import UserError
from common.files import read_file, read_json
from tokenizer import AddedToken, SentencePieceTokenizer, TiktokenTokenizer, Tokenizer, TokenizerSettings

TOKENIZER_FILES = (  # the first one found; Mistral's own folders number the version of their tokenizer
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.model.v2",
    "tokenizer.model.v1",
    "original/tokenizer.model",
)
LARGEST_TOKENIZER = 1 << 28  # bytes; the largest of those known has 2^25
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def find_tokenizer(folder: Path) -> Path | None:
    """The first of TOKENIZER_FILES that exists, readable or not: another one would be the wrong one."""
    return next((folder / name for name in TOKENIZER_FILES if os.path.lexists(folder / name)), None)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, or in a folder that holds one of `TOKENIZER_FILES`.

    Raises UserError where there is none, or where the file is damaged or something else.
    """
    if os.path.isdir(path):
        found = find_tokenizer(path)
        if found is None:
            tekken = " (tekken.json is not read)" if (path / "tekken.json").exists() else ""
            raise UserError(f"{path}: no tokenizer.json or tokenizer.model in this folder{tekken}")
        path = found
    data = read_file(path, LARGEST_TOKENIZER)
    if not data:
        raise UserError(f"{path}: the tokenizer file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the tokenizer itself (git lfs pull fetches it)")
    settings = tokenizer_settings(path.parent)
    if data.lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(data, str(path), settings)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return TiktokenTokenizer(data, str(path))
    return SentencePieceTokenizer(data, str(path), settings)


def token_name(token: Any) -> str:
    """tokenizer_config.json writes a token as its text or as an object with "content"; "" for none."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def named_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token, ... of a folder, those that are set: what chat templates know them by."""
    stated = _stated(folder)
    names = {name: token_name(stated.get(name)) for name in _NAMED}
    return {name: token for name, token in names.items() if token}


def _stated(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and what special_tokens_map.json adds to it.

    As in transformers, the latter is not asked where the former lists the added tokens.
    """
    stated = read_json(folder / "tokenizer_config.json", missing_ok=True)
    if not stated.get("added_tokens_decoder"):
        more = read_json(folder / "special_tokens_map.json", missing_ok=True)
        stated = {**stated, **{k: v for k, v in more.items() if v is not None}}
    return stated


def tokenizer_settings(folder: Path) -> TokenizerSettings:
    """What stands beside a tokenizer in its folder."""
    stated = _stated(folder)
    config = read_json(folder / "config.json", missing_ok=True)
    legacy, prefix, add_bos = (stated.get(name) for name in ("legacy", "add_prefix_space", "add_bos_token"))
    kind = stated.get("tokenizer_class") or config.get("tokenizer_class")
    return TokenizerSettings(
        bos_token=token_name(stated.get("bos_token")),
        eos_token=token_name(stated.get("eos_token")),
        eos_ids=eos_ids_of(folder),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        legacy=legacy if isinstance(legacy, bool) else None,
        add_prefix_space=prefix if isinstance(prefix, bool) else None,
        pieces_class=isinstance(kind, str)
        and kind.removesuffix("Fast") == "LlamaTokenizer"
        and config.get("model_type") not in ("mistral", "qwen2"),  # which transformers reads as the file stands
        added=tuple(_added_tokens(folder, stated)),
    )


def _added_tokens(folder: Path, stated: dict[str, Any]) -> Iterator[AddedToken]:
    """Tokens with a number come first, in its order; then those that have only a name."""
    where = folder / "tokenizer_config.json"
    named = [token_name(stated.get(name)) for name in _NAMED]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = stated.get(name)
        named += map(token_name, more if isinstance(more, list) else [])
    special = set(filter(None, named))
    numbered: dict[int, AddedToken] = {}
    decoder = stated.get("added_tokens_decoder")
    if isinstance(decoder, dict) and decoder:
        for number, token in decoder.items():
            if not (number.isdecimal() and len(number) < 10 and isinstance(token, dict) and token_name(token)):
                raise UserError(f"{where}: added_tokens_decoder: {number!r} is not a token's number with its content")
            flags = {flag: token.get(flag) is True for flag in ("special", "lstrip", "rstrip", "single_word")}
            name = token_name(token)
            flags["special"] |= name in special
            normalized = token.get("normalized")
            plain = not flags["special"] if normalized is None else normalized is True
            numbered[int(number)] = AddedToken(name, int(number), normalized=plain, **flags)
    else:
        where = folder / "added_tokens.json"
        for name, token in read_json(where, missing_ok=True).items():
            if type(token) is not int or not 0 <= token < 1 << 30 or not name:
                raise UserError(f"{where}: {name!r} has the number {token!r}, which is not a token's")
            numbered[token] = AddedToken(name, token, special=name in special, normalized=name not in special)
    yield from (numbered[number] for number in sorted(numbered))
    seen = {token.content for token in numbered.values()}
    for name in dict.fromkeys(filter(None, named)):
        if name not in seen:
            yield AddedToken(name, None, special=True, normalized=False)


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
