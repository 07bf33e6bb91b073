"""How a cache looks, in every picture alike, and the words that explain its name to somebody who sees only the picture.

The marker's shape is the cache's family (its name and bits), line and filling tell settings of one family apart.
Shades of grey, so that pictures read in black and white.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text

from plots.records import family

plt.rcParams["text.parse_math"] = False  # names come from files: "$\\frac$" is one, and no formula

SHAPES = {  # of the caches that are bundled
    "full": "o", "compress_kv": "s", "quantize_kv": "^", "quantize_kv K8V4": "v", "quantize_kv K4V8": ">",
    "quantize_kv K4V4": "D",
}  # fmt: skip
OTHERS = "PX*hpd<8H"
FILLS = ("#999999", "white", "#333333")
LINES = ("-", "--", ":", "-.")
FIRST_LINE = {"full": "-", "compress_kv": ":", "quantize_kv": "--"}
GREYS = {"full": "#222222", "compress_kv": "#888888", "quantize_kv": "#555555"}

EXPLAINED = (  # what a picture's texts may hold, and what it means
    (r"(?<![\d.])\d+/\d+(?![\d/])", "16/32: the first 16 tokens (sink) and the latest 32 (window) stay exact"),
    (r"\bK\dV\d\b", "K8V4: keys in 8 bits, values in 4; without it both in 8"),
    (r"\bcompress_kv\b", "compress_kv: what is neither in sink nor window is dropped"),
    (r"\bquantize_kv\b", "quantize_kv: the rest is quantised"),
    (r"\bmean KL\b", "mean KL: nats a token from the full cache's distribution"),
)  # fmt: skip


def shapes(families: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A marker and its filling for each family; those not bundled get the others, by their names."""
    unknown = sorted(set(families) - set(SHAPES))
    found = {name: (OTHERS[i % len(OTHERS)], FILLS[i // len(OTHERS) % 3]) for i, name in enumerate(unknown)}
    return found | {name: (SHAPES[name], FILLS[0]) for name in families if name in SHAPES}


def style_of_family(name: str, families: Iterable[str], size: float = 6) -> dict[str, Any]:
    """What matplotlib's `plot` takes for points without lines."""
    shape, fill = shapes(families)[name]
    return {"marker": shape, "color": "#333333", "markersize": size, "markerfacecolor": fill}


def styles(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What matplotlib's `plot` takes for lines with points, by setting. settings: all of the picture."""
    marks = shapes({family(setting) for setting in settings})
    found: dict[str, dict[str, Any]] = {}
    members: dict[str, int] = {}
    for setting in settings:
        name, cache = family(setting), setting.partition(":")[0]
        n = members[name] = members.get(name, -1) + 1
        grey, first = GREYS.get(cache, "#000000"), FIRST_LINE.get(cache, "-.")
        lines = [first, *(line for line in LINES if line != first)]
        fill = (grey, "white", "#bbbbbb")[n % 3]
        found[setting] = {
            "marker": marks[name][0],
            "color": grey,
            "linestyle": lines[n // 3 % 4],
            "markerfacecolor": fill,
        }
    return found


def explain(figure: Figure) -> None:
    """Beneath a picture, what the names in it mean."""
    texts = [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]
    notes = [note for pattern, note in EXPLAINED if any(re.search(pattern, text) for text in texts)]
    if not notes:
        return
    box = figure.get_tightbbox(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    width, height = figure.get_size_inches()
    figure.text(box.x0 / width, (box.y0 - 0.12) / height, "\n".join(notes), va="top", fontsize=7, color="#444444")
