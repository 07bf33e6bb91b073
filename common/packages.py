"""Packages that only some runs need: a run that lacks one says which, and how to get it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"llama_cpp": "llama-cpp-python", "lm_eval": "lm-eval", "PIL": "pillow", "yaml": "pyyaml"}  # as pip has them


def missing(module: str, purpose: str) -> UserError:
    """The error message for a `module` that cannot be imported. purpose: what needs it."""
    name = NAMES.get(module.partition(".")[0], module.partition(".")[0])
    return UserError(f"{purpose} needs the package {name}, which is not installed ({remedy(name)})")


def remedy(name: str) -> str:
    """How to get a package: to install it, or to use the project's own environment if that exists and is not in use."""
    venv = ROOT / ".venv"
    if (venv / "bin" / "activate").is_file() and Path(sys.prefix).resolve() != venv.resolve():
        return f"source {venv}/bin/activate, or pip install {name}"
    return f"pip install {name}"


def require(module: str, purpose: str) -> None:
    """Raises UserError (`missing`) if a module is not installed: to be called before long work that needs it last."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise missing(module, purpose)


@contextmanager
def missing_packages_reported() -> Iterator[None]:
    """A package that is not installed ends the program with one line and exit code 2, not with a traceback.

    If a module of the project itself is not found, that is a bug, and the traceback stays.
    """
    program = Path(sys.argv[0]).name
    try:
        yield
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if not top or (ROOT / top).is_dir() or (ROOT / f"{top}.py").is_file():
            raise
        print(f"{program}: error: {missing(top, program)}", file=sys.stderr)
        sys.exit(2)
