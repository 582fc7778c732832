"""Prepared folders in a store: read as from a disk, through a bounded cache, whatever happens."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from prepared import pictures, toy_identity, write_cache, write_prepared
from runs import assert_same_state, in_child, kill, last_state, on_call, start
from toy import use_toy

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


# --- Training


def overrides(path: object, tmp_path: Path, name: str) -> list[str]:
    return [
        f"runs_dir={tmp_path / 'runs'}",
        f"name={name}",
        *("model.pretrained=toy", "model.trainable=full", "objective=supervised"),
        f"data.shards.path={path}",
        f"data.shards.cache_dir={tmp_path / 'cache'}",
        *("data.shards.flip=true", "data.shards.captions=random", "data.shards.buffer=3"),
        *("sampler.num_inference_steps=2", "training.max_steps=8", "optimizer.lr=0.01"),
        *("training.micro_batch_size=2", "training.global_batch_size=6"),
        *("training.checkpoint_every_steps=2", "training.tensorboard=false"),
        *("validation.num_images=1", "validation.loss_images=2", "validation.every_steps=4"),
        "verify=false",
    ]


def test_training_from_a_store_that_is_killed_twice_ends_as_from_a_disk(
    folder: Path, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise. The run may go on from the disk, too, as the samples are the same."""
    use_toy(monkeypatch)
    start(overrides(folder, tmp_path, "disk"))
    for path, step in ((stored, 3), (folder, 3), (stored, 2)):

        def run(path: object = path, step: int = step) -> None:
            on_call(step, kill, "take_step")
            start(overrides(path, tmp_path, "store"))

        assert in_child(run) == -9
    start(overrides(stored, tmp_path, "store"))
    assert_same_state(tmp_path / "runs" / "store", tmp_path / "runs" / "disk")
    assert last_state(tmp_path / "runs" / "store").step == 8
    written = "".join(
        file.read_text(errors="replace")
        for file in (tmp_path / "runs" / "store").rglob("*")
        if file.suffix in {".yaml", ".json", ".jsonl"}
    )
    assert stored in written and str(tmp_path / "cache" / "0") not in written


def test_a_run_does_not_go_on_with_other_samples_in_a_store(
    folder: Path, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    few = [text.replace("max_steps=8", "max_steps=2") for text in overrides(stored, tmp_path, "a")]
    start(few)
    write_prepared(tmp_path / "other", pictures(COUNT + 1, captions=3))
    for path in (tmp_path / "other", "memory://bucket/other"):
        if not isinstance(path, Path):
            fsspec.filesystem("memory").put(f"{tmp_path}/other/", "/bucket/other/", recursive=True)
        with pytest.raises(ValueError, match="have other samples than the run was started with"):
            start(overrides(path, tmp_path, "a"))
