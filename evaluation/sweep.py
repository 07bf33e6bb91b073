"""A sweep's tasks: which of them are done, and running the rest."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint import find_demo, open_checkpoint, parse_device, parse_dtype
from cli.console import shown
from cli.options import Parser
from cli.provenance import FORMAT, made_from
from common.errors import UserError
from common.files import is_special, read_json, require_writable
from common.messages import progress, say
from evaluation.full_results import FLAG, without_flag
from evaluation.sweep_flags import main, make_parser
from evaluation.tables import PRINTERS, print_speeds
from kv_cache import format_policy, make_policy, parse_policy
from selective_kv import FullCache

__all__ = ["Task", "main", "make_parser", "run", "tasks"]

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Task:
    """One setting, the file of its result, the command that makes it, and what that record's `made_from` will be."""

    setting: str
    result: Path
    command: tuple[str, ...]
    made_from: dict[str, Any]

    def record(self) -> dict[str, Any] | None:
        """The task's result; None if there is none, or only what a killed run left of one.

        Raises UserError if the file holds something else: the result of another command, of other weights or texts, or
        of a version of this program that did not record them.
        """
        try:
            found = read_json(self.result, missing_ok=True)
        except UserError:  # half a record, not UTF-8, another shape: what was cut off is made again
            return None
        if not found or found.get("finished") is False:
            return None
        another = "choose another --name, or remove it"
        if found.get("format") != FORMAT:
            raise UserError(f"{self.result} was made by another version of this program: {another}")
        command = found.get("command")
        words = shown(command) if isinstance(command, list) and all(isinstance(w, str) for w in command) else []
        if words != self.shown:
            raise UserError(f"{self.result} was made by another command, {' '.join(words)}: {another}")
        if found.get("made_from") != self.made_from:
            raise UserError(f"{self.result} was made from {self._difference(found.get('made_from'))}: {another}")
        rows = found.get("rows", [])
        if self.setting not in (found.get("setting"), *(row.get("cache") for row in rows if isinstance(row, dict))):
            raise UserError(f"{self.result} holds no result of {self.setting}: {another}")
        return found

    def _difference(self, made_from: Any) -> str:
        """The first difference between this task's `made_from` and a record's, in words."""
        if not isinstance(made_from, dict):
            return "something else"
        words = {"checkpoint": "other weights", "files": "another text, prompt file or plugin"}
        names = [name for name, value in self.made_from.items() if made_from.get(name) != value]
        return words.get(names[0], f"another {names[0]}") if names else "something else"

    @property
    def shown(self) -> list[str]:
        """The command as its record shows it."""
        program = Path(self.command[1])
        return [*shown([str(program.relative_to(ROOT))]), *shown(without_flag(self.command[2:]))]

    def run(self) -> str | None:
        """Run the command, unless the task is done. Returns its last line, if it failed."""
        if self.record() is not None:
            return None
        process = subprocess.run(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="backslashreplace", check=False,
        )  # fmt: skip
        if process.returncode or self.record() is None:
            said = (process.stdout.strip().splitlines() or ["(it said nothing)"])[-1]
            return f"exit code {process.returncode}: {said}"
        return None


def what_tasks_are_made_from(args: argparse.Namespace) -> dict[str, Any]:
    """What the programs will record as `made_from`. Raises UserError if a file that they are to read is not there."""
    own = Parser("sweep.py", add_help=False, allow_abbrev=False)
    own.add_argument("--text", nargs="+", type=Path, default=[])
    for name in ("checkpoint_path", "prompt_file", "load_cache", "reference_path"):
        own.add_argument(f"--{name}", type=Path, nargs="?")  # that it lacks its value, the program will say
    for name in ("model", "dtype", "device"):
        own.add_argument(f"--{name}", nargs="?")
    own.add_argument("--random_weights", action="store_true")
    given = own.parse_known_args(args.rest)[0]
    where = None if given.random_weights else given.checkpoint_path or find_demo()
    checkpoint = open_checkpoint(where, given.model)
    device = parse_device(given.device or "auto")
    files = [given.prompt_file] if args.kind == "speed" else given.text
    for path in files:
        if path is not None and is_special(path) and not path.is_dir():
            raise UserError(f"{path}: a pipe or a device, and every task reads it anew: give a file")
    dtype = parse_dtype(given.dtype or "auto", checkpoint, device)
    return made_from(where, [*files, args.plugin, given.load_cache], dtype, device, given.reference_path)


