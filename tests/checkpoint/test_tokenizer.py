"""Tokenizers against the libraries' own results, streaming against decoding, and files that are none."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import regex
import sentencepiece
import tokenizers
from conftest import needs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_made import (
    LLAMA3,
    MADE,
    REAL,
    SPECIAL,
    TEXTS,
    byte_level_json,
    get,
    trained_sentencepiece,
)

from checkpoint import load_tokenizer
from common.errors import UserError
from tokenizer import LLAMA3_RANKS, StreamDecoder, llama3_special_tokens, split_at

text_strategy = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(TEXTS)
relaxed = settings(max_examples=60)

every = pytest.mark.parametrize("name", [*MADE, *REAL])


@every
@given(text=text_strategy)
@relaxed
def test_text_comes_back(name: str, text: str) -> None:
    tokenizer = get(name)
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.n_vocab for token in ids)
    assert ids[0] == tokenizer.bos_id and ids[1:] == tokenizer.encode(text, bos=False)
    if "▁" not in text:  # it spells a blank in SentencePiece
        assert tokenizer.decode(ids) == text


@every
@given(data=st.data())
@relaxed
def test_stream_equals_decode_and_holds_back_unfinished_characters(name: str, data: st.DataObject) -> None:
    """Any ids, also bytes that are no UTF-8 and ids past the vocabulary."""
    tokenizer = get(name)
    low = st.integers(0, min(600, tokenizer.n_vocab + 5))
    ids = data.draw(st.lists(low | st.integers(0, tokenizer.n_vocab + 300), max_size=30))
    stream, text = StreamDecoder(tokenizer), ""
    for n, token in enumerate(ids, 1):
        text += stream.push(token)
        so_far = tokenizer.decode(ids[:n])
        held_back = so_far[len(text) :]  # at most a character's first three bytes
        assert so_far.startswith(text) and held_back == "\ufffd" * len(held_back) and len(held_back) <= 3
    text += stream.flush()
    raw = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
    assert text == tokenizer.decode(ids) == (raw.removeprefix(" ") if tokenizer.drops_space else raw)


def test_a_character_in_parts_is_shown_once_whole() -> None:
    tokenizer = get("tiktoken")
    ids = [tokenizer.tokens.index(bytes([byte])) for byte in "é😀".encode()]
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in ids] == ["", "é", "", "", "", "😀"]
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd"


@pytest.mark.parametrize("name", ["sentencepiece", "llama2", "mistral", "stories"])
@given(text=text_strategy, data=st.data())
@relaxed
def test_sentencepiece_agrees_with_the_library(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = get(name)
    library = tokenizer.model
    assert tokenizer.encode(text) == [library.bos_id(), *library.encode(text)]
    ids = data.draw(st.lists(st.integers(1, tokenizer.n_vocab - 1), max_size=12))
    ours = tokenizer.decode(ids)
    starts_with_byte = bool(ids) and library.is_byte(ids[0])  # a byte that is a blank: never encoded so
    if "\ufffd" not in ours and not starts_with_byte:
        assert ours == library.decode(ids)


def test_sentencepiece_leading_space() -> None:
    """Generated text after a prompt keeps its space; the first piece of all loses the added one."""
    tokenizer = get("sentencepiece")
    word = next(n for n, piece in enumerate(tokenizer.pieces) if piece == b" the")
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in (tokenizer.bos_id, word, word)] == ["", "the", " the"]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
@given(text=text_strategy, data=st.data())
@relaxed
def test_tokenizer_json_agrees_with_the_library(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = get(name)
    library = tokenizers.Tokenizer.from_str(MADE[name]().decode())
    if not any(special in text for special in (*SPECIAL, "<think>", "Ġé")):
        assert tokenizer.encode(text) == library.encode(text).ids
    ids = data.draw(st.lists(st.integers(1, tokenizer.n_vocab - 1), max_size=12))
    ours = tokenizer.decode(ids)
    if "\ufffd" not in ours and "Ġé" not in ours:  # which the library would take for spelled bytes
        assert ours == library.decode(ids, skip_special_tokens=True)


def slow_llama3(ranks: dict[bytes, int], text: str) -> list[int]:
    """Byte-pair encoding by its definition, over the pattern that Llama 3's tokenizer.json publishes."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ids = []
    for word in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [(ranks.get(a + b, LLAMA3_RANKS), n) for n, (a, b) in enumerate(itertools.pairwise(parts))]
            if not pairs or min(pairs)[0] == LLAMA3_RANKS:
                break
            n = min(pairs)[1]
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        ids += [ranks[part] for part in parts]
    return ids


