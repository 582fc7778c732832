"""Tables and tars: every format, with every fault, is read alike by all who read it."""

import csv
import io
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from image_files import config_of, png, skip_counts, write_folder, write_tar

from sfumato.config import DownloadConfig, ImageSourceConfig, PackConfig
from sfumato.data.entries import Columns
from sfumato.data.images import open_images, validation_samples
from sfumato.data.left_out import SkipLog
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prompts import open_prompts, read_prompts
from sfumato.data.sources import list_source
from sfumato.preparation.pack import pack
from sfumato.preparation.url_table import write_table

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

Rows = Sequence[Mapping[str, bytes | None]]


# Writers: rows of bytes, None for what a row lacks


def rows_of(*captions: bytes | None) -> list[dict[str, bytes | None]]:
    return [
        {"image": b"%03d.png" % i, "url": b"http://fake/%d" % i, "caption": caption}
        for i, caption in enumerate(captions)
    ]


def write_separated(path: Path, rows: Rows) -> None:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerow(rows[0])
    for row in rows:
        fields = [each.decode("latin-1") for each in row.values() if each is not None]
        writer.writerow(fields)
    path.write_bytes(text.getvalue().encode("latin-1"))


def json_object(row: Mapping[str, bytes | None]) -> bytes:
    row = {name: value for name, value in row.items() if value is not None}
    text = {name: value.decode("latin-1") for name, value in row.items()}
    return json.dumps(text, ensure_ascii=False).encode("latin-1")


def write_parquet(path: Path, rows: Rows) -> None:
    columns = {name: pyarrow.array([row[name] for row in rows], pyarrow.binary())
               for name in rows[0]}  # fmt: skip
    table = pyarrow.table({name: each.view(pyarrow.string()) for name, each in columns.items()})
    parquet.write_table(table, path)


def write_members(path: Path, rows: Rows) -> None:
    members = []
    for i, row in enumerate(rows):
        members.append((f"{i:03d}.png", png(8, 8, i)))
        if row["caption"] is not None:
            members.append((f"{i:03d}.txt", row["caption"]))
    write_tar(path, members)


def write(path: Path, rows: Rows) -> None:
    if path.suffix == ".txt":
        path.write_bytes(b"".join((row["caption"] or b"") + b"\n" for row in rows))
    elif path.suffix == ".json":
        path.write_bytes(b"[" + b",\n".join(map(json_object, rows)) + b"]")
    elif path.suffix == ".jsonl":
        path.write_bytes(b"".join(json_object(row) + b"\n" for row in rows))
    elif path.suffix == ".parquet":
        write_parquet(path, rows)
    elif path.suffix == ".tar":
        write_members(path, rows)
    else:
        write_separated(path, rows)


# Readers: the captions that they give, and what they leave out, in the words of captions


@dataclass(frozen=True)
class Read:
    captions: list[str]
    left_out: dict[str, int]


def by_prompts(path: str, column: str | None) -> Read:
    prompts = read_prompts(path, column=column)
    stream = open_prompts(path, column=column, shuffle=False)
    assert stream.next(len(prompts), 0, len(prompts)) == prompts
    stream.next(1, 0, 1)
    counts = {skip.reason: skip.count for skip in stream.skipped.skips}
    return Read(prompts, {name.replace("prompt", "caption"): n for name, n in counts.items()})


def by_images(path: str, column: str | None) -> Read:
    config = config_of(path)
    config.sources = {"a": ImageSourceConfig(path, caption_column=column)}
    stream = open_images(config, height=8, width=8, divisor=8, seed=0)
    samples = validation_samples(config, 100, height=8, width=8)
    return Read([sample.caption for sample in samples], skip_counts(stream))


def by_pack(path: str, column: str | None) -> Read:
    out = Path("out")
    bins = pack(PackConfig(path, caption_column=column), DownloadConfig(), out)
    members = PreparedFolder(out).tar_record("000000").samples
    assert bins.pop("kept") == len(members)
    return Read([member.captions[0] for member in members], bins)


