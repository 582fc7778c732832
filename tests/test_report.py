"""The report of synthetic run folders: its numbers, its grids, and that it needs nothing else."""

import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sfumato.images import save_image
from sfumato.report.figures import running_mean
from sfumato.report.report import write_report
from sfumato.report.tables import number
from sfumato.training.folder import RunFolder

LABEL = "mean pairwise pixel distance (RMS at 16 x 16)"
PROMPTS = ["a star", "<script>alert(1)</script> & a ring"]
BASE = (18.2, 0.31)
DRAFT = {10: (20.2, 0.21), 20: (22.4, 0.12)}
PLUS = {10: (19.2, 0.29), 20: (21.2, 0.24)}
TINTS = {"base": (0.6, 0.6, 0.6), "plus": (0.2, 0.5, 0.8), "draft": (0.9, 0.5, 0.1)}


def write_run(
    path: Path,
    kl_coeff: float,
    points: dict[int, tuple[float, float]],
    *,
    side: int = 16,
    num_images: int = 3,
    **training: Any,
) -> RunFolder:
    """Write a run folder: config, run.json, metrics of 20 steps, and evaluations at `points`."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    settings = {
        "name": path.name,
        "runs_dir": "runs",
        "model": {"pretrained": "tiny"},
        "objective": {"kl_coeff": kl_coeff, "truncation_steps": 1},
        "reward": {"color": "red", "scale": 20.0},
        "training": {"seed": 0, **training},
    }
    run.config.write_text(yaml.safe_dump(settings))
    run.describe(f"sfumato train name={path.name}", {"reward_scale": 20.0})
    rows = [{"step": 0, "validation/reward": 18.0, "validation/reward_base": 18.0}]
    for step in range(1, 21):
        row = {"step": step, "reward": 18 + step / 10}
        rows.append(row | ({"kl": step / 1000} if kl_coeff else {}))
    rows[-1] |= {"validation/reward": 21.77, "validation/reward_base": 18.0}
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, (reward, diversity) in points.items():
        write_evaluation(run, step, reward, diversity, side, num_images)
    return run


def write_evaluation(
    run: RunFolder, step: int, reward: float, diversity: float, side: int, num_images: int
) -> None:
    place = run.evaluation(step)
    (place / "images").mkdir(parents=True)
    rows = []
    for p, prompt in enumerate(PROMPTS):
        for i in range(num_images):
            file = f"images/{p:03d}-{i:03d}.png"
            row = {"prompt": prompt, "prompt_index": p, "index": i, "seed": 1, "image": file}
            rows.append(row | {"reward": reward + i + 10 * p, "parts": {}, "held_out": {}})
            save_image(picture(run.path.name if step else "base", i, side), place / file)
    (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "step": step,
        "reward": reward,
        "reward_error": 0.25,
        "held_out": {"attributes": 0.5 + step / 100},
        "diversity": {"label": LABEL, "mean": diversity, "per_prompt": [diversity, diversity]},
        "settings": {
            "sampler": {"num_inference_steps": 20, "guidance_scale": 4.0},
            "prompts": PROMPTS,
            "num_images": num_images,
            "seed": 4321,
            "features": "pixels",
        },
    }
    (place / "summary.json").write_text(json.dumps(summary))


def picture(model: str, index: int, side: int) -> torch.Tensor:
    """Return a disc in the model's tint whose place shows the index."""
    tint = next((color for name, color in TINTS.items() if name in model), (0.5, 0.5, 0.5))
    y, x = np.mgrid[:side, :side] / side
    disc = (x - 0.3 - 0.15 * (index % 4)) ** 2 + (y - 0.5) ** 2 < 0.05
    image = np.where(disc[None], np.array(tint)[:, None, None], 0.95)
    return torch.from_numpy(image.astype(np.float32))


