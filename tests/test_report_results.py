"""Results of the report: differences with intervals, costs, gauges, and how lines are thinned."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_report import (
    BASE,
    DRAFT,
    PLUS,
    record_of,
    report,
    write_draft,
    write_lines,
    write_variant,
)

from sfumato.evaluation.bootstrap import paired_interval
from sfumato.evaluation.results import equal_reward_interval
from sfumato.report.album import MOST_BYTES, album
from sfumato.report.comparison import from_base
from sfumato.report.cost import Cost, cost
from sfumato.report.differences import Difference, differences, scored
from sfumato.report.figures import MOST_MARKS, Line, Panel, draw_panel, thinned
from sfumato.report.gauges import gauge_panels
from sfumato.report.pictures import SIZES, SMALLEST
from sfumato.report.records import read_runs
from sfumato.report.tables import metric_tables
from sfumato.training.folder import RunFolder

PROMPTS = 8


def write_scored(path: Path, kl_coeff: float, seed: int) -> RunFolder:
    """Write a run whose images have random scores, and summaries with the means of those."""
    run = write_draft(path, kl_coeff, {0: BASE, 20: DRAFT[20]}, num_prompts=PROMPTS)
    for step in (0, 20):
        rng = np.random.default_rng([seed if step else 0, step])
        folder = run.evaluation(step)
        rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        for row in rows:
            row |= {"reward": rng.normal(step / 10), "held_out": {"attributes": rng.uniform()}}
        write_lines(folder / "scores.jsonl", rows)
        spread = rng.uniform(0.1, 0.3, PROMPTS).tolist()
        summary = json.loads((folder / "summary.json").read_text())
        summary["reward"] = float(np.mean([row["reward"] for row in rows]))
        held_out = [row["held_out"]["attributes"] for row in rows]
        summary["held_out"] = {"attributes": float(np.mean(held_out))}
        summary["diversity"] |= {"mean": float(np.mean(spread)), "per_prompt": spread}
        (folder / "summary.json").write_text(json.dumps(summary))
    return run


def rows_of(run: RunFolder, step: int) -> list[dict[str, Any]]:
    lines = (run.evaluation(step) / "scores.jsonl").read_text().splitlines()
    return [{"seed": (row := json.loads(line))["index"], **row} for line in lines]


def test_differences_have_the_intervals_of_the_paired_bootstrap(tmp_path: Path) -> None:
    runs = [
        write_scored(tmp_path / name, kl, i)
        for i, (name, kl) in enumerate([("a", 0.0), ("b", 1.0)])
    ]
    record = record_of(runs[0])
    assert record.base is not None and record.final is not None
    found = differences(scored(record, record.base), scored(record, record.final))
    assert set(found) == {"reward", "held_out.attributes", "diversity"}
    for name in ("reward", "held_out.attributes"):
        mean, *ends = paired_interval(rows_of(runs[0], 0), rows_of(runs[0], 20), name)
        np.testing.assert_allclose(found[name].mean, mean)
        assert found[name].ends == tuple(ends)
    low, high = found["diversity"].ends or (0, 0)
    assert low < found["diversity"].mean < high

    page = report(runs, tmp_path)
    low, high = found["reward"].ends or (0, 0)
    (cell,) = (cell for cell in page.tables[0][2] if "±" in cell)
    assert cell.endswith(f"[{low:+.2f}, {high:+.2f}]")
    assert page.tables[1][0][:2] == ["model", "reward"] and page.tables[1][1][0] == "b"
    assert "Last evaluations, minus a" in page.html
    mean, *ends = paired_interval(rows_of(runs[0], 20), rows_of(runs[1], 20), "reward")
    shown = [float(x) for x in re.findall(r"[-+]\d+\.\d+", page.tables[1][1][1].replace("−", "-"))]
    np.testing.assert_allclose(shown, [mean, *ends], atol=0.006)
    text = " ".join(page.html.split())
    assert "intervals of 95 % over prompts" in text
    records = read_runs(runs)
    curves = [from_base(one, records[0].base) for one in records]
    equal = equal_reward_interval(*curves)
    assert equal is not None
    mean, low, high = (f"{value:+.3f}".replace("-", "−") for value in equal)
    assert f"(difference {mean}, 95 %: {low} to {high}, so that none is possible)" in text
    (table,) = (t for t in page.tables if t[-1][0] == "mean")
    assert table[-1][-1] == f"{mean} [{low}, {high}]"


@pytest.mark.parametrize("change", ["few prompts", "no scores", "other images", "older summary"])
def test_a_difference_without_an_interval_is_still_shown(tmp_path: Path, change: str) -> None:
    run = write_scored(tmp_path / "a", 0.0, 1)
    if change == "few prompts":
        run = write_draft(tmp_path / "few", 0.0, {0: BASE, 20: DRAFT[20]}, num_prompts=4)
    rows = rows_of(run, 20)
    if change == "no scores":
        rows = [{k: v for k, v in row.items() if k not in ("reward", "held_out")} for row in rows]
    if change == "other images":
        rows[-1]["index"] = 7
    write_lines(run.evaluation(20) / "scores.jsonl", rows)
    for step in (0, 20):
        path = run.evaluation(step) / "summary.json"
        summary = json.loads(path.read_text())
        summary["diversity"].pop("per_prompt", None)  # as older versions wrote it
        path.write_text(json.dumps(summary))
    record = record_of(run)
    assert record.base is not None and record.final is not None
    found = differences(scored(record, record.base), scored(record, record.final))
    assert found["diversity"] == Difference(record.final.diversity - record.base.diversity, None)
    assert (found["reward"].ends is None) == (change != "older summary")
    assert found["reward"].mean == record.final.reward - record.base.reward  # type: ignore[operator]
    page = report([run], tmp_path)
    assert ("They have no interval" in page.html) == (change != "older summary")


def timed(run: RunFolder, **own: Any) -> None:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for row in rows[1:]:
        row |= {"seconds_per_step": 2.5, "reward_queries": 8.0 * row["step"]} | own
    write_lines(run.metrics, rows)
    config = yaml.safe_load(run.config.read_text())
    config["training"]["global_batch_size"] = 4
    run.config.write_text(yaml.safe_dump(config))


def test_costs_stand_beside_scores(tmp_path: Path) -> None:
    run = write_draft(tmp_path / "run", 0.0, {0: BASE, **DRAFT})
    assert cost(record_of(run), 20) == Cost(None, None, None)
    timed(run)
    assert cost(record_of(run), 10) == Cost(25.0, 40, 80)
    page = report([run], tmp_path)
    assert page.tables[0][2][-3:] == ["50", "80", "160"]
    (every,) = (t for t in page.tables if t[0][:2] == ["model", "step"])
    assert [row[-3:] for row in every[1:]] == [["–"] * 3, ["25", "40", "80"], ["50", "80", "160"]]


def test_seconds_of_a_part_of_the_steps_are_not_shown(tmp_path: Path) -> None:
    run = write_draft(tmp_path / "run", 0.0, {0: BASE, **DRAFT})
    timed(run)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([*lines[:5], "{cut\n", *lines[6:]]))
    assert cost(record_of(run), 20) == Cost(None, 80, 160)
    header, _, row = report([run], tmp_path).tables[0]
    assert "seconds" not in header and row[-2:] == ["80", "160"]


def gauged(run: RunFolder, guard: dict[str, Any], base: float = 0.05) -> None:
    """Add gauges at steps 0, 10 and 20, and the settings of guards."""
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for step, value, count in ((0, base, 0.0), (10, 0.08, 0.0), (20, 0.12, 1.0)):
        rows[step] |= {"validation/gauge/dark": value, "validation/gauge_base/dark": base}
        rows[step] |= {"validation/gauge/high_frequencies": 0.5, "guard/dark": count}
    write_lines(run.metrics, rows)
    config = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump({**config, "guard": guard}))


@pytest.mark.parametrize(
    ("guard", "limits"),
    [
        ({}, [0.15]),  # by default
        ({"dark": {"action": "stop"}}, [0.15]),
        ({"dark": None}, []),
        ({"dark": {"limit": 2.0, "relative": "ratio", "action": "warn"}}, [0.1]),
        ({"dark": {"limit": 0.05, "relative": "difference"}}, [0.1]),
        ({"night": {"metric": "dark", "limit": 0.1, "relative": "off"}}, [0.1, 0.15]),
        ({"night": {"metric": "validation/gauge/dark", "limit": 0.1}}, [0.1, 0.15]),
        ({"night": {"metric": "gauge/dark", "limit": 0.2}}, [0.15, 0.2]),  # as training reads it
        ({"edges": {"limit": 0.3, "relative": "off"}}, [0.15]),  # of dark, by default
    ],
)
def test_gauges_are_shown_with_base_and_limits(
    tmp_path: Path, guard: dict[str, Any], limits: list[float]
) -> None:
    run = write_draft(tmp_path / "run", 0.0, {0: BASE, **DRAFT})
    gauged(run, guard)
    panels = gauge_panels([record_of(run)])
    assert [panel.title for panel in panels] == ["dark", "high frequencies"]
    (line,) = panels[0].lines
    assert (list(line.x), list(line.y)) == ([0, 10, 20], [0.05, 0.08, 0.12])
    assert panels[0].base == 0.05 and panels[1].base is None
    assert line.rings == [(20, 0.12)] and not panels[1].lines[0].rings
    np.testing.assert_allclose(panels[0].limits, limits)
    html = report([run], tmp_path).html
    assert "Gauges of reward hacking" in html and 'data-name="high frequencies"' in html


def test_bases_of_runs_that_differ_are_not_one_line(tmp_path: Path) -> None:
    runs = [write_draft(tmp_path / n, k, {**PLUS}) for n, k in (("a", 0.0), ("b", 1.0))]
    gauged(runs[0], {})
    assert gauge_panels([record_of(run) for run in runs])[0].base == 0.05
    gauged(runs[1], {}, base=0.06)
    assert gauge_panels([record_of(run) for run in runs])[0].base is None
    bare = write_draft(tmp_path / "bare", 0.0, {**PLUS})
    assert "Gauges of reward hacking" not in report([bare], tmp_path).html


@pytest.mark.parametrize(
    "guard", ["much", {"dark": "much"}, {"dark": {"limit": "much"}}, {"dark": {"limit": [1]}}]
)
def test_damaged_guards_are_named(tmp_path: Path, guard: Any) -> None:
    run = write_draft(tmp_path / "run", 0.0, {0: BASE, **DRAFT})
    gauged(run, guard)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged: guard"):
        report([run], tmp_path)


def test_long_lines_are_thinned() -> None:
    assert thinned([1, 2, 3], 3) == [1, 2, 3]
    points = thinned(range(1000), 10)
    assert points[0] == 0 and points[-1] == 999 and len(points) == 10
    assert set(np.diff(points)) == {111}
    long = Panel("p", [Line(0, range(5000), [float(i % 7) for i in range(5000)])])
    assert draw_panel(long).count("<use") < MOST_MARKS + 30  # marks, and ticks of the axes


def test_images_are_thinned_until_the_page_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_draft(tmp_path / "run", 0.0, {0: BASE, **DRAFT}, side=200, num_images=6)
    record = record_of(run)
    assert album([record], record, record.base).sizes == SIZES[0]
    whole = sum(len(p.uri) for p in album([record], record, record.base).pictures)
    assert 0 < whole <= MOST_BYTES
    monkeypatch.setattr("sfumato.report.album.MOST_BYTES", whole - 1)
    fewer = album([record], record, record.base)
    assert fewer.sizes in SIZES[1:]
    assert sum(len(p.uri) for p in fewer.pictures) < whole
    monkeypatch.setattr("sfumato.report.album.MOST_BYTES", 10)
    least = album([record], record, record.base)
    assert least.sizes == SMALLEST and len(least.last) == 1 and len(least.last[0].rows) == 1


def test_the_curve_over_guidance_is_shown(tmp_path: Path) -> None:
    run = write_draft(tmp_path / "run", 0.0, {0: BASE, **DRAFT})
    write_variant(run, 20, 23.0, 0.1, guidance_scale=8.0)
    folders = [run.evaluation(20), run.evaluation(20, "guidance_scale_8")]

    def measure(digests: tuple[str, str]) -> str:
        for folder, digest in zip(folders, digests, strict=True):
            network = {"network": {"kind": "clip", "sha256": digest}}
            names = {name: {"value": 0.5, "manifest": network} for name in ("kid", "clip_score")}
            summary = json.loads((folder / "summary.json").read_text())
            (folder / "summary.json").write_text(json.dumps(summary | {"metrics": names}))
        return report([run], tmp_path).html

    html = measure(("1", "1"))
    assert 'data-name="guidance of run"' in html and ">KID (clip features)</text>" in html
    html = measure(("1", "2"))
    assert 'data-name="guidance of run"' not in html
    assert "run has no curve over guidance: " in html and "sha256: 1 and 2" in html


def test_metrics_of_two_manifests_stand_in_two_tables(tmp_path: Path) -> None:
    runs = [write_scored(tmp_path / name, kl, 1) for name, kl in (("a", 0.0), ("b", 1.0))]
    networks = [{"network": {"kind": kind, "sha256": 64 * kind[0]}} for kind in ("clip", "dinov2")]
    reference = {"reference": {"sha256": 64 * "c", "count": 2048, "resize": None}}
    measured = {
        (0, 0): {"clip_score": (31.5, networks[0]), "kid": (0.25, networks[1] | reference)},
        (0, 20): {"clip_score": (30.25, networks[0]), "kid": (0.5, networks[1] | reference)},
        (1, 20): {"clip_score": (29.75, networks[0]), "kid": (0.125, networks[0] | reference)},
    }
    for (i, step), metrics in measured.items():
        file = runs[i].evaluation(step) / "summary.json"
        summary = json.loads(file.read_text())
        summary["metrics"] = {k: {"value": v, "manifest": m} for k, (v, m) in metrics.items()}
        file.write_text(json.dumps(summary))
    records = read_runs(runs)
    first, second, third = metric_tables(records, records[0].base)
    assert first.caption == "Features of clip (SHA-256 cccccccc)"
    assert [cell.text for row in first.rows for cell in row] == [
        *("base model", "0", "31.50", "a", "20", "30.25", "b", "20", "29.75")
    ]
    assert (
        second.caption
        == "Features of dinov2 (SHA-256 dddddddd), against 2,048 pictures (SHA-256 cccccccc)"
    )
    assert list(second.header) == ["model", "step", "KID (dinov2 features)"]
    assert [row[-1].text for row in second.rows] == ["0.250", "0.500"]
    assert [[cell.text for cell in row] for row in third.rows] == [["b", "20", "0.125"]]
    page = report(runs, tmp_path)
    assert "Metrics of sets of images" in page.html
