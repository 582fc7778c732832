"""Rows that are lost: each is counted as a row; files of a folder are read, counted or named."""

import json
import logging
import os
from pathlib import Path

import pytest
from image_files import config_of, encode, gradient, png, write_folder, write_tar
from PIL import Image

from sfumato.config import DownloadConfig, PackConfig
from sfumato.data.entries import Columns
from sfumato.data.images import open_images
from sfumato.data.left_out import SkipLog, SkipReport
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prompts import open_prompts
from sfumato.data.sources import list_source
from sfumato.preparation.pack import pack

QUOTED = {
    "never closed": {2: '2.png,"a ruler'},
    "closed by a quoted row": {2: '2.png,"a ruler', 29: '29.png,"quoted, as it should be"'},
    "closed at an end": {2: '2.png,"a ruler of 12', 29: '29.png,a ruler of 12"'},
    "closed before a comma": {2: '2.png,"a ruler', 29: '29.png,", a comma first'},
    "in the last row": {49: '49.png,"a ruler'},
}


def listed(
    path: Path, lines: str = "first"
) -> tuple[list[tuple[str, tuple[str, ...]]], SkipReport]:
    log = SkipLog()
    entries = list_source(str(path), None, Columns(lines=lines), log)
    return [(entry.position, entry.captions) for entry in entries], log.report()


def count(report: SkipReport) -> int:
    return sum(skip.count for skip in report.skips)


@pytest.mark.parametrize("changes", QUOTED.values(), ids=QUOTED)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_rows_behind_a_quotation_mark(tmp_path: Path, changes: dict[int, str], suffix: str) -> None:
    rows = {i: f"{i}.png,a picture {i}" for i in range(50)} | changes
    text = "\n".join(["image,text", *rows.values()]) + "\n"
    path = tmp_path / f"t{suffix}"
    path.write_text(text if suffix == ".csv" else text.replace(", ", "; ").replace(",", "\t"))
    entries, report = listed(path)
    assert len(entries) + count(report) == 50
    first, last = min(changes) + 2, 31 if 29 in changes else 51
    named = f"line {first}" if first == last else f"lines {first} to {last}"
    assert f"{path} {named})" in report.summary()


def test_captions_of_several_lines_are_no_lost_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('image,text\n1.png,"a fox, red\nin snow, at night\n\n"\n2.png,"a\nb"\n')
    assert listed(path)[0] == [("1.png", ("a fox, red",)), ("2.png", ("a",))]


@pytest.mark.parametrize(
    ("line", "lost"),
    [('[{"image": "b"}, {"image": "c"}]', 2), ('{"image": "b"}{"image": "c"}{"im', 3), ("7", 1)],
)
def test_rows_in_a_line_that_is_no_object(tmp_path: Path, line: str, lost: int) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"image": "a.png", "text": "a"}\n' + line + "\n")
    assert count(listed(path)[1]) == lost
    objects = [{"image": "a.png", "text": "a"}, [{"image": "b"}, {"image": "c"}]]
    (tmp_path / "t.json").write_text(json.dumps(objects))
    assert count(listed(tmp_path / "t.json")[1]) == 2


def test_rows_of_a_damaged_array_among_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "a"}, {"prompt": "b"}]')
    (tmp_path / "b.jsonl").write_text('{"prompt": "c"}\n')
    stream = open_prompts(f"{tmp_path}/{{a.json,b.jsonl}}", shuffle=False)
    (tmp_path / "a.json").write_text('[{"prompt": "a"}, {"prompt": "b"}, {"pro')
    stream.next(4, 0, 4)
    (skip,) = stream.skipped.skips
    assert skip.reason == "unreadable file" and skip.count == 3


def members(count: int) -> list[tuple[str, bytes]]:
    texts = [(f"{i:03d}.txt", b"picture %d" % i) for i in range(count)]
    return [each for i in range(count) for each in ((f"{i:03d}.png", png(8, 8, i)), texts[i])]


@pytest.mark.parametrize(
    "member", ["000.txt", "004.png", "004.txt", "008.png", "009.png", "009.txt"]
)
@pytest.mark.parametrize("offset", [0, 124, 257])
def test_keys_behind_a_damaged_header(tmp_path: Path, member: str, offset: int) -> None:
    path = write_tar(tmp_path / "t.tar", members(10))
    data = bytearray(path.read_bytes())
    data[data.index(member.encode()) + offset] ^= 0x55
    path.write_bytes(data)
    entries, report = listed(path)
    assert len(entries) == int(member[:3]) and count(report) == 10 - len(entries)


