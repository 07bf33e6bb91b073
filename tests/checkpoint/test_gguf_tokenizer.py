"""Tokenizers from GGUF metadata against the originals that the metadata was taken from."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import pytest
import sentencepiece
import tokenizers
from conftest import SENTENCES, needs
from texts import FRAGMENTS, texts
from tokenizers import decoders, pre_tokenizers
from tokenizers_made import LLAMA2, MISTRAL, trained_sentencepiece
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from checkpoint.gguf import GGUF, read_gguf
from checkpoint.gguf_tokenizer import gguf_chat_template, gguf_tokenizer
from common.errors import UserError
from tokenizer import LLAMA3_PATTERN, Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(pre_tokenizer: Any) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([*SENTENCES, *FRAGMENTS, "1234 5678 they'll THEY'LL   x  y\n\n\n"] * 3, trainer)
    return model


def split(pattern: str) -> Any:
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), by_bytes])


BY_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {  # as each family's tokenizer.json has it
    "llama-bpe": split(LLAMA3_PATTERN),
    "qwen2": split(LLAMA3_PATTERN.replace("{1,3}", "")),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BY_BYTES]),
    "gpt-2": BY_BYTES,
}


def metadata_of(original: tokenizers.Tokenizer, cut: str, /, **changes: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    fields = json.loads(original.to_str())
    vocab = {**fields["model"]["vocab"], **{t["content"]: t["id"] for t in fields["added_tokens"]}}
    kinds = {t["id"]: 3 if t["special"] else 4 for t in fields["added_tokens"]}
    values = {
        "model": "gpt2",
        "pre": cut,
        "tokens": sorted(vocab, key=vocab.__getitem__),
        "token_type": [kinds.get(n, 1) for n in range(len(vocab))],
        "merges": [" ".join(merge) for merge in fields["model"]["merges"]],
        "bos_token_id": vocab["<|im_start|>"],
        "eos_token_id": vocab["<|im_end|>"],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items() if value is not None}


def made(metadata: dict[str, Any]) -> Tokenizer:
    tokenizer = gguf_tokenizer(GGUF(Path("made.gguf"), metadata, {}))
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level_equals_the_original(pre: str) -> None:
    model = trained(CUTS[pre])
    if pre == "llama-bpe":  # a word that is a token stays whole, though no merges lead to it
        fields = json.loads(model.to_str())
        fields["model"]["vocab"][" Привет".encode().decode("latin-1")] = len(fields["model"]["vocab"])
        fields["model"]["vocab"]["Hellothe"] = len(fields["model"]["vocab"])
        fields["model"]["ignore_merges"] = True
        model = tokenizers.Tokenizer.from_str(json.dumps(fields))
    tokenizer = made(metadata_of(model, pre))
    model.encode_special_tokens = True
    reference = {"qwen2": Qwen2Tokenizer, "gpt-2": GPT2Tokenizer}.get(pre)
    if reference is not None:
        fields = json.loads(model.to_str())["model"]
        family = reference(vocab=fields["vocab"], merges=[tuple(merge) for merge in fields["merges"]])
        model = family.backend_tokenizer
        model.encode_special_tokens = True
    n_token = 0
    for text in (*texts(), "Hellothe Hellothe"):
        ids = tokenizer.encode_text(text)
        assert ids == model.encode(text, add_special_tokens=False).ids, text
        assert pre == "qwen2" or tokenizer.decode(ids) == text  # which composes letters and accents
        n_token += len(ids)
    assert n_token > 10_000


def test_added_and_special_tokens() -> None:
    model = trained(CUTS["smollm"])
    model.add_tokens(["<think>", "Ġé"])
    metadata = metadata_of(model, "smollm")
    tokenizer = made(metadata)
    think, start = (metadata["tokenizer.ggml.tokens"].index(token) for token in ("<think>", "<|im_start|>"))
    assert tokenizer.special_ids.keys() == set(SPECIAL)
    ids = tokenizer.encode("a<think>Ġé<|im_start|>b")
    assert think in ids and start not in ids
    assert tokenizer.decode(ids) == "a<think>Ġé<|im_start|>b"
    ids = tokenizer.encode("<|im_start|>b", special=True)
    assert ids[0] == start and tokenizer.decode(ids) == "b"


def test_begin_and_end_tokens() -> None:
    """As the file says; where it does not, as llama.cpp takes it. Llama 3's files name one of its three end tokens."""
    model = trained(CUTS["smollm"])
    end, start, im_end = range(3)
    for pre, stated, bos in (
        ("smollm", None, None),
        ("smollm", True, start),
        ("llama-bpe", None, start),
        ("llama-bpe", False, None),
    ):
        tokenizer = made(metadata_of(model, pre, add_bos_token=stated))
        assert tokenizer.bos_id == bos
        assert tokenizer.encode("a")[:1] == ([bos] if bos is not None else tokenizer.encode_text("a"))
    assert tokenizer.eos_ids == (im_end, end)
    assert set(made(metadata_of(model, "smollm", eot_token_id=7, eom_token_id=8)).eos_ids) == {end, im_end, 7, 8}
    with pytest.raises(UserError, match=r"there is no tokenizer\.ggml\.bos_token_id"):
        made(metadata_of(model, "llama-bpe", bos_token_id=None))


