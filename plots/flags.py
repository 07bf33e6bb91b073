"""Pictures from result files alone: python scripts/plot.py results/*.json outputs/frontier/*.json --out assets

Each picture is made where its data is among the files, as PNG and SVG, and reads in black and white:

  memory-...  weights, cache and the rest as the context grows; per model and device      benchmark.py, generate.py
  cache-...   cache bytes against context: the files' (points), planned (lines)           benchmark.py, generate.py
  table       perplexity, divergence, passkeys, ROUGE-L and tokens/s per cache; per model            any of them
  frontier    mean KL against cache bytes, a panel per text              evaluate.py divergence or perplexity
  position    mean KL by position in the window                          evaluate.py divergence or perplexity
  speed-...   a decode step against the context, and over the first cache's; per model and device    benchmark.py
  passkeys-.. share recalled by length and depth, a map per cache; per text               evaluate.py passkey
  ruler       RULER's scores by length, a panel per task, with intervals                    evaluate.py ruler

Where no file has bytes, memory and cache show the plan of Llama 3.1 8B. A line on standard error says what is
left out of a picture. generate.py's reports are what `--json` writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cli.options import Parser
from common.files import require_writable
from common.program import importing, program


def main(argv: list[str] | None = None) -> None:
    p = Parser("plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", type=Path, nargs="*", help="what evaluate.py, benchmark.py, generate.py and sweep.py wrote")
    p.add_argument("--out", type=Path, default=Path("outputs/pictures"))
    with program("plot.py"):
        args = p.parse(sys.argv[1:] if argv is None else argv)
        with importing():
            from plots.command import draw
            from plots.pictures import save
            from plots.records import read
        records = read(args.files)
        require_writable(args.out / "table.png", "--out")
        for name, figure in draw(records).items():  # all are drawn before the first is written
            save(figure, args.out, name)
