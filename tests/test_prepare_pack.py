"""Pack: uniform tars that are the same to the byte however they came to be."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from image_files import encode, gradient, png, write_folder, write_tar
from PIL import Image
from runs import in_child, kill, on_call

from sfumato.config import DownloadConfig, FilterConfig, PackConfig
from sfumato.data.left_out import UNREADABLE
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prepared.format import PreparedError, TarRecord
from sfumato.preparation import sources
from sfumato.preparation.filter import filter_samples
from sfumato.preparation.pack import pack

SIZES = [(8 + i % 5, 9 + i % 3) for i in range(25)]
DROPPED = {"no caption": 1, "not an image (JPEG, PNG, WEBP, BMP)": 1, "zero-byte file": 1}

# Packs, and is killed at the N-th time that a file is synced or a member is added.
KILLED = """
import os, signal, sys
from pathlib import Path
from sfumato.config import DownloadConfig, PackConfig
from sfumato import files
from sfumato.preparation import tars
from sfumato.preparation.pack import pack
source, out, workers, what, left = sys.argv[1:]
left = int(left)
def dying(function):
    def call(*arguments):
        global left
        function(*arguments)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return call
if what == "sync":
    files._sync = dying(files._sync)
elif what == "add":
    tars._add = dying(tars._add)
