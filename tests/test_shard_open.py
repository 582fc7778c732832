"""What a prepared folder is refused for, before training begins."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from prepared import (
    pictures,
    shard_files,
    toy_identity,
    toy_moments,
    write_cache,
    write_index,
    write_prepared,
)

from sfumato.config import ShardDataConfig
from sfumato.data.epochs import RowPick
from sfumato.data.order import PoolOrder
from sfumato.data.prepared import check
from sfumato.data.prepared.folder import CACHE, EMPTY, INDEX, MANIFEST, SELECTIONS, SHARDS
from sfumato.data.prepared.format import CacheIdentity, PreparedError
from sfumato.data.prepared.open import first_captions, open_shards
from sfumato.data.sample import Placement, Sample, central_crop, resize_and_crop
from sfumato.data.stream import OrderedStream

COUNT = 10  # samples, four a shard
Rows = OrderedStream[RowPick, Sample]


def open_small(config: ShardDataConfig, identity: CacheIdentity | None = None) -> Rows:
    return open_shards(config, height=16, width=16, seed=0, identity=identity or toy_identity())


def raw(folder: Path) -> ShardDataConfig:
    return ShardDataConfig(path=str(folder), workers=0)


def cached(folder: Path) -> ShardDataConfig:
    return ShardDataConfig(path=str(folder), cached=True, workers=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return tars, their index, and no cache."""
    selections = {"none": lambda _: False, "first": lambda i: i < 4, "even": lambda i: i % 2 == 0}
    return write_prepared(tmp_path, pictures(COUNT), selections=selections)


def numbers(stream: Rows, count: int) -> list[int]:
    return sorted(int(row.caption.split()[1]) for row in stream.next(count, 0, count))


def samples_of(stream: Rows) -> int:
    """Return how many samples an epoch has."""
    assert isinstance(stream.order, PoolOrder)
    return stream.order.samples


# Settings and selections


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("path", None, r"data\.shards\.path is missing"),
        ("crop", "left", r"data\.shards\.crop='left' is unknown; choose one of center, random"),
        (
            "captions",
            "all",
            r"data\.shards\.captions='all' .* one of first, random",
        ),
        ("buffer", 0, r"data\.shards\.buffer=0 is too small; give 1 or more"),
        ("workers", -1, r"data\.shards\.workers=-1 is too small; give 0 or more"),
        ("prefetch", -1, r"data\.shards\.prefetch=-1 is too small"),
    ],
)
def test_impossible_settings_are_refused(folder: Path, key: str, value: object, said: str) -> None:
    config = raw(folder)
    vars(config)[key] = value
    with pytest.raises(ValueError, match=said):
        open_small(config)


def test_a_folder_without_an_index_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(PreparedError, match=r"no index\.json.*stages=\[index\]"):
        open_small(raw(folder))
    with pytest.raises(PreparedError, match=r"no index\.json"):
        open_small(raw(tmp_path / "nowhere"))


def test_an_unknown_selection_names_the_known_ones(folder: Path) -> None:
    config = raw(folder)
    config.selection = "odd"
    with pytest.raises(PreparedError, match=r"no selection 'odd'; there is all, even, first, none"):
        open_small(config)


def test_an_empty_selection_is_refused(folder: Path) -> None:
    config = raw(folder)
    config.selection = "none"
    with pytest.raises(PreparedError, match=r"the selection 'none' .* keeps no sample"):
        open_small(config)


@pytest.mark.parametrize("kind", ["kept", "rows"])
def test_a_record_whose_indices_are_no_numbers_is_named(folder: Path, kind: str) -> None:
    write_cache(folder, toy_identity())
    place = (
        folder / SELECTIONS / "all" / "00000.json"
        if kind == "kept"
        else next((folder / CACHE).glob("*/00000.json"))
    )
    content = json.loads(place.read_text())
    content[kind][0] = "0"
    place.write_text(json.dumps(content))
    with pytest.raises(PreparedError, match=r"00000\.json.*damaged"):
        open_small(cached(folder))


