"""Preference pairs: the same from every kind of table; what is left out, replaced or refused."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from image_files import png
from pyarrow import parquet
from refusals import assert_explained

from sfumato.compose import compose_train
from sfumato.config import PairDataConfig
from sfumato.data import pair_tables
from sfumato.data.epochs import RowPick
from sfumato.data.pairs import first_pairs, open_pairs, pair_captions
from sfumato.data.row_groups import RowGroup
from sfumato.data.sample import Preference
from sfumato.data.stream import OrderedStream

Row = dict[str, Any]
PATHS = ["image_columns=[a,b]"]
DPO = ("objective=dpo", "model.pretrained=M")


def rows_of(count: int) -> list[Row]:
    """Return Pick-a-Pic's columns: every third row prefers the second picture, every fifth none."""
    rows: list[Row] = []
    for i in range(count):
        first = 0.5 if i % 5 == 4 else float(i % 3 != 2)
        rows.append(
            {
                "jpg_0": png(8, 10, 2 * i),
                "jpg_1": png(10, 8, 2 * i + 1),
                "label_0": first,
                "label_1": 1 - first,
                "caption": f"caption {i}",
            }
        )
    return rows


def write_parquet(file: Path, rows: Sequence[Row], group: int = 4) -> Path:
    parquet.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=group)
    return file