pack(PackConfig(source, samples_per_shard=10, workers=int(workers)), DownloadConfig(), Path(out))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return 25 pictures, of which three end in no sample."""
    folder = write_folder(tmp_path / "source", SIZES)
    (folder / "003.png").write_bytes(b"no picture")
    (folder / "004.png").write_bytes(b"")
    (folder / "009.txt").unlink()
    return folder


def packed(source: Path | str, out: Path, **settings: Any) -> dict[str, int]:
    config = PackConfig(str(source), **{"samples_per_shard": 10, **settings})
    return pack(config, DownloadConfig(), out)


def records(out: Path) -> list[TarRecord]:
    return [PreparedFolder(out).tar_record(p.stem) for p in sorted((out / "shards").glob("*.json"))]


def tree(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def times(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_tars_hold_the_pictures_own_bytes_and_all_is_counted(source: Path, tmp_path: Path) -> None:
    bins = packed(source, tmp_path / "out")
    assert bins == {"kept": 22, **DROPPED}
    found = records(tmp_path / "out")
    # The picture without a caption is no row, and keys are numbers of rows.
    assert [record.rows for record in found] == [(0, 10), (10, 20), (20, 24)]
    assert [len(record.samples) for record in found] == [8, 10, 4]
    keys = [f"{i:09d}" for i in range(24) if i not in {3, 4}]
    assert [m.key for r in found for m in r.samples] == keys
    good = [i for i in range(25) if i not in {3, 4, 9}]
    for number, member in zip(good, (m for r in found for m in r.samples), strict=True):
        assert (member.height, member.width) == SIZES[number]
        assert member.captions == (f"picture {number}",)
        tar = (tmp_path / "out" / "shards" / f"{int(member.key) // 10:06d}.tar").read_bytes()
        picture = tar[member.offset : member.offset + member.size]
        assert picture == (source / f"{number:03d}.png").read_bytes()


def test_tars_are_read_by_the_webdataset_package(source: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    packed(source, tmp_path / "out")
    tars = sorted(str(tar) for tar in (tmp_path / "out" / "shards").glob("*.tar"))
    seen = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    members = [member for record in records(tmp_path / "out") for member in record.samples]
    assert len(seen) == 22
    for sample, member in zip(seen, members, strict=True):
        number = int(member.captions[0].split()[1])
        assert sample["__key__"] == member.key and sample["txt"] == f"picture {number}"
        assert np.array_equal(sample["png"], gradient(*SIZES[number], number))
        assert sample["json"]["captions"] == [f"picture {number}"]
        assert (sample["json"]["height"], sample["json"]["width"]) == SIZES[number]
        assert sample["json"]["sha256"] == member.sha256


def test_members_have_no_time_and_no_owner(source: Path, tmp_path: Path) -> None:
    packed(source, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shards" / "000000.tar") as tar:
        found = {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar}
    assert found == {(0, 0, 0, "", 0o644)}


def test_the_suffix_is_of_what_the_picture_is(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient(12, 8))
    kinds = {"a": ("JPEG", "jpg"), "b": ("WEBP", "webp"), "c": ("BMP", "bmp"), "d": ("PNG", "png")}
    for name, (kind, _) in kinds.items():
        (tmp_path / f"{name}.png").write_bytes(encode(picture, kind))
        (tmp_path / f"{name}.txt").write_text(name)
    packed(tmp_path, tmp_path / "out")
    members = records(tmp_path / "out")[0].samples
    assert {m.captions[0]: m.suffix for m in members} == {n: s for n, (_, s) in kinds.items()}


def test_height_and_width_are_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = encode(Image.fromarray(gradient(12, 8)), "JPEG", exif)
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", picture), ("0.txt", b"turned")])
    packed(tar, tmp_path / "out")
    (member,) = records(tmp_path / "out")[0].samples
    assert (member.height, member.width) == (8, 12)


def run_killed(source: Path, out: Path, what: str, left: int, workers: int = 2, seed: int = 0):
    arguments = [str(source), str(out), str(workers), what, str(left)]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    run = [sys.executable, "-c", KILLED, *arguments]
    return subprocess.run(run, env=environment, capture_output=True, check=False).returncode


def test_neither_hash_seed_nor_workers_change_a_byte(source: Path, tmp_path: Path) -> None:
    for name, workers, seed in (("a", 1, 1), ("b", 5, 2)):
        assert run_killed(source, tmp_path / name, "never", 0, workers, seed) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert len(tree(tmp_path / "a")) == 7


@pytest.mark.parametrize(
    ("what", "left"), [("add", 7), ("add", 47), ("sync", 1), ("sync", 2), ("sync", 3), ("sync", 6)]
)
def test_a_kill_at_any_moment_leaves_no_trace(
    source: Path, tmp_path: Path, what: str, left: int
) -> None:
    packed(source, tmp_path / "whole")
    out = tmp_path / "out"
    assert run_killed(source, out, what, left) == -signal.SIGKILL
    finished = {name for name in tree(out) if name.endswith(".json")}
    for name in finished:
        assert tree(out)[name] == tree(tmp_path / "whole")[name]
        tar = name.replace(".json", ".tar")
        assert tree(out)[tar] == tree(tmp_path / "whole")[tar]
    before = times(out)
    assert packed(source, out) == {"kept": 22, **DROPPED}
    assert tree(out) == tree(tmp_path / "whole")
    assert all(times(out)[Path(name).name] == before[Path(name).name] for name in finished)


def test_a_kill_while_tars_are_made_of_other_settings_mixes_nothing(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    packed(source, out, max_pixels=90)
    # The tar is new, and its record was never written.
    assert run_killed(source, out, "sync", 2) == -signal.SIGKILL
    packed(source, out, max_pixels=90)
    packed(source, tmp_path / "whole", max_pixels=90)
    assert tree(out) == tree(tmp_path / "whole")


def test_finished_tars_are_not_made_again_and_no_picture_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = packed(source, tmp_path / "out")
    before = times(tmp_path / "out")

    def refuse(*_: Any) -> Any:
        raise AssertionError("a picture was read")

    monkeypatch.setattr("sfumato.preparation.pack._look_at", refuse)
    assert packed(source, tmp_path / "out") == first
    assert times(tmp_path / "out") == before


def test_only_what_changed_is_made_again(tmp_path: Path) -> None:
    """A source of tars is looked at tar by tar."""
    for name in range(4):
        pairs = [(f"{i}.{s}", d) for i in range(5) for s, d in (("png", png(8, 8, 5 * name + i)),
                                                                ("txt", b"a"))]  # fmt: skip
        write_tar(tmp_path / f"{name}.tar", pairs)
    out = tmp_path / "out"
    packed(f"{tmp_path}/*.tar", out, samples_per_shard=5)
    before = times(out)
    write_tar(tmp_path / "2.tar", [("0.png", png(8, 8, 77)), ("0.txt", b"other")])
    assert packed(f"{tmp_path}/*.tar", out, samples_per_shard=5) == {"kept": 16}
    after = times(out)
    same = {name for name in before if after.get(name) == before[name]}
    names = {f"{name}.{suffix}" for name in ("000000", "000001") for suffix in ("tar", "json")}
    assert same == {*names, ".written"}
    packed(f"{tmp_path}/*.tar", tmp_path / "anew", samples_per_shard=5)
    assert tree(out) == tree(tmp_path / "anew")


def test_a_source_that_grows_ends_in_the_same_tars_as_one_that_was_so_from_the_start(
    tmp_path: Path,
) -> None:
    numbers = iter(range(100))

    def write(name: str, count: int) -> None:
        members = [(f"{i}.{s}", d) for i in range(count)
                   for s, d in (("png", png(8, 8, next(numbers))), ("txt", b"a"))]  # fmt: skip
        write_tar(tmp_path / "in" / name, members)

    (tmp_path / "in").mkdir()
    write("a.tar", 10)
    packed(tmp_path / "in", tmp_path / "out")
    write("b.tar", 3)
    (tmp_path / "in" / "c.tar").write_bytes(b"no tar")
    assert packed(tmp_path / "in", tmp_path / "out") == {"kept": 13, "not a tar": 1}
    packed(tmp_path / "in", tmp_path / "anew")
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")
    (tmp_path / "in" / "b.tar").unlink()
    assert packed(tmp_path / "in", tmp_path / "out") == {"kept": 10, "not a tar": 1}
    shutil.rmtree(tmp_path / "anew")
    packed(tmp_path / "in", tmp_path / "anew")
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")


def test_a_picture_of_the_same_name_and_length_is_noticed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed(source, out)
    whole = png(*SIZES[20], 20)
    other = png(*SIZES[20], 21)
    assert len(whole) == len(other) and whole != other
    (source / "020.png").write_bytes(other)
    packed(source, out)
    packed(source, tmp_path / "anew")
    assert tree(out) == tree(tmp_path / "anew")


@pytest.mark.parametrize("kind", ["folder", "tars", "table"])
def test_files_of_the_future_are_packed_once_until_they_change(tmp_path: Path, kind: str) -> None:
    """A camera without a clock, or an archive from another time zone."""
    pictures, out = write_folder(tmp_path / "in", [(16, 16)] * 4), tmp_path / "out"
    named: Path | str = pictures
    file, old, new = pictures / "001.png", png(16, 16, 1), png(16, 16, 2)
    file.write_bytes(old)
    assert len(old) == len(new)
    if kind == "tars":
        file = tmp_path / "a.tar"
        write_tar(file, [("0.png", old), ("0.txt", b"a")])
        named, old = f"{tmp_path}/*.tar", file.read_bytes()
        new = old.replace(png(16, 16, 1), png(16, 16, 2))
    elif kind == "table":
        rows = [{"path": f"{i:03d}.png", "caption": "a"} for i in range(4)]
        (pictures / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = pictures / "t.jsonl"
    future = (2**31, 2**31)
    os.utime(file, future)
    packed(named, out)
    before = times(out)
    packed(named, out)
    assert times(out) == before
    file.write_bytes(new)
    os.utime(file, future)
    packed(named, out)
    packed(named, tmp_path / "anew")
    assert tree(out) == tree(tmp_path / "anew")
    assert times(out)["000000.tar"] > before["000000.tar"]


def test_a_damaged_tar_without_its_record_or_a_record_without_its_tar_is_made_again(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    packed(source, out)
    whole = tree(out)
    (out / "shards" / "000000.tar").unlink()
    (out / "shards" / "000001.json").write_text("{")
    packed(source, out)
    assert tree(out) == whole


# Tars that are damaged


def test_bad_members_are_counted_by_reason(tmp_path: Path) -> None:
    members = [
        ("a.png", png(8, 8, 1)), ("a.txt", b"a"),
        ("a.png", png(8, 8, 2)),
        ("b.png", png(8, 8, 3)),
        ("c.txt", b"no picture"),
        ("../d.png", png(8, 8, 4)), ("../d.txt", b"leaves"),
        ("/e.png", png(8, 8, 5)), ("/e.txt", b"leaves"),
        ("f.png", png(30, 30)[:-30]), ("f.txt", b"cut off"),
        ("g.png", png(8, 8, 6)), ("g.txt", "naïve".encode("latin-1")),
        ("h.png", png(8, 8, 7)), ("h.txt", b"h"),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", members)
    assert packed(tar, tmp_path / "out") == {
        "kept": 2,
        "caption that is not UTF-8": 1,
        "member that leaves its folder": 2,
        "no caption": 1,
        "no image with this key": 1,
        "second member of the same name": 1,
        "truncated or damaged image": 1,
    }
    assert [m.captions for m in records(tmp_path / "out")[0].samples] == [("a",), ("h",)]


def test_a_truncated_tar_gives_what_is_before_the_damage(tmp_path: Path) -> None:
    members = [(f"{i}.{s}", d) for i in range(4) for s, d in (("png", png(8, 8, i)), ("txt", b"a"))]
    tar = write_tar(tmp_path / "a.tar", members)
    whole = tar.read_bytes()
    tar.write_bytes(whole[: whole.index(b"2.txt") + 100])
    bins = packed(tar, tmp_path / "out")
    assert bins == {"kept": 2, "truncated or damaged tar": 1}


# Columns


def test_further_captions_and_columns_come_from_tars(tmp_path: Path) -> None:
    said = {"caption": "x", "long": ["first", "second", " ", 3], "score": 6.5, "nan": float("nan")}
    members = [
        ("a.png", png()), ("a.txt", b"main"), ("a.json", json.dumps(said).encode()),
        ("b.png", png(8, 8, 1)), ("b.txt", b"main"), ("b.json", b"{oops"),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", members)
    settings: dict[str, Any] = {"captions": ["long", "caption"], "columns": ["score", "nan"]}
    packed(tar, tmp_path / "out", **settings)
    first, second = records(tmp_path / "out")[0].samples
    assert first.captions == ("main", "first", "second", "x")
    assert first.columns == {"score": 6.5, "nan": None}
    assert second.captions == ("main",) and second.columns == {"score": None, "nan": None}
    with pytest.raises(ValueError, match=r"a.tar has no column 'scor'; its columns are 'caption'"):
        packed(tar, tmp_path / "other", columns=["scor"])


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_further_captions_and_columns_come_from_tables(tmp_path: Path, suffix: str) -> None:
    write_folder(tmp_path / "images", [(8, 8)] * 3)
    rows = [{"file_name": f"{i:03d}.png", "text": f"t{i}", "more": f"m{i}", "score": i / 2}
            for i in range(3)]  # fmt: skip
    table = tmp_path / "images" / f"metadata.{suffix}"
    if suffix == "csv":
        lines = [",".join(map(str, row.values())) for row in rows]
        table.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    elif suffix in ("json", "jsonl"):
        lines = [json.dumps(row) for row in rows]
        table.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    settings: dict[str, Any] = {"captions": ["more"], "columns": ["score"]}
    assert packed(tmp_path / "images", tmp_path / "out", **settings) == {"kept": 3}
    if suffix == "jsonl":  # a column need not be in every object
        lines = [json.dumps({k: v for k, v in row.items() if row is not rows[0] or k != "score"})
                 for row in rows]  # fmt: skip
        table.write_text("\n".join(lines))
        assert packed(tmp_path / "images", tmp_path / "some", **settings) == {"kept": 3}
        found = [m.columns["score"] for m in records(tmp_path / "some")[0].samples]
        assert found == [None, 0.5, 1]
    members = records(tmp_path / "out")[0].samples
    assert [m.captions for m in members] == [(f"t{i}", f"m{i}") for i in range(3)]
    assert [float(m.columns["score"]) for m in members] == [0, 0.5, 1]
    with pytest.raises(ValueError, match="no column 'nope'"):
        packed(tmp_path / "images", tmp_path / "other", columns=["nope"])
    table.unlink()
    with pytest.raises(ValueError, match=r"columns='score' was given.* no table; leave it"):
        packed(tmp_path / "images", tmp_path / "other", columns=["score"])


def test_what_cannot_be_packed_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"nothing of .*empty can be packed: there is no picture"):
        packed(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match=r"can be packed: 24 more than max_pixels=3 pixels"):
        (source / "003.png").write_bytes(png())
        (source / "004.png").write_bytes(png())
        packed(source, tmp_path / "out", max_pixels=3)
    with pytest.raises(ValueError, match=r"no such file: absent; check pack.path = 'absent'"):
        packed("absent", tmp_path / "out")
    with pytest.raises(ValueError, match=r"there is nothing to pack: pack.path is not given"):
        pack(PackConfig(), DownloadConfig(), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.*"))


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 512 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "noise"
    source.mkdir()
    noise = np.random.default_rng(0)
    for i in range(12):
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (100, 100, 3), np.uint8)).save(file, "PNG")
        (source / f"{i:02d}.png").write_bytes(file.getvalue())
        (source / f"{i:02d}.txt").write_text(f"noise {i}")
    packed(source, tmp_path / "whole", samples_per_shard=4)
    filler, out = small_disk / "filler", small_disk / "out"
    filler.write_bytes(b"x" * 250_000)
    with pytest.raises(PreparedError, match=r"no space is left on the disk; nothing half.*Free"):
        packed(source, out, samples_per_shard=4)
    left = tree(out)
    assert left.pop("shards/.unfinished") == b""
    left.pop("shards/.written")
    assert left.keys() == {"shards/000000.tar", "shards/000000.json"}
    assert left.items() <= tree(tmp_path / "whole").items()
    filler.unlink()
    packed(source, out, samples_per_shard=4)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_source_in_the_folder_of_tars_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "out" / "shards"
    source.mkdir(parents=True)
    file = source / "train-0001.tar"
    file.write_bytes(b"mine")
    with pytest.raises(ValueError, match="where the tars of out"):
        pack(PackConfig(path=str(source)), DownloadConfig(), tmp_path / "out")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(png())
    (pictures / "a.txt").write_text("a star")
    for name in ("train-0001.tar", "000000.tar"):
        file = file.rename(source / name)
        with pytest.raises(ValueError, match=rf"holds {name}, which sfumato prepare did not"):
            pack(PackConfig(path=str(pictures)), DownloadConfig(), tmp_path / "out")
    assert file.read_bytes() == b"mine"


def test_a_packing_that_did_not_finish_is_not_filtered(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        (pictures / f"{i}.png").write_bytes(png())
        (pictures / f"{i}.txt").write_text("a star")
    config = PackConfig(path=str(pictures), samples_per_shard=1)

    def killed() -> None:
        on_call(2, kill, "write_text")
        pack(config, DownloadConfig(), tmp_path / "out")

    assert in_child(killed) == -9
    with pytest.raises(ValueError, match="was not finished"):
        filter_samples(FilterConfig(), tmp_path / "out")
    pack(config, DownloadConfig(), tmp_path / "out")
    assert filter_samples(FilterConfig(), tmp_path / "out") == {"kept": 3}


def test_a_packing_of_nothing_leaves_what_was_packed(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(png())
    (pictures / "a.txt").write_text("a star")
    pack(PackConfig(path=str(pictures)), DownloadConfig(), tmp_path / "out")
    (pictures / "a.txt").write_text(" ")
    with pytest.raises(ValueError, match="nothing of"):
        pack(PackConfig(path=str(pictures)), DownloadConfig(), tmp_path / "out")
    assert filter_samples(FilterConfig(), tmp_path / "out") == {"kept": 1}


def test_a_kill_while_the_tars_of_a_longer_packing_are_removed_is_mended(tmp_path: Path) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for i in range(4):
        (pictures / f"{i}.png").write_bytes(png())
        (pictures / f"{i}.txt").write_text("a star")
    pack(PackConfig(path=str(pictures), samples_per_shard=1), DownloadConfig(), out)
    whole = PackConfig(path=str(pictures), samples_per_shard=4)

    def killed() -> None:
        unlink, left = Path.unlink, [2]

        def dying(place: Path, missing_ok: bool = False) -> None:
            unlink(place, missing_ok=missing_ok)
            left[0] -= place.name == "000003.json"
            if left[0] == 1:
                kill()

        Path.unlink = dying  # type: ignore[method-assign]
        pack(whole, DownloadConfig(), out)

    assert in_child(killed) == -9
    assert (out / "shards" / "000003.tar").exists() and not (
        out / "shards" / "000003.json"
    ).exists()
    pack(whole, DownloadConfig(), out)
    assert sorted(p.name for p in (out / "shards").glob("0*")) == ["000000.json", "000000.tar"]


@pytest.mark.parametrize("tags", [["\ud800x"], {"a": "\ud800"}, "\ud800"])
def test_lone_surrogates_in_a_column_are_replaced(tmp_path: Path, tags: object) -> None:
    (tmp_path / "a.png").write_bytes(png())
    row = {"file_name": "a.png", "text": "a star", "tags": tags}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out"
    assert pack(PackConfig(path=str(tmp_path), columns=["tags"]), DownloadConfig(), out) == {
        "kept": 1
    }
    assert "?" in json.dumps(PreparedFolder(out).tar_record("000000").samples[0].columns["tags"])


def test_hostile_rows_do_not_stop_a_pack(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", [(8, 8)] * 3)
    rows = [{"file_name": name, "text": "a"} for name in ("0\0.png", "000.png", "pipe.png")]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.mkfifo(source / "pipe.png")
    bins = packed(source, tmp_path / "out")
    assert bins["kept"] == 1 and sum(bins.values()) == 3
    (source / "metadata.jsonl").unlink()
    (source / "001.txt").unlink()
    os.mkfifo(source / "001.txt")
    (source / "002.txt").unlink()
    (source / "002.txt").symlink_to("/etc/hostname")
    bins = packed(source, tmp_path / "other")
    assert bins["kept"] == 1 and bins["unreadable caption"] == 1
    assert bins["caption: link that leaves the folder (copy what it leads to instead)"] == 1


def add_member(
    file: IO[bytes], name: str, data: bytes, size: int | None = None, **pax: str
) -> None:
    """Append a member; what `data` lacks of `size` is a hole, which takes no room on the disk."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data) if size is None else size, pax
    file.write(info.tobuf(tarfile.PAX_FORMAT) + data)
    file.seek(-(-(file.tell() - len(data) + info.size) // 512) * 512)


def test_hostile_members_do_not_stop_a_pack(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        for key, size in (("000", None), ("001", 2**28), ("002", 2**40), ("003", None)):
            add_member(file, f"{key}.png", png(), size)
            add_member(file, f"{key}.txt", b"a star", 2**40 if key == "003" else None)
        add_member(file, "plain", png(), path="nul\0in.png")
        add_member(file, "plain", b"a star", path="nul\0in.txt")
        add_member(file, "plain", png(), path="../leaves.png")
        add_member(file, "plain", b"a star", path="../leaves.txt")
        add_member(file, "004.png", png())
        add_member(file, "004.json", b"[" * 10**5)
        add_member(file, "005.png", png())
        add_member(file, "005.txt", b"a star")
        file.write(bytes(1024))
    bins = packed(tmp_path / "a.tar", tmp_path / "out")
    assert bins == {
        "kept": 3,  # 000, 005, and the one whose name has a zero byte
        "file far larger than its picture": 1,
        "file above 2 GiB": 1,
        "member .txt above 16,777,216 bytes": 1,
        "no caption": 1,
        "member that leaves its folder": 1,
        "not a JSON object": 1,
    }


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_larger_than_memory_do_not_stop_a_pack(tmp_path: Path, kind: bytes) -> None:
    """What lies before them is kept; the tars behind are packed."""
    (tmp_path / "tars").mkdir()
    for name in ("a", "b"):
        with (tmp_path / "tars" / f"{name}.tar").open("wb") as file:
            add_member(file, "000.png", png())
            add_member(file, "000.txt", b"a star")
            if name == "a":
                header = tarfile.TarInfo("huge")
                header.size, header.type = 2**40, kind
                file.write(header.tobuf(tarfile.GNU_FORMAT))
                file.truncate(file.tell() + 2**40)
            else:
                file.write(bytes(1024))
    bins = packed(tmp_path / "tars", tmp_path / "out")
    assert bins == {"kept": 2, "truncated or damaged tar": 1}


def test_rows_that_a_worker_does_not_see_end_the_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine of a cluster where the input is not mounted."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        members = [(f"{i}.{end}", data) for i in range(6) for end, data in picture_of(name, i)]
        write_tar(tmp_path / "in" / f"{name}.tar", members)
    config, listing = PackConfig(str(tmp_path / "in"), samples_per_shard=4), sources._list_one
    seen = list[str]()

    def one(tar: Path, *more: Any) -> sources.Listing:
        seen.append(tar.name)
        hidden = seen.count("a.tar") > 1 and tar.name == "a.tar"
        return sources.Listing([], {}) if hidden else listing(tar, *more)

    with monkeypatch.context() as absent:
        absent.setattr(sources, "_list_one", one)
        with pytest.raises(PreparedError, match=r"a\.tar gave 0 of its rows 0 to 3 on .*run the"):
            pack(config, DownloadConfig(), tmp_path / "out")
    pack(config, DownloadConfig(), tmp_path / "out")
    again = PreparedFolder(tmp_path / "out")
    captions = [each.captions for i in range(3) for each in again.tar_record(f"{i:06d}").samples]
    assert captions == [(f"{name} {i}",) for name in ("a", "b") for i in range(6)]


def test_a_tar_that_was_unreadable_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        members = [(f"0.{end}", data) for end, data in picture_of(name, 0)]
        write_tar(tmp_path / "in" / f"{name}.tar", members)
    config, listing = PackConfig(str(tmp_path / "in")), sources._list_one

    def one(tar: Path, *more: Any) -> sources.Listing:
        hidden = tar.name == "a.tar"
        return sources.Listing([], {UNREADABLE: 1}) if hidden else listing(tar, *more)

    with monkeypatch.context() as denied:
        denied.setattr(sources, "_list_one", one)
        pack(config, DownloadConfig(), tmp_path / "out")
    pack(config, DownloadConfig(), tmp_path / "out")
    samples = PreparedFolder(tmp_path / "out").tar_record("000000").samples
    assert [each.captions for each in samples] == [("a 0",), ("b 0",)]


def picture_of(name: str, number: int) -> list[tuple[str, bytes]]:
    return [("png", png(8, 8, number)), ("txt", f"{name} {number}".encode())]