def settings(args: argparse.Namespace) -> list[str]:
    """The full cache, then every combination, each once and in its usual spelling."""
    found = ["full"]
    for cache, sink, window in itertools.product(args.caches, args.sinks, args.windows):
        policy = parse_policy(cache)
        sizes = {"sink_size": sink, "window_size": window}
        has = {f.name for f in dataclasses.fields(policy)}  # one of the user's own may have neither
        knobs = dataclasses.asdict(policy) | {name: n for name, n in sizes.items() if name in has}
        found.append(format_policy(make_policy(policy.name, knobs)))
    return list(dict.fromkeys(found))


def flag(knob: str, value: str) -> list[str]:
    """generate.py's flag for a knob."""
    if value in ("true", "false"):
        return [f"--{knob}" if value == "true" else f"--no-{knob}"]
    return [f"--{knob}", value]


def full_results(args: argparse.Namespace) -> Path:
    """The folder in which the tasks share the full cache's results until all are done."""
    return args.outputs / args.name / f"full-of-{args.kind}"


def tasks(args: argparse.Namespace) -> list[Task]:
    """One task for each setting: its program, flags and result file."""
    made, source = [], {} if args.count else what_tasks_are_made_from(args)
    plugin = ["--plugin", str(args.plugin)] if args.plugin else []
    for setting in settings(args):
        name = setting.translate(str.maketrans(":,=", "---"))
        result = args.outputs / args.name / f"{args.kind}-{name}.json"
        cache, _, knobs = setting.partition(":")
        if args.kind == "speed":
            flags = [word for knob in knobs.split(",") if knob for word in flag(*knob.split("="))]
            command = ["generate.py", cache, *flags, *plugin, *args.rest, "--json", str(result)]
        else:
            stored = [FLAG, str(full_results(args)), "--json", str(result)]
            command = ["scripts/evaluate.py", args.kind, "--caches", setting, *plugin, *args.rest, *stored]
        made.append(Task(setting, result, (sys.executable, str(ROOT / command[0]), *command[1:]), source))
    return made


def is_done(task: Task) -> bool:
    """Whether the task's own result is there."""
    try:
        return task.record() is not None
    except UserError:
        return False


def run_all(todo: Sequence[Task], name: str) -> list[str]:
    """Run the tasks that are not done. Returns the settings that failed. Raises UserError if the full cache's task
    finds a mistake, which the others would find too."""
    failed = []
    for task in progress(todo, len(todo), name):
        error = task.run()
        if error is None:
            continue
        failed.append(task.setting)
        say(f"{task.setting}: {error}")
        if task.setting == FullCache.name and error.startswith("exit code 2:"):
            raise UserError("stopped: the full cache's task failed, and the others would for the same reason")
    return failed


def print_results(tasks: Sequence[Task], kind: str) -> None:
    """Print the results so far, in one table for each text, the full cache first."""
    records = [found for task in tasks if (found := task.record()) is not None]
    if not records:
        return
    if kind == "speed":
        print_speeds(records)
        return
    rows = [row for record in records for row in record["rows"]]
    once = {(row.get("text", ""), row["cache"]): row for row in reversed(rows)}  # the full cache's are in every record
    PRINTERS[kind](sorted(once.values(), key=lambda row: (row.get("text", ""), row["cache"] != FullCache.name)))


def run(args: argparse.Namespace) -> None:
    """Run the tasks that are not done, or the one of --index, and print what has been found so far."""
    every = todo = tasks(args)
    args.outputs.mkdir(parents=True, exist_ok=True)  # where a Slurm array's logs go, too
    if args.count:
        print(len(todo))
        return
    if args.index is not None:
        if not 0 <= args.index < len(todo):
            raise UserError(f"--index {args.index}: the tasks are 0 to {len(todo) - 1}")
        todo = [todo[args.index]]
    require_writable(todo[0].result, "--outputs")
    for task in todo:
        task.record()  # somebody else's result is told before any work
    failed = run_all(todo, args.name)
    if args.index is None:
        print_results(every, args.kind)
    if all(map(is_done, every)):
        shutil.rmtree(full_results(args), ignore_errors=True)  # another task of an array may be at it
    say(f"{len(todo) - len(failed)} of {len(todo)} done, in {args.outputs / args.name}/")
    sys.stdout.flush()
    if failed:
        sys.exit(1)