class Reader(HTMLParser):
    """Collects tables as rows of cell texts, images, and every reference to a resource."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.images: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self._cell: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            if given.get(name):
                self.references.append(str(given[name]))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "img":
            self.images.append(given)
            assert self._cell is not None
            self._cell.append("IMAGE")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            assert self._cell is not None
            self.tables[-1][-1].append(" ".join(" ".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def report(runs: Sequence[RunFolder], out: Path, **options: Any) -> str:
    return write_report(runs, out, **{"title": "A report", **options}).read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(root / "draft", 0.0, {0: BASE, **DRAFT}),
        write_run(root / "draft-plus", 0.25, PLUS),
    ]


@pytest.fixture(scope="module")
def html(runs: list[RunFolder], tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(runs, tmp_path_factory.mktemp("out") / "new" / "report.html")


def test_summary_sets_each_run_beside_the_base_model(html: str) -> None:
    assert read(html).tables[0] == [
        ["model", "objective", "steps", "reward", "attributes", LABEL],
        ["base model", "–", "0", "18.20 ± 0.25", "0.500", "0.310"],
        ["draft", "DRaFT", "20", "22.40 ± 0.25 +4.20", "0.700 +0.200", "0.120 −0.190"],
        [
            "draft-plus",
            "DRaFT+, kl_coeff 0.25",
            "20",
            "21.20 ± 0.25 +3.00",
            "0.700 +0.200",
            "0.240 −0.070",
        ],
    ]
    assert "Mean reward: 18.20 in the base model, 21.20 to 22.40 after training." in html


def test_equal_reward_agrees_with_numpy(html: str) -> None:
    table = next(t for t in read(html).tables if t[0][-1] == "difference")
    levels = np.linspace(BASE[0], PLUS[20][0], 11)[1:]
    curves = [zip(BASE, *run.values(), strict=True) for run in (DRAFT, PLUS)]
    first, second = (np.interp(levels, *map(list, curve)) for curve in curves)
    assert table[0] == ["reward", "draft", "draft-plus", "difference"]
    read_back = np.array([[float(cell) for cell in row] for row in table[1:-1]])
    np.testing.assert_allclose(read_back[:, 0], levels, atol=0.0051)
    np.testing.assert_allclose(read_back[:, 1:].T, [first, second, second - first], atol=0.00051)
    mean = (second - first).mean()
    assert float(table[-1][-1]) == pytest.approx(mean, abs=0.0006)
    assert f"draft-plus is more diverse than draft: by {mean:.3f} on average" in html


def test_grids_have_a_row_per_noise_and_a_column_per_model(html: str) -> None:
    reader = read(html)
    grids = [t for t in reader.tables if any("IMAGE" in cell for row in t for cell in row)]
    assert len(grids) == 2 * len(PROMPTS)
    equal, last = grids[0], grids[len(PROMPTS)]
    assert equal[0] == [  # 20.20 of draft is nearer to draft-plus's highest than 22.40
        "base model mean reward 19.20",
        "draft step 10, mean reward 21.20",
        "draft-plus step 20, mean reward 22.20",
    ]
    assert last == [
        [
            "base model mean reward 19.20",
            "draft step 20, mean reward 23.40",
            "draft-plus step 20, mean reward 22.20",
        ],
        ["IMAGE 18.20", "IMAGE 22.40", "IMAGE 21.20"],
        ["IMAGE 19.20", "IMAGE 23.40", "IMAGE 22.20"],
        ["IMAGE 20.20", "IMAGE 24.40", "IMAGE 23.20"],
    ]
    for image, model in zip(reader.images, ["base", "draft", "plus"] * 12, strict=True):
        data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
        red, green, blue = Image.open(io.BytesIO(data)).getpixel((7, 8))  # type: ignore[misc]
        np.testing.assert_allclose([red, green, blue], np.array(TINTS[model]) * 255, atol=1)
        assert image["class"] == "crisp"


def test_prompts_and_names_are_inert(runs: list[RunFolder], html: str, tmp_path: Path) -> None:
    assert "script" not in read(html).tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; a ring" in html
    odd = write_run(tmp_path / "<b>$x$", 0.0, {0: BASE, **DRAFT})
    text = report([odd], tmp_path / "r.html", title="<i>T</i>", notes="<u>one</u>\n\ntwo")
    assert not {"b", "i", "u"} & set(read(text).tags)
    assert "<p>&lt;u&gt;one&lt;/u&gt;</p>\n<p>two</p>" in text
    assert text.count("&lt;b&gt;$x$") > 3


def test_the_page_needs_nothing_else(html: str) -> None:
    reader = read(html)
    assert reader.references
    assert all(one.startswith(("data:image/", "#")) for one in reader.references)
    assert not {"script", "link", "iframe", "object", "base"} & set(reader.tags)
    assert "http://" not in html and "https://" not in html
    assert "@import" not in html
    assert all(one.startswith("#") for one in re.findall(r"url\(([^)]*)\)", html))


def test_every_figure_is_there_and_drawn_inline(html: str) -> None:
    titles = ["reward", "attributes", LABEL, "reward in training", "KL in training"]
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert len(figures) == len(titles) + 1
    for title, figure in zip(titles, figures, strict=False):
        assert f">{title}</text>" in figure
    assert ">draft-plus</text>" in figures[-1]
    assert figures[-1].count(">base model</text>") == 1
    marked = re.findall(r'<clipPath id="([^"]*)"|id="(m[0-9a-f]+)"', html)
    assert len(set(marked)) == len(marked)  # one figure's marks are not another's


def test_the_same_folders_give_the_same_bytes(
    runs: list[RunFolder], html: str, tmp_path: Path
) -> None:
    assert report(runs, tmp_path / "again.html") == html
    assert [p.name for p in tmp_path.iterdir()] == ["again.html"]


def test_settings_that_differ_are_listed(html: str) -> None:
    tables = read(html).tables
    assert ["reward scale", "20.0", "20.0"] in tables[-2]
    assert [row[0] for row in tables[-2][1:]][:4] == ["starts", "command", "time", "sfumato"]
    assert tables[-1] == [["", "draft", "draft-plus"], ["objective.kl_coeff", "0.0", "0.25"]]


def test_large_images_are_scaled_down_and_smooth(tmp_path: Path) -> None:
    run = write_run(tmp_path / "draft", 0.0, {0: BASE, 20: DRAFT[20]}, side=400, num_images=2)
    for image in read(report([run], tmp_path / "r.html")).images:
        data = base64.b64decode(str(image["src"]).removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(data)).size == (384, 384)
        assert "class" not in image


def test_a_run_of_the_same_seed_is_the_baseline(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "draft-0", 0.0, {0: BASE, **DRAFT}, seed=0),
        write_run(tmp_path / "draft-1", 0.0, {0: BASE, **DRAFT}, seed=1),
        write_run(tmp_path / "plus-1", 1.0, {0: BASE, **PLUS}, seed=1),
    ]
    html = report(runs, tmp_path / "r.html")
    assert "plus-1 is more diverse than draft-1" in html
    assert html.count('<th scope="row">base model</th>') == 1


# ---- what is missing


def test_runs_without_evaluation_show_their_validation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "draft", 0.0, {})
    place = run.samples(20)
    place.mkdir(parents=True)
    lines = []
    for i in range(2):
        for side in ("tuned", "base"):
            save_image(
                picture("draft" if side == "tuned" else "base", i, 16),
                place / f"{i:03d}-{side}.png",
            )
        pair = {"index": i, "prompt": "a <star>", "reward_tuned": 21.0 + i, "reward_base": 18.0}
        lines.append(json.dumps(pair) + "\n")
    (place / "pairs.jsonl").write_text("".join(lines))
    html = report([run], tmp_path / "r.html")
    reader = read(html)
    assert "No checkpoint of draft is evaluated: run sfumato evaluate" in html
    assert "at step 20, had a mean reward of 21.77" in html
    assert reader.tables[0][1][-2:] == ["not evaluated"] * 2
    assert [
        ["tuned", "base"],
        ["IMAGE a <star>: 21.00", "IMAGE a <star>: 18.00"],
        ["IMAGE a <star>: 22.00", "IMAGE a <star>: 18.00"],
    ] in reader.tables
    assert html.count("<figure>") == 2  # reward of validation images, reward in training


def test_one_evaluated_step_is_enough(tmp_path: Path) -> None:
    only_base = write_run(tmp_path / "a", 0.0, {0: BASE})
    only_last = write_run(tmp_path / "b", 0.5, {20: PLUS[20]})
    assert "No checkpoint of a is evaluated" in report([only_base], tmp_path / "a.html")
    assert "The base model is not evaluated" in report([only_last], tmp_path / "b.html")
    both = read(report([only_base, only_last], tmp_path / "c.html"))
    assert [row[0] for row in both.tables[0]] == ["model", "base model", "a", "b"]


def test_runs_that_never_meet_are_said_to(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "draft", 0.0, {0: BASE, **DRAFT}),
        write_run(tmp_path / "plus", 9.0, {0: BASE, 20: (18.0, 0.3)}),
    ]
    html = report(runs, tmp_path / "r.html")
    assert "plus and draft reach no common reward above the base model" in html
    assert "Diversity at equal reward" not in html and "Images at equal reward" not in html


def test_bare_folders_still_make_a_page(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "bare")
    run.path.mkdir()
    run.config.write_text("name: bare\n")
    html = report([run], tmp_path / "r.html")
    assert "bare has no metrics.jsonl" in html
    assert read(html).tables[0][1] == ["bare", "unknown", "0", *["not evaluated"] * 2]


def test_a_missing_image_is_said_in_its_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "draft", 0.0, {0: BASE, **DRAFT})
    (run.evaluation(20) / "images" / "000-001.png").unlink()
    (run.evaluation(20) / "images" / "000-002.png").write_bytes(b"no picture")
    reader = read(report([run], tmp_path / "r.html"))
    assert sum("image missing" in cell for t in reader.tables for row in t for cell in row) == 2


def break_config(run: RunFolder) -> None:
    run.config.write_text("a: [")


def break_summary(run: RunFolder) -> None:
    (run.evaluation(0) / "summary.json").unlink()


def break_scores(run: RunFolder) -> None:
    (run.evaluation(20) / "scores.jsonl").write_text("{")


def break_facts(run: RunFolder) -> None:
    (run.path / "run.json").write_text("{}")


def other_features(run: RunFolder) -> None:
    file = run.evaluation(20) / "summary.json"
    file.write_text(file.read_text().replace('"features": "pixels"', '"features": "lpips"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.config.unlink(), "is no run folder: it has no config.yaml"),
        (break_config, "config.yaml is not YAML"),
        (break_summary, "summary.json cannot be read"),
        (break_scores, "scores.jsonl cannot be read"),
        (break_facts, "run.json cannot be read"),
        (other_features, "evaluated differently .features: pixels and lpips"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    run = write_run(tmp_path / "draft", 0.0, {0: BASE, **DRAFT})
    damage(run)
    with pytest.raises(ValueError, match=message):
        report([run], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_wrong_runs_are_refused(runs: list[RunFolder], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    with pytest.raises(ValueError, match="no runs to report"):
        report([], out)
    with pytest.raises(ValueError, match="there is no run folder"):
        report([RunFolder(tmp_path / "nothing")], out)
    with pytest.raises(ValueError, match="named twice"):
        report([runs[0], runs[0]], out)
    other = write_run(tmp_path / "other", 1.0, PLUS, num_images=2)
    with pytest.raises(ValueError, match=r"draft and other were evaluated differently .num_images"):
        report([runs[0], other], out)


# ---- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (123.456, "123.5"),
        (22.404, "22.40"),
        (-0.5, "−0.500"),
        (0.00123, "0.00123"),
        (0.0, "0.00000"),
        (float("nan"), "–"),
    ],
)
def test_numbers_have_decimals_by_size(value: float, text: str) -> None:
    assert number(value) == text


def test_differences_have_the_decimals_of_their_value() -> None:
    assert number(0.0123, 22.4, sign=True) == "+0.01"
    assert number(-0.0001, 22.4, sign=True) == "0.00"


def test_running_mean_is_that_of_numpy() -> None:
    values = np.sin(np.arange(30.0))
    means = running_mean(values.tolist(), 4)
    np.testing.assert_allclose(means[3:], np.convolve(values, np.ones(4) / 4, "valid"))
    assert means[1] == pytest.approx(values[:2].mean())
