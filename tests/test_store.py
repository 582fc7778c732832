"""Prepared folders in a store: read as from a disk, through a bounded cache, whatever happens."""

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from prepared import pictures, toy_identity, write_cache, write_prepared

from sfumato.config import ShardDataConfig
from sfumato.data.epochs import RowPick
from sfumato.data.prepared.open import first_captions, first_samples, open_shards
from sfumato.data.sample import Sample
from sfumato.data.stream import OrderedStream

COUNT = 22  # samples, four a shard
MB = 1e-3  # in GB
ADDRESS = "memory://bucket/folder"
Rows = OrderedStream[RowPick, Sample]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a prepared folder with tars and a cache of all of it, on the disk."""
    write_prepared(tmp_path / "disk", pictures(COUNT, captions=3))
    write_cache(tmp_path / "disk", toy_identity(flip=True))
    return tmp_path / "disk"


@pytest.fixture
def stored(folder: Path) -> Iterator[str]:
    """Return the address of the same folder in a store."""
    system = fsspec.filesystem("memory")
    system.put(f"{folder}/", "/bucket/folder/", recursive=True)
    yield ADDRESS
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def settings(path: object, tmp_path: Path, **more: object) -> ShardDataConfig:
    given = {"flip": True, "captions": "random", "workers": 0, "buffer": 6, "cache_gb": MB}
    return ShardDataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **{**given, **more})


def opened(config: ShardDataConfig, seed: int = 0) -> Rows:
    return open_shards(config, height=16, width=16, seed=seed, identity=toy_identity())


def same(some: list[Sample], others: list[Sample]) -> bool:
    """Tell whether rows agree in every number and word."""

    def told(row: Sample) -> tuple[object, ...]:
        return row.caption, row.original, row.crop

    def content(row: Sample) -> torch.Tensor:
        if row.encoded is None:
            assert row.pixels is not None
            return row.pixels
        return torch.cat([row.encoded.moments.flatten(), row.encoded.text["pooled"].flatten()])

    return len(some) == len(others) and all(
        told(a) == told(b) and torch.equal(content(a), content(b))
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("more", [{}, {"shuffle": False}, {"buckets": True}, {"buffer": 100}])
def test_rows_from_a_store_are_those_from_a_disk(
    folder: Path, stored: str, tmp_path: Path, cached: bool, workers: int, more: dict[str, object]
) -> None:
    if cached and "buckets" in more:
        pytest.skip("the toy cache has one size")
    more = {"cached": cached, "workers": workers, **more}
    ours, theirs = (opened(settings(path, tmp_path, **more)) for path in (stored, folder))
    for _ in range(4):
        assert same(ours.next(COUNT, 0, COUNT), theirs.next(COUNT, 0, COUNT))
        assert ours.state() == theirs.state()
    assert not ours.skipped


def test_first_rows_and_captions_are_those_from_a_disk(
    folder: Path, stored: str, tmp_path: Path
) -> None:
    ours, theirs = (settings(path, tmp_path) for path in (stored, folder))
    assert first_captions(ours, 7) == first_captions(theirs, 7)
    rows = (first_samples(each, 5, height=16, width=16) for each in (ours, theirs))
    assert same(*rows)


@pytest.mark.parametrize("cached", [False, True])
def test_a_stream_goes_on_from_a_disk_in_a_store_and_back(
    folder: Path, stored: str, tmp_path: Path, cached: bool
) -> None:
    """The same samples at another place are the same: a checkpoint says so by their hash."""
    paths = [folder, stored, folder]
    whole = opened(settings(folder, tmp_path, cached=cached))
    state = whole.state()
    for path in paths:
        stream = opened(settings(path, tmp_path, cached=cached))
        stream.restore(state)
        assert same(stream.next(9, 0, 9), whole.next(9, 0, 9))
        state = stream.state()
