"""Features of data that every source of images has: buckets, weights, captions, bounds, resume."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import write_tar
from prepared import Picture, pictures, toy_identity, write_cache, write_prepared

from sfumato.config import ImageDataConfig, ImageSourceConfig, ShardDataConfig, ShardSourceConfig
from sfumato.data.images import open_images
from sfumato.data.pools import bucket_sizes, nearest
from sfumato.data.prepared.open import open_shards
from sfumato.data.sample import Sample
from sfumato.data.stream import OrderedStream

HEIGHT, WIDTH, DIVISOR = 24, 24, 8
SIZES = bucket_sizes(HEIGHT, WIDTH, DIVISOR)
COUNTS = {"a": 24, "b": 12}
Open = Callable[..., OrderedStream[Any, Sample]]


def named(prefix: str, count: int) -> list[Picture]:
    """Return pictures of four shapes; every third has three captions."""
    return [
        replace(picture, captions=tuple(f"{prefix} {text}" for text in picture.captions))
        for picture in pictures(count, captions=3)
    ]


def write_table(folder: Path, samples: list[Picture]) -> Path:
    rows = []
    for i, picture in enumerate(samples):
        (folder / f"{i:03d}.png").write_bytes(picture.data)
        rows.append({"image": f"{i:03d}.png", "caption": list(picture.captions)})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def write_folder(folder: Path, samples: list[Picture]) -> Path:
    for i, picture in enumerate(samples):
        (folder / f"{i:03d}.png").write_bytes(picture.data)
        (folder / f"{i:03d}.txt").write_text(picture.captions[0])
    return folder


def write_tars(folder: Path, samples: list[Picture]) -> Path:
    for first in range(0, len(samples), 5):
        members = []
        for i, picture in enumerate(samples[first : first + 5], first):
            members += [
                (f"{i:03d}.png", picture.data),
                (f"{i:03d}.txt", picture.captions[0].encode()),
            ]
        write_tar(folder / f"{first:03d}.tar", members)
    return folder


def write_shards(folder: Path, samples: list[Picture]) -> Path:
    write_prepared(folder, samples, per_shard=5)
    for height, width in SIZES:
        write_cache(folder, toy_identity(height, width, flip=True))
    return folder


WRITERS = {
    "folder": write_folder,
    "table": write_table,
    "tars": write_tars,
    "prepared": write_shards,
    "cached": write_shards,
}


@pytest.fixture(params=WRITERS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Return a function that opens two sources of one kind with some settings."""
    paths = {}
    for name, count in COUNTS.items():
        (tmp_path / name).mkdir()
        paths[name] = str(WRITERS[request.param](tmp_path / name, named(name, count)))

    def open_(
        *, weights: tuple[float | None, ...] = (None, None), repeats: int = 1, **settings: Any
    ) -> OrderedStream[Any, Sample]:
        settings = {"workers": 0, "flip": True, **settings}
        kind = ShardSourceConfig if request.param in {"prepared", "cached"} else ImageSourceConfig
        sources = {
            name: kind(path, weight=weight, repeats=repeats if name == "b" else 1)
            for (name, path), weight in zip(paths.items(), weights, strict=True)
        }
        given = {"height": HEIGHT, "width": WIDTH, "divisor": DIVISOR, "seed": 3}
        if kind is ImageSourceConfig:
            return open_images(ImageDataConfig(sources=sources, **settings), **given)
        config = ShardDataConfig(
            sources=sources, buffer=7, cached=request.param == "cached", **settings
        )
        identity = toy_identity(HEIGHT, WIDTH, flip=True)
        return open_shards(config, identity=identity, **given)

    open_.kind = request.param
    return open_


def same(some: list[Sample], others: list[Sample]) -> bool:
    return len(some) == len(others) and all(
        (a.caption, a.original, a.crop, a.name, a.size)
        == (b.caption, b.original, b.crop, b.name, b.size)
        and torch.equal(*(s.pixels if s.encoded is None else s.encoded.moments for s in (a, b)))
        for a, b in zip(some, others, strict=True)
    )


