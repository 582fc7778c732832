"""FID-CLIP curve over guidance: a distance to the reference against CLIP score."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from sfumato.evaluation.manifest import check_alike
from sfumato.evaluation.measures import metric_label
from sfumato.evaluation.results import Evaluation
from sfumato.files import write_text
from sfumato.report.figures import COLORS, GREY, INK, MARKERS, STYLE
from sfumato.training.folder import RunFolder

DISTANCES = ("fid", "kid", "cmmd")  # the first that was measured is drawn
SCORE = "clip_score"
SCALE = "sampler.guidance_scale"
NAME = "guidance"  # of the files in a run folder


@dataclass(frozen=True)
class Point:
    """Numbers of one step at one guidance scale; `line` names those that differ in it alone."""

    line: str
    guidance_scale: float
    distance: float
    score: float


def write_guidance(run: RunFolder, results: Sequence[Evaluation]) -> list[Path]:
    """Write guidance.csv, .svg and .json (the manifest) into a run folder.

    Returns:
        The files; none if fewer than two guidance scales have both a distance and a CLIP score.

    Raises:
        ValueError: the numbers were measured differently, or a file cannot be written.
    """
    measured = [one for one in results if SCORE in one.metrics]
    common = [name for name in DISTANCES if measured and all(name in o.metrics for o in measured)]
    if not common or len(set(map(_scale, measured))) < 2:
        return []
    first, name = measured[0], common[0]
    for one in measured[1:]:
        for metric in (name, SCORE):
            a, b = first.manifest(metric), one.manifest(metric)
            check_alike(_named(first), _named(one), a, b, but=(SCALE,))
    points = [_point(one, name) for one in measured]
    files = [run.path / f"{NAME}.{suffix}" for suffix in ("csv", "svg", "json")]
    texts = [
        _table(points, name),
        _draw(points, metric_label(name, first.metrics[name]), _images(first)),
        json.dumps({metric: first.manifest(metric) for metric in (name, SCORE)}, indent=2) + "\n",
    ]
    for file, text in zip(files, texts, strict=True):
        write_text(file, text)
    return files


def _point(one: Evaluation, name: str) -> Point:
    return Point(_line(one), _scale(one), one.metrics[name].value, one.metrics[SCORE].value)


def _line(one: Evaluation) -> str:
    variant = replace(one.variant, guidance_scale=None)
    return f"step {one.step} {variant.name}".strip() if one.step else "base model"


def _scale(one: Evaluation) -> float:
    return one.settings["sampler"]["guidance_scale"]


def _named(one: Evaluation) -> str:
    return f"{_line(one)} at guidance scale {_scale(one):g}"


def _images(one: Evaluation) -> str:
    prompts, each = len(one.settings["prompts"]), one.settings["num_images"]
    return f"{prompts * each:,} images of {prompts:,} prompts at each guidance scale"


def _table(points: Sequence[Point], name: str) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("model", "guidance_scale", SCORE, name))
    rows.writerows((p.line, p.guidance_scale, p.score, p.distance) for p in points)
    return text.getvalue()


def _draw(points: Sequence[Point], label: str, title: str) -> str:
    """Return an SVG: a line for each model, its points named by their guidance scale."""
    with rc_context({**STYLE, "svg.hashsalt": NAME}):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for i, line in enumerate(dict.fromkeys(point.line for point in points)):
            own = sorted((p for p in points if p.line == line), key=lambda p: p.guidance_scale)
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            x, y = [p.score for p in own], [p.distance for p in own]
            axes.plot(x, y, color=color, marker=marker, label=line)
            for point in own:
                text: Any = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8}
                place = (point.score, point.distance)
                axes.annotate(f"{point.guidance_scale:g}", place, color=GREY, **text)
        axes.set_xlabel("CLIP score (100 x cosine)")
        axes.set_ylabel(label)
        axes.set_title(title, color=INK)
        axes.legend(frameon=False)
        axes.margins(0.08)
        svg = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing)
        return svg.getvalue()
