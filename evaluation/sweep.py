"""A sweep over caches, sinks and windows: one task per setting, one JSON line per task, in outputs/NAME/.

  python scripts/sweep.py --name frontier --kind perplexity --caches quantize_kv compress_kv \
      --sinks 4 16 --windows 32 256 -- --text my.txt --context 8192
  python scripts/sweep.py --name speed --kind speed -- --prompt 4000 --max_new_tokens 64

KIND is one of evaluate.py's, or `speed` (generate.py's report). What stands behind `--` goes to that program.
A task whose result is there is skipped; one that fails or was killed is not done, is tried again by the next
call, and makes this one exit with 1 after the others have run. Programs write their results in one step,
so a killed sweep goes on where it was, and tasks may run at the same time (sweep.sbatch: `--count`, `--index`).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from cli.console import shown
from cli.options import Parser, add_plugin_flag, load_plugin
from common.errors import UserError
from common.files import require_writable
from kv_cache import format_policy, make_policy, parse_policy

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Task:
    """One setting, where its result goes, and the command that makes it."""

    setting: str
    result: Path
    command: tuple[str, ...]

    def is_done(self) -> bool:
        """Whether the result is there, whole, and of this command. Raises UserError where it is another's."""
        try:
            record = json.loads(self.result.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        if not isinstance(record, dict) or not record.get("finished", True):
            return False
        command = [*shown(record.get("command", []))]
        if command != self.shown:
            raise UserError(f"{self.result} was made by another command, {' '.join(command)}: choose another --name")
        return True

    @property
    def shown(self) -> list[str]:
        """The command as its record shows it."""
        program = Path(self.command[1])
        return [*shown([str(program.relative_to(ROOT))]), *shown(self.command[2:])]

    def run(self) -> bool:
        """Run it, unless it is done; whether it is done then."""
        if not self.is_done():
            process = subprocess.run(
                self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            if process.returncode or not self.is_done():
                last = (process.stdout.strip().splitlines() or ["(it said nothing)"])[-1]
                print(f"{self.setting}: exit code {process.returncode}: {last}", file=sys.stderr)
                return False
        return True


def settings(args: argparse.Namespace) -> list[str]:
    """The full cache, then every combination; each spelt in one way, and once."""
    found = ["full"]
    for cache, sink, window in itertools.product(args.caches, args.sinks, args.windows):
        policy = parse_policy(cache)
        sizes = {"sink_size": sink, "window_size": window}
        has = {f.name for f in dataclasses.fields(policy)}  # one of the user's own may have neither
        knobs = dataclasses.asdict(policy) | {name: n for name, n in sizes.items() if name in has}
        found.append(format_policy(make_policy(policy.name, knobs)))
    return list(dict.fromkeys(found))


def flag(knob: str, value: str) -> list[str]:
    """generate.py's way to say it."""
    if value in ("true", "false"):
        return [f"--{knob}" if value == "true" else f"--no-{knob}"]
    return [f"--{knob}", value]


def tasks(args: argparse.Namespace) -> list[Task]:
    made = []
    plugin = ["--plugin", str(args.plugin)] if args.plugin else []
    for setting in settings(args):
        name = setting.translate(str.maketrans(":,=", "---"))
        result = args.outputs / args.name / f"{args.kind}-{name}.json"
        cache, _, knobs = setting.partition(":")
        if args.kind == "speed":
            flags = [word for knob in knobs.split(",") if knob for word in flag(*knob.split("="))]
            command = ["generate.py", cache, *flags, *plugin, *args.rest, "--json", str(result)]
        else:
            command = [
                "scripts/evaluate.py",
                args.kind,
                "--caches",
                setting,
                *plugin,
                *args.rest,
                "--json",
                str(result),
            ]
        made.append(Task(setting, result, (sys.executable, str(ROOT / command[0]), *command[1:])))
    return made


def make_parser() -> Parser:
    p = Parser("sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", required=True, help="results go to outputs/NAME/")
    p.add_argument("--kind", choices=("perplexity", "divergence", "passkey", "rouge", "speed"), default="divergence")
    p.add_argument(
        "--caches", nargs="+", default=["quantize_kv", "compress_kv"], metavar="CACHE",
        help="a name, or one with knobs: quantize_kv:k_bits=4,v_bits=4",
    )  # fmt: skip
    add_plugin_flag(p)
    p.add_argument("--sinks", nargs="+", default=["4", "16"])
    p.add_argument("--windows", nargs="+", default=["32", "128"])
    p.add_argument("--outputs", type=Path, default=Path("outputs"))
    p.add_argument("--count", action="store_true", help="print the number of tasks and stop")
    p.add_argument("--index", type=int, metavar="N", help="run task N alone, counted from 0")
    return p


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    try:
        load_plugin(argv[:cut])
        args = make_parser().parse(argv[:cut])
        args.rest = argv[cut + 1 :]
        todo = tasks(args)
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
            task.is_done()  # a result of another command is told before any work
        bar = tqdm(todo, desc=args.name, disable=not sys.stderr.isatty())
        failed = [task.setting for task in bar if not task.run()]
    except UserError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"sweep.py: error: --outputs {args.outputs}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(f"{len(todo) - len(failed)} of {len(todo)} done, in {args.outputs / args.name}/", file=sys.stderr)
    if failed:
        sys.exit(1)
