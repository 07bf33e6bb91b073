"""The maps of passkeys, from small made-up result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from plot_records import QUANTISED, keys, passkeys, ticks

from plots import pictures
from plots.records import read


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


def test_each_map_of_passkeys_has_its_own_lengths() -> None:
    """The last map's labels stood beside all: lengths 1024 and 2048 were labelled 512 and 700."""
    figures = pictures.draw_passkeys(
        [passkeys(keys("full", 1.0)), passkeys(keys(QUANTISED, 0.25, ("512", "700", "900")))]
    )
    (first,), (second,) = (figure.axes for figure in figures.values())
    assert ticks(first) == (["0%", "50%"], ["1024", "2048"])
    assert ticks(second) == (["0%", "50%"], ["512", "700", "900"])
    assert [t.get_text() for t in second.texts] == ["25%", "100%"] * 3
    assert second.images[0].get_array().tolist() == [[0.25, 1.0]] * 3
    assert list(second.get_yticks(minor=True)) == [0.5, 1.5] and list(second.get_xticks(minor=True)) == [0.5]
    borders = [*second.xaxis.get_minor_ticks(), *second.yaxis.get_minor_ticks()]
    assert len(borders) == 3 and all(tick.gridline.get_visible() for tick in borders)  # cells of 100% were one field


def test_maps_say_how_many_passkeys_and_the_interval() -> None:
    rows = [keys("full", 1.0, trials_per_cell=4), keys(QUANTISED, 0.5, trials=12, low=0.25, high=0.75), keys("mine", 0)]
    titles = [axis.get_title() for axis in pictures.draw_passkeys([passkeys(*rows)])["passkeys"].axes[:3]]
    assert titles == ["full\n100.0% of 16 keys", "mine\n0.0%", "quantize_kv 16/32\n50.0% of 12 keys [25.0%, 75.0%]"]


def test_fields_that_newer_files_have_do_no_harm(tmp_path: Path) -> None:
    row = keys("full", 0.5, text="t", sha256=None, tokens=[1], trials=8, trials_per_cell=2, low=0.25, high=0.75)
    (tmp_path / "p.json").write_text(json.dumps({"kind": "passkey", "model": "m", "settings": {}, "rows": [row]}))
    (axis,) = pictures.draw_passkeys(read([tmp_path / "p.json"]))["passkeys"].axes
    assert axis.get_title() == "full\n50.0% of 8 keys [25.0%, 75.0%]"


def test_a_cache_in_two_grids_is_two_maps_and_in_one_the_larger_file_is_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few, many = keys("full", 0.5, trials_per_cell=1), keys("full", 1.0, trials_per_cell=8)
    other = keys("full", 0.0, ("512",), trials_per_cell=1)
    for order in ((few, many, other), (many, few, other)):
        figures = pictures.draw_passkeys([passkeys(row, path=f"{row['mean']}.json") for row in order]).values()
        titles = [axis.get_title() for figure in figures for axis in figure.axes]
        assert titles == ["full\n100.0% of 32 keys", "full\n0.0% of 2 keys"]
        assert (
            "passkeys of full: two files disagree: 1.0.json, with the most trials, is taken" in capsys.readouterr().err
        )


def test_texts_of_two_files_are_two_pictures_and_not_one_cache_twice() -> None:
    """README's own plot line: 16 maps, each cache twice, of two texts of which two more were dropped."""
    rows = [
        keys("full", 1.0, text=f"{name}.txt.xz", sha256=name, trials_per_cell=2)
        for name in ("books", "novels", "books")
    ]
    figures = pictures.draw_passkeys([passkeys(row) for row in rows])
    assert list(figures) == ["passkeys-books", "passkeys-novels"] and all(len(f.axes) == 1 for f in figures.values())
    assert "books.txt.xz" in figures["passkeys-books"].get_suptitle()
