"""Rows of prepared shards: right, in one order for raw and cached ones, resumable anywhere."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_files import config_of, png
from prepared import (
    Picture,
    pictures,
    sha256,
    shard_files,
    toy_identity,
    toy_moments,
    toy_states,
    write_cache,
    write_prepared,
)
from prepared import write_index as write_test_index
from safetensors.torch import load_file, save_file

from sfumato.config import ShardDataConfig
from sfumato.data.epochs import RowPick
from sfumato.data.images import open_images
from sfumato.data.left_out import SkipReport
from sfumato.data.order import PoolOrder
from sfumato.data.prepared.folder import CACHE, SELECTIONS, SHARDS, PreparedFolder
from sfumato.data.prepared.format import record_text
from sfumato.data.prepared.open import open_shards
from sfumato.data.sample import Sample
from sfumato.data.stream import OrderedStream
from sfumato.preparation.index import write_index

COUNT = 22  # samples, four a shard
Rows = OrderedStream[RowPick, Sample]


def open_small(config: ShardDataConfig, seed: int = 0) -> Rows:
    return open_shards(config, height=16, width=16, seed=seed, identity=toy_identity())


def samples_of(stream: Rows) -> int:
    """Return how many samples an epoch has."""
    assert isinstance(stream.order, PoolOrder)
    return stream.order.samples


def settings(folder: Path, *, cached: bool = False, workers: int = 0) -> ShardDataConfig:
    """Return settings with everything left to chance that a cache allows."""
    return ShardDataConfig(
        path=str(folder), cached=cached, flip=True, captions="random", workers=workers, buffer=6
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a prepared folder with tars and a cache of all of it."""
    write_prepared(tmp_path, pictures(COUNT, captions=3), selections={"odd": lambda i: i % 2 == 1})
    write_cache(tmp_path, toy_identity(flip=True))
    return tmp_path


def told(row: Sample) -> tuple[object, ...]:
    """Return what raw and cached rows both have."""
    return row.caption, row.original, row.crop


def same(some: list[Sample], others: list[Sample]) -> bool:
    """Tell whether rows agree in every number and word."""
    return len(some) == len(others) and all(
        told(a) == told(b) and torch.equal(content(a), content(b))
        for a, b in zip(some, others, strict=True)
    )


def content(row: Sample) -> torch.Tensor:
    if row.encoded is None:
        return row.pixels
    text = (t.flatten() for t in row.encoded.text.values())
    return torch.cat([row.encoded.moments.flatten(), *text])


def number(row: Sample) -> int:
    return int(row.caption.split()[1])


def numbers(rows: list[Sample]) -> list[int]:
    return [number(row) for row in rows]


def skips(report: SkipReport) -> dict[str, int]:
    return {skip.reason: skip.count for skip in report.skips}


# What rows hold


