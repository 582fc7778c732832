"""Report of run folders: its arithmetic, its structure, and the faults of run folders it names."""

import base64
import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from image_files import write_folder
from PIL import Image
from tiny_sd import write_tiny_sd

from sfumato.compose import compose_train
from sfumato.config import EvaluateConfig
from sfumato.evaluation.commands import evaluate_run
from sfumato.evaluation.results import Variant
from sfumato.images import save_image
from sfumato.report.comparison import compare, variant_curves
from sfumato.report.figures import running_mean, training_panels
from sfumato.report.losses import Measured, ValidationLoss, loss_by_t, validation_loss
from sfumato.report.records import RunRecord, read_runs
from sfumato.report.report import write_report
from sfumato.report.tables import number
from sfumato.run.run import train
from sfumato.training.checkpoint import best_step
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder

LABEL = "mean pairwise pixel distance (RMS at 16 x 16)"
PROMPTS = ["a star", "<script>alert(1)</script> & a ring"]
CAPTIONS = ["a <moon>", "月" * 200]
BASE = (18.2, 0.31)
DRAFT = {10: (20.2, 0.21), 20: (22.4, 0.12)}
PLUS = {10: (19.2, 0.29), 20: (21.2, 0.24)}
LOSSES = {0: 0.25, 10: 0.24, 20: 0.2, 30: 0.225}
SUPERVISED = {
    "objective": {"kind": "supervised"},
    "model": {"pretrained": "tiny", "trainable": "lora", "lora": {"rank": 16}},
    "reward": {"kind": "none"},
    "training": {"seed": 0, "global_batch_size": 8},
    "validation": {"seed": 1, "images": {"path": "held_out"}},
}
Points = dict[int, tuple[float | None, float]]


def tint(name: str) -> np.ndarray:
    """Return a color that differs between models and steps."""
    return np.random.default_rng(list(name.encode())).uniform(0.1, 0.9, 3).astype(np.float32)


def save(path: Path, name: str, side: int = 16) -> None:
    save_image(torch.from_numpy(tint(name))[:, None, None].expand(3, side, side), path)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> RunFolder:
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump({"name": path.name, "runs_dir": "runs", **settings}))
    run.describe(f"sfumato train name={path.name}", {"reward_scale": 20.0})
    write_lines(run.metrics, rows)
    return run


def write_draft(
    path: Path, kl_coeff: float, points: Points, *, seed: int = 0, **options: int
) -> RunFolder:
    """Write a run of 20 steps with rewards, and evaluations at `points`."""
    rows: list[dict[str, Any]] = [{"step": 0, "validation/reward": 18.0}]
    for step in range(1, 21):
        kl = {"kl": step / 1000} if kl_coeff else {}
        rows.append({"step": step, "reward": 18 + step / 10, **kl})
    rows[-1] |= {"validation/reward": 21.77}
    run = write_run(path, {"objective": {"kl_coeff": kl_coeff}, "training": {"seed": seed}}, rows)
    for step, (reward, diversity) in points.items():
        write_evaluation(run, step, reward, diversity, **options)
    return run


def write_supervised(
    path: Path, losses: dict[int, float] | None = None, **settings: Any
) -> RunFolder:
    """Write a run of 30 steps of 8 images, with validation losses and images."""
    losses = LOSSES if losses is None else losses
    rows: list[dict[str, Any]] = [{"step": step} for step in range(31)]
    for row in rows[1:]:
        low = row["step"] % 10
        bins = {f"mse_by_t/{low / 10:.1f}-{(low + 1) / 10:.1f}": 0.3}
        row |= {"loss": 0.3 - row["step"] / 1000, **bins}
    run = write_run(path, {**SUPERVISED, **settings}, rows)
    for step, loss in losses.items():
        rows[step]["validation/loss"] = loss
        write_pairs(run, step, {} if "reward" not in settings else {"reward_base": 18.0})
    write_lines(run.metrics, rows)
    return run


def write_pairs(run: RunFolder, step: int, rewards: dict[str, float]) -> None:
    folder = run.samples(step)
    folder.mkdir(parents=True)
    pairs = enumerate(CAPTIONS)
    write_lines(folder / "pairs.jsonl", [{"index": i, "prompt": c, **rewards} for i, c in pairs])
    for i in range(len(CAPTIONS)):
        save(folder / f"{i:03d}-tuned.png", f"tuned {step}")
        save(folder / f"{i:03d}-base.png", "base")


