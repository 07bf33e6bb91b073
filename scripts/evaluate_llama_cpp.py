"""llama.cpp's quantised caches against its own f16 cache, on the windows that evaluate.py scores."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project is run from its folder, not installed

from common.program import start

if __name__ == "__main__":
    start("evaluation.peer_llama_cpp")
