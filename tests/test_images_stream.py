"""The order of images: every sample once an epoch, in one size a batch, resumable anywhere."""

import itertools
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, final

import pytest
import torch
from image_files import config_of, skip_counts, write_folder

from sfumato.data.entries import Blob, Entry
from sfumato.data.epochs import ListEpochs, RowPick
from sfumato.data.images import ImageDataConfig, open_images
from sfumato.data.left_out import SkipLog
from sfumato.data.order import Pool, PoolOrder
from sfumato.data.pools import bucket_sizes, nearest
from sfumato.data.sample import Choices, Sample
from sfumato.data.stream import OrderedStream, Stream

# Squares, wide and tall pictures, of uneven numbers.
MIXED = [(20, 20)] * 7 + [(20, 40)] * 5 + [(40, 24)] * 4 + [(17, 19)] * 2


def open_small(config: ImageDataConfig, seed: int = 0) -> Stream[Sample]:
    return open_images(config, height=24, width=24, divisor=8, seed=seed)


def same(some: list[Sample], others: list[Sample]) -> bool:
    """Tell whether samples agree in every pixel and word."""
    return len(some) == len(others) and all(
        torch.equal(a.pixels, b.pixels)
        and (a.caption, a.original, a.crop, a.name) == (b.caption, b.original, b.crop, b.name)
        for a, b in zip(some, others, strict=True)
    )


def captions(samples: list[Sample]) -> list[str]:
    return [sample.caption for sample in samples]


def pool_of(key: str, members: Sequence[int], share: float, bucket: int = 0) -> Pool:
    """Return a pool in file order."""
    return Pool(key, bucket, ListEpochs(members, key=key, seed=0, shuffle=False), share)


@pytest.fixture
def mixed(tmp_path: Path) -> ImageDataConfig:
    """Two weighted sources of several shapes, with everything left to chance that can be."""
    write_folder(tmp_path / "a", MIXED, "a")
    write_folder(tmp_path / "b", MIXED[::2], "b")
    config = config_of(tmp_path / "a", tmp_path / "b", crop="random", flip=True, buckets=True)
    config.sources["s0"].weight = 3.0
    config.sources["s1"].weight = 1.0
    return config


# Order


def test_every_epoch_is_a_permutation(tmp_path: Path) -> None:
    stream = open_small(config_of(write_folder(tmp_path, MIXED)))
    rows = list(itertools.chain(*(stream.next(5, 0, 5) for _ in range(18))))
    epochs = [captions(rows[first : first + 18]) for first in range(0, 90, 18)]
    assert all(sorted(epoch) == sorted(f"picture {i}" for i in range(18)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    ordered = open_small(config_of(tmp_path, shuffle=False))
    assert captions(ordered.next(20, 0, 20)) == [f"picture {i % 18}" for i in range(20)]
    other = open_small(config_of(tmp_path), seed=1)
    assert captions(other.next(18, 0, 18)) != epochs[0]


def test_order_and_chance_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    config = config_of(write_folder(tmp_path, MIXED), crop="random", flip=True)
    by_one = open_small(config)
    by_seven = open_small(config)
    ones = [by_one.next(1, 0, 1)[0] for _ in range(42)]
    sevens = list(itertools.chain(*(by_seven.next(7, 0, 7) for _ in range(6))))
    assert same(ones, sevens)
    assert by_one.state() == by_seven.state()


def test_crops_and_mirrors_change_with_epoch_and_seed(tmp_path: Path) -> None:
    config = config_of(write_folder(tmp_path, [(24, 96)]), crop="random", flip=True)
    stream = open_small(config)
    samples = stream.next(60, 0, 60)
    assert len({sample.crop for sample in samples}) > 20
    mirrored = [bool(sample.pixels[1, 0, 0] > sample.pixels[1, 0, -1]) for sample in samples]
    assert 15 < sum(mirrored) < 45
    assert not same(open_small(config, seed=1).next(60, 0, 60), samples)
    config.crop, config.flip = "center", False
    plain = open_small(config).next(60, 0, 60)
    assert {sample.crop for sample in plain} == {(0, 36)}
    assert all(torch.equal(sample.pixels, plain[0].pixels) for sample in plain)


def test_order_is_the_same_in_another_process(mixed: ImageDataConfig) -> None:
    program = (
        "import sys; from sfumato.data.images import *; "
        "sources = {n: ImageSourceConfig(p, weight=float(w)) for n, p, w in "
        "zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3])}; "
        "config = ImageDataConfig(sources=sources, crop='random', flip=True, buckets=True); "
        "stream = open_images(config, height=24, width=24, divisor=8, seed=3); "
        "print([(s.caption, s.crop, s.pixels.sum().item()) "
        "for _ in range(9) for s in stream.next(4, 0, 4)])"
    )
    arguments = [str(part) for n, s in mixed.sources.items() for part in (n, s.path, s.weight)]
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    stream = open_small(mixed, seed=3)
    rows = [sample for _ in range(9) for sample in stream.next(4, 0, 4)]
    assert run.stdout.strip() == str([(s.caption, s.crop, s.pixels.sum().item()) for s in rows])


@pytest.mark.parametrize("workers", [0, 3])
def test_slices_of_processes_make_the_global_batch(mixed: ImageDataConfig, workers: int) -> None:
    one = open_small(mixed)
    mixed.workers = workers
    each = [open_small(mixed) for _ in range(2)]
    for _ in range(12):
        parts = [stream.next(4, 2 * rank, 2 * rank + 2) for rank, stream in enumerate(each)]
        assert same(list(itertools.chain(*parts)), one.next(4, 0, 4))
        assert each[0].state() == each[1].state() == one.state()


@final
@dataclass(frozen=True)
class CountedBlob(Blob):
    """A file that notes who opens it."""

    path: Path
    opened: ClassVar[Counter[str]] = Counter()

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        CountedBlob.opened[self.path.name] += 1
        with self.path.open("rb") as file:
            yield file


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (2, 2)])
def test_a_process_decodes_its_own_rows_only(tmp_path: Path, workers: int, ahead: int) -> None:
    write_folder(tmp_path, [(16, 16)] * 8)
    blobs = [CountedBlob(tmp_path / f"{i:03d}.png") for i in range(8)]
    entries = [Entry(tmp_path, str(i), (f"{i}",), blob) for i, blob in enumerate(blobs)]
    order = PoolOrder([pool_of("all", range(8), 8.0)], name="images", guards={})
    choices = Choices(((16, 16),))

    def read(pick: RowPick) -> Sample:
        return choices.sample(entries[pick.row], pick.bucket, pick.seed)

    stream = OrderedStream(order, read, SkipLog(), workers=workers, prefetch=ahead)
    CountedBlob.opened.clear()
    assert captions(stream.next(8, 2, 4)) == ["2", "3"]
    stream.next(8, 2, 4)
    assert set(CountedBlob.opened) == {"002.png", "003.png"}
    assert CountedBlob.opened.total() <= 2 * (2 + ahead)