@functools.cache
def unigram() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, vocab_size=300, model_type="unigram", minloglevel=2,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return model.getvalue()


def assert_equals_the_original(data: bytes) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = made(gguf_files.sentencepiece_metadata(data))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.drops_space) == (1, (2,), True)
    for text in texts():
        ids = tokenizer.encode(text)
        assert ids == [1, *original.encode(text)], text
        assert "▁" in text or tokenizer.decode(ids) == text


def test_sentencepiece_equals_the_original() -> None:
    """Both algorithms: a GGUF does not say which, and its scores do."""
    for data in (trained_sentencepiece(), unigram()):
        assert_equals_the_original(data)


@pytest.mark.parametrize("path", [pytest.param(p, marks=needs(p), id=p.stem) for p in (LLAMA2, MISTRAL)])
def test_real_sentencepiece_equals_the_original(path: Path) -> None:
    assert_equals_the_original(path.read_bytes())


def test_sentencepiece_settings() -> None:
    data = trained_sentencepiece()
    no_prefix = made(gguf_files.sentencepiece_metadata(data, add_space_prefix=False, add_bos_token=False))
    assert no_prefix.bos_id is None and not no_prefix.drops_space
    assert no_prefix.decode(no_prefix.encode(" the cat")) == " the cat"
    metadata = gguf_files.sentencepiece_metadata(data)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<|im_start|>", "   "]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], -1000.0, -1000.0]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 3, 4]
    tokenizer = made(metadata)
    start = tokenizer.n_vocab - 2
    assert start in tokenizer.encode("<|im_start|>the", special=True)
    assert start not in tokenizer.encode("<|im_start|>the")
    assert start + 1 in tokenizer.encode("a    b")  # an added token of blanks, which the converter respells
    assert tokenizer.decode(tokenizer.encode("a    b")) == "a    b"


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -1e300])
def test_a_score_that_is_no_float32_is_told(score: float) -> None:
    metadata = gguf_files.sentencepiece_metadata(unigram())
    metadata["tokenizer.ggml.scores"] = [score, *metadata["tokenizer.ggml.scores"][1:]]
    with pytest.raises(UserError, match="no finite float32"):
        made(metadata)


BAD: list[tuple[dict[str, Any], str]] = [
    (dict(model="bert"), "a tokenizer of the kind 'bert' is not supported"),
    (dict(model=3), "tokenizer.ggml.model is 3, not of type str"),
    (dict(pre="mystery"), "pre-tokenizer 'mystery' is not supported"),
    (dict(pre=None), "no tokenizer.ggml.pre"),
    (dict(tokens=None), "tokenizer.ggml.tokens is empty"),
    (dict(tokens=["a", 3]), "tokens holds others than str"),
    (dict(tokens=["a", "a"], token_type=[1, 1]), "a token is there twice"),
    (dict(token_type=[1]), "and types of 1"),
    (dict(tokens=["a", "b"], token_type=[1, -1]), "token_type has a -1, and types are 1 to 6"),
    (dict(tokens=["a", "b"], token_type=[2**31, 1]), "token_type has a 2147483648"),
    (dict(merges=None), "merges is missing"),
    (dict(merges=["ab"]), "'ab' is not two parts"),
    (dict(merges=["no such"]), "tokenizer.ggml.merges: "),
    (dict(eos_token_id=10**6), "eos_token_id is 1000000, and there are"),
    (dict(eos_token_id="2"), "eos_token_id is '2', not of type int"),
    (dict(add_bos_token=1), "add_bos_token is 1, not of type bool"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        made(metadata_of(trained(CUTS["smollm"]), "smollm", **changes))
    assert "\n" not in str(error.value)


def test_bad_sentencepiece() -> None:
    data = trained_sentencepiece()
    n = sentencepiece.SentencePieceProcessor(model_proto=data).vocab_size()
    for changes, message in (
        (dict(scores=None), "and scores of 0"),
        (dict(scores=[-1000.0] * n), "scores are mostly the same"),
        (dict(token_type=[3] * n), "not a SentencePiece or tiktoken model"),
    ):
        with pytest.raises(UserError, match=message):
            made(gguf_files.sentencepiece_metadata(data, **changes))


def test_through_a_file(tmp_path: Path) -> None:
    """Tokenizer and template as the package's writer puts them; a file without is a model without."""
    metadata = metadata_of(trained(CUTS["smollm"]), "smollm", add_bos_token=True)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for key, value in (metadata | {"tokenizer.chat_template": "{{ messages }}"}).items():
        gguf_files.put(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = read_gguf(tmp_path / "t.gguf")
    assert {k: v for k, v in read.metadata.items() if "ggml" in k} == metadata
    source, names = gguf_chat_template(read)
    assert source == "{{ messages }}" and names == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = gguf_tokenizer(read)
    assert tokenizer is not None and tokenizer.encode("the cat") == made(metadata).encode("the cat")
    assert gguf_tokenizer(GGUF(Path("none"), {}, {})) is None