def test_raw_rows_are_those_of_the_same_pictures_opened_as_images(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = tmp_path_factory.mktemp("files")
    for i, picture in enumerate(pictures(COUNT)):
        (files / f"{i:03d}.png").write_bytes(picture.data)
        (files / f"{i:03d}.txt").write_text(picture.captions[0])
    images = open_images(
        config_of(files, shuffle=False), height=16, width=24, divisor=8, seed=0
    ).next(COUNT, 0, COUNT)
    config = ShardDataConfig(path=str(folder), shuffle=False, workers=0)
    rows = open_shards(config, height=16, width=24, seed=0).next(COUNT, 0, COUNT)
    assert same(rows, [*images])


@pytest.mark.parametrize("shuffle", [True, False])
def test_cached_rows_hold_what_was_cached_of_their_sample(folder: Path, shuffle: bool) -> None:
    config = settings(folder, cached=True)
    config.shuffle = shuffle
    rows = open_small(config).next(3 * COUNT, 0, 3 * COUNT)
    empty = toy_states("")
    mirrored = 0
    for row in rows:
        encoded, moments = row.encoded, toy_moments(number(row))
        assert encoded is not None
        turned = torch.equal(encoded.moments, moments.flip(-1))
        mirrored += turned
        assert torch.equal(encoded.moments, moments) or turned
        for states, expected in ((encoded.text, toy_states(row.caption)), (encoded.empty, empty)):
            assert states.keys() == expected.keys()
            assert all(torch.equal(states[name], expected[name]) for name in expected)
        assert row.size == (16, 16)
    assert 15 < mirrored < 51
    again = [row.caption for row in rows if "again" in row.caption]
    assert {caption.split()[-1] for caption in again} == {"1", "2"}
    assert set(numbers(rows)) == set(range(COUNT))


def test_raw_and_cached_rows_come_in_one_order_with_the_same_chance(folder: Path) -> None:
    raw, cached = open_small(settings(folder)), open_small(settings(folder, cached=True))
    for _ in range(12):
        pairs = list(zip(raw.next(5, 0, 5), cached.next(5, 0, 5), strict=True))
        for picture, row in pairs:
            assert row.encoded is not None
            assert told(picture) == told(row)
            mirrored = bool(picture.pixels[1, 0, 0] > picture.pixels[1, 0, -1])
            assert torch.equal(row.encoded.moments, toy_moments(number(row))) is not mirrored
    assert raw.state() == cached.state()


def test_first_captions_and_no_mirrors_are_the_default(folder: Path) -> None:
    for cached in (False, True):
        config = ShardDataConfig(path=str(folder), cached=cached, workers=0)
        rows = open_small(config).next(2 * COUNT, 0, 2 * COUNT)
        assert {row.caption for row in rows} == {f"picture {i}" for i in range(COUNT)}
        pairs = [(row.encoded.moments, toy_moments(number(row))) for row in rows if row.encoded]
        assert len(pairs) == (len(rows) if cached else 0)
        assert all(torch.equal(moments, expected) for moments, expected in pairs)


def test_crops_of_tars_are_random_where_asked(tmp_path: Path) -> None:
    wide = [Picture(png(16, 96), 16, 96, ("wide",))]
    config = ShardDataConfig(path=str(write_prepared(tmp_path, wide)), crop="random", workers=0)
    assert len({row.crop for row in open_small(config).next(40, 0, 40)}) > 20
    config.crop = "center"
    assert {row.crop for row in open_small(config).next(40, 0, 40)} == {(0, 40)}


def test_a_row_is_a_copy_and_not_a_view_of_the_file(folder: Path) -> None:
    (row,) = open_small(settings(folder, cached=True)).next(1, 0, 1)
    assert row.encoded is not None
    for tensor in (row.encoded.moments, *row.encoded.text.values()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_sample_is_told_by_its_place_and_caption(folder: Path) -> None:
    (row,) = open_small(ShardDataConfig(path=str(folder), cached=True, shuffle=False)).next(1, 0, 1)
    place = folder / CACHE / toy_identity(flip=True).moments_folder / "00000.safetensors"
    assert str(row) == f"{place} 000000000 (picture 0)"


# Order, processes, resuming


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (3, 1), (3, 5)])
def test_workers_change_nothing(folder: Path, cached: bool, workers: int, prefetch: int) -> None:
    config = settings(folder, cached=cached)
    plain = open_small(config)
    config.workers, config.prefetch = workers, prefetch
    ahead = open_small(config)
    # Calls that differ from the ones before drop what was prepared.
    for call in [(4, 0, 4)] * 5 + [(4, 2, 4), (3, 0, 3), (3, 0, 0), (50, 0, 50)] + [(4, 0, 4)] * 3:
        assert same(ahead.next(*call), plain.next(*call))
        assert ahead.state() == plain.state()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_from_every_position(folder: Path, cached: bool, workers: int) -> None:
    config = settings(folder, cached=cached, workers=workers)
    running, resumed = open_small(config), open_small(config)
    states, batches = [], []
    for _ in range(14):
        states.append(json.dumps(running.state()))
        batches.append(running.next(4, 0, 4))
    for position in (0, 9, 3, 12):
        resumed.restore(json.loads(states[position]))
        assert json.dumps(resumed.state()) == states[position]
        for batch in batches[position:]:
            assert same(resumed.next(4, 0, 4), batch)