def by_download(path: str, column: str | None) -> Read:
    config = DownloadConfig(path, caption_column=column or "caption")
    record = write_table(config, Path("out"))
    table = parquet.read_table(Path("out") / "table" / "000000.parquet")
    return Read(table.column("caption").to_pylist(), dict(record.dropped))


Reader = Callable[[str, str | None], Read]
READERS: dict[str, tuple[Reader, str, str]] = {  # what reads, whose path, and of no row at all
    "prompts": (by_prompts, "prompts", "no prompt can be read"),
    "images": (by_images, "data.images.sources.a.path", "has no image that can be used"),
    "pack": (by_pack, "pack.path", "can be packed"),
    "download": (by_download, "download.table", "has no row that can be downloaded"),
}
TABLES = ("csv", "tsv", "json", "jsonl", "parquet")
FORMATS = {
    "prompts": ("txt", *TABLES, "tar"),
    "images": (*TABLES, "tar"),
    "pack": (*TABLES, "tar"),
    "download": TABLES,
}
ALL = [(reader, kind) for reader, kinds in FORMATS.items() for kind in kinds]
WITH_COLUMNS = [(reader, kind) for reader, kind in ALL if kind in TABLES]
OF_TEXT = [(reader, kind) for reader, kind in WITH_COLUMNS if kind != "parquet"]
BROKEN = {"csv": "not CSV", "tsv": "not CSV", "json": "not a JSON object",
            "jsonl": "not a JSON object"}  # fmt: skip


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, [(8, 8)] * 4)
    for caption in tmp_path.glob("*.txt"):
        caption.unlink()
    monkeypatch.chdir(tmp_path)


def read(reader: str, kind: str, column: str | None = "caption") -> Read:
    return READERS[reader][0](f"t.{kind}", column if kind in TABLES else None)


def refused(reader: str, kind: str, message: str, column: str | None = "caption") -> None:
    with pytest.raises(ValueError, match=message):
        read(reader, kind, column)


@pytest.mark.parametrize(("reader", "kind"), ALL)
def test_what_is_whole_is_read_whole(reader: str, kind: str) -> None:
    hard = ['a "red" fox, asleep', "naïve café, 雨の東京", "trailing, comma,", "{}"]
    write(Path(f"t.{kind}"), rows_of(*(caption.encode() for caption in hard)))
    assert read(reader, kind) == Read(hard, {})
    if reader != "download":
        assert read(reader, kind, None) == Read(hard, {})


