"""A tokenizer and the files beside it: what transformers makes of the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from conftest import SENTENCES
from tokenizers_made import TEXTS, byte_fallback_json, byte_level_json, trained_sentencepiece
from transformers import AutoTokenizer

from checkpoint import load_tokenizer
from checkpoint.tokenizer_files import eos_ids_of
from common.errors import UserError


def folder_with(path: Path, bos: bool = True, **files: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(byte_level_json(bos))
    for name, fields in files.items():
        (path / f"{name}.json").write_text(json.dumps(fields))
    return path


def test_begin_token_is_the_tokenizers_own(tmp_path: Path) -> None:
    """Not what a config names: Qwen 2.5's names one that its tokenizer never uses, and SmolLM2's begins a turn."""
    qwen = folder_with(tmp_path / "a", False, config={"bos_token_id": 1}, tokenizer_config={"bos_token": None})
    assert load_tokenizer(qwen).bos_id is None
    assert load_tokenizer(qwen).encode("The")[0] not in (0, 1)
    assert load_tokenizer(folder_with(tmp_path / "b")).bos_id == 0  # by the template
    smollm = folder_with(tmp_path / "c", False, config={"bos_token_id": 2}, tokenizer_config={"bos_token": "<|end|>"})
    fields = json.loads(byte_level_json())
    (smollm / "tokenizer.json").write_text(json.dumps(fields | {"post_processor": None}))
    assert load_tokenizer(smollm).bos_id is None


def sentencepiece_folder(path: Path, **settings: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(trained_sentencepiece())
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_a_sentencepiece_file_without_a_begin_token_by_its_settings(tmp_path: Path) -> None:
    """Yi's add_bos_token: false was not looked at."""
    assert load_tokenizer(sentencepiece_folder(tmp_path / "a")).bos_id == 1
    assert load_tokenizer(sentencepiece_folder(tmp_path / "b", add_bos_token=False)).bos_id is None
    end = load_tokenizer(sentencepiece_folder(tmp_path / "c", bos_token="</s>"))
    assert end.bos_id == 2


def test_a_space_is_put_before_a_text_and_not_after_special_tokens(tmp_path: Path) -> None:
    """Mistral's `[INST] ` got a second blank; transformers' legacy: true is the old way."""
    new, old = (load_tokenizer(sentencepiece_folder(tmp_path / str(legacy), legacy=legacy)) for legacy in (False, True))
    library = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece())
    text = "the fox</s> the fox</s>the fox"
    fox, spaced = library.encode("the fox"), library.encode(" the fox")
    assert new.encode(text, bos=False, special=True)[: len(fox) + 1 + len(fox)] == [*fox, 2, *fox]
    assert old.encode(text, bos=False, special=True) == [*fox, 2, *spaced, 2, *fox]
    assert new.decode(new.encode(text, special=True)) == "the fox the foxthe fox"
    assert new.encode(" the fox", bos=False, begins=False) == fox  # in the midst of a text
    assert new.encode(" the fox", bos=False) == spaced


ADDED = {"330": {"content": "<|im_start|>", "special": True}, "331": {"content": "<tool>", "special": False}}


