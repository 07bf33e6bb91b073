"""Command lines: one-line errors, and flags made from the fields of cache classes."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kv_cache import KVCache, caches
from tokenizer import UserError


class Parser(argparse.ArgumentParser):
    """One line on a mistake, and the nearest flag when one is unknown. Options and positionals mix freely."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        for word in argv:  # before argparse takes an unknown flag's value for something else
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in (*self._option_string_actions, "--"):
                near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.5)
                self.error(f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else ""))
        return self.parse_intermixed_args(argv)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def parse_size(text: str) -> int:
    """Bytes: "20GiB", "512 MiB", "1.5e9", "20GB"."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([KMGT])(i?)B?|B?)\s*", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 20GiB")
    step = 1024 if match[3] else 1000
    return int(number * step ** (" KMGT".index(match[2].upper()) if match[2] else 0))


def make_policy(name: str, knobs: Mapping[str, Any]) -> KVCache:
    """The cache class called `name`, with values given as text or as they are. Raises UserError."""
    known = caches()
    if name not in known:
        raise UserError(f"no cache is called {name!r}: there are {', '.join(known)}")
    fields = {f.name: f for f in dataclasses.fields(known[name])}
    values: dict[str, Any] = {}
    for knob, value in knobs.items():
        if knob not in fields:
            owners = [n for n, c in known.items() if knob in {f.name for f in dataclasses.fields(c)}]
            raise UserError(f"--{knob} is a flag of {' and '.join(owners) or 'no cache'}, and the cache is {name}")
        kind = type(fields[knob].default)
        try:
            values[knob] = _convert(value, kind)
        except ValueError:
            raise UserError(f"--{knob} takes a value of type {kind.__name__}, not {value!r}") from None
    try:
        return known[name](**values)
    except ValueError as error:
        raise UserError(str(error)) from None


def _convert(value: Any, kind: type) -> Any:
    if isinstance(value, kind):
        return value
    if kind is bool:
        if value not in ("true", "false"):
            raise ValueError(value)
        return value == "true"
    return kind(value)


def parse_policy(text: str) -> KVCache:
    """A cache setting in one word: "full", "quantize_kv:sink_size=16,window_size=32"."""
    name, _, rest = text.partition(":")
    knobs = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    return make_policy(name, knobs)


def format_policy(policy: KVCache) -> str:
    """What `parse_policy` reads."""
    values = [(f, getattr(policy, f.name)) for f in dataclasses.fields(policy)]
    shown = [(f.name, v) for f, v in values if v != f.default or not f.metadata.get("rare")]
    knobs = ",".join(f"{name}={str(v).lower()}" for name, v in shown)
    return f"{policy.name}:{knobs}" if knobs else policy.name


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """A group of flags per cache class. A flag that two classes share is one flag, None until given."""
    added: set[str] = set()
    for name, cls in caches().items():
        fields = dataclasses.fields(cls)
        shared = [f"--{f.name}" for f in fields if f.name in added]
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        group = parser.add_argument_group(
            f"{name}: {summary}", f"also {', '.join(shared)}, as above" if shared else None
        )
        for f in fields:
            if f.name in added:
                continue
            added.add(f.name)
            help_text = f"{f.metadata.get('help', '')} (default: {f.default})".replace("%", "%%")
            if isinstance(f.default, bool):
                action: Any = argparse.BooleanOptionalAction
                group.add_argument(f"--{f.name}", action=action, default=None, help=help_text)
            else:
                group.add_argument(f"--{f.name}", metavar=type(f.default).__name__.upper(), help=help_text)


def policy_from(args: argparse.Namespace) -> KVCache:
    """The cache that the subcommand `args.cache` names, with the knobs that were given."""
    names = {f.name for cls in caches().values() for f in dataclasses.fields(cls)}
    return make_policy(args.cache, {n: getattr(args, n) for n in names if getattr(args, n) is not None})


def add_plugin_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--plugin", type=Path, metavar="FILE", help="a Python file that defines caches of your own")


def load_plugin(argv: Sequence[str]) -> None:
    """Import the file given with --plugin, so that its caches are there when flags are made. Raises UserError."""
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--plugin", type=Path)
    path = pre.parse_known_args(argv)[0].plugin
    if path is None:
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
