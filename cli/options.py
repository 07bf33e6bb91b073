"""Command lines: one-line errors, and flags made from the fields of cache classes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from common.errors import UserError, nearest, printable
from kv_settings import make_settings, parse_settings
from selective_kv.settings import CacheSettings, known_settings

if TYPE_CHECKING:
    from selective_kv import KVCache


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, with the nearest name if one is unknown. Options and positionals may be mixed.

    stray: the flag that a word without one is most likely meant for.
    """

    def __init__(self, *args: Any, stray: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, _path)  # Path("") would be the working directory
        self.stray = stray

    def error(self, message: str) -> NoReturn:
        told, found, names = message.partition("arguments are required: ")
        if found:
            message = told + found + ", ".join(map(self._spelled, names.split(", ")))
        if self.stray and message.startswith("unrecognized arguments: "):
            message += f" (is it for {self.stray}?)"
        self.exit(2, f"{self.prog}: error: {printable(' '.join(message.splitlines()))}\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        for before, word in pairwise(["", *argv]):  # before argparse takes an unknown flag's value for something else
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in (*self._option_string_actions, "--"):
                near = "" if len(flag.split()) > 1 else nearest(flag, self._option_string_actions)
                if flag in ("--cache", "--caches") and any(a.dest == "cache" for a in self._actions):
                    near = ": the cache is a word here, and its knobs are flags, as in: quantize_kv --bits 4"
                if "--caches" in self._option_string_actions and flag[2:] in {"bits", *_knob_names()}:
                    near = ": knobs stand behind the cache's name here, as in --caches quantize_kv:k_bits=4,v_bits=4"
                self.error(f"unknown argument {flag}{near}{self._hint(before)}")
            if re.fullmatch(r"-[A-Za-z].*", word) and flag not in self._option_string_actions:
                longer = [f"; did you mean {known}?" for known in self._option_string_actions if known[1:3] == word[:2]]
                self.error(f"unknown argument {flag}: flags have two dashes{''.join(longer[:1])}{self._hint(before)}")
        return self.parse_intermixed_args(argv)

    def _spelled(self, name: str) -> str:
        """A required argument's name, with the values it can have."""
        action = next((a for a in self._actions if name in ("/".join(a.option_strings), a.dest)), None)
        if action is None:
            return name
        if action.option_strings:
            return f"{name} {action.metavar or action.dest.upper()}"
        return f"{name} ({', '.join(map(str, action.choices))})" if action.choices else name

    def _hint(self, before: str) -> str:
        """A hint on how to give a flag a value that begins with dashes; "" if the flag takes no value."""
        action = self._option_string_actions.get(before)
        if action is None or action.nargs is not None:  # None: one value, and it must be there
            return ""
        return f" (a value that begins with dashes is given as {before}=...)"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            name, _, knobs = str(value).partition(":")
            near = nearest(str(value), [str(choice) for choice in action.choices or ()])
            if knobs and name in (action.choices or ()):
                flags = " ".join(f"--{knob.replace('=', ' ')}" for knob in knobs.split(","))
                near = f"; knobs are flags here: {name} {flags}"
            if not near and not action.option_strings and "--prompt" in self._option_string_actions:
                near = "; a text to continue is given as --prompt TEXT"
            raise argparse.ArgumentError(action, error.message + near) from None


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


MOST_SEQUENCES = 65535  # a kernel's grid is no wider
MOST = 2**31 - 1  # of whatever is counted: sizes of tensors are made of it


def positive(text: str) -> int:
    if not text.isdecimal() or not text.strip("0"):
        several = "; several stand apart, as in 1 8" if re.fullmatch(r"\d+(,\d+)+", text) else ""
        raise argparse.ArgumentTypeError(f"{printable(repr(text), 60)} is not a whole number above zero{several}")
    if len(text) > 12 or int(text) > MOST:
        raise argparse.ArgumentTypeError(f"{printable(text, 60)} is more than {MOST:,}")
    return int(text)


def at_most(most: int) -> Callable[[str], int]:
    """A type for argparse: `positive`, and no more than that."""

    def parsed(text: str) -> int:
        number = positive(text)
        if number > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most:,}")
        return number

    return parsed