def test_an_index_of_two_minds_is_refused(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["selections"]["all"].append(3)
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(PreparedError, match="it has 3 tars and the counts of 4"):
        open_small(raw(folder))


def test_first_captions_are_those_of_the_selection_in_file_order(folder: Path) -> None:
    config = raw(folder)
    config.selection = "even"
    assert first_captions(config, 4) == [f"picture {i}" for i in (0, 2, 4, 6)]
    assert first_captions(config, 99) == [f"picture {i}" for i in range(0, COUNT, 2)]
    config.selection = "none"
    with pytest.raises(PreparedError, match="keeps no sample"):
        first_captions(config, 4)


# Files that changed since the index


def test_a_tar_that_vanished_or_changed_is_named(folder: Path) -> None:
    tar = folder / SHARDS / "00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-512])
    said = rf"00001\.tar has {len(data) - 512} bytes, and had {len(data)} when it was indexed"
    with pytest.raises(PreparedError, match=said):
        open_small(raw(folder))
    tar.unlink()
    with pytest.raises(PreparedError, match=r"00001\.tar is missing, though index\.json lists it"):
        open_small(raw(folder))
    (folder / SHARDS / "00002.tar").unlink()
    with pytest.raises(PreparedError, match=r"00001\.tar is missing.* \(and 1 more of 3 files\)"):
        open_small(raw(folder))
    # A selection that needs none of it can be read.
    config = raw(folder)
    config.selection = "first"
    assert numbers(open_small(config), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("half", ["moments", "text"])
def test_a_cache_shard_that_vanished_or_was_truncated_is_named(folder: Path, half: str) -> None:
    identity = toy_identity()
    write_cache(folder, identity)
    name = identity.moments_folder if half == "moments" else identity.text_folder
    file = shard_files(folder / CACHE / name)[1]
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(PreparedError, match=rf"{name}/00001\.safetensors has \d+ bytes, and had"):
        open_small(cached(folder))
    file.unlink()
    with pytest.raises(PreparedError, match=rf"{name}/00001\.safetensors is missing"):
        open_small(cached(folder))
    write_index_without(folder, name, "00001")
    with pytest.raises(PreparedError, match=rf"{name} of .* lacks 1 of the 3 shards .* 00001"):
        open_small(cached(folder))


def write_index_without(folder: Path, cache: str, shard: str) -> None:
    (folder / CACHE / cache / f"{shard}.json").unlink()
    write_index(folder)


def test_a_cache_without_the_empty_prompt_is_refused(folder: Path) -> None:
    identity = toy_identity()
    write_cache(folder, identity)
    place = folder / CACHE / identity.text_folder / EMPTY
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(PreparedError, match=r"empty\.safetensors, the states of the empty prompt"):
        open_small(cached(folder))
    place.unlink()
    with pytest.raises(PreparedError, match=r"empty\.safetensors.*precache again"):
        open_small(cached(folder))


# Which cache


def test_names_of_caches_are_hashes_of_their_identity() -> None:
    # printf '{"a":[1,"x"],"b":false}' | sha256sum
    identity = CacheIdentity({"b": False, "a": [1, "x"]}, {"a": [1, "x"], "b": False})
    key = "90cf0f22afcad7f5"
    assert identity.moments_folder == f"moments-{key}" and identity.text_folder == f"text-{key}"


def test_a_cache_of_another_model_or_size_is_refused_and_the_difference_named(
    folder: Path,
) -> None:
    with pytest.raises(PreparedError, match="no cache of moments for this run"):
        open_small(cached(folder))
    write_cache(folder, toy_identity(autoencoder="other"))
    write_cache(folder, toy_identity(height=32))
    with pytest.raises(PreparedError) as raised:
        open_small(cached(folder))
    for identity, said in (
        (toy_identity(autoencoder="other"), "autoencoder (other in the cache, kl in the run)"),
        (toy_identity(height=32), "height (32 in the cache, 16 in the run)"),
    ):
        assert f"{identity.moments_folder} differs in {said}" in str(raised.value)
    write_cache(folder, toy_identity())
    assert numbers(open_small(cached(folder)), COUNT) == list(range(COUNT))
    with pytest.raises(PreparedError, match=r"of text .* \(clip in the cache, t5 in the run\)"):
        open_small(cached(folder), toy_identity(encoder="t5"))


def test_a_cache_that_the_index_does_not_list_is_told(folder: Path) -> None:
    write_cache(folder, toy_identity())
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(content | {"caches": {}}))
    said = rf"{toy_identity().moments_folder} exists, but was incomplete .* indexed"
    with pytest.raises(PreparedError, match=said):
        open_small(cached(folder))


def test_a_manifest_that_was_changed_or_is_missing_is_refused(folder: Path) -> None:
    identity = toy_identity(height=32)
    write_cache(folder, identity)
    place = folder / CACHE / identity.moments_folder / MANIFEST
    place.write_text(json.dumps({**json.loads(place.read_text()), "height": 16}))
    with pytest.raises(PreparedError, match="does not belong to its folder"):
        open_small(cached(folder))
    place.unlink()
    with pytest.raises(PreparedError, match=r"manifest\.json is missing"):
        open_small(cached(folder))


def test_mirrors_need_mirrored_moments(folder: Path) -> None:
    write_cache(folder, toy_identity())
    config = cached(folder)
    config.flip = True
    with pytest.raises(PreparedError, match=r"flip \(no mirrored moments.*precache\.flip"):
        open_small(config)
    write_cache(folder, toy_identity(flip=True))
    assert numbers(open_small(config), COUNT) == list(range(COUNT))


def test_random_crops_cannot_be_had_from_a_cache(folder: Path) -> None:
    write_cache(folder, toy_identity())
    config = cached(folder)
    config.crop = "random"
    with pytest.raises(ValueError, match=r"data.shards.crop=random"):
        open_small(config)


def test_how_tensors_are_stored_does_not_matter(folder: Path) -> None:
    config = cached(folder)
    write_cache(folder, toy_identity(flip=True, dtype="float16"))
    (row,) = open_small(config).next(1, 0, 1)
    assert row.encoded is not None and row.encoded.moments.dtype == torch.float16
    assert row.encoded.text["prompt_embeds"].dtype == torch.float16
    expected = toy_moments(int(row.caption.split()[1])).half()
    assert torch.equal(row.encoded.moments, expected)
    # The one of just this identity comes first, then the most exact.
    write_cache(folder, toy_identity(flip=True))
    (row,) = open_small(config, toy_identity(dtype="bfloat16")).next(1, 0, 1)
    assert row.encoded is not None and row.encoded.moments.dtype == torch.float32
    (row,) = open_small(config, toy_identity(flip=True, dtype="float16")).next(1, 0, 1)
    assert row.encoded is not None and row.encoded.moments.dtype == torch.float16


# What a cache holds of a selection


def test_what_is_in_both_halves_and_in_the_selection_is_read(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_cache(folder, toy_identity(), without_moments={2, 3}, without_text={5, 8})
    with caplog.at_level(logging.WARNING):
        stream = open_small(cached(folder))
    assert samples_of(stream) == 6 and numbers(stream, 6) == [0, 1, 4, 6, 7, 9]
    (skip,) = stream.skipped.skips
    assert skip.reason == "kept by selection 'all', but not in both halves of the cache"
    assert skip.count == 4 and "(of 3 shards, the first is 00000)" in str(skip)
    assert len(caplog.records) == 1
    config = cached(folder)
    config.selection = "even"
    assert numbers(open_small(config), 3) == [0, 4, 6]


def test_a_whole_cache_comes_before_a_partial_one_of_this_very_identity(folder: Path) -> None:
    config = cached(folder)
    write_cache(folder, toy_identity(dtype="float16"))
    state = open_small(config).state()
    write_cache(folder, toy_identity(), selection="even")
    stream = open_small(config)
    assert samples_of(stream) == COUNT and not stream.skipped.skips
    stream.restore(state)
    config.selection = "even"  # both hold all of it
    (row,) = open_small(config).next(1, 0, 1)
    assert row.encoded is not None and row.encoded.moments.dtype == torch.float32


def test_a_cache_of_another_selection_lends_what_both_have(folder: Path) -> None:
    write_cache(folder, toy_identity(), selection="even")
    assert numbers(open_small(cached(folder)), 5) == [0, 2, 4, 6, 8]
    config = cached(folder)
    config.selection = "even"
    stream = open_small(config)
    assert numbers(stream, 5) == [0, 2, 4, 6, 8] and not stream.skipped.skips
    write_prepared(folder, pictures(COUNT), selections={"odd": lambda i: i % 2 == 1})
    config.selection = "odd"
    with pytest.raises(PreparedError, match="no sample of selection 'odd' is in the cache"):
        open_small(config)


def test_counts_of_many_shards_are_taken_from_the_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(folder, toy_identity(), selection="even")
    monkeypatch.setattr(check, "_FEW", 0)
    config = cached(folder)
    config.selection = "even"
    for record in (folder / CACHE / toy_identity().moments_folder).glob("0*.json"):
        record.rename(record.with_suffix(".away"))
    stream = open_small(config)
    assert samples_of(stream) == 5
    with pytest.raises(PreparedError, match=r"0000\d\.json is missing"):
        stream.next(5, 0, 5)
    # Other counts send it to the records.
    config.selection = "all"
    with pytest.raises(PreparedError, match=r"00000\.json is missing"):
        open_small(config)


def test_records_tell_where_few_counts_differ(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(folder, toy_identity(), without_text={5})
    monkeypatch.setattr(check, "_FEW", 0)
    monkeypatch.setattr(check, "_NEARLY", 0.5)
    (folder / CACHE / toy_identity().moments_folder / "00002.json").unlink()
    config = cached(folder)
    config.shuffle = False
    stream = open_small(config)
    assert samples_of(stream) == COUNT - 1 and numbers(stream, 4) == [0, 1, 2, 3]
    monkeypatch.setattr(check, "_NEARLY", 0.2)
    with pytest.raises(PreparedError, match=r"00002\.json is missing"):
        open_small(cached(folder))


def test_counts_that_agree_by_accident_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = {"low": lambda i: i % 4 < 2, "high": lambda i: i % 4 >= 2}
    folder = write_prepared(tmp_path, pictures(8), selections=halves)
    write_cache(folder, toy_identity(), selection="low")
    monkeypatch.setattr(check, "_FEW", 0)
    config = cached(folder)
    config.selection = "high"
    with pytest.raises(PreparedError, match=r"has 0 of the 2 samples .* selection 'high'"):
        open_small(config).next(4, 0, 4)


@pytest.mark.parametrize("original", [(16, 16), (33, 20), (20, 33), (17, 100), (64, 65), (7, 9)])
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (15, 31)])
def test_the_central_crop_is_that_of_framing(
    original: tuple[int, int], size: tuple[int, int]
) -> None:
    picture = Image.new("RGB", (original[1], original[0]))
    for mirrored in (False, True):
        _, crop = resize_and_crop(picture, size, Placement(mirrored=mirrored))
        assert central_crop(original, size) == crop
