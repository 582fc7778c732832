"""Tiny packages in the place of those that npm and PyPI give out for the demo's rebuild."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.demo import classifier, pictures
from sfumato.demo.packages import Package
from sfumato.demo.rebuild import SUMS
from sfumato.files import RECORD, sha256_of

NAMES = ("red-apple", "rocket", "grapes", "cactus", "orange-book")
BODY = '<circle cx="16" cy="16" r="12" fill="red"/>'
LABELS = {0: "grapes, vine", 1: "missile, rocket", 2: "tench"}


def write_npm(folder: Path, package: Package, files: Mapping[str, object]) -> Package:
    """Write a package's file as npm does; return the package with its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / package.file, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return replace(package, sha256=sha256_of(folder / package.file))


def write_wheel(folder: Path, package: Package, files: Mapping[str, bytes]) -> Package:
    """Write a package's file as PyPI has it; return the package with its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / package.file, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return replace(package, sha256=sha256_of(folder / package.file))


def drawings(**bodies: str) -> dict[str, Any]:
    icons = {name.replace("_", "-"): {"body": body} for name, body in bodies.items()}
    return {"icons": icons, "width": 32, "height": 32}


def write_packages(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Write packages of five things, two of which the model draws; the demo then takes them."""
    patch.setitem(pictures.KIND_OF, "grapes", "snack")
    patch.setitem(pictures.KIND_OF, "rocket", "vehicle")
    every = drawings(**{name.replace("-", "_"): BODY for name in NAMES})
    noto = {
        "icons.json": {**every, "icons": {**every["icons"], "one-oclock": {"body": BODY}}},
        "info.json": {"license": {"spdx": "Apache-2.0"}},
        "metadata.json": {
            "categories": {"Objects": [*NAMES, "one-oclock"], "Flags": ["white-flag"]}
        },
        "chars.json": {"1f34e": "red-apple"},
    }
    others = {"info.json": {"license": {"spdx": "MIT"}}}
    few = drawings(red_apple=BODY, rocket="<circle r=", grapes="<g/>", white_flag=BODY)
    contents: dict[str, dict[str, object]] = {
        "noto": noto,
        "classic": {**others, "icons.json": few},
        "fluent": {**others, "icons.json": every},
        "flat": {"icons.json": every, "info.json": {"license": {"spdx": "CC-BY-SA-4.0"}}},
    }
    for style, files in contents.items():
        patch.setitem(pictures.STYLES, style, write_npm(folder, pictures.STYLES[style], files))
    words = {"\U0001f34e": ["red_apple", "fruit", "School"]}
    keywords = write_npm(folder, pictures.KEYWORDS, {"dist/emoji-en-US.json": words})
    patch.setattr(pictures, "KEYWORDS", keywords)
    names = {classifier.LABELS_FILE: json.dumps(LABELS).encode()}
    patch.setattr(classifier, "LABELS", write_wheel(folder, classifier.LABELS, names))


def published_state() -> dict[str, Tensor]:
    """Return random weights of EfficientNet-lite0 for three labels, under its published names."""
    generator = torch.Generator().manual_seed(0)

    def layer(conv: str, norm: str, *shape: int) -> dict[str, Tensor]:
        size = (shape[0],)
        fan = shape[1] * shape[2] * shape[3]
        return {
            f"{conv}.weight": torch.randn(shape, generator=generator) * (2 / fan) ** 0.5,
            f"{norm}.weight": torch.rand(size, generator=generator) + 0.5,
            f"{norm}.bias": torch.randn(size, generator=generator) / 10,
            f"{norm}.running_mean": torch.randn(size, generator=generator) / 10,
            f"{norm}.running_var": torch.rand(size, generator=generator) + 0.5,
            f"{norm}.num_batches_tracked": torch.tensor(1),
        }

    state = layer("_conv_stem", "_bn0", 32, 3, 3, 3)
    width, i = 32, 0
    stages = [(1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80)]
    stages += [(3, 5, 6, 112), (4, 5, 6, 192), (1, 3, 6, 320)]
    for repeats, side, expansion, out in stages:
        for _ in range(repeats):
            name, inner = f"_blocks.{i}", width * expansion
            if expansion > 1:
                state |= layer(f"{name}._expand_conv", f"{name}._bn0", inner, width, 1, 1)
            state |= layer(f"{name}._depthwise_conv", f"{name}._bn1", inner, 1, side, side)
            state |= layer(f"{name}._project_conv", f"{name}._bn2", out, inner, 1, 1)
            width, i = out, i + 1
    state |= layer("_conv_head", "_bn1", 1280, 320, 1, 1)
    state["_fc.weight"] = torch.randn(len(LABELS), 1280, generator=generator) / 30
    return state | {"_fc.bias": torch.randn(len(LABELS), generator=generator)}


def write_weights(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Write the package of the classifier's weights; the demo then takes it."""
    stream = io.BytesIO()
    torch.save(published_state(), stream)
    files = {classifier.WEIGHTS_FILE: stream.getvalue()}
    patch.setattr(classifier, "WEIGHTS", write_wheel(folder, classifier.WEIGHTS, files))


def files_of(folder: Path) -> set[str]:
    """Return the files that a folder ships."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)) for path in files}


def check_sums(folder: Path) -> None:
    """Check that SHA256SUMS has each other file that a folder ships, and its sum."""
    lines = (folder / SUMS).read_text().splitlines()
    sums = {name: sha256_of(folder / name) for name in files_of(folder) - {SUMS}}
    assert {name: found for found, name in (line.split("  ") for line in lines)} == sums
