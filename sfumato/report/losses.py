"""Losses of supervised training: the validation loss, and the loss by t at start and end."""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.report.records import RunRecord

_BIN = re.compile(r"mse_by_t/(\d\.\d{1,9})-(\d\.\d{1,9})")  # a bin of t: mse_by_t/0.0-0.1
SHARE = 10  # one tenth of training at each end
FEWEST = 25  # logged steps to average at each end, if there are twice as many
SOURCE = ("path", "base_path", "image_column", "caption_column")  # settings that select images
BOUNDS = ("min_size", "max_pixels")


@dataclass(frozen=True)
class Measured:
    """A value and the step at which it was measured."""

    step: int
    value: float


@dataclass(frozen=True)
class ValidationLoss:
    """The validation loss of a run: at step 0, and the lowest and last of trained weights."""

    before: Measured | None
    lowest: Measured | None
    last: Measured | None


@dataclass(frozen=True)
class Profile:
    """The loss as a function of t.

    Attributes:
        t: the middle of each bin.
        mean: over the logged steps with rows in the bin.
        error: standard error of `mean`; nan of a single step.
    """

    t: Sequence[float]
    mean: Sequence[float]
    error: Sequence[float]


@dataclass(frozen=True)
class LossByT:
    """The loss by t over the first and the last `window` logged steps."""

    start: Profile
    end: Profile
    window: int


def validation_loss(record: RunRecord) -> ValidationLoss | None:
    """Return the validation loss of a run, or None without any.

    The lowest is the first of equals, and never step 0, which has no checkpoint.
    """
    steps, values = record.series("validation/loss")
    losses = [Measured(int(step), value) for step, value in zip(steps, values, strict=True)]
    if not losses:
        return None
    trained = [loss for loss in losses if loss.step]
    return ValidationLoss(
        before=next((loss for loss in losses if loss.step == 0), None),
        lowest=min(trained, key=lambda loss: loss.value, default=None),
        last=trained[-1] if trained else None,
    )


def loss_by_t(record: RunRecord) -> LossByT | None:
    """Return the loss by t at both ends of training, or None where fewer than two steps have it."""
    rows = [row for row in record.metrics if any(map(_BIN.fullmatch, row))]
    window = max(len(rows) // SHARE, min(FEWEST, len(rows) // 2))
    if not window:
        return None
    return LossByT(_profile(rows[:window]), _profile(rows[-window:]), window)


def _profile(rows: Sequence[Mapping[str, int | float]]) -> Profile:
    bins: dict[float, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if bounds := _BIN.fullmatch(key):
                bins.setdefault((float(bounds[1]) + float(bounds[2])) / 2, []).append(value)
    t = sorted(bins)
    groups = [bins[middle] for middle in t]
    errors = [statistics.stdev(g) / len(g) ** 0.5 if len(g) > 1 else math.nan for g in groups]
    return Profile(t, list(map(statistics.fmean, groups)), errors)


def has_held_out(record: RunRecord) -> bool:
    """Say whether the validation loss is measured on images that are not trained on."""
    images = record.setting("validation", "images") or {}
    return bool(images.get("path") or images.get("sources"))


def differing_losses(records: Sequence[RunRecord]) -> list[str]:
    """Return the settings that make the validation losses of runs incomparable."""
    settings = [_loss_settings(record) for record in records]
    pairs = itertools.pairwise(settings)
    return list(dict.fromkeys(key for a, b in pairs for key in a if a[key] != b[key]))


def _loss_settings(record: RunRecord) -> dict[str, Any]:
    """Return the settings that a validation loss depends on."""
    images = record.setting("validation" if has_held_out(record) else "data", "images") or {}
    sources = [images, *(images.get("sources") or {}).values()]
    parts = [record.setting("model", key) for key in ("autoencoder", "text_encoder")]
    plain = ("validation.loss_images", "validation.seed", "sampler.height", "sampler.width")
    return {
        "model.pretrained": record.setting("model", "pretrained") or parts,
        "validation.images": [
            [images.get(key) for key in BOUNDS],
            *([source.get(key) for key in SOURCE] for source in sources),
        ],
        **{name: record.setting(*name.split(".")) for name in plain},
    }