@pytest.mark.parametrize(("reader", "kind"), ALL)
def test_a_row_that_is_not_utf8_is_counted_and_named(
    reader: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(Path(f"t.{kind}"), rows_of(b"fox", "naïve".encode("latin-1"), b"bird"))
    with caplog.at_level(logging.WARNING):
        assert read(reader, kind) == Read(["fox", "bird"], {"caption that is not UTF-8": 1})
    line = {"csv": 3, "tsv": 3, "txt": 2, "jsonl": 2}.get(kind)
    place = f"line {line}" if line else "001" if kind == "tar" else "row 1"
    assert (reader == "pack" and kind == "tar") or f"t.{kind} {place}" in caplog.text


@pytest.mark.parametrize(("reader", "kind"), OF_TEXT)
def test_a_header_that_is_not_utf8_is_refused(reader: str, kind: str) -> None:
    path = Path(f"t.{kind}")
    write(path, rows_of(b"fox"))
    text = path.read_bytes()
    if kind in ("csv", "tsv"):
        path.write_bytes(text.replace(b"url", "légende".encode("latin-1")))
        refused(reader, kind, f"t.{kind} line 1 is not UTF-8; save the table as UTF-8")
    path.write_bytes(text.decode().encode("utf-16-le"))
    refused(reader, kind, f"t.{kind} line 1 holds zero bytes")


@pytest.mark.parametrize(("reader", "kind"), [*OF_TEXT, ("prompts", "txt")])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_utf16_with_its_mark_is_read(reader: str, kind: str, encoding: str) -> None:
    path = Path(f"t.{kind}")
    write(path, rows_of(b"fox", "naïve 雨".encode()))
    text = path.read_text("utf-8")
    path.write_bytes(("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding))
    assert read(reader, kind) == Read(["fox", "naïve 雨"], {})


@pytest.mark.parametrize(("reader", "kind"), WITH_COLUMNS)
def test_a_column_that_the_first_row_lacks_is_found(reader: str, kind: str) -> None:
    write(Path(f"t.{kind}"), rows_of(None, b"fox", b"bird"))
    assert read(reader, kind) == Read(["fox", "bird"], {"no caption": 1})


@pytest.mark.parametrize(("reader", "kind"), WITH_COLUMNS)
def test_a_column_that_is_missing_is_refused(reader: str, kind: str) -> None:
    write(Path(f"t.{kind}"), rows_of(b"fox", b"bird"))
    columns = "'image', 'url', 'caption'"
    refused(reader, kind, f"t.{kind} has no column 'label'; its columns are {columns}", "label")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("kind", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_column_that_is_there_twice_is_refused_where_it_is_read(
    reader: str, kind: str, separator: str
) -> None:
    header, row = ["image", "url", "caption"], ["000.png", "http://fake/0", "fox"]
    for names, values in ((["", ""], ["x", "y"]), (["note", "note", ""], ["x", "y", "z"])):
        lines = [[*header, *names], [*row, *values]]
        Path(f"t.{kind}").write_text("\n".join(map(separator.join, lines)))
        shutil.rmtree("out", ignore_errors=True)
        assert read(reader, kind) == Read(["fox"], {})
    for twice in (["caption"], ["x", "caption", "caption"]):
        lines = [[*header, *twice], [*row, *twice]]
        Path(f"t.{kind}").write_text("\n".join(map(separator.join, lines)))
        shutil.rmtree("out", ignore_errors=True)
        said = f"t.{kind} has {1 + twice.count('caption')} columns of the name 'caption'; rename"
        refused(reader, kind, said)
        refused(reader, kind, said, None)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("blank", ["", "\n \n"])
def test_json_lines_under_the_name_of_json_are_told_their_name(reader: str, blank: str) -> None:
    write(Path("t.jsonl"), rows_of(b"fox", b"bird"))
    lines = Path("t.jsonl").read_text()
    Path("t.json").write_text(blank + lines)
    refused(reader, "json", r"t\.json is not JSON \(.*\); it has an object a line: name it \.jsonl")
    Path("t.json").write_text(f"[{lines}")
    refused(reader, "json", r"t\.json is not JSON \(.*\); write it again")


@pytest.mark.parametrize(("reader", "kind"), OF_TEXT)
def test_a_broken_row_is_counted(reader: str, kind: str) -> None:
    path = Path(f"t.{kind}")
    write(path, rows_of(b"fox", b"owl", b"bird"))
    broken = {"json": b"1", "jsonl": b"{oops\n"}.get(kind, b'"001.png"oops"\n')
    lines = path.read_bytes().splitlines(keepends=True)
    index = next(i for i, line in enumerate(lines) if b"owl" in line)
    lines[index] = broken + (b",\n" if kind == "json" else b"")
    path.write_bytes(b"".join(lines))
    assert read(reader, kind) == Read(["fox", "bird"], {BROKEN[kind]: 1})


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("kind", "separator", "name"), [("csv", b",", "commas"), ("tsv", b"\t", "tabs")]
)
def test_a_row_with_too_many_fields_is_counted(
    reader: str, kind: str, separator: bytes, name: str
) -> None:
    path = Path(f"t.{kind}")
    write(path, rows_of(b"fox"))
    row = separator.join([b"001.png", b"http://fake/1", b"owl", b" asleep\n\n"])
    path.write_bytes(path.read_bytes() + row)
    reason = f"more fields than columns (quote captions that hold {name})"
    assert read(reader, kind) == Read(["fox"], {reason: 1})


@pytest.mark.parametrize(("reader", "kind"), ALL)
def test_a_blank_caption_is_counted(reader: str, kind: str) -> None:
    write(Path(f"t.{kind}"), rows_of(b"fox", b" ", b"bird"))
    assert read(reader, kind) == Read(["fox", "bird"], {"blank caption": 1})


@pytest.mark.parametrize(("reader", "kind"), ALL)
@pytest.mark.parametrize("path", ["absent.{}", "absent/{{0..3}}.{}"])
def test_a_wrong_path_names_whose_it_is(reader: str, kind: str, path: str) -> None:
    function, setting, _ = READERS[reader]
    path = path.format(kind)
    with pytest.raises(ValueError, match="no such file: absent") as raised:
        function(path, None)
    assert f"check {setting} = {path!r}" in str(raised.value)


@pytest.mark.parametrize(("reader", "kind"), ALL)
def test_an_empty_file_is_refused(reader: str, kind: str) -> None:
    Path(f"t.{kind}").touch()
    nothing = READERS[reader][2]
    damaged = {"json": "t.json is not JSON", "parquet": "t.parquet is not a parquet file"}
    refused(reader, kind, damaged.get(kind, nothing))


@pytest.mark.parametrize(("reader", "kind"), [each for each in ALL if each[1] != "txt"])
def test_a_truncated_file(reader: str, kind: str) -> None:
    path = Path(f"t.{kind}")
    write(path, rows_of(b"fox", b"bird", b"owl at the end"))
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"owl") + 3] if kind != "parquet" else whole[:-20])
    if kind == "json":
        refused(reader, kind, "t.json is not JSON")
    elif kind == "parquet":
        refused(reader, kind, "t.parquet is not a parquet file")
    else:
        reason = BROKEN.get(kind, "truncated or damaged tar")
        assert read(reader, kind) == Read(["fox", "bird"], {reason: 1})