# Prefetching and resuming


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (3, 1), (3, 5)])
def test_workers_change_nothing(mixed: ImageDataConfig, workers: int, prefetch: int) -> None:
    plain = open_small(mixed)
    mixed.workers, mixed.prefetch = workers, prefetch
    ahead = open_small(mixed)
    # Calls that differ from the ones before drop what was prepared.
    for call in [(4, 0, 4)] * 5 + [(4, 2, 4), (3, 0, 3), (3, 0, 0), (8, 0, 8)] + [(4, 0, 4)] * 3:
        assert same(ahead.next(*call), plain.next(*call))
        assert ahead.state() == plain.state()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_from_every_position(mixed: ImageDataConfig, workers: int) -> None:
    mixed.workers = workers
    running = open_small(mixed)
    resumed = open_small(mixed)
    states = []
    batches = []
    for _ in range(14):
        states.append(json.dumps(running.state()))
        batches.append(running.next(4, 0, 4))
    for position in (0, 9, 3, 12):
        resumed.restore(json.loads(states[position]))
        assert json.dumps(resumed.state()) == states[position]
        for batch in batches[position:]:
            assert same(resumed.next(4, 0, 4), batch)


def test_resume_with_other_samples_is_refused(tmp_path: Path) -> None:
    config = config_of(write_folder(tmp_path, MIXED), buckets=True)
    stream = open_small(config)
    stream.next(4, 0, 4)
    state = stream.state()
    (tmp_path / "000.png").rename(tmp_path / "zzz.png")
    (tmp_path / "000.txt").rename(tmp_path / "zzz.txt")
    with pytest.raises(ValueError, match="as many samples as before, but others"):
        open_small(config).restore(state)
    (tmp_path / "zzz.png").unlink()
    with pytest.raises(ValueError, match="had 9 samples of 24x24, and now has 8"):
        open_small(config).restore(state)
    with pytest.raises(ValueError, match="had 5 samples of 8x32, and now has 0"):
        open_small(config_of(tmp_path)).restore(
            state | {"images": {"8x32": {"drawn": 0, "samples": 5}}}
        )
    with pytest.raises(ValueError, match=r"epoch.* is no position .* has images, places"):
        stream.restore({"epoch": 0, "position": 3})


def test_resume_where_the_folder_was_moved(tmp_path: Path) -> None:
    write_folder(tmp_path / "one" / "data", MIXED)
    state = open_small(config_of(tmp_path / "one" / "data")).state()
    (tmp_path / "one").rename(tmp_path / "two")
    open_small(config_of(tmp_path / "two" / "data")).restore(state)


