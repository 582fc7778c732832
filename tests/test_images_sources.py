"""What lists images with captions: folders, tables, tars, Hugging Face datasets."""

import csv
import json
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import config_of, encode, gradient, png, skip_counts, write_folder, write_tar
from PIL import Image

from sfumato.data.entries import Columns
from sfumato.data.images import (
    ImageDataConfig,
    ImageSourceConfig,
    open_images,
    validation_samples,
)
from sfumato.data.left_out import SkipLog
from sfumato.data.sources import list_source


def listed(path: Path | str, **settings: str) -> list[tuple[str, str]]:
    """Return place and caption of what a path lists."""
    columns = Columns(settings.get("image"), settings.get("caption"))
    entries = list_source(str(path), settings.get("base"), columns, SkipLog())
    return [(entry.position, entry.captions[0]) for entry in entries]


def counts(path: Path | str, **settings: str) -> dict[str, int]:
    log = SkipLog()
    columns = Columns(settings.get("image"), settings.get("caption"))
    list_source(str(path), settings.get("base"), columns, log)
    return {skip.reason: skip.count for skip in log.report().skips}


def open_small(config: ImageDataConfig) -> Any:
    return open_images(config, height=8, width=8, divisor=8, seed=0)


# Folders


def test_folder_reads_captions_beside_images_at_any_depth(tmp_path: Path) -> None:
    write_folder(tmp_path / "b" / "deep", [(8, 8)], "x")
    write_folder(tmp_path, [(8, 8), (8, 9)])
    write_folder(tmp_path / ".hidden", [(8, 8)])
    (tmp_path / "._000.png").write_bytes(b"left by macOS")
    (tmp_path / "001.txt").write_bytes("\ufeff  naïve 雨\n".encode())
    (tmp_path / "README.md").write_text("no image")
    expected = [("000.png", "picture 0"), ("001.png", "naïve 雨")]
    assert listed(tmp_path) == [*expected, ("b/deep/x000.png", "xpicture 0")]
    assert listed(f"{tmp_path}/") == listed(tmp_path)