def test_keys_behind_the_end_of_a_tar_and_links(tmp_path: Path) -> None:
    one, two = (write_tar(tmp_path / f"{i}.tar", members(3)).read_bytes() for i in "ab")
    path = tmp_path / "t.tar"
    path.write_bytes(one + two)
    entries, report = listed(path)
    assert len(entries) == 3 and report.skips[0].count == 3
    assert "(000 to 002)" in report.summary()
    import tarfile

    with tarfile.open(path, "w") as tar:
        for name, kind in (("x.png", tarfile.SYMTYPE), ("x.txt", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "y"
            tar.addfile(link)
    entries, report = listed(path)
    assert not entries and count(report) == 1


def test_tars_beside_pictures(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", [(8, 8)] * 5)
    (folder / "._backup.tar").write_bytes(b"\0\5\x16\7" + bytes(200))
    assert len(listed(folder)[0]) == 5
    for name in ("backup.tar", "BACKUP.TAR"):
        path = write_tar(folder / name, members(2))
        with pytest.raises(ValueError, match=f"both tars \\({name}\\) and pictures"):
            listed(folder)
        path.rename(tmp_path / name)
        assert len(listed(tmp_path / name)[0]) == 2
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "X.TAR", members(2))
    (tars / "preview.png").write_bytes(png())
    (tars / "README.md").write_text("tars")
    entries, report = listed(tars)
    assert len(entries) == 2 and report.summary().startswith("skipped picture beside tars: 1")


def test_every_file_of_a_folder_is_read_or_counted(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.jpe", "c.pjpeg", "z.JPG"):
        (tmp_path / name).write_bytes(encode(Image.fromarray(gradient(8, 8)), "JPEG"))
        (tmp_path / name).with_suffix(".txt").write_text(name)
    others = ["d.heif", "e.tga", "g.ppm", "h.psd", "j.jp2", "k.zip", "l.mp4", "m.parquet", "hash"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    for name in (
        "README.md",
        "LICENSE",
        "a.npz",
        "a.json",
        "readme.txt",
        "Thumbs.db",
        ".hidden.png",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "lost.txt").write_text("a caption")
    entries, report = listed(tmp_path)
    assert len(entries) == 4 and count(report) == len(others) + 1
    assert "caption without an image: 1" in report.summary()


def test_conventions_of_other_trainers_are_pointed_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "10_cat", [(8, 8)])
    (tmp_path / "b.png").write_bytes(png())
    (tmp_path / "b.caption").write_text("a cat")
    (tmp_path / "labels.csv").write_text("image,text\n")
    entries, report = listed(tmp_path)
    assert [skip.reason for skip in report.skips] == ["no caption"] and len(entries) == 1
    for text in ("as kohya repeats it", ".caption are not read", "table that is not read"):
        assert text in report.summary()


def test_layouts_of_the_hub(tmp_path: Path) -> None:
    data = tmp_path / "snapshot" / "data"
    data.mkdir(parents=True)
    (data / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    for path in (data.parent, data):
        with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet.*save_to_disk"):
            listed(path)
    for split in ("train", "test"):
        folder = tmp_path / "folder" / split
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(png())
        (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cat"}\n')
        if split == "train":
            assert listed(folder.parent)[0] == [("1.png", ("a cat",))]
    with pytest.raises(ValueError, match=r"test/metadata.jsonl, train/metadata.jsonl"):
        listed(tmp_path / "folder")


@pytest.mark.parametrize(
    ("path", "position"), [("sub\\1.png", "sub/1.png"), ("sub\\..\\sub\\1.png", "sub/1.png")]
)
def test_paths_that_windows_wrote(tmp_path: Path, path: str, position: str) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"image,text\n{path},a cat\n")
    assert listed(table)[0] == [(position, ("a cat",))]
    table.write_text("image,text\n..\\1.png,a cat\n")
    with pytest.raises(ValueError, match="leaves the base path"):
        listed(table)
    table.write_text("image,text\na\0.png,a cat\n")
    assert listed(table)[1].skips[0].reason == "path with zero bytes"
    if os.name == "posix":
        (tmp_path / "a\\b.png").write_bytes(png())
        table.write_text("image,text\na\\b.png,a cat\n")
        assert listed(table)[0] == [("a\\b.png", ("a cat",))]


TEXT = "a red car\r\nan automobile, side view\n\n photo of a vehicle\n"
LINES = ("a red car", "an automobile, side view", "photo of a vehicle")


@pytest.mark.parametrize("kind", ["folder", "tar", "jsonl"])
def test_captions_of_several_lines(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"t.{kind}"
    if kind == "folder":
        path.mkdir()
        (path / "a.png").write_bytes(png())
        (path / "a.txt").write_bytes(TEXT.encode())
    elif kind == "tar":
        write_tar(path, [("a.png", png()), ("a.txt", TEXT.encode())])
    else:
        (tmp_path / "a.png").write_bytes(png())
        path.write_text(json.dumps({"image": "a.png", "text": TEXT}) + "\n")
    for lines, captions, said in (
        ("first", LINES[:1], "the first is taken"),
        ("random", LINES, "each is a caption"),
        ("all", (TEXT.strip(),), ""),
    ):
        entries, report = listed(path, lines)
        assert [captions for _, captions in entries] == [captions]
        assert said in report.summary() and not report.skips and bool(report) == bool(said)
        stream = open_images(config_of(path, caption_lines=lines), height=8, width=8, divisor=8,
                             seed=0)  # fmt: skip
        assert {sample.caption for sample in stream.next(60, 0, 60)} == {*captions}
        out = tmp_path / f"{kind}-{lines}"
        pack(PackConfig(str(path), caption_lines=lines), DownloadConfig(), out)
        assert PreparedFolder(out).tar_record("000000").samples[0].captions == captions


def test_changed_colours_and_bad_alternatives_are_remarks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"image": "a.png", "text": ["a cat", " "]}]
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[0]) + "\n")
    data = png()
    gamma = b"\0\0\0\4gAMA\0\1\x86\xa0\x31\xe8\x96\x5f"
    (tmp_path / "a.png").write_bytes(data[:33] + gamma + data[33:])
    with caplog.at_level(logging.WARNING):
        stream = open_images(config_of(tmp_path / "t.jsonl"), height=8, width=8, divisor=8, seed=0)
    assert not stream.skipped.skips
    reasons = ["one of several captions left out", "colours converted to sRGB (PNG gamma)"]
    assert [each.reason for each in stream.skipped.remarks] == reasons
    assert "PNG gamma" in caplog.text
