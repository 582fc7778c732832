"""The report of supervised runs: losses by step and by t, images before and after, no rewards."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from image_files import write_folder
from PIL import Image
from test_report import BASE, DRAFT, LABEL, PLUS, PROMPTS, picture, read, report, write_run
from tiny_sd import write_tiny_sd

from sfumato.compose import compose_train
from sfumato.config import EvaluateConfig
from sfumato.evaluation.commands import evaluate_run
from sfumato.images import save_image
from sfumato.report.losses import Measured, ValidationLoss, loss_by_t, validation_loss
from sfumato.report.panels import training_panels
from sfumato.report.records import RunRecord, read_runs
from sfumato.run.run import train
from sfumato.training.checkpoint import best_step
from sfumato.training.distribution import Distribution
from sfumato.training.folder import RunFolder

CAPTIONS = ["a <moon>", "月" * 200]
LOSSES = {0: 0.25, 10: 0.24, 20: 0.2, 30: 0.225}
TINTS = {0: (0.6, 0.6, 0.6), 10: (0.1, 0.2, 0.3), 20: (0.2, 0.5, 0.8), 30: (0.9, 0.5, 0.1)}


def write_supervised(
    path: Path,
    losses: dict[int, float] | None = None,
    *,
    images: str | None = "held_out",
    trainable: str = "lora",
    reward: str = "none",
    seed: int = 1234,
) -> RunFolder:
    """Write a run folder of 30 steps of 8 images: config, metrics, and images of validations."""
    losses = LOSSES if losses is None else losses
    run = RunFolder(path)
    path.mkdir(parents=True)
    settings = {
        "name": path.name,
        "model": {"pretrained": "tiny", "trainable": trainable, "lora": {"rank": 16}},
        "objective": {"kind": "supervised"},
        "reward": {"kind": reward},
        "data": {"images": {"path": "train", "sources": {}}},
        "training": {"seed": 0, "global_batch_size": 8},
        "validation": {"seed": seed, "images": {"path": images, "sources": {}}},
    }
    run.config.write_text(yaml.safe_dump(settings))
    run.describe(f"sfumato train name={path.name}", {})
    rows: list[dict[str, Any]] = [{"step": step} for step in range(31)]
    for row in rows[1:]:
        low = row["step"] % 10
        by_t = {f"mse_by_t/{low / 10:.1f}-{(low + 1) / 10:.1f}": 0.3}
        row |= {"loss": 0.3 - row["step"] / 1000, "mse": 0.3, **by_t}
    for step, loss in losses.items():
        rows[step]["validation/loss"] = loss
        write_pairs(run, step, scored=reward != "none")
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def write_pairs(run: RunFolder, step: int, *, scored: bool = False) -> None:
    place = run.samples(step)
    place.mkdir(parents=True)
    lines = []
    for i, caption in enumerate(CAPTIONS):
        rewards = {"reward_tuned": float(step), "reward_base": 18.0} if scored else {}
        lines.append(json.dumps({"index": i, "prompt": caption, **rewards}) + "\n")
        for side, tint in (("tuned", TINTS[step]), ("base", TINTS[0])):
            image = picture("", i, 16) * 0 + np.array(tint, dtype=np.float32)[:, None, None]
            save_image(image, place / f"{i:03d}-{side}.png")
    (place / "pairs.jsonl").write_text("".join(lines))


def write_evaluation(run: RunFolder, step: int, diversity: float) -> None:
    """Write what `evaluate` writes without a reward, of the prompts and noise of test_report."""
    place = run.evaluation(step)
    (place / "images").mkdir(parents=True)
    rows = []
    for p, prompt in enumerate(PROMPTS):
        for i in range(3):
            file = f"images/{p:03d}-{i:03d}.png"
            rows.append({"prompt": prompt, "prompt_index": p, "index": i, "image": file})
            save_image(picture("plus" if step else "base", i, 16), place / file)
    (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "step": step,
        "held_out": {"attributes": 0.5 + step / 100},
        "diversity": {"label": LABEL, "mean": diversity},
        "settings": {
            "sampler": {"num_inference_steps": 20, "guidance_scale": 4.0},
            "reward": None,
            "prompts": PROMPTS,
            "num_images": 3,
            "seed": 4321,
            "features": "pixels",
        },
    }
    (place / "summary.json").write_text(json.dumps(summary))


def record_of(run: RunFolder) -> RunRecord:
    return read_runs([run])[0]


def titles(html: str) -> list[str]:
    """Return what stands above each figure: the text drawn last."""
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    return [re.findall(r">([^<>]*)</text>", figure)[-1] for figure in figures]


HEADER = ["model", "objective", "steps", "images seen", "validation loss before"]
HEADER += ["lowest validation loss", "last validation loss"]


# ---- the table


def test_the_table_tells_where_each_run_began_and_ended(tmp_path: Path) -> None:
    runs = [
        write_supervised(tmp_path / "lora"),
        write_supervised(tmp_path / "full", {0: 0.25, 20: 0.26}, trainable="full"),
    ]
    html = report(runs, tmp_path / "r.html")
    table = read(html).tables[0]
    assert table == [
        HEADER,
        [
            "lora",
            "Supervised, LoRA rank 16",
            "30",
            "240",
            "0.25000",
            "0.20000 step 20",
            "0.22500 −10.0%",
        ],
        [
            "full",
            "Supervised, all weights",
            "30",
            "240",
            "0.25000",
            "0.26000 step 20",
            "0.26000 +4.0%, step 20",
        ],
    ]
    assert (
        "Validation loss of lora: 0.25000 before training, 0.22500 at step 30 (−10.0%); the lowest "
        "was 0.20000 at step 20." in html
    )
    assert "0.26000 at step 20 (+4.0%), never below where it began." in html
    assert "Reward against diversity" not in html and ">reward<" not in html
    assert titles(html) == ["validation loss", "loss in training", "loss by t"]


def test_evaluated_runs_have_scores_but_no_reward(tmp_path: Path) -> None:
    run = write_supervised(tmp_path / "lora")
    write_evaluation(run, 0, 0.31)
    write_evaluation(run, 20, 0.21)
    html = report([run], tmp_path / "r.html")
    reader = read(html)
    assert reader.tables[0] == [
        [*HEADER, "attributes", LABEL],
        ["base model", "–", "0", "–", "–", "–", "–", "0.500", "0.310"],
        [
            "lora",
            "Supervised, LoRA rank 16",
            "30 evaluated at 20",
            "240",
            "0.25000",
            "0.20000 step 20",
            "0.22500 −10.0%",
            "0.700 +0.200",
            "0.210 −0.100",
        ],
    ]
    assert [["base model", "lora step 20"], *[["IMAGE", "IMAGE"]] * 3] in reader.tables
    assert "Diversity of images of the same prompt: 0.310 in the base model, 0.210" in html
    assert "eward" not in html.split("<details>")[0]
    assert "±" not in html
    assert titles(html)[:3] == ["validation loss", "attributes", LABEL]


def test_a_reward_that_only_measures_is_reported(tmp_path: Path) -> None:
    run = write_supervised(tmp_path / "lora", reward="clip")
    html = report([run], tmp_path / "r.html")
    assert read(html).tables[0][0] == [*HEADER, "reward", "diversity"]
    grid = next(t for t in read(html).tables if t[0][0] == "base model")
    assert grid[1] == ["IMAGE a <moon>: 18.00", "IMAGE 20.00", "IMAGE 30.00"]


# ---- images


def test_images_before_and_after_come_from_the_best_and_the_last_step(tmp_path: Path) -> None:
    run = write_supervised(tmp_path / "lora")
    reader = read(report([run], tmp_path / "r.html"))
    grid = next(t for t in reader.tables if t[0][0] == "base model")
    assert grid == [
        ["base model", "step 20 lowest validation loss", "step 30 last"],
        ["IMAGE a <moon>", "IMAGE", "IMAGE"],
        [f"IMAGE {'月' * 90}…", "IMAGE", "IMAGE"],
    ]
    for image, step in zip(reader.images, [0, 20, 30] * 2, strict=True):
        data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
        color = Image.open(io.BytesIO(data)).getpixel((3, 3))
        np.testing.assert_allclose(color, np.array(TINTS[step]) * 255, atol=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "header"),
    [
        ({0: 0.3, 10: 0.2, 20: 0.1}, ["base model", "step 20 lowest validation loss, last"]),
        ({0: 0.3}, ["base model"]),
    ],
)
def test_columns_are_named_once(tmp_path: Path, losses: dict[int, float], header: Any) -> None:
    run = write_supervised(tmp_path / "lora", losses)
    tables = read(report([run], tmp_path / "r.html")).tables
    assert next(t for t in tables if t[0][0] == "base model")[0] == header


def test_damaged_pairs_are_named(tmp_path: Path) -> None:
    run = write_supervised(tmp_path / "lora")
    (run.samples(20) / "pairs.jsonl").write_text('{"index": 0, "prompt": "a <moon>"}\n')
    with pytest.raises(ValueError, match=r"samples holds validations of different lengths"):
        report([run], tmp_path / "r.html")
    (run.samples(20) / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"step-000020.pairs.jsonl cannot be read .'prompt'"):
        report([run], tmp_path / "r.html")


# ---- losses


def test_the_lowest_is_the_first_of_equals_and_of_trained_weights(tmp_path: Path) -> None:
    losses = {0: 0.1, 10: 0.3, 20: 0.2, 30: 0.2}
    found = validation_loss(record_of(write_supervised(tmp_path / "a", losses)))
    assert found == ValidationLoss(Measured(0, 0.1), Measured(20, 0.2), Measured(30, 0.2))
    assert validation_loss(record_of(write_supervised(tmp_path / "b", {}))) is None
    untrained = validation_loss(record_of(write_supervised(tmp_path / "c", {0: 0.1})))
    assert untrained == ValidationLoss(Measured(0, 0.1), None, None)


@pytest.mark.parametrize(("steps", "window"), [(1000, 100), (100, 25), (30, 15), (2, 1)])
def test_loss_by_t_is_the_mean_of_the_steps_that_had_the_bin(
    tmp_path: Path, steps: int, window: int
) -> None:
    rng = np.random.default_rng(steps)
    values = rng.uniform(0.1, 1, (steps, 10))
    values[rng.uniform(size=values.shape) < 0.3] = np.nan
    values[[0, -1], 0] = 0.5  # no row is empty
    run = write_supervised(tmp_path / "run")
    names = [f"mse_by_t/{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)]
    rows: list[dict[str, Any]] = [{"step": 0, "validation/loss": 0.1}]
    for step, seen in enumerate(values, 1):
        known = {n: v for n, v in zip(names, seen, strict=True) if np.isfinite(v)}
        rows.append({"step": step, "loss": 0.1, **known})
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = loss_by_t(record_of(run))
    assert found is not None and found.window == window
    for profile, part in ((found.start, values[:window]), (found.end, values[-window:])):
        count = np.isfinite(part).sum(0)
        kept = count > 0
        np.testing.assert_allclose(profile.t, (np.arange(10) + 0.5)[kept] / 10)
        np.testing.assert_allclose(profile.mean, np.nanmean(part[:, kept], 0))
        several = count[kept] > 1
        assert np.isnan(np.array(profile.error)[~several]).all()
        expected = np.nanstd(part[:, kept][:, several], 0, ddof=1) / count[kept][several] ** 0.5
        np.testing.assert_allclose(np.array(profile.error)[several], expected)


def test_the_curve_of_the_loss_begins_where_its_window_is_full(tmp_path: Path) -> None:
    records = []
    for name, steps in (("long", 100), ("short", 3)):
        run = write_supervised(tmp_path / name)
        rows = [{"step": step, "loss": 1.0 if step == 1 else 0.1} for step in range(1, steps + 1)]
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        records.append(record_of(run))
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
    assert curve.ring == (20, 0.2)
    found = loss_by_t(record)
    assert found is not None
    start, end = panels["loss by t"].lines
    assert (start.pale, start.y, start.error) == (True, found.start.mean, found.start.error)
    assert (end.pale, end.y, end.error) == (False, found.end.mean, found.end.error)


# ---- what is missing, and what cannot be compared


def test_what_a_run_did_not_measure_is_said(tmp_path: Path) -> None:
    run = write_supervised(tmp_path / "bare", {})
    run.metrics.write_text('{"step": 1, "loss": 0.1}\n')
    html = report([run], tmp_path / "r.html")
    assert "bare has no validation loss: it is off (validation.loss_images = 0)" in html
    assert "bare logged too little for its loss by t." in html
    assert "bare has no validation images." in html
    assert "No checkpoint of bare is evaluated" in html
    assert read(html).tables[0] == [
        HEADER,
        ["bare", "Supervised, LoRA rank 16", "1", "8", "–", "–", "–"],
    ]
    assert "Before and after" not in html and "bars of one standard error" not in html


def test_a_validation_loss_of_training_images_is_said_to_be_one(tmp_path: Path) -> None:
    runs = [
        write_supervised(tmp_path / "held"),
        write_supervised(tmp_path / "same", images=None),
        write_supervised(tmp_path / "other", seed=5),
    ]
    html = report(runs, tmp_path / "r.html")
    assert "same has no images that are held out (validation.images)" in html
    assert "held has no images" not in html
    assert (
        "The validation losses of held, same, other are not of the same thing (these settings "
        "differ: validation.images, validation.seed)" in html
    )
    alike = report([runs[0], write_supervised(tmp_path / "too")], tmp_path / "r.html")
    assert "not of the same thing" not in alike and "that it was trained on" not in alike


# ---- beside runs with a reward


def test_mixed_runs_show_what_each_of_them_has(tmp_path: Path) -> None:
    tuned = write_supervised(tmp_path / "tuned")
    write_evaluation(tuned, 0, 0.31)
    write_evaluation(tuned, 30, 0.28)
    runs = [
        tuned,
        write_run(tmp_path / "draft", 0.0, {0: BASE, **DRAFT}),
        write_run(tmp_path / "plus", 0.25, PLUS),
        write_supervised(tmp_path / "bare"),
    ]
    html = report(runs, tmp_path / "r.html")
    table = read(html).tables[0]
    assert table[0] == [*HEADER, "reward", "attributes", LABEL]
    assert table[1][-3:] == ["18.20 ± 0.25", "0.500", "0.310"]
    assert table[2][3:] == [
        "240",
        "0.25000",
        "0.20000 step 20",
        "0.22500 −10.0%",
        "–",
        "0.800 +0.300",
        "0.280 −0.030",
    ]
    draft = ["draft", "DRaFT", "20", "–", "–", "–", "–"]
    assert table[3] == [*draft, "22.40 ± 0.25 +4.20", "0.700 +0.200", "0.120 −0.190"]
    assert table[5][-3:] == ["–", "not evaluated", "not evaluated"]
    last = [t for t in read(html).tables if "tuned step 30" in t[0]]
    assert len(last) == len(PROMPTS)
    assert last[0][1] == ["IMAGE 18.20", "IMAGE", "IMAGE 22.40", "IMAGE 21.20"]
    equal = next(t for t in read(html).tables if "draft step 10, mean reward 21.20" in t[0])
    assert equal[0][2:] == ["plus step 20, mean reward 22.20"]
    assert "plus is more diverse than draft: by" in html
    assert "Mean reward: 18.20 in the base model, 21.20 to 22.40 after training." in html
    assert "loss by t" in titles(html) and "KL in training" in titles(html)


def test_other_settings_of_an_evaluation_are_still_refused(tmp_path: Path) -> None:
    tuned = write_supervised(tmp_path / "tuned")
    write_evaluation(tuned, 30, 0.28)
    draft = write_run(tmp_path / "draft", 0.0, {0: BASE, **DRAFT})
    file = draft.evaluation(0) / "summary.json"
    for step in (0, 10, 20):
        file = draft.evaluation(step) / "summary.json"
        file.write_text(file.read_text().replace('"seed": 4321', '"seed": 1'))
    with pytest.raises(ValueError, match=r"tuned and draft were evaluated differently .seed: 4321"):
        report([tuned, draft], tmp_path / "r.html")


def test_rewards_of_two_kinds_are_refused_whatever_stands_between(tmp_path: Path) -> None:
    runs = [write_supervised(tmp_path / "tuned")]
    write_evaluation(runs[0], 30, 0.28)
    for name in ("red", "blue"):
        runs.append(write_run(tmp_path / name, 0.0, {20: DRAFT[20]}))
        file = runs[-1].evaluation(20) / "summary.json"
        settings = f'"settings": {{"reward": {{"color": "{name}"}}, '
        file.write_text(file.read_text().replace('"settings": {', settings))
    with pytest.raises(ValueError, match=r"red and blue .* .reward.color: red and blue"):
        report(runs, tmp_path / "r.html")
    assert report(runs[:2], tmp_path / "r.html")


# ---- a run that was made, not written by hand


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
    assert [(one.reward, one.reward_error) for one in evaluated] == [(None, None)] * 3
    assert evaluated[-1].step == 4
    assert f"step 4: {LABEL} {evaluated[-1].diversity:.4f}\n" in capsys.readouterr().out
    rows = (run.evaluation(4) / "scores.jsonl").read_text().splitlines()
    assert not {"reward", "parts"} & json.loads(rows[0]).keys()
    summary = json.loads((run.evaluation(4) / "summary.json").read_text())
    assert not {"reward", "reward_error"} & summary.keys()

    html = report([run], tmp_path / "r.html")
    row = read(html).tables[0][-1]
    assert row[:4] == ["run", "Supervised, LoRA rank 32", "4", "16"]
    found = validation_loss(record_of(run))
    assert found is not None and found.lowest is not None
    assert found.lowest.step == best_step(run.checkpoints)
    assert row[5].startswith(f"{found.lowest.value:.3f}"[:4])
    assert row[-1].startswith(f"{evaluated[-1].diversity:.3f}")
    assert titles(html) == ["validation loss", LABEL, "loss in training", "loss by t"]
