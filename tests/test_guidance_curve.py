"""The FID-CLIP curve over guidance: table, figure and manifest by one command, and refusals."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_measures import place, whole

from sfumato.evaluation.results import Evaluation, Metric, Variant, read_evaluations
from sfumato.report.guidance import write_guidance
from sfumato.training.folder import RunFolder

__all__ = ["place", "whole"]  # fixtures
CLIP: dict[str, Any] = {"network": {"kind": "clip", "sha256": "1"}}


def evaluation(scale: float, *, step: int = 0, seed: int = 1, **metrics: float) -> Evaluation:
    """Return an evaluation at a guidance scale; a scale of 5 is the run's own."""
    sampler = {"guidance_scale": scale, "num_inference_steps": 4}
    settings = {"sampler": sampler, "prompts": ["a", "b"], "num_images": 30, "seed": seed}
    variant = Variant(guidance_scale=None if scale == 5 else scale)
    found = {name: Metric(float(value), CLIP) for name, value in metrics.items()}
    return Evaluation(step, None, None, 0.1, "d", settings=settings, variant=variant, metrics=found)


def rows_of(run: RunFolder) -> list[dict[str, str]]:
    return list(csv.DictReader((run.path / "guidance.csv").open()))


def test_each_model_has_a_line_over_guidance(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    found = [
        evaluation(scale, step=step, kid=scale / 10 + step, clip_score=20 + scale)
        for step in (0, 7)
        for scale in (1.35, 5.0, 7.45)
    ]
    found[3:] = [replace(o, variant=replace(o.variant, lora_scale=0.5)) for o in found[3:]]
    files = write_guidance(run, found)
    assert [file.name for file in files] == ["guidance.csv", "guidance.svg", "guidance.json"]
    rows = rows_of(run)
    assert rows[1] == {
        "model": "base model", "guidance_scale": "5.0", "clip_score": "25.0", "kid": "0.5"
    }  # fmt: skip
    assert {row["model"] for row in rows} == {"base model", "step 7 lora_scale_0.5"}
    figure = (tmp_path / "guidance.svg").read_text()
    assert "KID (clip features)" in figure and "CLIP score" in figure
    assert "60 images of 2 prompts" in figure
    assert len(re.findall(r">(?:1\.35|7\.45)</text>", figure)) == 4
    manifest = json.loads((tmp_path / "guidance.json").read_text())
    assert manifest["kid"]["metric"] == CLIP and manifest["kid"]["seed"] == 1


@pytest.mark.parametrize("names", [["fid", "kid"], ["kid", "cmmd"]])
def test_the_first_distance_that_all_have_is_drawn(tmp_path: Path, names: list[str]) -> None:
    run = RunFolder(tmp_path)
    found = [
        evaluation(s, clip_score=20, **{name: s + i for i, name in enumerate(names)})
        for s in (1.5, 5.0)
    ]
    write_guidance(run, found)
    assert names[0] in rows_of(run)[0] and names[1] not in rows_of(run)[0]
    less = {k: v for k, v in found[0].metrics.items() if k != names[0]}
    write_guidance(run, [replace(found[0], metrics=less), found[1]])
    assert names[1] in rows_of(run)[0]


@pytest.mark.parametrize(
    "found",
    [
        [],
        [evaluation(1.5, kid=0.1, clip_score=20)],
        [evaluation(1.5, kid=0.1), evaluation(5.0, kid=0.1)],
        [evaluation(1.5, clip_score=20), evaluation(5.0, clip_score=20)],
    ],
)
def test_without_both_numbers_at_two_scales_nothing_is_drawn(
    tmp_path: Path, found: list[Evaluation]
) -> None:
    assert write_guidance(RunFolder(tmp_path), found) == []
    assert not list(tmp_path.iterdir())


def test_numbers_of_two_manifests_are_no_curve(tmp_path: Path) -> None:
    first = evaluation(1.5, kid=0.1, clip_score=20)
    with pytest.raises(ValueError, match=r"scale 1.5 and .* scale 5 were .*\(seed: 1 and 2\)"):
        write_guidance(RunFolder(tmp_path), [first, evaluation(5.0, seed=2, kid=0, clip_score=2)])
    other = Metric(0.2, {"network": {"kind": "clip", "sha256": "2"}})
    second = evaluation(5.0, clip_score=20)
    second = replace(second, metrics={**second.metrics, "kid": other})
    with pytest.raises(ValueError, match=r"differently \(metric.network.sha256: 1 and 2\)"):
        write_guidance(RunFolder(tmp_path), [first, second])
    assert not list(tmp_path.iterdir())


def test_one_command_writes_the_curve(place: Path) -> None:
    arguments = [
        *(f"run={place / 'run'}", f"prompts={place / 'table.jsonl'}", "num_images=2"),
        *("steps=[0]", "batch_size=16", "guidance_scales=[1.5,4]", "metrics=[kid,clip_score]"),
        *(f"metric_features={place / 'clip'}", f"reference={place / 'pictures'}"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "sfumato", "evaluate", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "guidance.svg" in done.stdout and "KID (clip features)" in done.stdout
    run = RunFolder(place / "run")
    stored = [read_evaluations(run, Variant(guidance_scale=scale))[0] for scale in (1.5, 4.0)]
    assert [float(row["kid"]) for row in rows_of(run)] == [o.metrics["kid"].value for o in stored]
    assert stored[0].metrics["kid"].manifest["reference"]["count"] == 60