def as_files(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """Write the pictures; return the rows with paths."""
    folder.mkdir(exist_ok=True)
    named = []
    for i, row in enumerate(rows):
        for name in ("jpg_0", "jpg_1"):
            (folder / f"{i:03d}-{name}.png").write_bytes(row[name])
        named.append({**row, **{name: f"{i:03d}-{name}.png" for name in ("jpg_0", "jpg_1")}})
    return named


def write_jsonl(file: Path, rows: Sequence[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_csv(file: Path, rows: Sequence[Row]) -> Path:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    file.write_text("\n".join(lines) + "\n")
    return file


def structs(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with Hugging Face's pairs of bytes and path."""
    names = ("jpg_0", "jpg_1")
    return [{**row, **{n: {"bytes": row[n], "path": "x.png"} for n in names}} for row in rows]


WRITERS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "parquet of bytes": lambda folder, rows: write_parquet(folder / "a.parquet", rows, 100),
    "parquet of structs": lambda d, rows: write_parquet(d / "s.parquet", structs(rows), 100),
    "parquet of paths": lambda d, rows: write_parquet(d / "p.parquet", as_files(d, rows)),
    "jsonl": lambda folder, rows: write_jsonl(folder / "a.jsonl", as_files(folder, rows)),
    "csv": lambda folder, rows: write_csv(folder / "a.csv", as_files(folder, rows)),
    "folder": lambda d, rows: write_jsonl(d / "metadata.jsonl", as_files(d, rows)).parent,
}


def config_of(path: Path, **settings: Any) -> PairDataConfig:
    return replace(PairDataConfig(path=str(path), workers=0), **settings)


def opened(
    config: PairDataConfig, seed: int = 0, size: int = 8
) -> OrderedStream[RowPick, Preference]:
    return open_pairs(config, height=size, width=size, seed=seed)


def told(pairs: Sequence[Preference]) -> list[tuple[str, float, bytes, bytes]]:
    return [
        (
            p.first.caption,
            p.label,
            p.first.pixels.numpy().tobytes(),
            p.second.pixels.numpy().tobytes(),
        )
        for p in pairs
    ]


def counts(stream: OrderedStream[RowPick, Preference]) -> dict[str, int]:
    return {skip.reason: skip.count for skip in stream.skipped.skips}


# --- Formats


@pytest.mark.parametrize("shuffle", [False, True])
def test_all_formats_give_the_same_pairs(tmp_path: Path, shuffle: bool) -> None:
    found = {}
    for name, write in WRITERS.items():
        folder = tmp_path / name
        folder.mkdir()
        stream = opened(config_of(write(folder, rows_of(10)), shuffle=shuffle, flip=True))
        found[name] = told(stream.next(12, 0, 12))
        assert counts(stream) == {"tie (ties=keep keeps it)": 2}
    first = found["parquet of bytes"]
    assert all(each == first for each in found.values())
    assert {(caption, label) for caption, label, *_ in first} == {
        (f"caption {i}", float(i % 3 != 2)) for i in range(10) if i % 5 != 4
    }
    in_order = first_pairs(config_of(tmp_path / "folder"), 4, height=8, width=8)
    assert [pair.first.caption for pair in in_order] == [f"caption {i}" for i in range(4)]


def test_both_pictures_are_cropped_and_mirrored_alike(tmp_path: Path) -> None:
    """The two differ in their third channel alone, so that one place shows the same values."""
    rows = rows_of(8)
    for i, row in enumerate(rows):
        row |= {"jpg_0": png(16, 24, i), "jpg_1": png(16, 24, i + 99)}
    config = config_of(write_parquet(tmp_path / "a.parquet", rows), crop="random", flip=True)
    pairs = opened(config).next(32, 0, 32)
    for pair in pairs:
        assert torch.equal(pair.first.pixels[:2], pair.second.pixels[:2])
        assert not torch.equal(pair.first.pixels[2], pair.second.pixels[2])
        assert pair.first.crop == pair.second.crop
    assert len({pair.first.crop for pair in pairs}) > 3


def test_columns_have_names_of_ones_own(tmp_path: Path) -> None:
    rows = [
        {"win": r["jpg_0"], "lose": r["jpg_1"], "p": 0.75, "q": 0.25, "text": r["caption"]}
        for r in rows_of(3)
    ]
    config = config_of(
        write_parquet(tmp_path / "a.parquet", rows),
        image_columns=["win", "lose"],
        label_columns=["p", "q"],
    )
    assert [pair.label for pair in opened(config).next(3, 0, 3)] == [0.75] * 3
    assert pair_captions(config, 2) == ["caption 0", "caption 1"]


def test_paths_start_from_base_path(tmp_path: Path) -> None:
    named = as_files(tmp_path / "pictures", rows_of(3))
    table = write_jsonl(tmp_path / "a.jsonl", named)
    good = config_of(table, base_path=str(tmp_path / "pictures"), shuffle=False)
    assert opened(good).next(1, 0, 1)[0].first.caption == "caption 0"
    with pytest.raises(ValueError, match=r"cannot be decoded, .*missing file"):
        opened(config_of(table)).next(1, 0, 1)
    with pytest.raises(ValueError, match="base_path='nowhere' is no folder"):
        opened(config_of(table, base_path="nowhere"))
    named[0]["jpg_0"] = "../../x.png"
    with pytest.raises(ValueError, match="leaves the base path"):
        opened(config_of(write_jsonl(table, named)))


def test_a_caption_of_several_lines_is_one_caption(tmp_path: Path) -> None:
    row = {**rows_of(1)[0], "caption": " a star\non a hill "}
    for write in ("parquet of bytes", "jsonl"):
        stream = opened(config_of(WRITERS[write](tmp_path, [row])))
        assert stream.next(1, 0, 1)[0].first.caption == "a star\non a hill"
        assert not stream.skipped


def test_ties_are_left_out_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(config_of(write_parquet(tmp_path / "a.parquet", rows_of(10))))
    assert not caplog.records


def test_ties_are_kept_if_asked(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", rows_of(10))
    stream = opened(config_of(file, ties="keep"))
    assert (
        sorted(pair.label for pair in stream.next(10, 0, 10)) == [0.0] * 3 + [0.5] * 2 + [1.0] * 5
    )
    assert not stream.skipped


# --- Order


@pytest.mark.parametrize("buffer", [3, 1000])
def test_an_epoch_is_a_permutation_and_any_position_is_found_again(
    tmp_path: Path, buffer: int
) -> None:
    for i in range(2):
        rows = [{**row, "caption": f"{i} {row['caption']}"} for row in rows_of(13)]
        write_parquet(tmp_path / f"train-{i}.parquet", rows)
    config = config_of(tmp_path / "train-*.parquet", buffer=buffer, flip=True)
    whole = opened(replace(config, workers=2, prefetch=3))
    seen = told([row for _ in range(11) for row in whole.next(4, 0, 4)])
    assert len({caption for caption, *_ in seen[:22]}) == 22  # two of 13 are ties
    assert len({caption for caption, *_ in seen[22:44]}) == 22
    part = opened(config)
    before = told([row for _ in range(7) for row in part.next(4, 0, 4)])
    again = opened(config)
    again.restore(part.state())
    assert before + told([row for _ in range(4) for row in again.next(4, 0, 4)]) == seen
    halves = [opened(config), opened(config)]
    both = [row for _ in range(11) for i in (0, 1) for row in halves[i].next(4, 2 * i, 2 * i + 2)]
    assert told(both) == seen
    assert told(opened(config, seed=1).next(22, 0, 22)) != seen[:22]


def test_a_resumed_run_refuses_other_pairs(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", rows_of(10))
    state = opened(config_of(file)).state()
    for changed in (config_of(file, ties="keep"), config_of(file, buffer=5)):
        with pytest.raises(ValueError, match=r"cannot resume: .* Restore"):
            opened(changed).restore(state)
    rows = rows_of(10)
    rows[0] |= {"label_0": 0.0, "label_1": 1.0}
    write_parquet(file, rows)
    with pytest.raises(ValueError, match="other pairs or labels"):
        opened(config_of(file)).restore(state)


def test_a_row_group_is_in_memory_while_its_window_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing reads no picture; a shuffled epoch reads each row group once."""
    config = config_of(write_parquet(tmp_path / "a.parquet", rows_of(40)), buffer=8)
    read: list[int] = []
    start = RowGroup.__init__

    def watched(self: RowGroup, path: Path, number: int, columns: Sequence[str]) -> None:
        read.append(number)
        start(self, path, number, columns)

    monkeypatch.setattr(RowGroup, "__init__", watched)
    stream = opened(config)
    assert read == []
    stream.next(32, 0, 32)
    assert sorted(read) == list(range(10))
    read.clear()
    assert len(first_pairs(config, 3, height=8, width=8)) == 3
    assert read == [0]


def test_a_row_group_too_large_for_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_tables, "LARGEST_GROUP", 100)
    with pytest.raises(ValueError) as caught:
        opened(config_of(write_parquet(tmp_path / "a.parquet", rows_of(3))))
    assert_explained(str(caught.value), "a.parquet", None, "row group 0", "row_group_size=100")


# --- What is left out

FAULTS: list[tuple[str, Row, str]] = [
    ("missing picture", {"jpg_0": None}, "no picture"),
    ("missing second picture", {"jpg_1": None}, "no picture"),
    ("equal pictures", {"jpg_0": png(8, 8, 3), "jpg_1": png(8, 8, 3)}, "two equal pictures"),
    ("empty bytes", {"jpg_1": b""}, "zero-byte file"),
    ("no image", {"jpg_0": b"<html>"}, "not an image (JPEG, PNG, WEBP, BMP)"),
    ("damaged picture", {"jpg_1": png(64, 64)[:80]}, "truncated or damaged image"),
    ("blank caption", {"caption": "  "}, "blank caption"),
    ("no caption", {"caption": None}, "no caption"),
    ("labels of both", {"label_1": 1.0}, "labels that do not sum to 1"),
    ("labels of none", {"label_0": 0.0}, "labels that do not sum to 1"),
    ("label above 1", {"label_0": 2.0, "label_1": -1.0}, "labels outside 0 to 1"),
    ("label below 0", {"label_0": -0.5, "label_1": 1.5}, "labels outside 0 to 1"),
    ("label of nan", {"label_0": float("nan")}, "labels outside 0 to 1"),
    ("no label", {"label_0": None}, "labels that are no numbers"),
]


@pytest.mark.parametrize(("fault", "reason"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
@pytest.mark.parametrize("kind", ["bytes", "files"])
def test_a_broken_row_is_counted_and_another_takes_its_place(
    tmp_path: Path, kind: str, fault: Row, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(4)
    rows[0] |= fault
    if kind == "files":
        files = [{**row, **{n: row[n] or b"" for n in ("jpg_0", "jpg_1")}} for row in rows]
        named = as_files(tmp_path, files)
        for name in ("jpg_0", "jpg_1"):
            named[0][name] = None if rows[0][name] is None else named[0][name]
        table = write_jsonl(tmp_path / "a.jsonl", named)
    else:
        table = write_parquet(tmp_path / "a.parquet", rows)
    stream = opened(config_of(table))
    captions = {pair.first.caption for _ in range(3) for pair in stream.next(4, 0, 4)}
    assert captions == {"caption 1", "caption 2", "caption 3"}
    assert counts(stream) == {reason: 1}
    (skip,) = stream.skipped.skips
    assert ("line 1" if kind == "files" else "row 0") in skip.positions[0]
    if reason.startswith("labels"):
        assert f"label_0={rows[0]['label_0']}" in skip.positions[0]
    assert reason in caplog.text
    found = first_pairs(config_of(table), 9, height=8, width=8)
    assert [pair.first.caption for pair in found] == ["caption 1", "caption 2", "caption 3"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_one_file_as_both_pictures_and_a_file_that_is_gone(tmp_path: Path, kind: str) -> None:
    named = as_files(tmp_path, rows_of(4))
    named[0]["jpg_1"] = named[0]["jpg_0"]
    named[1]["jpg_1"] = "gone.png"
    write = write_jsonl if kind == "jsonl" else write_csv
    stream = opened(config_of(write(tmp_path / f"a.{kind}", named)))
    captions = {pair.first.caption for _ in range(3) for pair in stream.next(4, 0, 4)}
    assert captions == {"caption 2", "caption 3"}
    assert counts(stream) == {"two equal pictures": 1, "missing file": 1}


def test_labels_of_a_csv_are_numbers(tmp_path: Path) -> None:
    named = as_files(tmp_path, rows_of(4))
    labels = [("1", "0"), ("yes", "0"), ("", "1"), (".25", "0.75")]
    for row, (first, second) in zip(named, labels, strict=True):
        row |= {"label_0": first, "label_1": second}
    stream = opened(config_of(write_csv(tmp_path / "a.csv", named), shuffle=False))
    assert [pair.label for pair in stream.next(2, 0, 2)] == [1.0, 0.25]
    assert counts(stream) == {"labels that are no numbers": 2}


def test_small_and_large_pictures_are_left_out(tmp_path: Path) -> None:
    rows = rows_of(3)
    rows[0]["jpg_1"], rows[1]["jpg_0"] = png(4, 4), png(30, 30)
    config = config_of(write_parquet(tmp_path / "a.parquet", rows), min_size=6, max_pixels=500)
    stream = opened(config)
    assert {pair.first.caption for pair in stream.next(6, 0, 6)} == {"caption 2"}
    assert counts(stream) == {
        "shorter side below min_size=6": 1,
        "more than max_pixels=500 pixels": 1,
    }


# --- What is refused


def no_column(rows: list[Row], name: str) -> list[Row]:
    return [{key: value for key, value in row.items() if key != name} for row in rows]


@pytest.mark.parametrize("name", ["jpg_0", "jpg_1", "label_0", "label_1", "caption"])
@pytest.mark.parametrize("kind", ["parquet of bytes", "jsonl", "csv"])
def test_a_table_without_a_column_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    table = WRITERS[kind](folder, rows_of(3))
    if kind == "parquet of bytes":
        write_parquet(table, no_column(rows_of(3), name))
    else:
        write = write_jsonl if kind == "jsonl" else write_csv
        write(table, no_column(as_files(folder, rows_of(3)), name))
    with pytest.raises(ValueError) as caught:
        opened(config_of(table))
    others = [key for key in rows_of(1)[0] if key != name]
    setting = {"j": "image_columns", "l": "label_columns", "c": "caption_column"}[name[0]]
    assert_explained(str(caught.value), f"data.pairs.{setting}", name, "has no column", *others)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "nothing was skipped"),
        (rows_of(5)[4:], "tie (ties=keep keeps it): 1"),
        ([{**row, "caption": " "} for row in rows_of(3)], "blank caption: 3"),
        ([{**row, "label_0": 7.0} for row in rows_of(3)], "labels outside 0 to 1: 3"),
    ],
)
def test_a_set_without_a_usable_pair_is_refused(tmp_path: Path, rows: list[Row], said: str) -> None:
    columns = {name: [row[name] for row in rows] for name in rows_of(1)[0]}
    kinds = [*[pa.binary()] * 2, *[pa.float64()] * 2, pa.string()]
    schema = pa.schema(list(zip(columns, kinds, strict=True)))
    parquet.write_table(pa.table(columns, schema=schema), tmp_path / "a.parquet")
    config = config_of(tmp_path / "a.parquet")
    for action in (
        lambda: opened(config),
        lambda: first_pairs(config, 3, height=8, width=8),
        lambda: pair_captions(config, 3),
    ):
        with pytest.raises(ValueError) as caught:
            action()
        assert_explained(str(caught.value), "data.pairs.path", str(config.path), said)


def test_columns_of_another_type_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "jpg_1": 3} for row in rows_of(3)]
    with pytest.raises(ValueError) as caught:
        opened(config_of(write_parquet(tmp_path / "a.parquet", rows)))
    assert_explained(str(caught.value), "data.pairs.image_columns", "jpg_1", "int64")


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", rows_of(8))
    stream = opened(config_of(file))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"row group \d of .*a\.parquet cannot be read .* write"):
        stream.next(1, 0, 1)
    with pytest.raises(ValueError, match=r"is not a parquet file .*; write it again"):
        opened(config_of(file))


def test_a_folder_of_splits_asks_for_one(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", rows_of(3))
    with pytest.raises(ValueError) as caught:
        opened(config_of(tmp_path))
    assert_explained(str(caught.value), "data.pairs.path", str(tmp_path), "train-*.parquet")
    tar = tmp_path / "a.tar"
    tar.touch()
    with pytest.raises(ValueError, match=r"suffix '\.tar' is unknown"):
        opened(config_of(tar))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.pairs.image_columns=[a]", "data.pairs.image_columns", "['a']"),
        ("data.pairs.image_columns=[a,b,c]", "data.pairs.image_columns", "['a', 'b', 'c']"),
        ("data.pairs.label_columns=[p,p]", "data.pairs.label_columns", "['p', 'p']"),
        ("data.pairs.label_columns=[]", "data.pairs.label_columns", "[]"),
        ("data.pairs.ties=half", "data.pairs.ties", "half"),
        ("data.pairs.buffer=0", "data.pairs.buffer", "0"),
    ],
)
def test_impossible_settings_are_refused(override: str, key: str, value: str) -> None:
    with pytest.raises(ValueError) as caught:
        compose_train([*DPO, "data.pairs.path=P", override])
    assert_explained(str(caught.value), key, value)


def test_dpo_names_what_it_reads() -> None:
    with pytest.raises(ValueError, match=r"missing settings: data\.pairs\.path;"):
        compose_train(DPO)
    with pytest.raises(ValueError, match=r"data\.images\.path=P .* with objective=dpo"):
        compose_train([*DPO, "data.pairs.path=P", "data.images.path=P"])
    with pytest.raises(ValueError, match=r"data\.pairs\.path=P .* set objective=dpo"):
        compose_train(
            [
                "objective=supervised",
                "model.pretrained=M",
                "data.images.path=I",
                "data.pairs.path=P",
            ]
        )
    config, _ = compose_train([*DPO, "data.pairs.path=P", "validation.pairs.path=V"])
    assert config.validation.pairs.path == "V"
