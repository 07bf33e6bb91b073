"""The program that runs a chat template: cli/chat_template.py starts it and talks to it.

A template is somebody else's program. Jinja's sandbox keeps it from files and from Python, but not from looping for
ever or filling the memory, and Python cannot stop either from within: so it runs in a process of its own, whose
memory and processor time the system bounds. A line of JSON in, a line of JSON out:

    {"source": ..., "names": {...}}      -> {} or {"error": ...}; once, at first
    {"variables": {...}}                 -> {"text": ...} or {"error": ...}
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from contextlib import suppress
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 29  # bytes of address space
SECONDS = 2  # of processor time, a rendering
LONGEST = 1 << 24  # characters that it may write: four million tokens


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks what a model wrote for those who train it: as it stands."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own escapes what HTML would misread."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def reason(error: BaseException) -> str:
    """Jinja's own errors are sentences; others say little without their type."""
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY >> 20} MiB"
    message = " ".join(str(error).split())[:1000]
    return message if isinstance(error, jinja2.TemplateError) and message else f"{type(error).__name__}: {message}"


def compile_template(source: str, names: dict[str, str]) -> jinja2.Template:
    """names: what the template knows beside what it is given: the texts of special tokens, by name."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": strftime_now, **names}
    return environment.from_string(source)


def bound_time() -> None:
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS + 1, hard))


def answer(line: str, template: jinja2.Template | None) -> tuple[jinja2.Template | None, dict[str, str]]:
    """The template, compiled at the first line, and what to say."""
    try:
        asked = json.loads(line)
        if template is None:
            return compile_template(asked["source"], asked["names"]), {}
        text = template.render(asked["variables"])
        if len(text) > LONGEST:
            return template, {"error": f"it writes {len(text):,} characters"}
        return template, {"text": text}
    except (Exception, RecursionError) as error:  # whatever somebody else's program does: divide by zero, say
        return template, {"error": reason(error)}


def main() -> None:
    with suppress(ValueError, OSError):  # macOS knows no bound on address space; that on time holds there too
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template: jinja2.Template | None = None
    for line in sys.stdin:
        bound_time()
        template, said = answer(line, template)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
