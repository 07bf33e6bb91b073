"""Chat templates: the ids that transformers makes, turn by turn, in one cache."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers_made import byte_level_json
from transformers import PreTrainedTokenizerFast

import generate
from checkpoint import load_tokenizer
from cli import run, template_process
from cli.chat_template import ChatTemplate, load_chat_template, template_variables
from cli.conversation import Conversation, following
from engine import Engine
from selective_kv import FullCache

LLAMA3 = """{{ bos_token }}{% for m in messages %}
<|{{ m.role }}|>

{{ m['content'] | trim }}<|end|>{% endfor %}
{% if add_generation_prompt %}<|assistant|>

{% endif %}"""
CHATML = """{% if messages[0].role != 'system' %}{{ '<s>system\\nBe brief.</s>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<s>' + m.role + '\\n' + m.content + '</s>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{%- endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] + ' ' %}
{% set turns = messages[1:] %}{% else %}{% set said = '' %}{% set turns = messages %}{% endif %}
{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}
{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + (said if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"""
TEMPLATES = {"llama 3": (LLAMA3, "<|end|>"), "chatml": (CHATML, "</s>"), "llama 2": (LLAMA2, "</s>")}


@pytest.fixture(params=TEMPLATES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PreTrainedTokenizerFast, str]:
    """A folder with a tokenizer and a template, the same in transformers, and the token that ends a turn."""
    template, end = TEMPLATES[request.param]
    (tmp_path / "tokenizer.json").write_text(byte_level_json())
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if request.param == "chatml":
        (tmp_path / "chat_template.jinja").write_text(template)
        settings["chat_template"] = "not this one: the file stands above it"
    elif request.param == "llama 2":
        settings["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    else:
        settings["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    backend = tokenizers.Tokenizer.from_str(byte_level_json())
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    theirs.chat_template = template
    return tmp_path, theirs, end


@pytest.mark.parametrize("system", [None, "Only whole words."])
def test_every_turn_is_what_transformers_writes(
    made: tuple[Path, PreTrainedTokenizerFast, str], system: str | None
) -> None:
    """The ids read, with the replies between them, are those of the whole conversation in one go."""
    folder, theirs, end = made
    ours = load_tokenizer(folder / "tokenizer.json")
    chat = Conversation(load_chat_template(folder), ours, system)
    stop = ours.special_ids[end]
    messages = [] if system is None else [{"role": "system", "content": system}]
    seen: list[int] = []
    pending: list[int] = []
    wrote = ""
    for text, reply in (("Hello you", "Yes?"), ("what is 2 + 2", "4, I think \ue000"), ("  thanks \ue000", "Well")):
        turn = chat.turn(text, wrote, pending, frozenset([stop]))
        assert turn.anew == (not seen)
        seen, chat = seen + turn.ids, turn.after
        messages.append({"role": "user", "content": text})
        want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert theirs.decode(seen) == theirs.decode(want)  # the pieces may be cut otherwise around a reply
        if len(messages) <= 2:
            assert seen == want
        blank = " " if "[/INST]" in theirs.decode(want) else ""  # Llama 2's template writes it, its model does too
        wrote = blank + reply + blank
        seen += ours.encode_text(wrote)
        pending = [stop]
        messages.append({"role": "assistant", "content": reply})
    assert chat.begin().turn("Hello you").ids == chat.begin().turn("Hello you", "old").ids
    assert chat.end_of_turn() == {stop}


@pytest.mark.parametrize("end", ["", "\n", "  "])
def test_a_template_that_marks_no_end_of_a_reply(end: str, tiny: Path) -> None:
    """Every turn of such a chat was "no token at all for this tokenizer"."""
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}", {}, tiny)
    chat = Conversation(template, load_tokenizer(tiny / "tokenizer.model"))
    assert chat.end_of_turn() == frozenset() and chat.turn("Hello").ids


def test_a_reply_that_was_cut_off_is_ended(made: tuple[Path, PreTrainedTokenizerFast, str]) -> None:
    folder, _, end = made
    ours = load_tokenizer(folder / "tokenizer.json")
    chat = Conversation(load_chat_template(folder), ours).turn("Hello").after
    stop, last = ours.special_ids[end], ours.encode_text("x")[0]
    cut = chat.turn("go on", "x", [last], frozenset([stop])).ids
    assert cut[0] == last and stop in cut[1:3]
    ended = chat.turn("go on", "", [stop], frozenset([stop])).ids
    assert ended[0] == stop and ended[1:] == cut[cut.index(stop) + 1 :]


THINKING = """{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- set text = m.content %}
{%- if '</think>' in text and loop.index0 < ns.last %}{%- set text = text.split('</think>')[-1].lstrip() %}{%- endif %}
{{- '<s>' + m.role + '\\n' }}{% generation %}{{ text }}{% endgeneration %}{{- '</s>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{%- endif %}"""


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_a_turn_that_the_template_rewrites_is_read_anew(tmp_path: Path, variables: dict[str, bool]) -> None:
    """Qwen 3's template leaves old reasoning out: it stayed in the cache. Every prompt is what transformers writes."""
    (tmp_path / "tokenizer.json").write_text(byte_level_json())
    (tmp_path / "chat_template.jinja").write_text(THINKING)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(byte_level_json()))
    theirs.chat_template = THINKING
    chat = Conversation(load_chat_template(tmp_path, variables), load_tokenizer(tmp_path))
    messages: list[dict[str, str]] = []
    wrote = ""
    for text in ("Hello", "and now", "again"):
        messages.append({"role": "user", "content": text})
        turn = chat.turn(text, wrote)
        want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
        assert turn.anew and turn.ids == want
        wrote = "Yes" if variables else "<think>\nwell\n</think>\n\nYes"
        messages.append({"role": "assistant", "content": wrote})
        chat = turn.after


def test_what_follows_a_reply() -> None:
    assert following("a", " b ", "a b c") == "c" and following("a", " b  ", "a b c") == " c"
    assert following("a", "", "a c") == " c"
    assert following("a", "b", "ac") is None and following("a", "b", "xb") is None


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "instruct")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA2}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_prompt_is_a_turn_and_only_the_reply_is_printed(instruct: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint_path", str(instruct), "--max_new_tokens", "12", "--temperature", "0"]
    generate.main([*base, "--chat", "--system", "Say:", "--prompt", "red fox"])
    reply = capsys.readouterr().out
    tokenizer = load_tokenizer(instruct)
    ids = tokenizer.encode("<s>[INST] Say: red fox [/INST]", bos=False, special=True)
    job = run.prepare(
        generate.make_parser().parse([*base, "--chat", "--system", "Say:", "--prompt", "red fox"]),
        FullCache(),
    )
    assert job.prompts == [ids]
    assert "INST" not in reply and "red fox" not in reply


def test_a_chat_stays_in_the_cache(
    instruct: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    original = Engine.generate

    def spy(self, prompts, n):  # type: ignore[no-untyped-def]
        read.append(list(prompts[0]))
        yield from original(self, prompts, n)

    monkeypatch.setattr(Engine, "generate", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\none\n"))
    argv = ["--checkpoint_path", str(instruct), "--chat", "--interactive", "--temperature", "0"]
    generate.main([*argv, "--max_new_tokens", "5"])
    encode = load_tokenizer(instruct).encode
    first = encode("<s>[INST] one [/INST]", bos=False, special=True)
    assert read[0] == read[2] == first
    assert read[1][1:] == encode(" </s><s>[INST] two [/INST]", bos=False, special=True)
    assert "[INST]" not in capsys.readouterr().out


def test_a_turn_that_has_no_room_is_forgotten(
    instruct: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 60 + "\none\n"))
    argv = ["--checkpoint_path", str(instruct), "--chat", "--interactive", "--context", "64", "--max_new_tokens", "5"]
    generate.main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert "no room" in err
    first = load_tokenizer(instruct).encode("<s>[INST] one [/INST]", bos=False, special=True)
    assert json.loads(out.splitlines()[-1])["tokens_read"] == len(first)  # a first turn again


@pytest.mark.parametrize(
    ("template", "more", "message"),
    [
        (None, ["--chat"], "has no chat template"),
        ("{% for %}", ["--chat"], "does not parse"),
        ("{{ raise_exception('no system turn') }}", ["--chat", "--system", "x"], "no system turn"),
        ("{{ ().__class__.__base__.__subclasses__() }}", ["--chat"], "refuses"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", ["--chat"], "too much time"),
        ("{{ 'a' * 4000000000 }}", ["--chat"], "it needs more than 512 MiB"),
        ("{{ messages[0].content * 4000000000 }}", ["--chat"], "refuses this: it needs more than 512 MiB"),
        ("{{ '%4000000000d' % messages|length }}", ["--chat"], "refuses this: it needs more than 512 MiB"),
        ("{{ messages[0].content.center(4000000000) }}", ["--chat"], "refuses this: it needs more than 512 MiB"),
        ("{{ messages|tojson(indent=2000000000) }}", ["--chat"], "refuses this: "),
        ("{{ messages[0].content * 20000000 }}", ["--chat"], "refuses this: it writes 40,000,000 characters"),
        ("{{ [1] * 10**9 }}{{ messages }}", ["--chat"], "it needs more than 512 MiB"),
        ("{{ 1/0 }}", ["--chat"], "refuses this: ZeroDivisionError: division by zero"),
        ("{{ 'x'+1 }}", ["--chat"], "refuses this: TypeError: "),
        ("{% for i in range(10**12) %}{{ i }}{% endfor %}", ["--chat"], "refuses this: OverflowError: Range too big"),
        ("{% include 'x' %}", ["--chat"], "refuses this: TypeError: no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["--chat"], "refuses this: RecursionError: "),
        ("{{ strftime_now(5) }}", ["--chat"], "refuses this: TypeError: "),
        ("{{ raise_exception('') }}", ["--chat"], "refuses this: TemplateError: "),
        ("{{ raise_exception('a\\nb') }}", ["--chat"], "refuses this: a b"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, ["--chat"], "does not parse: SyntaxError: "),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", ["--chat"], "does not parse: RecursionError: "),
        ("", ["--chat"], "the chat template writes nothing"),
        (" {# only a remark #}\n", ["--chat"], "the chat template writes nothing"),
        (LLAMA2, ["--system", "x"], "--system goes with --chat"),
        (LLAMA2, ["--template_vars", "{}"], "--template_vars goes with --chat"),
        (LLAMA2, ["--chat", "--template_vars", "[1]"], "--template_vars: not a JSON object"),
        (LLAMA2, ["--chat", "--template_vars", '{"messages": 1}'], "--template_vars: messages is this program's own"),
    ],
)
def test_bad_input_is_one_line(
    template: str | None, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "m")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--checkpoint_path", str(folder), "--prompt", "hi", *more])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and len(err.splitlines()) == 1 and message in err


def test_template_variables() -> None:
    assert template_variables(None) == {} and template_variables('{"enable_thinking": false}') == {
        "enable_thinking": False
    }


def test_a_chat_ends_at_the_token_that_its_template_ends_turns_with(tmp_path: Path) -> None:
    """<|eot_id|>, where configs name only the base model's end: replies went on and on."""
    folder = write_checkpoint(tmp_path / "m")
    (folder / "tokenizer.json").write_text(byte_level_json())
    (folder / "chat_template.jinja").write_text(LLAMA3)
    n_vocab = load_tokenizer(folder).n_vocab
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.randn(n_vocab, 32)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": n_vocab, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    argv = ["--checkpoint_path", str(folder), "--prompt", "hi"]
    ends = [
        run.prepare(generate.make_parser().parse([*argv, *more]), FullCache()).end_ids
        for more in ([], ["--chat"], ["--chat", "--ignore_eos"])
    ]
    assert ends == [{1}, {1, 2}, frozenset()]


def test_a_template_runs_where_nothing_of_this_program_is() -> None:
    """The process that runs it imports Jinja and the standard library, no more."""
    source = Path(template_process.__file__).read_text()
    found = {name for name in re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE)}
    assert found <= {"__future__", "contextlib", "datetime", "jinja2", "json", "resource", "sys", "typing"}


def test_random_weights_cannot_chat(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--random_weights", "--model", "llama-3.2-1b", "--chat", "--prompt", "hi"])
    assert exit_.value.code == 2 and "--chat needs a checkpoint with a tokenizer" in capsys.readouterr().err
