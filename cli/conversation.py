"""Chat templates: how an instruct model wants its turns written, as its checkpoint says.

A template is a Jinja program that comes with the checkpoint (`chat_template.jinja`, or `chat_template` in
`tokenizer_config.json`). It is run in Jinja's sandbox with the names that transformers gives it, so that it
writes what `apply_chat_template` writes. Names of special tokens in the result are the tokens themselves.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoint import Checkpoint
from checkpoint.gguf_tokenizer import gguf_chat_template
from checkpoint.tokenizer_files import token_name
from common.errors import UserError
from common.files import read_file, read_json
from tokenizer import Tokenizer

Message = dict[str, str]  # "role": system, user or assistant; "content"
LARGEST_TEMPLATE = 1 << 22  # bytes; those of models have up to 2^16
REPLY = "\ue000"  # stands for a reply that is in the cache already: a character of nobody's


class ChatTemplate:
    """source: the template. names: its special tokens' texts, such as bos_token."""

    def __init__(self, source: str, names: dict[str, str], where: Path) -> None:
        self.where = where
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda x, **k: json.dumps(x, ensure_ascii=False, **k)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, **names}
        try:
            self.template = environment.from_string(source)
        except Exception as error:  # somebody else's program: it may be too much for Python's compiler, too
            raise UserError(f"{where}: the chat template does not parse: {_reason(error)}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The turns and the beginning of the model's own. Raises UserError where the template refuses them."""
        try:
            text = self.template.render(messages=list(messages), add_generation_prompt=True)
        except Exception as error:  # somebody else's program: it may divide by zero, or recurse for ever
            raise UserError(f"{self.where}: the chat template refuses this: {_reason(error)}") from None
        if not text.strip():
            raise UserError(f"{self.where}: the chat template writes nothing")
        return text

    def next_turn(self, messages: Sequence[Message], text: str) -> str:
        """What follows the last reply: the end of its turn, the user's `text`, the beginning of the next reply.

        messages: the turns before it; the last one's reply is in the cache as the model wrote it.
        """
        turns = [*messages, {"role": "assistant", "content": REPLY}, {"role": "user", "content": text}]
        _, found, rest = self.render(turns).rpartition(REPLY)
        if not found:
            raise UserError(f"{self.where}: the chat template leaves a reply out: no conversation is possible")
        return rest


@dataclass
class Conversation:
    """The turns of a chat so far, and the ids that the next one adds to what the model has read."""

    template: ChatTemplate
    tokenizer: Tokenizer
    system: str | None = None
    turns: tuple[Message, ...] = ()

    def turn(self, text: str, pending: Sequence[int] = (), end_ids: frozenset[int] = frozenset()) -> list[int]:
        """Ids to read for the user's next turn, which is remembered.

        pending: of the last reply, what the cache has not read (its last token). An end token that the model wrote
        itself is not written again.
        """
        user = {"role": "user", "content": text}
        if not self.turns:
            system = () if self.system is None else ({"role": "system", "content": self.system},)
            self.turns = (*system, user)
            return self._encode(self.template.render(self.turns))
        ids = self._encode(self.template.next_turn(self.turns, text))
        if pending and pending[-1] in end_ids and pending[-1] in ids[:2]:  # ids[0] may be a blank before it
            ids = ids[ids.index(pending[-1]) + 1 :]
        self.turns = (*self.turns, {"role": "assistant", "content": REPLY}, user)
        return [*pending, *ids]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, special=True)


def chat_template_of(checkpoint: Checkpoint) -> ChatTemplate:
    """The checkpoint's own: a GGUF file holds it, elsewhere it lies beside the tokenizer. Raises UserError."""
    if checkpoint.gguf is not None:
        source, names = gguf_chat_template(checkpoint.gguf)
        if source is not None:
            return ChatTemplate(source, names, checkpoint.gguf.path)
        if checkpoint.tokenizer_path is None:
            raise UserError(f"--chat: {checkpoint.gguf.path} has no chat template; a base model has none")
    assert checkpoint.tokenizer_path is not None
    folder = checkpoint.tokenizer_path.parent
    return load_chat_template(folder.parent if folder.name == "original" else folder)


def load_chat_template(folder: Path) -> ChatTemplate:
    """The template of the checkpoint in a folder. Raises UserError where there is none."""
    settings = read_json(folder / "tokenizer_config.json", missing_ok=True)
    file = folder / "chat_template.jinja"
    source = settings.get("chat_template")
    if os.path.lexists(file):
        try:
            source = read_file(file, LARGEST_TEMPLATE).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 at byte {error.start}") from None
    elif isinstance(source, list):  # several, by name
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(source, str):
        raise UserError(
            f"--chat: {folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "a base model has none"
        )
    names = {name: token_name(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return ChatTemplate(source, {k: v for k, v in names.items() if v}, folder)


def _reason(error: Exception) -> str:
    """In one line. Jinja's own errors are sentences; others say little without their type."""
    message = " ".join(str(error).split())
    return message if isinstance(error, jinja2.TemplateError) and message else f"{type(error).__name__}: {message}"


def _refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