@pytest.mark.parametrize("cached", [False, True])
def test_other_processes_go_on_without_repeating_or_losing_a_sample(
    folder: Path, cached: bool
) -> None:
    config = settings(folder, cached=cached, workers=2)
    rows: list[Sample] = []
    state = open_small(config).state()
    # More processes than shards (six), and other batches, in the middle of epochs.
    for processes, each, steps in ((2, 2, 3), (7, 1, 1), (1, 5, 3), (3, 2, 2), (2, 1, 2)):
        streams = [open_small(config) for _ in range(processes)]
        for stream in streams:
            stream.restore(state)
        for _ in range(steps):
            size = processes * each
            parts = [s.next(size, each * i, each * i + each) for i, s in enumerate(streams)]
            rows += itertools.chain(*parts)
        assert all(stream.state() == streams[0].state() for stream in streams)
        state = streams[0].state()
    assert len(rows) == 50 > 2 * COUNT
    for first in (0, COUNT):
        assert Counter(numbers(rows[first : first + COUNT])) == Counter(range(COUNT))
    assert same(rows, open_small(config).next(50, 0, 50))


@pytest.mark.parametrize("cached", [False, True])
def test_the_order_is_the_same_in_another_process(folder: Path, cached: bool) -> None:
    program = (
        "import sys; from sfumato.data.prepared.open import *; "
        "config = ShardDataConfig(path=sys.argv[1], cached=sys.argv[2] == 'True', flip=True, "
        "captions='random', buffer=6); "
        "from prepared import toy_identity; "
        "s = open_shards(config, height=16, width=16, seed=3, identity=toy_identity()); "
        "print([(r.caption, r.crop) for _ in range(9) for r in s.next(4, 0, 4)])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(cached)],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    stream = open_small(settings(folder, cached=cached), seed=3)
    rows = [row for _ in range(9) for row in stream.next(4, 0, 4)]
    assert run.stdout.strip() == str([(row.caption, row.crop) for row in rows])


def test_a_selection_is_all_that_is_read(folder: Path) -> None:
    for cached in (False, True):
        config = settings(folder, cached=cached)
        config.selection = "odd"
        stream = open_small(config)
        assert samples_of(stream) == 11
        rows = [*stream.next(11, 0, 11), *stream.next(11, 0, 11)]
        assert Counter(numbers(rows)) == Counter([*range(1, COUNT, 2)] * 2)


@pytest.mark.parametrize("cached", [False, True])
def test_resume_with_other_samples_or_another_order_is_refused(folder: Path, cached: bool) -> None:
    config = settings(folder, cached=cached)
    state = open_small(config).state()
    config.selection = "odd"
    with pytest.raises(ValueError, match=r"other samples.*data\.shards\.selection"):
        open_small(config).restore(state)
    config.selection, config.buffer = "all", 7
    with pytest.raises(ValueError, match=r"order was 'shuffled within 6 .* within 7 "):
        open_small(config).restore(state)
    config.buffer = 6
    with pytest.raises(ValueError, match=r"is no position .* has epoch, position, shards, order"):
        open_small(config).restore({"epoch": 0, "position": 3})
    for epoch, position in ((-1, 0), (0, -1), (0, COUNT)):
        with pytest.raises(ValueError, match=f"position={position} is no position in epochs of 22"):
            open_small(config).restore(state | {"epoch": epoch, "position": position})


def test_resume_with_a_selection_that_was_filtered_anew_is_refused(folder: Path) -> None:
    """It keeps as many samples of each tar as before, but others."""
    config = settings(folder)
    config.selection = "odd"
    write_index(folder)
    state = open_small(config).state()
    open_small(config).restore(state)
    record = PreparedFolder(folder).kept_record("odd", "00000")
    other = replace(record, kept=tuple(i - 1 for i in record.kept))
    (folder / SELECTIONS / "odd" / "00000.json").write_text(record_text(other))
    write_index(folder)
    with pytest.raises(ValueError, match=r"other samples.*data\.shards\.selection"):
        open_small(config).restore(state)


def test_resume_where_the_folder_was_moved(folder: Path) -> None:
    state = open_small(settings(folder)).state()
    folder.rename(folder.with_name("elsewhere"))
    open_small(settings(folder.with_name("elsewhere"), cached=True)).restore(state)


def test_rows_have_to_be_inside_the_batch(folder: Path) -> None:
    stream = open_small(settings(folder))
    for size, start, stop in ((0, 0, 0), (4, 2, 5), (4, 3, 2), (4, -1, 2)):
        with pytest.raises(ValueError, match="global batch"):
            stream.next(size, start, stop)
    assert stream.state() == open_small(settings(folder)).state()


# Broken rows


def break_pictures(folder: Path, broken: set[int]) -> None:
    """Write pictures anew whose pixels end early; records and index fit them."""
    samples = pictures(COUNT, captions=3)
    cut = [
        Picture(p.data[:60], p.height, p.width, p.captions) if i in broken else p
        for i, p in enumerate(samples)
    ]
    write_prepared(folder, cut)


BROKEN = {1, 4, 5, 9, 21}


def test_broken_pictures_are_replaced_and_counted_whatever_the_processes(folder: Path) -> None:
    break_pictures(folder, BROKEN)
    config = settings(folder)
    one = open_small(config)
    config.workers = 2
    each = [open_small(config) for _ in range(2)]
    resumed = open_small(config)
    for step in range(11):
        if step == 5:
            resumed.restore(each[0].state())
        expected = one.next(4, 0, 4)
        assert not BROKEN & set(numbers(expected))
        parts = [stream.next(4, 2 * rank, 2 * rank + 2) for rank, stream in enumerate(each)]
        assert same(list(itertools.chain(*parts)), expected)
        if step >= 5:
            assert same(resumed.next(4, 0, 4), expected)
    assert skips(one.skipped) == {"truncated or damaged image": 5}
    # A process meets what is in its own rows, and replacements.
    own = [skips(stream.skipped)["truncated or damaged image"] for stream in each]
    assert all(0 < count <= 5 for count in own)


def test_a_process_reads_no_rows_of_others(folder: Path) -> None:
    config = ShardDataConfig(path=str(folder), shuffle=False, workers=2)
    break_pictures(folder, {2, 3, 6, 7, 10, 11})
    stream = open_small(config)
    rows = [row for _ in range(3) for row in stream.next(4, 0, 2)]
    assert numbers(rows) == [0, 1, 4, 5, 8, 9] and not stream.skipped.skips


def accept(folder: Path, *files: Path) -> None:
    """Let record and index say what lies there: as prepared, but wrong."""
    for file in files:
        place = file.with_suffix(".json")
        record = json.loads(place.read_text())
        record |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
        place.write_text(json.dumps(record))
    write_test_index(folder)


@pytest.mark.parametrize("part", ["moments", "text"])
def test_a_cache_shard_that_goes_missing_later_is_replaced(folder: Path, part: str) -> None:
    stream = open_small(settings(folder, cached=True))
    identity = toy_identity(flip=True)
    cache = identity.moments_folder if part == "moments" else identity.text_folder
    shard_files(folder / CACHE / cache)[1].unlink()
    rows = [row for _ in range(4) for row in stream.next(11, 0, 11)]
    assert set(numbers(rows)) == set(range(COUNT)) - {4, 5, 6, 7}
    assert skips(stream.skipped) == {"missing cache shard": 4}


def test_a_cache_shard_of_other_rows_or_captions_is_left_out(folder: Path) -> None:
    identity = toy_identity(flip=True)
    texts = shard_files(folder / CACHE / identity.text_folder)
    moments = shard_files(folder / CACHE / identity.moments_folder)
    # Of the same size, so that only its content tells.
    data = moments[0].read_bytes()
    moments[0].write_bytes(b"\xff" * 8 + data[8:])
    states, size = load_file(texts[1]), texts[1].stat().st_size
    assert states["offsets"].tolist() == [0, 1, 2, 5, 6]
    save_file(states | {"offsets": torch.tensor([0, 1, 3, 5, 6])}, texts[1])
    assert texts[1].stat().st_size == size
    accept(folder, moments[0], texts[1])
    stream = open_small(settings(folder, cached=True))
    rows = [row for _ in range(4) for row in stream.next(11, 0, 11)]
    assert set(numbers(rows)) == set(range(COUNT)) - {0, 1, 2, 3, 5, 6}
    assert skips(stream.skipped) == {
        "unreadable or damaged cache shard": 4,
        "cached states of other captions than the tar's": 2,
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_that_can_be_read_is_an_error_that_stays(folder: Path, workers: int) -> None:
    stream = open_small(settings(folder, cached=True, workers=workers))
    state = stream.state()
    expected = open_small(settings(folder, cached=True)).next(4, 0, 4)
    files = (folder / CACHE / toy_identity(flip=True).moments_folder).glob("*.safetensors")
    away = {file: file.rename(file.with_suffix(".away")) for file in files}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"17 samples in a row .*\(missing cache shard\)"):
            stream.next(4, 0, 4)
        assert stream.state() == state
    for file, beside in away.items():
        beside.rename(file)
    if workers:  # a batch that was made ahead stays as it is until the stream is set anew
        stream.restore(state)
    assert same(stream.next(4, 0, 4), expected)  # no row was passed over


@pytest.mark.parametrize("cached", [False, True])
def test_records_that_changed_since_the_index_are_an_error(folder: Path, cached: bool) -> None:
    stream = open_small(settings(folder, cached=cached))
    place = folder / SHARDS / "00002.json"
    record = json.loads(place.read_text())
    place.write_text(json.dumps(record | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"shard 00002 of .* is not the one that was indexed"):
        stream.next(COUNT, 0, COUNT)
    place.unlink()
    with pytest.raises(ValueError, match=r"00002\.json is missing"):
        stream.next(COUNT, 0, COUNT)


def test_each_broken_row_has_a_replacement_of_its_own(folder: Path) -> None:
    break_pictures(folder, BROKEN)
    stream = open_small(settings(folder))
    replaced: list[list[int]] = []
    for _ in range(4):
        seen = Counter(numbers(stream.next(COUNT, 0, COUNT)))
        assert seen.total() == COUNT and len(seen) == COUNT - len(BROKEN)
        replaced.append(sorted((seen - Counter(list(seen))).elements()))
    assert all(len(set(each)) > 1 for each in replaced), "in one epoch"
    assert len({tuple(each) for each in replaced}) == 4, "and from epoch to epoch"


def test_states_that_end_early_are_left_out(folder: Path) -> None:
    text = shard_files(folder / CACHE / toy_identity(flip=True).text_folder)[1]
    states = load_file(text)
    short = {name: t if name == "offsets" else t[:-1] for name, t in states.items()}
    save_file(short, text)
    accept(folder, text)
    stream = open_small(settings(folder, cached=True))
    rows = [row for _ in range(4) for row in stream.next(11, 0, 11)]
    assert set(numbers(rows)) == set(range(COUNT)) - {4, 5, 6, 7}
    assert skips(stream.skipped) == {"cache shard that does not fit its record": 4}