def number(row: Sample) -> tuple[str, int]:
    name, _, index, *_ = row.caption.split()
    return name, int(index)


def test_a_batch_has_the_size_of_its_bucket_and_epochs_are_whole(opened: Open) -> None:
    stream = opened(buckets=True)
    seen: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for _ in range(72):
        batch = stream.next(2, 0, 2)
        (size,) = {row.size for row in batch}
        assert all(SIZES[nearest(row.original, SIZES)] == size for row in batch)
        seen.setdefault(size, []).extend(map(number, batch))
    assert len(seen) == 3 and len(set(itertools.chain(*seen.values()))) == 36
    for rows in seen.values():
        samples = len(set(rows))
        assert abs(len(rows) - 144 * samples / 36) <= 2
        for first in range(0, len(rows) - samples + 1, samples):
            assert len(set(rows[first : first + samples])) == samples


@pytest.mark.parametrize("buckets", [False, True])
def test_weights_decide_the_shares(opened: Open, buckets: bool) -> None:
    stream = opened(weights=(1.0, 3.0), buckets=buckets)
    rows = [number(row) for _ in range(60) for row in stream.next(2, 0, 2)]
    assert abs(sum(name == "b" for name, _ in rows) - 90) <= 4
    assert len({row for row in rows if row[0] == "b"}) == 12


def test_repeats_count_in_an_epoch(opened: Open) -> None:
    stream = opened(repeats=3)
    for _ in range(2):
        epoch = Counter(number(row) for row in stream.next(60, 0, 60))
        assert all(epoch["a", i] == 1 for i in range(24))
        assert all(epoch["b", i] == 3 for i in range(12))


def test_captions_are_the_first_or_random(opened: Open) -> None:
    assert not any("again" in row.caption for row in opened().next(36, 0, 36))
    random = [row.caption for row in opened(captions="random").next(144, 0, 144)]
    several = opened.kind not in {"folder", "tars"}  # their captions are one text file each
    assert any("again 1" in text for text in random) == several
    assert any("again 2" in text for text in random) == several


@pytest.mark.parametrize("buckets", [False, True])
def test_bounds_leave_out_and_count(opened: Open, buckets: bool) -> None:
    stream = opened(min_size=20, max_pixels=900, buckets=buckets)
    rows = [row for _ in range(54) for row in stream.next(1, 0, 1)]
    # (17, 19) is too small, (40, 24) too large.
    assert {row.original for row in rows} == {(20, 20), (20, 40)}
    assert len({number(row) for row in rows}) == 18
    assert sum(skip.count for skip in stream.skipped.skips) == 18


FEATURES: list[dict[str, Any]] = [
    {},
    {"buckets": True},
    {"weights": (2.0, 1.0)},
    {"repeats": 2, "captions": "random"},
    {"buckets": True, "weights": (1.0, 2.0), "captions": "random", "min_size": 18},
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_read_ahead_and_other_processes_go_on_at_the_exact_sample(
    opened: Open, features: dict[str, Any]
) -> None:
    stream = opened(**features)
    batches, states = [], []
    for _ in range(24):
        states.append(json.dumps(stream.state()))
        batches.append(stream.next(6, 0, 6))
    for processes in (1, 2, 3):
        each = [opened(**features, workers=2) for _ in range(processes)]
        for process in each:
            process.restore(json.loads(states[9]))
        share = 6 // processes
        for step in range(9, 15):
            parts = [p.next(6, i * share, (i + 1) * share) for i, p in enumerate(each)]
            assert same(list(itertools.chain(*parts)), batches[step])
            assert all(json.dumps(p.state()) == states[step + 1] for p in each)


def test_resuming_with_other_sources_is_refused(opened: Open) -> None:
    state = opened(buckets=True).state()
    opened(buckets=True).restore(state)
    for other in ({"repeats": 2, "buckets": True}, {"min_size": 18, "buckets": True}, {}):
        with pytest.raises(ValueError, match="resume"):
            opened(**other).restore(state)