@pytest.mark.parametrize("reader", READERS)
def test_a_parquet_file_that_is_damaged_inside_is_refused(reader: str) -> None:
    path = Path("t.parquet")
    write(path, rows_of(*(b"picture %d" % i for i in range(1000))))
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(b"PAR1" + b"\xff" * (footer - 4) + content[footer:])
    refused(reader, "parquet", "t.parquet is a damaged parquet file")


# What only images have: several captions


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "tar"])
def test_a_list_of_captions_is_all_captions(tmp_path: Path, kind: str) -> None:
    several: list[Any] = [["a fox ", "a red fox", " ", "a fox"], [], ["a bird"]]
    rows = [{"image": f"{i:03d}.png", "text": each} for i, each in enumerate(several)]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "tar":
        objects = [(f"{i:03d}.json", json.dumps(row).encode()) for i, row in enumerate(rows)]
        write_tar(path, [*((f"{i:03d}.png", png(8, 8, i)) for i in range(3)), *objects])
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        path.write_text(text)
    log = SkipLog()
    entries = list_source(str(path), None, Columns(), log)
    assert [entry.captions for entry in entries] == [("a fox", "a red fox"), ("a bird",)]
    assert log.counts() == {"no caption": 1}
    pack(PackConfig(str(path)), DownloadConfig(), tmp_path / "out")
    members = PreparedFolder(tmp_path / "out").tar_record("000000").samples
    assert [member.captions for member in members] == [("a fox", "a red fox"), ("a bird",)]


def test_a_bad_caption_in_a_list_of_parquet_spoils_no_other(tmp_path: Path) -> None:
    texts = pyarrow.array([[b"fox", b"na\xefve"], [b"na\xefve"]], pyarrow.list_(pyarrow.binary()))
    offsets, values = texts.offsets, texts.values.view(pyarrow.string())
    captions = pyarrow.ListArray.from_arrays(offsets, values)
    table = pyarrow.table({"image": ["000.png", "001.png"], "text": captions})
    parquet.write_table(table, tmp_path / "t.parquet")
    log = SkipLog()
    (entry,) = list_source(str(tmp_path / "t.parquet"), None, Columns(), log)
    assert entry.captions == ("fox",) and log.counts() == {"caption that is not UTF-8": 1}


def test_a_tar_without_the_column_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [("0.png", png()), ("0.json", b'{"label": "fox"}')])
    for function in (by_images, by_pack):
        with pytest.raises(ValueError, match=r"t.tar has no column 'caption'.* are 'label'"):
            function(str(tar), "caption")
