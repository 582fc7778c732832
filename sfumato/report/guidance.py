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
from sfumato.report.figures import COLORS, GREY, INK, MARKERS, STYLE, inline_svg
from sfumato.training.folder import RunFolder

DISTANCES = ("fid", "kid", "cmmd")  # the first that was measured is drawn
SCORE = "clip_score"
SCALE = "sampler.guidance_scale"
NAME = "guidance"  # of the files in a run folder
SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


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
    name, measured = _measured(results)
    if not measured:
        return []
    first = measured[0]
    points = [_point(one, name) for one in measured]
    files = [run.path / f"{NAME}.{suffix}" for suffix in ("csv", "svg", "json")]
    texts = [
        _table(points, name),
        _draw(name, measured).replace("<svg", f"<svg {SPACES}", 1),
        json.dumps({metric: first.manifest(metric) for metric in (name, SCORE)}, indent=2) + "\n",
    ]
    for file, text in zip(files, texts, strict=True):
        write_text(file, text)
    return files


def draw_guidance(results: Sequence[Evaluation]) -> str | None:
    """Return the curve as an element of a page; None where `write_guidance` writes nothing.

    Raises:
        ValueError: the numbers were measured differently.
    """
    name, measured = _measured(results)
    return _draw(name, measured) if measured else None


def _measured(results: Sequence[Evaluation]) -> tuple[str, list[Evaluation]]:
    """Return the distance to draw, and the evaluations that have it beside a CLIP score."""
    measured = [one for one in results if SCORE in one.metrics]
    common = [name for name in DISTANCES if measured and all(name in o.metrics for o in measured)]
    if not common or len(set(map(_scale, measured))) < 2:
        return "", []
    first, name = measured[0], common[0]
    for one in measured[1:]:
        for metric in (name, SCORE):
            a, b = first.manifest(metric), one.manifest(metric)
            check_alike(_named(first), _named(one), a, b, but=(SCALE,))
    return name, measured


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


def _draw(name: str, measured: Sequence[Evaluation]) -> str:
    """Return an SVG: a line for each model, its points named by their guidance scale."""
    first, points = measured[0], [_point(one, name) for one in measured]
    with rc_context({**STYLE, "svg.hashsalt": f"{NAME} {points}"}):
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
        axes.set_ylabel(metric_label(name, first.metrics[name]))
        axes.set_title(_images(first), color=INK)
        axes.legend(frameon=False)
        axes.margins(0.08)
        return inline_svg(figure)