@pytest.mark.parametrize("beside", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_that_only_the_files_beside_a_sentencepiece_model_know(tmp_path: Path, beside: str) -> None:
    settings = {"added_tokens_decoder": ADDED} if beside == "added_tokens_decoder" else {}
    folder = sentencepiece_folder(tmp_path, **settings)
    if not settings:
        (folder / "added_tokens.json").write_text('{"<|im_start|>": 330, "<tool>": 331}')
        (folder / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|im_start|>"]}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.n_vocab, tokenizer.n_plain) == (332, 330)
    ids = tokenizer.encode("<|im_start|>user<tool>", bos=False, special=True)
    assert ids[0] == 330 and ids[-1] == 331 and tokenizer.decode(ids) == "user<tool>"
    plain = tokenizer.encode("<|im_start|>user<tool>", bos=False)
    assert 330 not in plain and plain[-1] == 331


# What transformers 5.23 makes of the same folder, over files and settings of every kind that was found in real ones.
FRAMED = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA = FRAMED | {"tokenizer_class": "LlamaTokenizer"}
IM = {"<|im_start|>": {"special": True, "rstrip": True}, "<|im_end|>": {"special": True}, "[INST]": {"lstrip": True}}
SETTINGS: dict[str, dict[str, object]] = {
    "none": {},
    "no class": FRAMED,
    "as the file stands": FRAMED | {"tokenizer_class": "PreTrainedTokenizerFast"},
    "llama": LLAMA,
    "llama, legacy": LLAMA | {"legacy": True},
    "llama, no space": LLAMA | {"add_prefix_space": False},
    "add_bos_token is not asked": FRAMED | {"add_bos_token": False},
    "nor here": FRAMED | {"add_bos_token": True},
    "chatml": FRAMED | {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
}
MORE = ["[INST] Hi  [/INST]", "<s>[INST] a <|end|> b</s> c", "<|im_start|>user\n é<|im_end|>\n <|im_start|> x [INST]y"]


def metaspace(scheme: str) -> dict[str, object]:
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return json.loads(byte_fallback_json()) | {"normalizer": None, "pre_tokenizer": space}


FILES: dict[str, Callable[[], dict[str, object]]] = {
    "byte level": lambda: json.loads(byte_level_json()),
    "unframed": lambda: json.loads(byte_level_json()) | {"post_processor": None},
    "byte fallback": lambda: json.loads(byte_fallback_json()),
    "space at first": lambda: metaspace("first"),
    "space always": lambda: metaspace("always"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_whole_texts_are_what_transformers_makes_of_the_folder(
    file: str, name: str, family: str, tmp_path: Path
) -> None:
    fields, settings = FILES[file](), dict(SETTINGS[name])
    n = len(tokenizers.Tokenizer.from_str(json.dumps(fields)).get_vocab())
    if name == "chatml":
        tokens = {
            str(n + i): {"content": token, "normalized": False} | flags for i, (token, flags) in enumerate(IM.items())
        }
        frame = {"0" if file in ("byte level", "unframed") else "1": {"content": "<s>", "special": True}}
        settings["added_tokens_decoder"] = frame | tokens
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *MORE]:
        assert ours.encode(text, special=True) == theirs(text).input_ids, text
        assert ours.encode(text, bos=False, special=True) == theirs(text, add_special_tokens=False).input_ids
    if settings:
        assert theirs.eos_token_id in ours.eos_ids


def test_all_end_tokens_are_found(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        generation_config={"eos_token_id": [7, 9]},
        config={"eos_token_id": 9},
        tokenizer_config={"eos_token": "</s>"},
    )
    assert load_tokenizer(folder).eos_ids == (7, 9, 1)
    assert eos_ids_of(folder) == (7, 9)
    (folder / "config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(UserError, match="eos_token_id '</s>' is not a number"):
        load_tokenizer(folder)


def test_a_training_limit_is_no_limit_here(tmp_path: Path) -> None:
    """tokenizer.json may carry the truncation and padding that its last user set."""
    model = tokenizers.Tokenizer.from_str(byte_level_json())
    model.enable_truncation(2)
    model.enable_padding(length=50)
    (tmp_path / "tokenizer.json").write_text(model.to_str())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]


def test_a_folder_prefers_tokenizer_json(tmp_path: Path) -> None:
    """A ChatML fine-tune of Llama 2 has <|im_start|> there, and not in the tokenizer.model beside it: 29 ids for 11."""
    folder = sentencepiece_folder(tmp_path)
    assert load_tokenizer(folder).n_vocab == 330
    folder_with(tmp_path)
    assert load_tokenizer(folder).n_vocab == load_tokenizer(folder / "tokenizer.json").n_vocab != 330


def test_begin_and_end_that_only_special_tokens_map_names(tmp_path: Path) -> None:
    """Older repositories have no tokenizer_config.json, or one that names neither."""
    folder = folder_with(tmp_path, special_tokens_map={"eos_token": {"content": "<|end|>"}}, tokenizer_config={})
    assert load_tokenizer(folder).eos_ids == (2,)
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).eos_ids == (2,)
    pieces = sentencepiece_folder(tmp_path / "sp")
    (pieces / "special_tokens_map.json").write_text('{"bos_token": "</s>", "eos_token": "<s>"}')
    assert (load_tokenizer(pieces).bos_id, load_tokenizer(pieces).eos_ids) == (2, (1,))


def test_a_text_in_the_midst_of_another(tmp_path: Path) -> None:
    """A chat's later turns: the space that a text begins with is not put there again."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(metaspace("first")))
    tokenizer = load_tokenizer(tmp_path)
    whole = tokenizer.encode("the fox</s>the fox", bos=False, special=True)
    at = whole.index(2) + 1
    assert whole[at:] == tokenizer.encode("the fox", bos=False, special=True, begins=False)
    assert whole[at:] != tokenizer.encode("the fox", bos=False, special=True)


def test_a_name_that_is_half_a_surrogate_pair(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "\\ud800"}')
    with pytest.raises(UserError, match=r"tokenizer_config.json: half a surrogate pair, which is no text$"):
        load_tokenizer(folder)


def test_a_panic_of_the_library_is_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is no Exception, and prints a page by itself."""
    fields = json.loads(byte_level_json())
    fields["model"] |= {"continuing_subword_prefix": "x" * 100, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"tokenizer.json: ") as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).isprintable() and capfd.readouterr().err == ""


def steps(*decoders: str) -> dict[str, object]:
    known = {
        "Replace": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        "other letters": {"type": "Replace", "pattern": {"String": "e"}, "content": "E"},
        "Strip": {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        "the end's": {"type": "Strip", "content": " ", "start": 0, "stop": 1},
    }
    return {"type": "Sequence", "decoders": [known.get(name, {"type": name}) for name in decoders]}


@pytest.mark.parametrize(
    ("decoder", "known"),
    [
        (steps("Replace", "ByteFallback", "Fuse", "Strip"), True),
        (steps("Replace", "ByteFallback", "Fuse"), True),
        (steps("Replace", "ByteFallback", "Fuse", "other letters"), False),
        (steps("other letters", "Replace", "ByteFallback", "Fuse", "Strip"), False),
        (steps("Replace", "ByteFallback", "Fuse", "the end's"), False),
        (steps("ByteFallback", "Fuse", "Strip"), False),
        (steps("Strip", "Replace", "ByteFallback", "Fuse"), False),
    ],
)
def test_a_decoder_is_followed_or_refused(tmp_path: Path, decoder: dict[str, object], known: bool) -> None:
    """What a file replaces and strips was not looked at: text came out as other letters, without a word."""
    fields = json.loads(byte_fallback_json()) | {"decoder": decoder}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    if not known:
        with pytest.raises(UserError, match=r"its decoder is not supported: it makes .* of what would be "):
            load_tokenizer(tmp_path)
        return
    ours, library = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_str(json.dumps(fields))
    for text in TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=True)