def write_evaluation(
    run: RunFolder,
    step: int,
    reward: float | None,
    diversity: float,
    *,
    side: int = 16,
    num_images: int = 3,
    num_prompts: int = 2,
) -> None:
    folder = run.evaluation(step)
    (folder / "images").mkdir(parents=True)
    rows = []
    prompts = [*PROMPTS, *(f"prompt {i}" for i in range(2, num_prompts))]
    for p, prompt in enumerate(prompts):
        for i in range(num_images):
            file = f"images/{p:03d}-{i:03d}.png"
            rewards = {} if reward is None else {"reward": reward + i + 10 * p}
            rows.append({"prompt": prompt, "prompt_index": p, "index": i, "image": file, **rewards})
            save(folder / file, run.path.name if step else "base model", side)
    write_lines(folder / "scores.jsonl", rows)
    settings: dict[str, Any] = {
        "sampler": {"num_inference_steps": 20, "guidance_scale": 4.0},
        "prompts": prompts,
        "num_images": num_images,
        "seed": 4321,
        "features": "pixels",
    }
    summary = {
        "step": step,
        "held_out": {"attributes": 0.5 + step / 100},
        "diversity": {"label": LABEL, "mean": diversity},
        "settings": settings | ({"reward": None} if reward is None else {}),
    }
    rewards = {} if reward is None else {"reward": reward, "reward_error": 0.25}
    (folder / "summary.json").write_text(json.dumps(summary | rewards))


