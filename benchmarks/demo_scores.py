"""Judges of the demo's pictures, and distances between sets of them, for the other benchmarks.

A row says what a picture shows, or is to show: name, style, background, and all of it as text.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.clip import VisionNetwork, preprocess
from sfumato.compose import DEMO_MODELS
from sfumato.demo.images import NEW_NAMES, Row, read_rows
from sfumato.demo.pictures import BACKGROUNDS, STYLES, THINGS, Emoji, caption
from sfumato.images import load_images
from sfumato.rewards.classifier import ClassifierReward
from sfumato.rewards.clip import ClipReward

BATCH = 64
ASKED = ("name", "style", "background")


def rows_of(names: Sequence[str]) -> list[Row]:
    """Return the row of each name in each style on each background."""
    rng = random.Random(0)
    return [
        caption(Emoji(style, name, (), ""), background, rng)
        for name in names
        for style in STYLES
        for background in BACKGROUNDS
    ]


def read_pictures(
    folder: Path, *, names: Sequence[str] = (), count: int | None = None
) -> tuple[Tensor, list[Row]]:
    """Return the pictures of a folder, and their rows.

    Args:
        names: those of the pictures that are read; none are all.
        count: of pictures, which are then drawn by chance.
    """
    known = {row["text"]: row for row in rows_of([*THINGS, *NEW_NAMES])}
    rows: list[Row] = [{**known.get(row["text"], {}), **row} for row in read_rows(folder)]
    rows = [row for row in rows if not names or row["name"] in names]
    if count is not None and count < len(rows):
        rows = random.Random("pictures").sample(rows, count)
    return load_images([folder / row["file_name"] for row in rows]), rows


@torch.no_grad()
def in_batches(act: Callable[[Any], Tensor], items: Any) -> Tensor:
    """Return the rows of a function of batches."""
    return torch.cat([act(items[i : i + BATCH]) for i in range(0, len(items), BATCH)])


def load_classifier(size: int, models: Path = DEMO_MODELS) -> ClassifierReward:
    return ClassifierReward.from_pretrained(str(models / "classifier"), None, sizes=[size])


@torch.no_grad()
def top_1(
    classifier: ClassifierReward, pictures: Tensor, prompts: Sequence[str]
) -> tuple[float, float]:
    """Return the share of pictures whose likeliest label the prompt names, and its mean log p."""
    right, values = [], []
    for i in range(0, len(prompts), BATCH):
        pixels = preprocess(pictures[i : i + BATCH], classifier.views[0])
        log_p = classifier.model(pixel_values=pixels).logits.float().log_softmax(1)
        goals = classifier.goals(prompts[i : i + BATCH])  # 0 at the labels of the prompt
        right.append(goals.gather(1, log_p.argmax(1, keepdim=True))[:, 0] == 0)
        values.append((log_p + goals).logsumexp(1))
    return torch.cat(right).float().mean().item(), torch.cat(values).mean().item()


def load_features(models: Path = DEMO_MODELS) -> Callable[[Tensor], Tensor]:
    """Return what maps pictures to the 1,280 features of the classifier, seen at 128 px."""
    whole = load_classifier(128, models)
    kind = "EfficientNetForImageClassification"
    network = VisionNetwork(kind, "classifier", whole.model, whole.views[0])
    return partial(in_batches, network.features)


class Reader:
    """Reads a picture of THINGS: the nearest of all their captions by the text-image model.

    No reward of the demo sees this model. It was trained on the pictures of `train`.
    """

    def __init__(self, models: Path = DEMO_MODELS) -> None:
        self.clip = ClipReward.from_pretrained(str(models / "text_image"))
        self.rows = rows_of(THINGS)
        self.texts = in_batches(self.clip.text_features, [row["text"] for row in self.rows])

    def features(self, pictures: Tensor) -> Tensor:
        return in_batches(self.clip.image_features, pictures)

    def __call__(self, pictures: Tensor) -> list[Row]:
        """Return the row of the caption that each picture is nearest to."""
        nearest = (self.features(pictures) @ self.texts.T).argmax(1)
        return [self.rows[i] for i in nearest]


class Drawings:
    """Reads a picture of any name: the nearest drawing by the classifier's features.

    A drawing is a name in a style, and the mean of the features of its real pictures. So it also
    reads names that the text-image model has never met.
    """

    def __init__(
        self, features: Callable[[Tensor], Tensor], known: Sequence[tuple[Tensor, Sequence[Row]]]
    ) -> None:
        self.network, own = features, dict[tuple[str, str], list[Tensor]]()
        for pictures, rows in known:
            for row, one in zip(rows, F.normalize(features(pictures), dim=1), strict=True):
                own.setdefault((row["name"], row["style"]), []).append(one)
        self.rows = [{"name": name, "style": style} for name, style in own]
        self.means = F.normalize(torch.stack([torch.stack(v).mean(0) for v in own.values()]), dim=1)

    def __call__(self, pictures: Tensor) -> list[Row]:
        nearest = (F.normalize(self.network(pictures), dim=1) @ self.means.T).argmax(1)
        return [self.rows[i] for i in nearest]


def shares(asked: Sequence[Row], seen: Sequence[Row]) -> Mapping[str, float]:
    """Return the share of pictures that are read as asked: in each respect, and in all."""
    keys = [key for key in ASKED if key in seen[0]]
    right = [[a[key] == b[key] for key in keys] for a, b in zip(asked, seen, strict=True)]
    found = {key: sum(one[i] for one in right) / len(right) for i, key in enumerate(keys)}
    return {**found, "all": sum(map(all, right)) / len(right)}


def told(found: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in found.items())


def small(pictures: Tensor) -> Tensor:
    """Return rows of numbers whose distances are the RMS of differences at 16 x 16 pixels."""
    rows = F.interpolate(pictures, (16, 16), mode="area").flatten(1)
    return rows / rows.shape[1] ** 0.5


def neighbours(pictures: Tensor, known: Tensor, rows: Sequence[Row]) -> tuple[float, float]:
    """Return the median distance to the nearest known picture, and the share that is memorised.

    A picture is memorised if it is nearer to its nearest known picture than that one is to any
    known picture of another drawing: another emoji, or the same in another style. The demo has one
    drawing of each emoji in each style. So a model that draws them as they are has a share near 1.

    Args:
        pictures, known: as rows of numbers.
        rows: of the known pictures.
    """
    distances, nearest = torch.cdist(pictures, known).min(1)
    drawings = [(row["name"], row["style"]) for row in rows]
    number = torch.tensor([drawings.index(one) for one in drawings])
    others = torch.cdist(known[nearest], known)
    others[number[nearest][:, None] == number] = torch.inf
    memorised = (distances < others.min(1).values).float().mean().item()
    return distances.median().item(), memorised