# Letters that every Unicode version knows alike: \\p{L} of a new one differs from engine to engine.
old_letters = st.characters(max_codepoint=0x24F) | st.sampled_from(list("λЖ中のカ한٣½²\u0301\u3000\u2028'’😀"))


@pytest.mark.parametrize("name", ["tiktoken", "llama3"])
@given(text=st.text(old_letters, max_size=40) | st.sampled_from(TEXTS))
@relaxed
def test_tiktoken_agrees_with_slow_byte_pair_encoding(name: str, text: str) -> None:
    tokenizer = get(name)
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    assert tokenizer.encode(text, bos=False) == slow_llama3(ranks, text)


def test_llama3_special_tokens() -> None:
    special = llama3_special_tokens()
    assert len(special) == 256 and sorted(special.values()) == list(range(128000, 128256))
    published = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|finetune_right_pad_id|>": 128004,
        "<|reserved_special_token_2|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_3|>": 128011,
        "<|reserved_special_token_247|>": 128255,
    }
    assert published.items() <= special.items()
    tokenizer = get("tiktoken")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (128000, (128001, 128008, 128009))
    assert tokenizer.n_vocab == 128256


@needs(LLAMA3)
def test_llama3_known_ids() -> None:
    """The ids that Meta's own tokenizer gives."""
    assert get("llama3").encode("Hello world") == [128000, 9906, 1917]


def test_long_runs_without_a_break() -> None:
    """The pattern's engine overflows on a million blanks, and takes the process with it."""
    tokenizer = get("tiktoken")
    for text in (" " * 1_000_000, "x " + "ab" * 100_000 + "  y", "\n" * 60_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [
        ("tiktoken", "<|eot_id|>", [128009]),
        ("tiktoken", "<|begin_of_text|><|end_of_text|>", [128000, 128001]),
        ("sentencepiece", "</s>", [2]),
        ("byte-level", "<|end|><s>", [2, 0]),
        ("byte-fallback", "</s>", [2]),
    ],
)
def test_special_tokens_only_on_request(name: str, text: str, tokens: list[int]) -> None:
    tokenizer = get(name)
    plain = tokenizer.encode(text, bos=False)
    assert not set(plain) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(plain) == text
    assert tokenizer.encode(text, bos=False, special=True) == tokens
    assert tokenizer.decode(tokens) == ""
    inside = tokenizer.encode(f"a{text}b", special=True)
    assert inside == [
        tokenizer.bos_id,
        *tokenizer.encode("a", bos=False),
        *tokens,
        *tokenizer.encode("b", bos=False, begins=False, special=True),
    ]


def test_the_longest_special_name_wins() -> None:
    parts = split_at("<|end|>><|end|> <|end", ["<|end", "<|end|>", "<|end|>>"])
    assert parts == ["", "<|end|>>", "", "<|end|>", " ", "<|end", ""] and split_at("a", []) == ["a"]


@every
def test_half_a_surrogate_pair_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="character 2"):
        get(name).encode("ab\udce9")


# --- Files that are no tokenizer --------------------------------------------------------------------


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"just some text, in a file\n" * 9, "not a SentencePiece or tiktoken model"),
        (b"\x80\x02garbage\xff" * 30, "not a SentencePiece or tiktoken model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b'{"model": {"type": "BPE"', "not JSON"),
        (b'{"hidden_size": 4}', "not a tokenizer's"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"version": "1.0", "model": {"type": "Nonsense"}}', "tokenizer"),
        (b"IQ== 0\nIg== 1\n", "2 tiktoken ranks, where Llama 3 has 128000"),
        (b"IQ== 0\nIg== one\n", "line 2 is not a tiktoken rank"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", MADE)
@given(kept=st.floats(0, 0.9999))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_files_are_refused(name: str, tmp_path: Path, kept: float) -> None:
    data = MADE[name]()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data[: int(len(data.rstrip()) * kept)])
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_sentencepiece_without_its_last_field_is_refused(tmp_path: Path) -> None:
    """sentencepiece itself takes such a file, with rules that it makes up: runs of blanks would vanish."""
    data = trained_sentencepiece()
    cut = data[: data.rindex(b"\n\x08identity") - 2]
    library = sentencepiece.SentencePieceProcessor(model_proto=cut)
    assert library.encode("a  b") != sentencepiece.SentencePieceProcessor(model_proto=data).encode("a  b")
    (tmp_path / "tokenizer.model").write_bytes(cut)
    with pytest.raises(UserError, match="a damaged one"):
        load_tokenizer(tmp_path)


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    fields = json.loads(byte_level_json())
    for decoder, named in ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"), (None, "null"):
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields | {"decoder": decoder}))
        with pytest.raises(UserError, match=f"decoder of type {named}"):
            load_tokenizer(tmp_path)
