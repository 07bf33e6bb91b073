"""Chat templates: how an instruct model wants its turns written, as its checkpoint says.

A template is a Jinja program that comes with the checkpoint (`chat_template.jinja`, or `chat_template` in
`tokenizer_config.json`, or in a GGUF file's metadata). It is given the names that transformers gives it, so that it
writes what `apply_chat_template` writes, and runs in a process of its own (cli/template_process.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from checkpoint.gguf_tokenizer import gguf_chat_template
from checkpoint.tokenizer_files import named_tokens
from common.errors import UserError
from common.files import parse_json, read_file, read_json

Message = dict[str, str]  # "role": system, user or assistant; "content"
LARGEST_TEMPLATE = 1 << 22  # bytes; those of models have up to 2^16
OURS = {"messages", "add_generation_prompt"}


class ChatTemplate:
    """source: the template. names: its special tokens' texts, such as bos_token. where: how errors name it.

    variables: what else it is to know, such as enable_thinking.
    """

    def __init__(
        self, source: str, names: dict[str, str], where: Path, variables: dict[str, Any] | None = None
    ) -> None:
        self.where, self.source = where, source
        self.variables = {"tools": None, "documents": None, **(variables or {})}
        # A session of its own: a Ctrl-C is for this program, not for that one.
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("template_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        said = self._ask({"source": source, "names": names}, "does not parse")
        if "error" in said:
            raise UserError(f"{where}: the chat template does not parse: {said['error']}")

    def __del__(self) -> None:
        process = getattr(self, "process", None)
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, question: dict[str, Any], failing: str) -> dict[str, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
            said = self.process.stdout.readline()
        except BrokenPipeError:
            said = b""
        if not said:
            raise UserError(f"{self.where}: the chat template {failing}: it takes too much time or memory")
        return json.loads(said)

    def render(self, messages: Sequence[Message], reply: bool = True) -> str:
        """The turns and, if a `reply` is to follow, its beginning. Raises UserError where the template refuses them."""
        variables = self.variables | {"messages": list(messages), "add_generation_prompt": reply}
        said = self._ask({"variables": variables}, "refuses this")
        if "error" in said:
            raise UserError(f"{self.where}: the chat template refuses this: {said['error']}")
        if not said["text"].strip():
            raise UserError(f"{self.where}: the chat template writes nothing")
        return said["text"]


def template_variables(text: str | None) -> dict[str, Any]:
    """The variables of --template_vars. Raises UserError."""
    if text is None:
        return {}
    variables = parse_json(text.encode("utf-8", "surrogateescape"), "--template_vars")
    for name in OURS & variables.keys():
        raise UserError(f"--template_vars: {name} is this program's own")
    return variables


def chat_template_of(checkpoint: Checkpoint, variables: dict[str, Any] | None = None) -> ChatTemplate:
    """The checkpoint's own: a GGUF file holds it, elsewhere it lies beside the tokenizer. Raises UserError."""
    if checkpoint.gguf is not None:
        source, names = gguf_chat_template(checkpoint.gguf)
        if source is not None:
            return ChatTemplate(source, names, checkpoint.gguf.path, variables)
        if checkpoint.tokenizer_path is None:
            raise UserError(f"--chat: {checkpoint.gguf.path} has no chat template; a base model has none")
    assert checkpoint.tokenizer_path is not None
    folder = checkpoint.tokenizer_path.parent
    return load_chat_template(folder.parent if folder.name == "original" else folder, variables)


def load_chat_template(folder: Path, variables: dict[str, Any] | None = None) -> ChatTemplate:
    """The template of the checkpoint in a folder. Raises UserError where there is none."""
    file = folder / "chat_template.jinja"
    source = read_json(folder / "tokenizer_config.json", missing_ok=True).get("chat_template")
    if os.path.lexists(file):
        try:
            source = read_file(file, LARGEST_TEMPLATE).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 at byte {error.start}") from None
    elif isinstance(source, list):  # several, by name
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    elif isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise UserError(
            f"--chat: {folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "a base model has none"
        )
    return ChatTemplate(source, named_tokens(folder), folder, variables)
