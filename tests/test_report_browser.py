"""The report in a browser: no error, every image shown, and what its script does."""

import csv
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import CHROMIUM, Tab
from PIL import Image
from test_report import Points, report, write_draft
from test_report_results import gauged, write_scored

from sfumato.training.folder import RunFolder

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
CHECKPOINTS = 200
OUTSIDE = """
[...document.querySelectorAll("th, td, img, svg, button, input, p, pre, summary")].filter((one) => {
  const box = one.getBoundingClientRect();
  return box.width && (box.left < 0 || box.right > innerWidth + 0.5);
}).map((one) => one.outerHTML.slice(0, 100))
"""
COLUMN = """
[...document.querySelector("table.sorts").tBodies[0].rows].map((row) => row.cells[0].textContent)
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    tab = Tab(tmp_path_factory.mktemp("chromium"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Return a run of many checkpoints with images of noise, and two with intervals and gauges."""
    root = tmp_path_factory.mktemp("runs")
    noise = np.random.default_rng(0).integers(0, 256, (384, 384, 3), np.uint8)
    Image.fromarray(noise).save(root / "noise.png")
    steps = range(0, CHECKPOINTS + 1)
    points: Points = {step: (18 + step / 100, 0.3 - step / 1000) for step in steps}
    long = write_draft(root / "long", 0.0, points, num_images=3, num_prompts=8)
    for path in long.path.glob("evaluation/*/images/*.png"):
        path.unlink()
        os.link(root / "noise.png", path)
    scored = [
        write_scored(root / name, kl, i)
        for i, (name, kl) in enumerate([("first", 0.0), ("second", 1.0)])
    ]
    gauged(scored[0], {"dark": {"limit": 2.0, "relative": "ratio"}})
    return [*scored, long]


@pytest.fixture(scope="module")
def page(runs: list[RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    report(runs, out)
    return out / "new" / "r.html"


def test_a_page_of_200_checkpoints_is_small(page: Path) -> None:
    assert page.stat().st_size < 5_000_000


@pytest.mark.parametrize("width", [1300, 420])
def test_every_image_is_shown_and_nothing_lies_outside(tab: Tab, page: Path, width: int) -> None:
    tab.open(page, width)
    count, shown = tab.run(
        "[document.images.length, [...document.images].filter((i) => i.naturalWidth > 0).length]"
    )
    assert count == shown > 20
    assert tab.run("document.querySelectorAll('figure svg').length") > 5
    assert tab.run("document.documentElement.scrollWidth") <= width
    tab.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert tab.run("document.documentElement.scrollWidth") <= width
    if width == 420:
        assert tab.run(OUTSIDE) == []
    assert tab.errors == []


def test_small_pictures_are_enlarged_exactly(
    tab: Tab, runs: list[RunFolder], tmp_path: Path
) -> None:
    report(runs[:2], tmp_path)
    for width in (1300, 420):
        tab.open(tmp_path / "new" / "r.html", width)
        scales = tab.run(
            "[...document.querySelectorAll('img.crisp')].filter((i) => i.width).map("
            "(i) => [i.width / i.naturalWidth, i.height / i.naturalHeight,"
            " getComputedStyle(i).imageRendering])"
        )
        assert scales and {tuple(one) for one in scales} == {(8, 8, "pixelated")}
    assert tab.errors == []


@pytest.mark.parametrize("width", [1300, 420])
def test_a_click_sorts_a_table(tab: Tab, page: Path, width: int) -> None:
    tab.open(page, width)
    head = "document.querySelectorAll('table.sorts th button')"
    names = tab.run(f"[...{head}].map((one) => one.textContent)")
    reward = names.index("reward")
    tab.run(f"{head}[{reward}].click()")
    assert tab.run(COLUMN) == ["base model", "first", "second", "long"]
    assert tab.run("document.querySelector('[aria-sort]').ariaSort") == "ascending"
    tab.run(f"{head}[{reward}].click()")
    assert tab.run(COLUMN) == ["long", "second", "first", "base model"]
    tab.run(f"{head}[0].click()")
    assert tab.run(COLUMN) == ["base model", "first", "long", "second"]
    assert tab.errors == []


@pytest.mark.parametrize("width", [1300, 420])
def test_the_slider_shows_the_images_of_a_step(tab: Tab, page: Path, width: int) -> None:
    tab.open(page, width)
    heads = """
    [...document.querySelector('[data-steps] table').tBodies[0].rows[0].cells]
      .filter((one) => one.offsetWidth).map((one) => one.dataset.name)
    """
    assert tab.run("document.querySelector('.slider output').textContent") == "step 200"
    assert [name.split(",")[0] for name in tab.run(heads)] == [
        "base model",
        "first",
        "second",
        "long",
    ]
    tab.run("""
    const input = document.querySelector('.slider input');
    input.value = 0;
    input.dispatchEvent(new Event('input'));
    """)
    assert tab.run("document.querySelector('.slider output').textContent") == "step 1"
    assert [name.split(",")[:2] for name in tab.run(heads)][1:] == [["long", " step 1"]]
    assert tab.errors == []


def downloaded(tab: Tab, script: str, name: str) -> str:
    tab.run(script)
    path, end = tab.downloads / name, time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{name} was not saved"
        time.sleep(0.05)
    return path.read_text(encoding="utf-8")


def test_tables_and_figures_are_saved(tab: Tab, page: Path) -> None:
    tab.open(page, 1300)
    saves = "document.querySelectorAll('.saves')[0].children"
    rows = list(csv.DictReader(downloaded(tab, f"{saves}[0].click()", "summary.csv").splitlines()))
    objects: list[dict[str, Any]] = json.loads(
        downloaded(tab, f"{saves}[1].click()", "summary.json")
    )
    assert [row["model"] for row in rows] == ["base model", "first", "second", "long"]
    for row, one in zip(rows, objects, strict=True):
        assert list(row) == list(one)
        assert [*row.values()] == ["" if value is None else str(value) for value in one.values()]
    assert objects[3]["reward"] == 20.0 and objects[3]["reward error"] == 0.25
    second = objects[2]
    assert second["reward low"] < second["reward difference"] < second["reward high"]
    assert objects[0]["reward difference"] is None
    figure = "document.querySelector('figure[data-name=\"reward against diversity\"] button')"
    text = downloaded(tab, f"{figure}.click()", "reward_against_diversity.svg")
    assert text.startswith("<svg") and "xmlns=" in text and ">second</text>" in text
    assert tab.errors == []


def test_a_text_of_a_run_is_no_formula_in_a_table(tab: Tab, tmp_path: Path) -> None:
    points: Points = {0: (18.0, 0.3), 20: (19.0, 0.2)}
    report([write_draft(tmp_path / "=1+1", 0.0, points)], tmp_path)
    tab.open(tmp_path / "new" / "r.html", 1300)
    (tab.downloads / "summary.csv").unlink(missing_ok=True)
    click = "document.querySelector('.saves').children[0].click()"
    rows = list(csv.DictReader(downloaded(tab, click, "summary.csv").splitlines()))
    assert [row["model"] for row in rows] == ["base model", "'=1+1"]
    assert tab.errors == []