def test_rows_have_to_be_inside_the_batch(tmp_path: Path) -> None:
    stream = open_small(config_of(write_folder(tmp_path, [(16, 16)])))
    for size, start, stop in ((0, 0, 0), (4, 2, 5), (4, 3, 2), (4, -1, 2)):
        with pytest.raises(ValueError, match="global batch"):
            stream.next(size, start, stop)
    assert stream.state() == open_small(config_of(tmp_path)).state()


# Buckets, weights, repeats


# SDXL's table (arXiv:2307.01952, appendix I) between 1/2 and 1; the others are these turned.
SDXL_HALF = {
    *[(704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152)],
    *[(896, 1088), (960, 1088), (960, 1024), (1024, 1024)],
}


def test_buckets_are_among_those_of_sdxl() -> None:
    sizes = bucket_sizes(1024, 1024, 64)
    assert set(sizes) <= SDXL_HALF | {(width, height) for height, width in SDXL_HALF}
    assert {(width, height) for height, width in sizes} == set(sizes)
    assert len(sizes) == 13 and sizes[0] == (704, 1408)


@pytest.mark.parametrize(
    ("height", "width", "divisor"), [(16, 24, 8), (512, 512, 8), (768, 512, 64)]
)
def test_bucket_sizes_keep_the_area(height: int, width: int, divisor: int) -> None:
    sizes = bucket_sizes(height, width, divisor)
    assert (height, width) in sizes and len(set(sizes)) == len(sizes)
    assert all(h * w <= height * width and h % divisor == w % divisor == 0 for h, w in sizes)


def test_the_nearest_bucket_is_that_of_the_log_ratio() -> None:
    sizes = ((16, 32), (16, 16), (32, 16), (24, 24))
    # 16 x 16 has the ratio of 24 x 24 and fewer pixels; the border is the geometric mean, 1.414.
    assert sizes[nearest((100, 141), sizes)] == (24, 24)
    assert sizes[nearest((100, 142), sizes)] == (16, 32)
    assert sizes[nearest((142, 100), sizes)] == (32, 16)
    assert sizes[nearest((1, 99), sizes)] == (16, 32)


def test_a_batch_has_one_size_and_every_bucket_its_epochs(tmp_path: Path) -> None:
    config = config_of(write_folder(tmp_path, MIXED), buckets=True)
    stream = open_small(config)
    seen: dict[tuple[int, ...], list[str]] = {}
    for _ in range(90):
        batch = stream.next(2, 0, 2)
        shapes = {sample.size for sample in batch}
        assert len(shapes) == 1
        seen.setdefault(shapes.pop(), []).extend(captions(batch))
    assert {size: len(set(rows)) for size, rows in seen.items()} == {
        (24, 24): 9,
        (16, 32): 5,
        (32, 16): 4,
    }
    for rows in seen.values():
        count = len(set(rows))
        assert abs(len(rows) - 180 * count / 18) <= 2
        for first in range(0, len(rows) - count + 1, count):
            assert len(set(rows[first : first + count])) == count


def test_weights_decide_the_proportions(mixed: ImageDataConfig) -> None:
    stream = open_small(mixed)
    rows: list[str] = []
    for step in range(1, 101):
        rows += captions(stream.next(4, 0, 4))
        from_a = sum(row.startswith("a") for row in rows)
        assert abs(from_a - 3 * step) <= 4
    counts = Counter(row for row in rows if row.startswith("a"))
    assert len(counts) == 18 and max(counts.values()) - min(counts.values()) <= 4


def test_without_weights_sources_count_by_size_and_repeats(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [(16, 16)] * 3, "a")
    write_folder(tmp_path / "b", [(16, 16)] * 2, "b")
    config = config_of(tmp_path / "a", tmp_path / "b", crop="random", flip=True)
    config.sources["s1"].repeats = 4
    stream = open_small(config)
    for _ in range(3):
        epoch = Counter(captions(stream.next(11, 0, 11)))
        assert epoch == {
            **dict.fromkeys(["apicture 0", "apicture 1", "apicture 2"], 1),
            "bpicture 0": 4,
            "bpicture 1": 4,
        }


def test_repeats_of_a_sample_are_cropped_differently(tmp_path: Path) -> None:
    config = config_of(write_folder(tmp_path, [(16, 640)]), crop="random")
    config.sources["s0"].repeats = 8
    assert len({sample.crop for sample in open_small(config).next(8, 0, 8)}) > 5


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_counts_never_stray_far_from_shares(batch: int) -> None:
    shares = [0.5, 7.0, 1.3, 90.0]
    pools = [pool_of(str(i), [i], share, bucket=i) for i, share in enumerate(shares)]
    order = PoolOrder(pools, name="images", guards={})
    for step in range(1, 500):
        order.take(batch, 0, batch)
        for drawn, share in zip(order.drawn, shares, strict=True):
            assert abs(drawn - step * batch * share / sum(shares)) < 2 * batch