class Page(HTMLParser):
    """Collects tables as rows of cell texts, images, tags, and references to resources.

    Images outside tables are many images of one prompt.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tables: list[list[list[str]]] = []
        self.images: list[dict[str, str | None]] = []
        self.many: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self._cell: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.references += [str(values[name]) for name in names if values.get(name)]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "img":
            (self.many if self._cell is None else self.images).append(values)
            if self._cell is not None:
                self._cell.append("IMAGE")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            assert self._cell is not None
            self.tables[-1][-1].append(" ".join(" ".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def grids(self) -> Iterator[list[list[str]]]:
        return (t for t in self.tables if any("IMAGE" in cell for row in t for cell in row))

    def titles(self) -> list[str]:
        """Return the title or the last label of each figure."""
        figures = re.findall(r"<figure.*?</figure>", self.html, re.DOTALL)
        return [re.findall(r">([^<>]*)</text>", figure)[-1] for figure in figures]


def report(runs: Sequence[RunFolder], out: Path, **options: Any) -> Page:
    return Page(write_report(runs, out / "new" / "r.html", **{"title": "T", **options}).read_text())


def record_of(run: RunFolder) -> RunRecord:
    return read_runs([run])[0]


def opened(image: dict[str, str | None]) -> Image.Image:
    data = str(image["src"]).partition(";base64,")[2]
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    root = tmp_path_factory.mktemp("runs")
    tuned = write_supervised(root / "tuned")
    write_evaluation(tuned, 0, None, 0.31)
    write_evaluation(tuned, 30, None, 0.28)
    draft = write_draft(root / "draft", 0.0, {0: BASE, **DRAFT})
    plus = write_draft(root / "draft-plus", 0.25, {**PLUS})
    return [tuned, draft, plus, write_supervised(root / "bare", {0: 0.25, 20: 0.26})]


@pytest.fixture(scope="module")
def page(runs: list[RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(runs, tmp_path_factory.mktemp("out"))


# ---- the page


def test_the_summary_has_every_model_and_measure(page: Page) -> None:
    header, *rows = page.tables[0]
    losses = ["validation loss before", "lowest validation loss", "last validation loss"]
    columns = ["model", "objective", "steps", *losses]
    assert header == [*columns, "reward", "attributes (held out)", LABEL, "images"]
    none, unknown = ["–"] * 3, "not recorded"
    draft = [*none, "22.40 ± 0.25 +4.20", "0.700 +0.200", "0.120 −0.190"]
    plus = [*none, "21.20 ± 0.25 +3.00", "0.700 +0.200", "0.240 −0.070"]
    tuned = ["0.25000", "0.20000 step 20", "0.22500 −10.0%", "–", "0.800 +0.300"]
    bare = ["0.25000", "0.26000 step 20", "0.26000 +4.0%, step 20", "–"]
    lora = "Supervised, LoRA rank 16"
    assert rows == [
        ["base model", "–", "0", *none, "18.20 ± 0.25", "0.500", "0.310", "–"],
        ["tuned", lora, "30", *tuned, "0.280 −0.030", "240"],
        ["draft", "DRaFT", "20", *draft, unknown],
        ["draft-plus", "DRaFT+, kl_coeff 0.25", "20", *plus, unknown],
        ["bare", lora, "30", *bare, "not evaluated", "not evaluated", "240"],
    ]


def test_every_figure_is_drawn_inline(page: Page) -> None:
    losses, rewards = ["loss in training", "loss by t"], ["reward in training", "KL in training"]
    measures = ["validation loss", "reward", "attributes (held out)", LABEL]
    assert page.titles()[2:] == [*measures, *rewards, *losses]
    tradeoffs = re.findall(r"<figure.*?</figure>", page.html, re.DOTALL)[:2]
    for figure, axis in zip(tradeoffs, (LABEL, "attributes (held out)"), strict=True):
        for name in ("draft", "draft-plus", "base model", axis):
            assert figure.count(f">{name}</text>") == 1
    marks = re.findall(r'<clipPath id="([^"]*)"|id="(m[0-9a-f]+)"', page.html)
    assert len(set(marks)) == len(marks)  # figures do not share ids


def test_grids_have_a_row_per_noise_and_a_column_per_model(page: Page) -> None:
    grids = list(page.grids())
    equal, last = grids[4:6], grids[6:]  # after a course per supervised run, and steps
    assert len(last) == len(PROMPTS)
    assert equal[0][0] == [  # 20.20 of draft is closer than 22.40 to the highest of draft-plus
        "base model mean reward 19.20",
        "draft step 10, mean reward 21.20",
        "draft-plus step 20, mean reward 22.20",
    ]
    header, *rows = last[0]
    assert [cell.split(",")[0] for cell in header[1:]] == [
        "tuned step 30",
        "draft step 20",
        "draft-plus step 20",
    ]
    assert rows[1] == ["IMAGE 19.20", "IMAGE", "IMAGE 23.40", "IMAGE 22.20"]
    names = ["base model", "tuned", "draft", "draft-plus"]
    for image, name in zip(page.images[-24:], names * 6, strict=True):
        np.testing.assert_allclose(opened(image).getpixel((7, 8)), tint(name) * 255, atol=1)
        assert image["class"] == "crisp" and str(image["alt"]).startswith(f"{name}: ")


def test_settings_versions_and_differences_are_listed(page: Page, runs: list[RunFolder]) -> None:
    origins, differences = page.tables[-2:]
    assert ["reward scale", *["20.0"] * 4] in origins
    assert [row[0] for row in origins[1:]][:4] == ["starts", "command", "time", "sfumato"]
    assert ["objective.kl_coeff", "–", "0.0", "0.25", "–"] in differences
    assert page.tags.count("details") == len(runs) + 1  # and all evaluations


def test_the_page_is_self_contained_and_reproducible(
    page: Page, runs: list[RunFolder], tmp_path: Path
) -> None:
    assert page.references
    assert all(one.startswith(("data:image/", "#")) for one in page.references)
    assert not {"link", "iframe", "object", "base"} & set(page.tags)
    (script,) = re.findall(r"<script>(.*?)</script>", page.html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.tags.count("script") == 1
    assert "default-src 'none'; img-src data:" in page.html
    assert f"script-src 'sha256-{digest}'; base-uri" in page.html
    assert not re.search(r"https?://|@import", page.html)
    assert all(one.startswith("#") for one in re.findall(r"url\(([^)]*)\)", page.html))
    assert report(runs, tmp_path).html == page.html
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.html"]


def test_text_of_users_is_escaped(page: Page, tmp_path: Path) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; a ring" in page.html
    odd = write_draft(tmp_path / "<b>$x$", 0.0, {0: BASE, **DRAFT})
    other = report([odd], tmp_path, title="<i>T</i>", notes="<u>one</u>\n\ntwo")
    assert not {"b", "i", "u", "moon"} & {*other.tags, *page.tags}
    assert "<p>&lt;u&gt;one&lt;/u&gt;</p>\n<p>two</p>" in other.html
    assert other.html.count("&lt;b&gt;$x$") > 3


@pytest.mark.parametrize(
    "theirs",
    ["mine", "", "<html><body>Written by Sfumato 1.</body></html>", "binary", "a link", "a folder"],
)
def test_files_of_the_user_are_not_replaced(
    runs: list[RunFolder], tmp_path: Path, theirs: str
) -> None:
    out = tmp_path / "page.html"
    if theirs == "a folder":
        out.mkdir()
    elif theirs == "a link":
        (tmp_path / "elsewhere").write_text("mine")
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out.write_bytes(bytes(range(256)) if theirs == "binary" else theirs.encode())
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"page\.html is (in the way|a folder)"):
        write_report(runs, out, title="T")
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("old", "new"),
    [("<title>First", "<title>Mine"), ("</section>", "<p>mine</p></section>"), ("</style>", "")],
)
def test_a_report_that_was_edited_is_not_replaced(
    runs: list[RunFolder], tmp_path: Path, old: str, new: str
) -> None:
    out = tmp_path / "page.html"
    page = write_report(runs, out, title="First").read_text()
    write_report(runs, out, title="First")
    out.write_text(page.replace(old, new, 1))
    assert out.read_text() != page
    with pytest.raises(
        ValueError, match=r"page\.html is in the way, and no report as Sfumato wrote"
    ):
        write_report(runs, out, title="Second")
    assert out.read_text() == page.replace(old, new, 1)
    out.write_text("".join(page.splitlines(keepends=True)[:-1]))  # as earlier versions end
    assert "Second" in write_report(runs, out, title="Second").read_text()


def test_a_report_is_replaced_but_by_no_half(
    runs: list[RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page.html"
    first = write_report(runs, out, title="First").read_bytes()
    assert write_report(runs, out, title="Second").read_bytes() != first
    second, write_text = out.read_bytes(), Path.write_text

    def full(path: Path, text: str, **options: Any) -> None:
        write_text(path, text[:100], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    for name in ("page.html", "new.html"):
        with pytest.raises(ValueError, match=rf"{name} could not be written: no space is left"):
            write_report(runs, tmp_path / name, title="Third")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert out.read_bytes() == second


def test_large_images_are_scaled_down_and_smooth(tmp_path: Path) -> None:
    points: Points = {0: BASE, 20: DRAFT[20]}
    run = write_draft(tmp_path / "draft", 0.0, points, side=400, num_images=5)
    page = report([run], tmp_path)
    for image in page.images:
        assert opened(image).size == (384, 384) and "class" not in image
    assert len(page.many) == 2 * 2 * 5  # prompts, models, images
    for image in page.many:
        assert opened(image).size == (128, 128) and image["width"] == "72"


@pytest.mark.parametrize(("side", "width"), [(16, 128), (64, 128), (100, 100), (128, 128)])
def test_small_images_are_enlarged_by_a_whole_number(tmp_path: Path, side: int, width: int) -> None:
    run = write_draft(tmp_path / "draft", 0.0, {0: BASE, 20: DRAFT[20]}, side=side, num_images=5)
    page = report([run], tmp_path)
    assert page.many
    for image in page.images:
        assert opened(image).size == (side, side) and image["class"] == "crisp"
        assert image["width"] == str(width)
    for image in page.many:
        assert int(str(image["width"])) % side == 0


def test_images_before_and_after_come_from_the_best_and_the_last_step(tmp_path: Path) -> None:
    page = report([write_supervised(tmp_path / "lora")], tmp_path)
    assert next(page.grids()) == [
        ["base model", "step 20 lowest validation loss", "step 30 last"],
        ["IMAGE a <moon>", "IMAGE", "IMAGE"],
        [f"IMAGE {'月' * 90}…", "IMAGE", "IMAGE"],
    ]
    for image, name in zip(page.images, ["base", "tuned 20", "tuned 30"] * 2, strict=True):
        np.testing.assert_allclose(opened(image).getpixel((3, 3)), tint(name) * 255, atol=1)
    best_is_last = report([write_supervised(tmp_path / "b", {0: 0.3, 20: 0.1})], tmp_path)
    assert next(best_is_last.grids())[0] == ["base model", "step 20 lowest validation loss, last"]
    untrained = report([write_supervised(tmp_path / "c", {0: 0.3})], tmp_path)
    assert next(untrained.grids())[0] == ["base model"]


def test_runs_without_evaluation_show_their_validation(tmp_path: Path) -> None:
    run = write_draft(tmp_path / "draft", 0.0, {})
    write_pairs(run, 20, {"reward_tuned": 21.0, "reward_base": 18.0})
    page = report([run], tmp_path)
    (grid,) = page.grids()
    assert grid[:2] == [["tuned", "base"], ["IMAGE a <moon>: 21.00", "IMAGE a <moon>: 18.00"]]
    assert page.tables[0][1][3:5] == ["not evaluated"] * 2
    assert page.titles() == ["reward of validation images", "reward in training"]


def write_variant(run: RunFolder, step: int, reward: float, diversity: float, **own: Any) -> Path:
    """Move an evaluation of a step to where that variant's belongs, keeping the step's own."""
    kept = run.evaluation(step)
    aside = kept.with_name("aside") if kept.exists() else None
    if aside:
        kept.rename(aside)
    write_evaluation(run, step, reward, diversity)
    folder = run.evaluation(step, Variant(**own).name)
    folder.parent.mkdir(exist_ok=True)
    kept.rename(folder)
    if aside:
        aside.rename(kept)
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    if "guidance_scale" in own:
        summary["settings"]["sampler"]["guidance_scale"] = own["guidance_scale"]
    path.write_text(json.dumps(summary | {"variant": vars(Variant(**own))}))
    return path


def test_variants_are_curves_and_rows(tmp_path: Path) -> None:
    run = write_draft(tmp_path / "draft", 0.0, {0: BASE, **DRAFT})
    write_variant(run, 10, 19.5, 0.25, schedule="linear")
    write_variant(run, 20, 20.5, 0.22, schedule="linear")
    write_variant(run, 20, 19.0, 0.28, lora_scale=0.25)
    write_variant(run, 20, 20.0, 0.2, lora_scale=0.5)
    write_variant(run, 20, 23.0, 0.1, guidance_scale=8.0)
    record = record_of(run)
    curves = {
        name: [(one.reward, one.diversity) for one in curve]
        for name, curve in variant_curves(record, record.base)
    }
    assert curves == {
        "schedule linear": [BASE, (19.5, 0.25), (20.5, 0.22)],
        "LoRA scales": [BASE, (19.0, 0.28), (20.0, 0.2), DRAFT[20]],
        "guidance scales": [DRAFT[20], (23.0, 0.1)],
    }
    page = report([run], tmp_path)
    (table,) = (t for t in page.tables if "schedule" in t[0])
    assert len(table) == 1 + 3 + 5
    assert ["draft", "20", "linear", "1", "4", "20.50 ± 0.25", "0.700", "0.220"] in table
    assert ["draft", "20", "draft", "1", "8", "23.00 ± 0.25", "0.700", "0.100"] in table
    figure = re.findall(r'<figure[^>]*variants of draft".*?</figure>', page.html, re.DOTALL)[0]
    for name in (*curves, "base model"):
        assert figure.count(f">{name}</text>") == 1


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("num_images", 5), ("features", "lpips")])
def test_variants_of_other_settings_are_left_out_and_named(
    tmp_path: Path, key: str, value: Any
) -> None:
    run = write_draft(tmp_path / "draft", 0.0, {0: BASE, **DRAFT})
    path = write_variant(run, 20, 20.5, 0.22, schedule="linear")
    summary = json.loads(path.read_text())
    summary["settings"][key] = value
    path.write_text(json.dumps(summary))
    html = report([run], tmp_path).html
    assert "other settings: 1, the first is schedule_linear/step-000020" in html
    assert "Variants of the checkpoints" not in html


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("num_images", 5), ("features", "lpips")])
def test_variants_without_the_runs_own_evaluations_are_compared_too(
    tmp_path: Path, key: str, value: Any
) -> None:
    run = write_draft(tmp_path / "draft", 0.0, {20: DRAFT[20]})
    paths = [write_variant(run, 20, 19.0, 0.28, lora_scale=scale) for scale in (0.25, 0.5)]
    write_variant(run, 20, 23.0, 0.1, guidance_scale=8.0)
    shutil.rmtree(run.evaluation(20))
    plus = write_draft(tmp_path / "plus", 1.0, {**PLUS})
    assert "LoRA scale" in report([run, plus], tmp_path).html
    summary = json.loads(paths[1].read_text())
    summary["settings"][key] = value
    paths[1].write_text(json.dumps(summary))
    assert record_of(run).unlike == ["lora_scale_0.5/step-000020"]
    shutil.rmtree(paths[0].parent)
    shutil.rmtree(run.path / "evaluation" / "guidance_scale_8")
    with pytest.raises(ValueError, match=f"draft and plus were evaluated differently .{key}: "):
        report([run, plus], tmp_path)
    del summary["settings"]["sampler"]
    paths[1].write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"lora_scale_0.5/step-000020/summary.json settings"):
        report([run], tmp_path)


@pytest.mark.parametrize("scale", ["x", [8.0], None])
def test_a_damaged_guidance_scale_of_a_variant_is_named(tmp_path: Path, scale: Any) -> None:
    run = write_draft(tmp_path / "draft", 0.0, {0: BASE, **DRAFT})
    path = write_variant(run, 20, 23.0, 0.1, guidance_scale=8.0)
    summary = json.loads(path.read_text())
    summary["settings"]["sampler"]["guidance_scale"] = scale
    path.write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"guidance_scale_8/step-000020/summary.json settings"):
        report([run], tmp_path)
    del summary["settings"]["sampler"]["guidance_scale"]
    path.write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"guidance_scale_8/step-000020/summary.json settings"):
        report([run], tmp_path)


def test_a_page_of_200_checkpoints_stays_small(tmp_path: Path) -> None:
    points: Points = {step: (18 + step / 100, 0.3 - step / 1000) for step in range(201)}
    run = write_draft(tmp_path / "long", 0.0, points, num_images=1)
    noise = np.random.default_rng(0).integers(0, 256, (384, 384, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for path in run.path.glob("evaluation/*/images/*.png"):
        path.unlink()
        os.link(tmp_path / "noise.png", path)
    page = report([run], tmp_path)
    assert len(page.html) < 5_000_000
    text = " ".join(page.html.split())
    assert "Shown are 6 of 200 evaluated steps, and 1 of 1 images of each of 2 of 2 prompts" in text
    assert 'data-steps="1 41 81 120 160 200"' in text
    assert "a line has at most 400 points" in text
    grid = next(page.grids())
    steps = [cell.split()[2].rstrip(",") for cell in grid[0][1:]]
    assert steps == ["1", "41", "81", "120", "160", "200"]


# ---- gaps, damage and comparability


def test_a_missing_image_is_marked(tmp_path: Path) -> None:
    run = write_draft(tmp_path / "draft", 0.0, {0: BASE, **DRAFT})
    (run.evaluation(20) / "images" / "000-001.png").unlink()
    (run.evaluation(20) / "images" / "000-002.png").write_bytes(b"no picture")
    cells = [cell for t in report([run], tmp_path).tables for row in t for cell in row]
    # The slider's grid shows the first of the two as well.
    assert sum("image missing" in cell for cell in cells) == 3


def test_gaps_are_named(tmp_path: Path) -> None:
    bare = RunFolder(tmp_path / "bare")
    bare.path.mkdir()
    bare.config.write_text("name: bare\n")
    page = report([bare], tmp_path)
    assert "bare has no metrics.jsonl" in page.html
    assert page.tables[0][1] == [
        "bare",
        "unknown",
        "0",
        *["not evaluated"] * 2,
        "0",
    ]
    base, last = (write_draft(tmp_path / n, 0.5, p) for n, p in (("a", {0: BASE}), ("b", PLUS)))
    unevaluated = report([base], tmp_path).html
    assert f"a has no evaluated checkpoint: run sfumato evaluate run={base.path}" in unevaluated
    assert "at step 20, had a mean reward of 21.77" in unevaluated
    assert "The base model is not evaluated" in report([last], tmp_path).html
    both = report([base, last], tmp_path)
    assert [row[0] for row in both.tables[0]] == ["model", "base model", "a", "b"]


def test_gaps_of_supervised_runs_are_named(tmp_path: Path) -> None:
    run = write_supervised(tmp_path / "none", {})
    write_lines(run.metrics, [{"step": 1, "loss": 0.1}])
    html = report([run], tmp_path).html
    for gap in ("validation loss: it is off (validation.loss_images = 0)", "validation images."):
        assert f"none has no {gap}" in html
    assert "none logged too few steps for its loss by t" in html
    held = write_supervised(tmp_path / "held")
    same = write_supervised(tmp_path / "same", validation={"seed": 5})
    html = report([held, same], tmp_path).html
    assert "same has no held-out images (validation.images)" in html
    assert "held has no held-out" not in html
    assert "settings differ: validation.images, validation.seed" in html
    assert "settings differ" not in report([held], tmp_path).html


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "20 sampling steps, guidance scale 4. "),
        ({"solver": "first_order", "guidance_interval": None}, "20 sampling steps, guidance scale"),
        ({"solver": "dpmpp_2m"}, "20 sampling steps of DPM-Solver++ 2M, guidance scale 4. "),
        ({"guidance_interval": [0.2, 0.5]}, "guidance scale 4 for t in [0.2, 0.5]. "),
        ({"negative_prompt": "<b>ugly"}, "guidance scale 4, away from “&lt;b&gt;ugly”. "),
        ({"scheduler": "PNDMScheduler"}, "20 sampling steps of PNDMScheduler, guidance scale 4. "),
        ({"negative_prompt": ""}, "20 sampling steps, guidance scale 4. "),
    ],
)
def test_the_page_says_how_images_were_sampled(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    run = write_draft(tmp_path / "run", 0.0, {0: BASE, **DRAFT})
    for path in run.path.glob("evaluation/*/summary.json"):
        summary = json.loads(path.read_text())
        summary["settings"]["sampler"] |= settings
        path.write_text(json.dumps(summary))
    assert said in " ".join(report([run], tmp_path).html.split())


def cut_pairs(run: RunFolder) -> None:
    write_lines(run.samples(20) / "pairs.jsonl", [{"index": 0, "prompt": "a"}])


def change(run: RunFolder, old: str, new: str) -> None:
    path = run.evaluation(20) / "summary.json"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.config.unlink(), "is no run folder: it has no config.yaml"),
        (lambda run: run.config.write_text("a: ["), "config.yaml is damaged: it is not YAML"),
        (lambda run: (run.path / "run.json").write_text("{}"), "run.json is damaged.*starts"),
        (lambda run: (run.evaluation(0) / "summary.json").unlink(), "summary.json is missing"),
        (lambda run: change(run, "0.21", '"much"'), r"diversity.mean = 'much'"),
        (lambda run: change(run, '"reward"', '"r"'), "summary.json is damaged: reward"),
        (lambda run: (run.evaluation(20) / "scores.jsonl").write_text("{"), "scores.*line 1"),
        (lambda run: write_lines(run.evaluation(20) / "scores.jsonl", [{}]), "line 1.*prompt"),
        (lambda run: write_lines(run.samples(20) / "pairs.jsonl", [{}]), "pairs.*line 1.*prompt"),
        (cut_pairs, "samples holds validations of different lengths"),
        (lambda run: change(run, "pixels", "lpips"), "differently .features: pixels and lpips"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[RunFolder], None], message: str) -> None:
    run = write_supervised(tmp_path / "run", reward={"kind": "color"})
    write_evaluation(run, 0, *BASE)
    write_evaluation(run, 20, 20.2, 0.21)
    damage(run)
    with pytest.raises(ValueError, match=message):
        report([run], tmp_path)
    assert not (tmp_path / "new").exists()


def test_runs_that_cannot_be_compared_are_refused(runs: list[RunFolder], tmp_path: Path) -> None:
    other = write_draft(tmp_path / "other", 1.0, {**PLUS}, num_images=2)
    mistakes = {
        "no runs to report": [],
        "there is no run folder": [RunFolder(tmp_path / "nothing")],
        "named twice": [runs[1], runs[1]],
        "tuned and other were evaluated differently .num_images: 3 and 2": [runs[0], other],
    }
    for message, folders in mistakes.items():
        with pytest.raises(ValueError, match=message):
            report(folders, tmp_path)
    red, blue = (write_draft(tmp_path / name, 0.0, {20: DRAFT[20]}) for name in ("red", "blue"))
    for run in (red, blue):
        color = f'"settings": {{"reward": {{"color": "{run.path.name}"}}, '
        change(run, '"settings": {', color)
    with pytest.raises(ValueError, match=r"red and blue .* .reward.color: red and blue"):
        report([runs[0], red, blue], tmp_path)
    assert report([runs[0], red], tmp_path)
    change(red, '"prompts"', '"contents": {"reward.pretrained": "51aa"}, "prompts"')
    assert report([runs[0], red], tmp_path)  # the file of a reward that the other run has not
    change(red, '"reward.pretrained"', '"model.pretrained"')
    with pytest.raises(ValueError, match=r"contents.model.pretrained: None and 51aa"):
        report([runs[0], red], tmp_path)


# ---- arithmetic


def test_equal_reward_agrees_with_numpy(page: Page) -> None:
    table = next(t for t in page.tables if t[0][-1] == "difference")
    levels = np.linspace(BASE[0], PLUS[20][0], 11)[1:]
    curves = [zip(BASE, *run.values(), strict=True) for run in (DRAFT, PLUS)]
    first, second = (np.interp(levels, *map(list, curve)) for curve in curves)
    assert table[0] == ["reward", "draft", "draft-plus", "difference"]
    cells = np.array([[float(cell) for cell in row] for row in table[1:-1]])
    np.testing.assert_allclose(cells[:, 0], levels, atol=0.0051)
    np.testing.assert_allclose(cells[:, 1:].T, [first, second, second - first], atol=0.00051)
    mean = (second - first).mean()
    assert float(table[-1][-1]) == pytest.approx(mean, abs=0.0006)
    expected = f"draft-plus is more diverse than draft: by {mean:.3f} on average"
    assert expected in " ".join(page.html.split())


def test_a_run_of_the_same_seed_is_the_baseline(tmp_path: Path) -> None:
    plain = [write_draft(tmp_path / f"d{i}", 0.0, {0: BASE, **DRAFT}, seed=i) for i in (0, 1)]
    plus = write_draft(tmp_path / "plus", 1.0, {0: BASE, **PLUS}, seed=1)
    records = read_runs([*plain, plus])
    assert [one.baseline for one in compare(records, records[0].base)] == ["d1"]


@pytest.mark.parametrize(
    ("kind", "coeff", "name"),
    [
        ("policy_gradient", 0.0, "Policy gradient"),
        ("nft", 0.5, "DiffusionNFT, kl_coeff 0.5"),
        ("direct", 2.0, "Direct gradients, kl_coeff 2"),
        ("draft", 2.0, "DRaFT+, kl_coeff 2"),
        ("draft", 0.0, "DRaFT"),
    ],
)
def test_an_objective_has_its_name(tmp_path: Path, kind: str, coeff: float, name: str) -> None:
    run = write_draft(tmp_path / "run", coeff, {0: BASE, **DRAFT})
    set_kind(run, kind)
    assert read_runs([run])[0].objective == name


def set_kind(run: RunFolder, kind: str) -> None:
    file = run.path / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["objective"]["kind"] = kind
    file.write_text(yaml.safe_dump(content))


def test_a_run_is_compared_with_one_of_each_objective(tmp_path: Path) -> None:
    runs = [write_draft(tmp_path / f"d{i}", 0.0, {0: BASE, **DRAFT}, seed=i) for i in (0, 1)]
    set_kind(runs[0], "policy_gradient")
    plus = write_draft(tmp_path / "plus", 1.0, {0: BASE, **PLUS}, seed=1)
    records = read_runs([*runs, plus])
    assert [one.baseline for one in compare(records, records[0].base)] == ["d0", "d1"]


def test_runs_of_equal_diversity_are_called_so(tmp_path: Path) -> None:
    runs = [write_draft(tmp_path / f"kl{kl:g}", kl, {0: BASE, **DRAFT}) for kl in (0.0, 1.0)]
    text = " ".join(report(runs, tmp_path).html.split())
    assert "At equal reward, kl1 is as diverse as kl0 on average" in text


def test_runs_without_a_common_reward_are_not_compared(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", 0.0, {0: BASE, **DRAFT})
    plus = write_draft(tmp_path / "plus", 9.0, {0: BASE, 20: (18.0, 0.3)})
    html = report([draft, plus], tmp_path).html
    assert "plus and draft reach no common reward above the base model" in html
    assert "Diversity at equal reward" not in html and "Images at equal reward" not in html


def test_the_lowest_loss_is_the_first_of_equals_and_of_trained_weights(tmp_path: Path) -> None:
    losses = {0: 0.1, 10: 0.3, 20: 0.2, 30: 0.2}
    loss = validation_loss(record_of(write_supervised(tmp_path / "a", losses)))
    assert loss == ValidationLoss(Measured(0, 0.1), Measured(20, 0.2), Measured(30, 0.2))
    assert validation_loss(record_of(write_supervised(tmp_path / "b", {}))) is None
    untrained = validation_loss(record_of(write_supervised(tmp_path / "c", {0: 0.1})))
    assert untrained == ValidationLoss(Measured(0, 0.1), None, None)


@pytest.mark.parametrize(("steps", "window"), [(1000, 100), (100, 25), (30, 15), (2, 1)])
def test_loss_by_t_is_the_mean_of_the_steps_with_the_bin(
    tmp_path: Path, steps: int, window: int
) -> None:
    rng = np.random.default_rng(steps)
    values = rng.uniform(0.1, 1, (steps, 10))
    values[rng.uniform(size=values.shape) < 0.3] = np.nan
    values[[0, -1], 0] = 0.5  # no row is empty
    names = [f"mse_by_t/{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)]
    rows: list[dict[str, Any]] = [{"step": 0, "validation/loss": 0.1}]
    for step, row in enumerate(values, 1):
        finite = {n: v for n, v in zip(names, row, strict=True) if np.isfinite(v)}
        rows.append({"step": step, "loss": 0.1, **finite})
    loss = loss_by_t(record_of(write_run(tmp_path / "run", SUPERVISED, rows)))
    assert loss is not None and loss.window == window
    for profile, part in ((loss.start, values[:window]), (loss.end, values[-window:])):
        count = np.isfinite(part).sum(0)
        seen, several = count > 0, count[count > 0] > 1
        np.testing.assert_allclose(profile.t, (np.arange(10) + 0.5)[seen] / 10)
        np.testing.assert_allclose(profile.mean, np.nanmean(part[:, seen], 0))
        assert np.isnan(np.array(profile.error)[~several]).all()
        expected = np.nanstd(part[:, count > 1], 0, ddof=1) / count[count > 1] ** 0.5
        np.testing.assert_allclose(np.array(profile.error)[several], expected)


def test_the_curve_of_the_loss_begins_where_its_window_is_full(tmp_path: Path) -> None:
    records = []
    for name, steps in (("long", 100), ("short", 3)):
        rows = [{"step": step, "loss": 1.0 if step == 1 else 0.1} for step in range(1, steps + 1)]
        records.append(record_of(write_run(tmp_path / name, SUPERVISED, rows)))
    (panel,) = training_panels(records, None)
    assert panel.title == "loss in training (running mean of 5)"
    long, short = panel.lines
    assert list(long.x) == list(range(5, 101))
    np.testing.assert_allclose(long.y, [1.4 / 5] + [0.1] * 95)
    assert list(short.x) == [3] and short.y == pytest.approx([1.2 / 3])


def test_figures_mark_the_lowest_loss_and_both_ends_of_training(tmp_path: Path) -> None:
    record = record_of(write_supervised(tmp_path / "run"))
    panels = {panel.title: panel for panel in training_panels([record], None)}
    (curve,) = panels["validation loss"].lines
    assert (list(curve.x), list(curve.y)) == (list(LOSSES), list(LOSSES.values()))
    assert curve.rings == [(20, 0.2)]
    loss = loss_by_t(record)
    assert loss is not None
    start, end = panels["loss by t"].lines
    assert (start.pale, start.y, start.error) == (True, loss.start.mean, loss.start.error)
    assert (end.pale, end.y, end.error) == (False, loss.end.mean, loss.end.error)


def test_numbers_have_decimals_by_size() -> None:
    values = (123.456, 22.404, -0.5, 0.00123, 0.0, float("nan"))
    texts = ["123.5", "22.40", "−0.500", "0.00123", "0.00000", "–"]
    assert [number(value) for value in values] == texts
    assert number(0.0123, 22.4, sign=True) == "+0.01"
    assert number(-0.0001, 22.4, sign=True) == "0.00"


def test_running_mean_is_that_of_numpy() -> None:
    values = np.sin(np.arange(30.0))
    means = running_mean(values.tolist(), 4)
    np.testing.assert_allclose(means[3:], np.convolve(values, np.ones(4) / 4, "valid"))
    assert means[1] == pytest.approx(values[:2].mean())


# ---- a real run


def test_a_real_run_is_trained_evaluated_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_sd(tmp_path / "tiny")
    write_folder(tmp_path / "images", [(32, 32)] * 8)
    settings, plain = compose_train(
        [
            "objective=supervised",
            "reward=none",
            f"model.pretrained={tmp_path / 'tiny'}",
            f"data.images.path={tmp_path / 'images'}",
            f"runs_dir={tmp_path}",
            "optimizer.lr=0.01",
            "sampler.num_inference_steps=2",
            "training.max_steps=4",
            "training.checkpoint_every_steps=2",
            "training.micro_batch_size=4",
            "training.global_batch_size=4",
            "training.tensorboard=false",
            "validation.num_images=2",
            "validation.every_steps=2",
            "validation.loss_images=4",
            "verify=false",
        ]
    )
    train(settings, plain, Distribution(settings.training))
    run = RunFolder(tmp_path / "run")
    evaluated = evaluate_run(EvaluateConfig(run=str(run.path), num_images=2))
    assert [(one.step, one.reward, one.reward_error) for one in evaluated] == [
        (step, None, None) for step in (0, 2, 4)
    ]
    assert f"step 4: {LABEL} {evaluated[-1].diversity:.4f}\n" in capsys.readouterr().out
    rows = (run.evaluation(4) / "scores.jsonl").read_text().splitlines()
    assert not {"reward", "parts"} & json.loads(rows[0]).keys()

    page = report([run], tmp_path)
    row = page.tables[0][-1]
    assert row[:3] == ["run", "Supervised, LoRA rank 32", "4"]
    assert row[-1] == "16" and float(row[-2]) > 0  # images and seconds
    loss = validation_loss(record_of(run))
    assert loss is not None and loss.lowest is not None
    assert loss.lowest.step == best_step(run.checkpoints)
    assert row[4].startswith(f"{loss.lowest.value:.3f}"[:4])
    assert row[-3].startswith(f"{evaluated[-1].diversity:.3f}")
    assert page.titles() == ["validation loss", LABEL, "loss in training", "loss by t"]