def parse_size(text: str) -> int:
    """Bytes: "20GiB", "512 MiB", "1.5e9", "20GB"."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([KMGT])(i?)B?|B?)\s*", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is not None and match[2]:
        number *= (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper())
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 20GiB")
    return int(number)


def parse_shape(text: str) -> tuple[int, int]:
    """A batch and a context: "8x32768"."""
    batch, found, n_token = text.lower().partition("x")
    if not found:
        raise argparse.ArgumentTypeError(f"{printable(repr(text), 60)} is not a batch and a context such as 8x32768")
    return at_most(MOST_SEQUENCES)(batch), positive(n_token)


def require_name(name: str, flag: str = "--profile") -> None:
    """Raises UserError unless `name` can only be a folder's inside another, and can be printed."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise UserError(f"{flag} {name!r}: a name for a folder in outputs/, not a path")
    if not name.isprintable():  # control characters, and the bytes that are no UTF-8
        raise UserError(f"{flag} {name!r}: not printable text")


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """A group of flags per cache class. Raises UserError where a class's field cannot be a flag here.

    A flag that two classes share is one flag, None until given; each group tells what it means there.
    """
    # The flags so far: whose, and whether of the kind that is on or off.
    owners: dict[str, tuple[type[CacheSettings], bool]] = {}
    for name, cls in known_settings().items():
        summary = (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        group = parser.add_argument_group(f"{name}: {summary}")
        for f in dataclasses.fields(cls):
            flag, options, switch = f"--{f.name}", _flag_options(f), isinstance(f.default, bool)
            owner, other = owners.get(f.name, (cls, switch))
            if switch != other:
                raise UserError(f"{_field(cls, f)}: {owner.__name__} has it too, and only one of them is true or false")
            if f.name in owners:  # to be shown only: an action of another parser
                shown = argparse.ArgumentParser(add_help=False).add_argument(flag, **options)
                group._group_actions.append(shown)
                continue
            if f.name in {action.dest for action in parser._actions}:
                raise UserError(f"{_field(cls, f)}: {parser.prog} has an argument of that name already")
            owners[f.name] = (cls, switch)
            group.add_argument(flag, **options)


def _flag_options(f: dataclasses.Field[Any]) -> dict[str, Any]:
    """What argparse is told about the flag of a field. Its value stays text, and the cache class judges it."""
    help_text = f"{f.metadata.get('help', '')} (default: {f.default})".replace("%", "%%")
    if isinstance(f.default, bool):
        return {"action": argparse.BooleanOptionalAction, "default": None, "help": help_text}
    choices = ",".join(map(str, f.metadata.get("choices") or ()))
    return {"metavar": f"{{{choices}}}" if choices else type(f.default).__name__.upper(), "help": help_text}


def _knob_names() -> set[str]:
    return {f.name for cls in known_settings().values() for f in dataclasses.fields(cls)}


def _field(cls: type[CacheSettings], f: dataclasses.Field[Any]) -> str:
    return f"class {cls.__name__}, field {f.name}"


def knobs_from(args: argparse.Namespace) -> dict[str, Any]:
    """The knobs that were given, checked as those of the cache that the subcommand `args.cache` names.

    `kv_cache.make_policy` makes the cache of them. Raises UserError.
    """
    names = _knob_names()
    knobs = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    make_settings(args.cache, knobs)
    return knobs


def check_cache_names(settings: Sequence[str]) -> None:
    """Raises UserError about the first setting in one word that spells no cache."""
    for text in settings:
        parse_settings(text)


def add_plugin_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--plugin", type=Path, metavar="FILE", help="a Python file that defines caches of your own")


def load_plugin(argv: Sequence[str]) -> None:
    """Import the file given with --plugin, so that its caches are there when flags are made. Raises UserError."""
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--plugin", type=Path, nargs="?")  # that it lacks its value, the whole parser will say
    path = pre.parse_known_args(argv)[0].plugin
    if path is None:
        return
    from selective_kv import caches  # not above: only a plugin needs torch before the flags are read

    name = f"_plugin_{path.stem}"  # its own: a plugin torch.py must not become everybody's torch
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file")
    taken, before = caches(), _cache_classes()
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
        _check_plugin([cls for cls in _cache_classes() if cls not in before], taken)
    except (Exception, SystemExit) as error:  # whatever somebody's file may raise
        del sys.modules[name]
        raise UserError(f"--plugin {path}: {_reason(error, spec.origin)}") from None


def _cache_classes() -> list[type[KVCache]]:
    from selective_kv import KVCache

    found = [KVCache]
    for cls in found:  # which grows meanwhile
        found += [child for child in cls.__subclasses__() if child not in found]
    return found


def _check_plugin(classes: Sequence[type[KVCache]], taken: dict[str, type[KVCache]]) -> None:
    """Raises UserError about the first of a plugin's classes that is no cache, or not findable, or not settable."""
    from selective_kv import KVCache

    named = [cls for cls in classes if cls.name]
    if not named:
        raise UserError("it defines no cache: no subclass of KVCache with a name")
    for cls in named:
        if not isinstance(cls.name, str) or not re.fullmatch(r"\w[\w.-]*", cls.name):
            raise UserError(f"class {cls.__name__}: the name {cls.name!r} is not one word")
        owner = taken.setdefault(cls.name, cls)
        # The same class twice is a file that is read again, or what dataclass(slots=True) was made from
        if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(
                f"class {cls.__name__}: the name {cls.name!r} is {owner.__name__}'s already: give it one of its own"
            )
        if cls.update is KVCache.update and cls.attend is KVCache.attend:
            raise UserError(f"class {cls.__name__}: it defines no update")
        if any(isinstance(value, dataclasses.Field) for value in vars(cls).values()):
            raise UserError(f"class {cls.__name__}: it has fields, but is no @dataclass")
        for f in dataclasses.fields(cls):
            if f.default is dataclasses.MISSING:
                raise UserError(f"{_field(cls, f)}: it has no default")
            if not isinstance(f.default, (bool, int, float, str)):
                kind = type(f.default).__name__
                raise UserError(f"{_field(cls, f)}: its default is a {kind}, and a flag is a bool, int, float or str")


def _reason(error: BaseException, file: str | None) -> str:
    """An error of a plugin's in one line: "line N: Type: message", N the line of `file` that was at work."""
    if isinstance(error, UserError):
        return str(error)
    message = " ".join(str(error).split())
    lines = [n for frame, n in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:  # it did not come to run
        lines, message = [error.lineno or 1], error.msg
    elif isinstance(error, OSError) and not lines:  # the file itself cannot be read
        return error.strerror or message
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {message}"


def require_weights(args: argparse.Namespace) -> None:
    """Raises UserError where --model names a shape and nothing gives its weights: the bundled model has its own."""
    if args.model is not None and args.checkpoint_path is None and not args.random_weights:
        raise UserError(f"--model {args.model} is a shape: --random_weights runs it, --checkpoint_path has its weights")