def test_a_bucket_smaller_than_the_batch_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = open_small(config_of(write_folder(tmp_path, [(16, 16)] * 3)))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            stream.next(4, 0, 4)
    (record,) = caplog.records
    assert "3 samples fall to 24x24 pixels, fewer than the global batch of 4" in record.message


# Broken samples


def break_picture(file: Path) -> None:
    """Cut the pixels and leave the header."""
    file.write_bytes(file.read_bytes()[:60])


def test_broken_samples_are_replaced_counted_and_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(write_folder(tmp_path, MIXED), buckets=True)
    for i in (1, 4, 9):
        break_picture(tmp_path / f"{i:03d}.png")
    stream = open_small(config)
    assert stream.skipped.skips == ()
    with caplog.at_level(logging.WARNING, logger="sfumato.data.left_out"):
        rows: list[Sample] = []
        for _ in range(54):
            batch = stream.next(2, 0, 2)
            assert len({sample.size for sample in batch}) == 1
            rows += batch
    assert len(rows) == 108
    assert set(captions(rows)) == {f"picture {i}" for i in range(18) if i not in (1, 4, 9)}
    assert skip_counts(stream) == {"truncated or damaged image": 3}
    (record,) = caplog.records
    assert str(tmp_path) in record.message
    # The replacements come from the broken one's own bucket.
    wide = [s for s in rows if s.size == (16, 32)]
    assert {sample.original for sample in wide} == {(20, 40)}


def test_replacements_do_not_depend_on_processes_or_workers(mixed: ImageDataConfig) -> None:
    folder = Path(mixed.sources["s0"].path)
    for i in range(0, 18, 2):
        break_picture(folder / f"a{i:03d}.png")
    one = open_small(mixed)
    mixed.workers = 2
    each = [open_small(mixed) for _ in range(2)]
    resumed = open_small(mixed)
    for step in range(16):
        if step == 8:
            resumed.restore(each[0].state())
        expected = one.next(4, 0, 4)
        parts = [stream.next(4, 2 * rank, 2 * rank + 2) for rank, stream in enumerate(each)]
        assert same(list(itertools.chain(*parts)), expected)
        if step >= 8:
            assert same(resumed.next(4, 0, 4), expected)


def test_a_bucket_that_is_wholly_broken_borrows_from_the_others(tmp_path: Path) -> None:
    config = config_of(write_folder(tmp_path, [(16, 16)] * 3 + [(16, 32)]), buckets=True)
    break_picture(tmp_path / "003.png")
    stream = open_small(config)
    shapes = Counter(sample.size for _ in range(8) for sample in stream.next(1, 0, 1))
    assert shapes == {(24, 24): 6, (16, 32): 2}
    assert skip_counts(stream) == {"truncated or damaged image": 1}


def test_nothing_that_can_be_decoded_is_an_error(tmp_path: Path) -> None:
    config = config_of(write_folder(tmp_path, [(16, 16)] * 3))
    stream = open_small(config)
    for file in tmp_path.glob("*.png"):
        break_picture(file)
    with pytest.raises(ValueError, match=r"33 samples in a row cannot be decoded, the last is .*"):
        stream.next(1, 0, 1)
    config.workers = 1
    with pytest.raises(ValueError, match=r"cannot be decoded.*\(truncated or damaged image\)"):
        open_small(config).next(1, 0, 1)


def test_a_file_that_goes_missing_later_is_replaced(tmp_path: Path) -> None:
    stream = open_small(config_of(write_folder(tmp_path, [(16, 16)] * 3)))
    (tmp_path / "001.png").unlink()
    assert set(captions(stream.next(9, 0, 9))) == {"picture 0", "picture 2"}
    assert skip_counts(stream) == {"missing file": 1}
    assert f"{tmp_path} 001.png" in stream.skipped.summary()


def test_what_breaks_later_adds_to_what_was_broken_before(tmp_path: Path) -> None:
    write_folder(tmp_path, [(16, 16)] * 3)
    rows = [{"image": f"{name}.png", "text": "fox"} for name in ("000", "001", "x", "y", "002")]
    (tmp_path / "table.json").write_text(json.dumps(rows))
    stream = open_small(config_of(tmp_path / "table.json"))
    assert skip_counts(stream) == {"missing file": 2}
    (tmp_path / "001.png").unlink()
    stream.next(9, 0, 9)
    assert skip_counts(stream) == {"missing file": 3}