def test_folder_counts_what_it_leaves_out(tmp_path: Path) -> None:
    write_folder(tmp_path, [(8, 8)] * 4)
    (tmp_path / "001.txt").unlink()
    (tmp_path / "002.txt").write_text(" \n")
    (tmp_path / "003.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "old.TIFF").write_bytes(b"II*\0")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "self.txt").write_text("a link to itself")
    assert counts(tmp_path) == {
        "no caption": 1,
        "blank caption": 1,
        "caption that is not UTF-8": 1,
        "format .tiff is not read": 1,
        "folder met before (symbolic link)": 1,
    }
    stream = open_small(config_of(tmp_path))
    assert skip_counts(stream)["unreadable file"] == 1
    assert [sample.caption for sample in stream.next(2, 0, 2)] == ["picture 0"] * 2


def test_folders_behind_links_are_read_unless_the_links_leave(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", [(8, 8)])
    write_folder(tmp_path / "data" / "b", [(8, 8)])
    (tmp_path / "data" / "a").symlink_to(tmp_path / "data" / "b")  # stays inside
    (tmp_path / "data" / "out").symlink_to(tmp_path / "real")
    (tmp_path / "data" / "b" / "up").symlink_to("../../real")
    (tmp_path / "data" / "whole").symlink_to("/")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    leaves = "link that leaves the folder (copy what it leads to instead)"
    for folder in (tmp_path / "data", tmp_path / "link"):  # the folder itself may be a link
        assert listed(folder) == [("a/000.png", "picture 0")]
        assert counts(folder) == {leaves: 3, "folder met before (symbolic link)": 1}
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\nb/000.png,a\n")
    assert listed(tmp_path / "data") == [("b/000.png", "a")]


def test_tars_beside_a_link_that_leaves_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", [(8, 8)])
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", [("a.png", png()), ("a.txt", b"a")])
    (tmp_path / "tars" / "out").symlink_to(tmp_path / "real")
    assert listed(tmp_path / "tars") == [("a.png", "a")]
    leaves = "link that leaves the folder (copy what it leads to instead)"
    assert counts(tmp_path / "tars") == {leaves: 1}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.tsv"])
def test_metadata_in_a_folder_takes_the_place_of_text_files(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "train", [(8, 8)] * 2)
    write_table(tmp_path / name, [{"file_name": "train/001.png", "text": "from the table"}])
    assert listed(tmp_path) == [("train/001.png", "from the table")]


# Tables


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


TABLES = ["t.csv", "t.tsv", "t.json", "t.jsonl", "t.parquet"]


@pytest.mark.parametrize("name", TABLES)
def test_tables_join_the_base_path_and_the_chosen_columns(tmp_path: Path, name: str) -> None:
    base = write_folder(tmp_path / "images", [(8, 8)] * 2)
    rows = [
        {"id": 1, "picture": "000.png", "text": "no", "Beschreibung": ' "a", fox\n雨 '},
        {"id": 2, "picture": str(base / "001.png"), "text": "no", "Beschreibung": "a bird"},
    ]
    table = write_table(tmp_path / name, rows)
    found = listed(table, base=str(base), image="picture", caption="Beschreibung")
    assert found == [("000.png", '"a", fox'), ("001.png", "a bird")]
    source = ImageSourceConfig(str(table), str(base), "picture", "Beschreibung")
    (sample, _) = open_small(ImageDataConfig(sources={"a": source}, shuffle=False)).next(2, 0, 2)
    assert sample.caption == '"a", fox' and sample.name == f"{table} 000.png"


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("column", ["caption", "text", "prompt"])
def test_columns_are_guessed_in_order(tmp_path: Path, name: str, column: str) -> None:
    row = {"file_name": "000.png", column: "a fox"}
    if column == "caption":
        row |= {"prompt": "no", "text": "no", "path": "no"}
    assert listed(write_table(tmp_path / name, [row])) == [("000.png", "a fox")]


def test_the_working_directory_is_a_base_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path / "t.csv", [{"image": "../x.png", "text": "fox"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"line 2: the image path '../x.png' leaves"):
        listed(Path("t.csv"))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../x.png", "../images2/x"])
def test_paths_that_leave_the_base_are_refused(tmp_path: Path, name: str, path: str) -> None:
    (tmp_path / "images").mkdir()
    rows = [{"image": "a/../000.png", "text": "fox"}, {"image": path, "text": "fox"}]
    table = write_table(tmp_path / name, rows)
    place = {"t.csv": "line 3", "t.tsv": "line 3", "t.jsonl": "line 2"}.get(name, "row 1")
    with pytest.raises(ValueError, match=rf"{name} {place}: the image path '{path}' leaves"):
        listed(table, base=str(tmp_path / "images"))


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    lines = [
        "{oops",
        "[1]",
        '{"image": null, "text": "x"}',
        '{"image": ["a.png", "b.png"], "text": "x"}',
        '{"image": "", "text": "x"}',
        '{"image": "a.png"}',
        '{"image": "a.png", "text": 3}',
        '{"image": "a.png", "text": " "}',
        '{"image": "a.png", "text": "\\ud800"}',
        '{"image": "000.png", "text": "good"}',
        '{"image": "gone.png", "text": "no file"}',
        "",
    ]
    write_folder(tmp_path, [(8, 8)])
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    stream = open_small(config_of(tmp_path / "t.jsonl"))
    assert stream.next(1, 0, 1)[0].caption == "good"
    assert skip_counts(stream) == {
        "not a JSON object": 2,
        "no path in column 'image'": 3,
        "no caption": 1,
        "caption that is no text": 1,
        "blank caption": 1,
        "caption that is not UTF-8": 1,
        "missing file": 1,
    }
    assert f"missing file: 1 ({tmp_path}/t.jsonl gone.png)" in stream.skipped.summary()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b'{"image": "a.png"}', "t.json holds a JSON dict; give a list"),
        ("t.json", b"[" * 10**5, "t.json is not JSON"),
        ("t.xlsx", b"", "t.xlsx, whose suffix '.xlsx'.*.csv, .tsv, .json, .jsonl, .parquet, .tar"),
        ("t.txt", b"a fox", "suffix '.txt'"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_small(config_of(tmp_path / name))


def test_pictures_inside_parquet_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [{"image": {"bytes": b"", "path": ""}, "text": ""}])
    with pytest.raises(ValueError, match=r"column 'image' of .* not paths.*save_to_disk"):
        listed(table)


# Tars


def pairs(count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(count)
        for member in ((f"{i:03d}.png", png(8, 8, i)), (f"{i:03d}.txt", f"picture {i}".encode()))
    ]


def test_tars_pair_members_as_webdataset_does(tmp_path: Path) -> None:
    members = [
        ("./a/000.JPG", encode(Image.fromarray(gradient(8, 8)), "JPEG")),
        ("./a/000.txt", b" a fox\n"),
        ("001.json", json.dumps({"prompt": "no", "caption": "a bird"}).encode()),
        ("001.webp", encode(Image.fromarray(gradient(8, 9)), "WEBP")),
        ("002.txt", b"text wins"),
        ("002.png", png()),
        ("002.json", b'{"caption": "no"}'),
        ("002.seg.png", png()),
        ("._003.txt", b"left by macOS"),
    ]
    tar = write_tar(tmp_path / "shard.tar", members)
    expected = [("a/000.jpg", "a fox"), ("001.webp", "a bird"), ("002.png", "text wins")]
    assert listed(tar) == expected
    assert counts(tar) == {}
    assert listed(tar, image="seg.png") == [("002.seg.png", "text wins")]
    assert listed(tar, caption="caption") == [("001.webp", "a bird"), ("002.png", "no")]
    stream = open_small(config_of(tar, shuffle=False))
    samples = stream.next(3, 0, 3)
    assert [s.original for s in samples] == [(8, 8), (8, 9), (8, 8)]
    assert samples[2].name == f"{tar} 002.png"


def test_tars_agree_with_the_webdataset_package(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    tar = write_tar(tmp_path / "shard.tar", pairs(5))
    dataset = webdataset.WebDataset(str(tar), shardshuffle=False).decode("rgb8")
    stream = open_small(config_of(tar, shuffle=False))
    for expected, sample in zip(dataset, stream.next(5, 0, 5), strict=True):
        assert sample.caption == expected["txt"]
        pixels = ((sample.image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, expected["png"])


def test_members_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    members = [
        ("0.png", png()),
        ("1.txt", b"no image"),
        ("2.png", png()),
        ("2.txt", b"a fox"),
        ("2.txt", b"again"),
        ("3.png", png()),
        ("3.json", b"{oops"),
        ("4.png", b""),
        ("4.txt", b"no bytes"),
        ("5.png", b"no picture"),
        ("5.txt", b"no picture"),
    ]
    tar = write_tar(tmp_path / "shard.tar", members)
    stream = open_small(config_of(tar))
    assert stream.next(1, 0, 1)[0].caption == "a fox"
    assert skip_counts(stream) == {
        "second member of the same name": 1,
        "no caption": 1,
        "no image with this key": 1,
        "not a JSON object": 1,
        "zero-byte file": 1,
        "not an image (JPEG, PNG, WEBP, BMP)": 1,
    }


@pytest.mark.parametrize("pattern", ["", "/", "/*.tar", "/{000..001}.tar"])
def test_tars_may_be_patterns(tmp_path: Path, pattern: str) -> None:
    write_tar(tmp_path / "000.tar", pairs(1))
    write_tar(tmp_path / "001.tar", pairs(2)[2:])
    assert listed(f"{tmp_path}{pattern}") == [("000.png", "picture 0"), ("001.png", "picture 1")]


def test_a_tar_cut_anywhere_keeps_what_is_before(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar", pairs(3))
    whole = path.read_bytes()
    sizes = [(len(data) + 511) // 512 * 512 for _, data in pairs(3)]
    ends = [sum(sizes[: i + 1]) + 512 * (i + 1) for i in range(6)]
    for cut in range(0, ends[-1], 200):
        path.write_bytes(whole[:cut])
        found = listed(path)
        # A member is whole without the zeros that fill its last block.
        readable = sum(
            end - size + len(data) <= cut
            for end, size, (_, data) in zip(ends[1::2], sizes[1::2], pairs(3)[1::2], strict=True)
        )
        assert found == [(f"{i:03d}.png", f"picture {i}") for i in range(readable)]
        reason = "not a tar" if cut < 512 else "truncated or damaged tar"
        assert counts(path)[reason] == 1
    path.write_bytes(whole)
    assert counts(path) == {}


def test_a_picture_cut_off_at_the_end_of_a_tar_is_no_member(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar", [*pairs(1), ("1.txt", b"a fox"), ("1.png", png())])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"1.png") + 512 + len(png()) - 1])
    assert listed(path) == [("000.png", "picture 0")]
    assert counts(path) == {"truncated or damaged tar": 1}


def test_a_damaged_header_ends_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar", pairs(3))
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"001.txt")] ^= 0x55
    path.write_bytes(damaged)
    assert listed(path) == [("000.png", "picture 0")]
    assert counts(path) == {"truncated or damaged tar": 2}


# Hugging Face


def save_dataset(folder: Path, columns: dict[str, list[Any]], shards: int = 1) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        dataset = dataset.cast_column("image", datasets.Image())
    dataset.save_to_disk(folder, num_shards=shards)
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_saved_datasets_are_read(tmp_path: Path, shards: int) -> None:
    pictures = [Image.fromarray(gradient(8, 8 + i)) for i in range(4)]
    columns = {"image": pictures, "text": [f"picture {i}" for i in range(4)], "id": [1, 2, 3, 4]}
    folder = save_dataset(tmp_path / "saved", columns, shards)
    assert listed(folder) == [(f"row {i}", f"picture {i}") for i in range(4)]
    stream = open_small(config_of(folder, shuffle=False, workers=2))
    assert [s.original for s in stream.next(4, 0, 4)] == [(8, 8), (8, 9), (8, 10), (8, 11)]
    with pytest.raises(ValueError, match=r"no column 'label'; .* 'image', 'text', 'id'"):
        listed(folder, caption="label")


def test_rows_of_datasets_without_image_or_caption_are_counted(tmp_path: Path) -> None:
    image = Image.fromarray(gradient(8, 8))
    columns = {"image": [None, image, image], "text": ["a", None, "good"]}
    folder = save_dataset(tmp_path / "saved", columns)
    assert listed(folder) == [("row 2", "good")]
    assert counts(folder) == {"no image in column 'image'": 1, "no caption": 1}


def test_a_missing_image_is_missing_whatever_bytes_lie_there(tmp_path: Path) -> None:
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    parts = [pyarrow.array([png(), png()]), pyarrow.array(["", ""])]
    mask = pyarrow.array([True, False])
    images = pyarrow.StructArray.from_arrays(parts, names=["bytes", "path"], mask=mask)
    datasets.Dataset(pyarrow.table({"image": images, "text": ["a", "b"]})).save_to_disk(tmp_path)
    assert listed(tmp_path) == [("row 1", "b")]


def test_datasets_may_hold_bytes_or_paths(tmp_path: Path) -> None:
    save_dataset(tmp_path / "bytes", {"jpg": [png()], "text": ["fox"]})
    stream = open_images(
        ImageDataConfig(
            sources={"a": ImageSourceConfig(str(tmp_path / "bytes"), image_column="jpg")}
        ),
        height=8,
        width=8,
        divisor=8,
        seed=0,
    )
    assert stream.next(1, 0, 1)[0].caption == "fox"
    base = write_folder(tmp_path / "images", [(8, 8)])
    folder = save_dataset(tmp_path / "paths", {"path": ["000.png", "../x"], "text": ["a", "b"]})
    with pytest.raises(ValueError, match=r"paths row 1: the image path '../x' leaves"):
        listed(folder, base=str(base))
    folder = save_dataset(tmp_path / "number", {"path": [1], "text": ["a"]})
    with pytest.raises(ValueError, match=r"column 'path' of .* holds .*int64"):
        listed(folder)


def test_splits_have_to_be_chosen(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    image = Image.fromarray(gradient(8, 8))
    one = datasets.Dataset.from_dict({"image": [image], "text": ["fox"]})
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "two")
    assert listed(tmp_path / "one") == [("row 0", "fox")]
    with pytest.raises(ValueError, match=r"splits train, test; give one .*two/train"):
        listed(tmp_path / "two")
    assert listed(tmp_path / "two" / "test") == [("row 0", "fox")]


def test_damaged_datasets_are_refused(tmp_path: Path) -> None:
    pictures = [Image.fromarray(gradient(64, 64, i)) for i in range(20)]
    columns = {"image": pictures, "text": [f"picture {i}" for i in range(20)]}
    folder = save_dataset(tmp_path / "saved", columns, shards=2)
    first = folder / "data-00000-of-00002.arrow"
    whole = first.read_bytes()
    for cut in (0, 7, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        first.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"data-00000-of-00002.arrow is truncated or damaged"):
            listed(folder)
    first.unlink()
    with pytest.raises(ValueError, match=r"dataset .*saved cannot be read.*data-00000-of-00002"):
        listed(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"dataset .*saved cannot be read"):
        listed(folder)


def test_a_dataset_may_hold_several_captions_and_one_that_is_not_utf8(tmp_path: Path) -> None:
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    texts = pyarrow.array([[b"a", b"b"], [b"na\xefve"], []], pyarrow.list_(pyarrow.binary()))
    values = texts.values.view(pyarrow.string())
    texts = pyarrow.ListArray.from_arrays(texts.offsets, values)
    table = pyarrow.table({"image": [png()] * 3, "text": texts})
    datasets.Dataset(table).save_to_disk(tmp_path)
    (entry,) = list_source(str(tmp_path), None, Columns(), SkipLog())
    assert entry.captions == ("a", "b")
    assert counts(tmp_path) == {"caption that is not UTF-8": 1, "no caption": 1}


def test_without_datasets_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"not installed; pip install 'sfumato\[datasets\]'"):
        listed(tmp_path)


# Settings


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"path='' is empty"),
        ("absent", "no such file: absent; check data.images.sources.s0.path"),
        ("absent/*.tar", "no file matches"),
        ("{000..001}.tar", "no such file"),
        ("x" * 5000, "no such file"),
        ("empty", "no image that can be used: nothing was skipped"),
        ("uncaptioned", "no image that can be used: skipped no caption: 1"),
        ("picture.png", "suffix '.png'.* give a folder"),
    ],
)
def test_bad_paths_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_folder(Path("uncaptioned"), [(8, 8)])
    Path("uncaptioned/000.txt").unlink()
    Path("picture.png").write_bytes(png())
    with pytest.raises(ValueError, match=message):
        open_small(config_of(path))


Change = Callable[[ImageDataConfig], None]


def change(**settings: Any) -> Change:
    return lambda config: vars(config).update(settings)


def change_source(**settings: Any) -> Change:
    return lambda config: vars(config.sources["s0"]).update(settings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change(sources={}), "data.images.path is missing"),
        (change(crop="middle"), "data.images.crop='middle'.*center, random"),
        (change(min_size=0), "data.images.min_size=0"),
        (change(workers=-1), "data.images.workers=-1"),
        (change(prefetch=-1), "data.images.prefetch=-1"),
        (change(max_pixels=10**9), "data.images.max_pixels=1000000000 is too large"),
        (change(max_pixels=63), "no image that can be used: skipped more than max_pixels=63"),
        (change(min_size=9), "no image that can be used: skipped shorter side below min_size=9"),
        (change_source(path=None), "data.images.sources.s0.path is missing"),
        (change_source(repeats=0), "data.images.sources.s0.repeats=0"),
        (change_source(weight=1.0), "data.images.sources.s1 has no weight, but others have"),
        (change_source(weight=-1.0), "data.images.sources.s0.weight=-1.0 is too small"),
        (change_source(weight=float("nan")), "weight=nan must be finite"),
        (change_source(weight=1.0, repeats=2), "repeats=2 beside a weight"),
        (change_source(base_path="absent"), "base_path='absent' is no folder"),
        (change_source(base_path="."), "base_path='.' was given, but .* holds images and no table"),
        (change_source(image_column="img"), "image_column='img' was given"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changed: Change, message: str) -> None:
    folder = write_folder(tmp_path, [(8, 8)])
    config = config_of(folder, folder)
    changed(config)
    with pytest.raises(ValueError, match=message):
        open_small(config)


def test_sizes_have_to_be_multiples_of_the_divisor(tmp_path: Path) -> None:
    config = config_of(write_folder(tmp_path, [(8, 8)]))
    for height, width, divisor in ((9, 8, 8), (8, 0, 8), (8, 8, 0), (-8, 8, 8)):
        with pytest.raises(ValueError, match=f"{height} x {width} pixels cannot be trained on"):
            open_images(config, height=height, width=width, divisor=divisor, seed=0)


# Validation


def test_validation_takes_the_first_good_samples(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [(8, 24), (16, 8), (8, 8)])
    write_folder(tmp_path / "b", [(8, 8)] * 3, "b")
    (tmp_path / "a" / "001.png").write_bytes(png(64, 64)[:-40])
    config = config_of(tmp_path / "a", tmp_path / "b", crop="random", flip=True, buckets=True)
    samples = validation_samples(config, 3, height=8, width=8)
    assert [s.caption for s in samples] == ["picture 0", "picture 2", "bpicture 0"]
    assert samples[0].original == (8, 24) and samples[0].crop == (0, 8)
    pixels = ((samples[0].pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, gradient(8, 24)[:, 8:16])
    assert len(validation_samples(config, 100, height=8, width=8)) == 5
    with pytest.raises(ValueError, match="0 validation samples"):
        validation_samples(config, 0, height=8, width=8)
    with pytest.raises(ValueError, match=r"no sample .*below min_size=99"):
        validation_samples(config_of(tmp_path / "a", min_size=99), 1, height=8, width=8)


def test_links_and_pipes_of_a_folder_are_counted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", [(8, 8)] * 6)
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    for number, target in enumerate((secret, "/dev/zero")):
        (folder / f"00{number}.txt").unlink()
        (folder / f"00{number}.txt").symlink_to(target)
    (folder / "002.txt").unlink()
    os.mkfifo(folder / "002.txt")
    (folder / "003.txt").write_text("x" * (2**20 + 1))
    (folder / "004.png").unlink()
    (folder / "004.png").symlink_to(write_folder(tmp_path / "private", [(8, 8)]) / "000.png")
    (folder / "006.png").symlink_to(folder / "005.png")  # stays inside
    (folder / "006.txt").write_text("a link inside")
    assert listed(folder) == [("005.png", "picture 5"), ("006.png", "a link inside")]
    leaves = "link that leaves the folder (copy what it leads to instead)"
    assert counts(folder) == {
        f"caption: {leaves}": 2,
        "unreadable caption": 1,
        "caption above 1,048,576 bytes": 1,
        leaves: 1,
    }


def test_links_of_the_hubs_cache_are_read(tmp_path: Path) -> None:
    blobs = write_folder(tmp_path / "datasets--a--b" / "blobs", [(8, 8)])
    folder = tmp_path / "datasets--a--b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for suffix in (".png", ".txt"):
        (folder / f"cat{suffix}").symlink_to(blobs / f"000{suffix}")
    assert listed(folder) == [("cat.png", "picture 0")]


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_headers_of_any_size_end_a_tar(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", png()), ("a.txt", b"a")])
    header = tarfile.TarInfo("huge")
    header.size, header.type = 2**33 - 1, kind
    data = path.read_bytes().rstrip(b"\0")
    start = -(-len(data) // 512) * 512
    path.write_bytes(data.ljust(start, b"\0") + header.tobuf(tarfile.USTAR_FORMAT))
    os.truncate(path, start + 2**33 + 4096)  # sparse: it takes no room
    assert listed(path) == [("a.png", "a")]
    assert counts(path) == {"truncated or damaged tar": 1}


def test_texts_of_any_size_are_counted(tmp_path: Path) -> None:
    members = [("a.png", png()), ("a.txt", b"x" * (2**24 + 1)), ("b.png", png()), ("b.txt", b"b")]
    path = write_tar(tmp_path / "a.tar", members)
    assert listed(path) == [("b.png", "b")]
    assert counts(path)["member .txt above 16,777,216 bytes"] == 1


def test_a_zero_in_a_path_spoils_its_row_only(tmp_path: Path) -> None:
    write_folder(tmp_path, [(8, 8)])
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "0\0.png", "text": "a"})
        + "\n"
        + json.dumps({"file_name": "000.png", "text": "b"})
    )
    stream = open_small(config_of(tmp_path))
    assert [sample.caption for sample in stream.next(2, 0, 2)] == ["b"] * 2
