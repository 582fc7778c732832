"""Prompt files: the formats, what is refused before training, and what damage costs."""

import csv
import io
import json
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from sfumato.data.prompts import open_prompts, read_prompts
from sfumato.data.stream import Stream

HARD_PROMPTS = (
    'a "red" fox, asleep',
    "two\nlines",
    "naïve café, 雨の東京",
    "trailing, comma,",
    "{}",
)


def write_txt(path: Path, prompts: Sequence[str]) -> str:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return str(path)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def txt_members(prompts: Sequence[str]) -> list[tuple[str, bytes]]:
    return [(f"{i:06d}.txt", prompt.encode()) for i, prompt in enumerate(prompts)]


def numbered(count: int, prefix: str = "prompt") -> list[str]:
    return [f"{prefix} {i}" for i in range(count)]


def skip_counts(stream: Stream[str]) -> dict[str, int]:
    return {skip.reason: skip.count for skip in stream.skipped.skips}


@pytest.fixture
def three_shards(tmp_path: Path) -> str:
    """17 prompts in tars of 9, 1 and 7."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, (first, last) in enumerate([(0, 9), (9, 10), (10, 17)]):
        write_tar(folder / f"{shard:03d}.tar", txt_members(numbered(17)[first:last]))
    return str(folder)


# Formats


def test_txt_keeps_lines_and_counts_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa fox\r\n\r\n  a bird \n \nün\u2028e".encode() + b"\n\xff\xfe\nlast")
    assert read_prompts(str(path)) == ["a fox", "a bird", "ün\u2028e", "last"]
    stream = open_prompts(str(path))
    stream.next(4, 0, 4)
    assert skip_counts(stream) == {"blank prompt": 2, "prompt that is not UTF-8": 1}
    assert [skip.positions for skip in stream.skipped.skips] == [
        (f"{path} line 2",),
        (f"{path} line 6",),
    ]


def test_zero_bytes_are_called_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\na bird\n", encoding="utf-16-le")
    with pytest.raises(ValueError, match=r"no prompt can be read.*zero bytes: 3"):
        open_prompts(str(path))
    path.write_bytes(b"a\0cat\na dog\n")
    stream = open_prompts(str(path))
    assert stream.next(2, 0, 2) == ["a dog"] * 2
    assert skip_counts(stream) == {"prompt with zero bytes": 1}


@pytest.mark.parametrize("text", ["\ufeffa fox\na bird", "\ufeffa fox\r\n\r\na bird\r\n"])
def test_utf16_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode("utf-16-le"))
    assert read_prompts(str(path)) == ["a fox", "a bird"]
    path.write_bytes(text.encode("utf-16-be")[:-1])  # cut inside a letter
    stream = open_prompts(str(path), shuffle=False)
    assert stream.next(3, 0, 3)[0] == "a fox"
    assert stream.skipped.skips[-1].reason == "prompt that is not UTF-8"


def test_usual_columns_are_found_in_capitals_and_lists_are_prompts(tmp_path: Path) -> None:
    path = tmp_path / "Parti.tsv"
    path.write_text("Prompt\tCategory\na cat\tAnimals\n")
    assert read_prompts(str(path)) == ["a cat"]
    path = tmp_path / "lists.jsonl"
    path.write_text('{"caption": ["a", "b"]}\n{"caption": []}\n')
    assert read_prompts(str(path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("column", "header"), [(None, "caption"), ("Beschreibung", "Beschreibung")]
)
def test_csv_reads_what_the_csv_module_wrote(
    tmp_path: Path, column: str | None, header: str
) -> None:
    path = tmp_path / "prompts.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows(
            [("id", "text", header), *((i, "", p) for i, p in enumerate(HARD_PROMPTS))]
        )
    assert read_prompts(str(path), column=column) == list(HARD_PROMPTS)


def test_jsonl_counts_bad_lines_and_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    bad = [
        "{oops",
        "[1]",
        '{"text": "x"}',
        '{"prompt": null}',
        '{"prompt": "\\ud800"}',
        "[" * 10**5,
    ]
    good = [json.dumps({"text": "no", "prompt": prompt}) for prompt in HARD_PROMPTS]
    write_txt(path, [*bad[:2], *good, *bad[2:], ""])
    stream = open_prompts(str(path), shuffle=False)
    # Twice over the file, and the counts are those of once.
    assert stream.next(10, 0, 10) == list(HARD_PROMPTS) * 2
    stream.next(1, 0, 1)
    assert skip_counts(stream) == {
        "not a JSON object": 3,
        "no prompt": 2,
        "prompt that is not UTF-8": 1,
    }
    assert f"not a JSON object: 3 ({path} line 1)" in stream.skipped.summary()
    assert f"no prompt: 2 ({path} line 8)" in stream.skipped.summary()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("column", [None, "Prompt"])
def test_absent_column_names_those_there(tmp_path: Path, suffix: str, column: str | None) -> None:
    # The wrong file hides behind a good one.
    good, wrong = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path, header in ((good, column or "prompt"), (wrong, " prompt")):
        row = {"id": "1", header: "fox"}
        lines = [",".join(row), ",".join(row.values())] if suffix == ".csv" else [json.dumps(row)]
        write_txt(path, lines)
    assert read_prompts(str(good), column=column) == ["fox"]
    with pytest.raises(ValueError, match=rf"b{suffix} has no column .*'id', ' prompt'"):
        open_prompts(str(tmp_path / f"*{suffix}"), column=column)


def test_tar_reads_what_webdataset_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    members = [
        ("./a/000.jpg", b"\xff\xd8" * 999),
        ("./a/000.txt", b"a fox"),
        ("001.TXT", "naïve 雨".encode()),
        ("._001.txt", b"left by macOS"),
        ("002.json", b"{}"),
        ("003.old.txt", b"another field"),
        ("003.txt", b"a bird"),
    ]
    path = write_tar(tmp_path / "shard.tar", members)
    samples = webdataset.WebDataset(path, shardshuffle=False).decode()
    expected = [sample["txt"] for sample in samples if "txt" in sample]
    assert read_prompts(path) == expected == ["a fox", "naïve 雨", "a bird"]


def test_paths_may_be_patterns(three_shards: str) -> None:
    for path in (three_shards, f"{three_shards}/", f"{three_shards}/*.tar", f"{three_shards}/0*"):
        assert read_prompts(path) == numbered(17)
    assert read_prompts(f"{three_shards}/{{002,{{000..001}}}}.tar")[:7] == numbered(17)[10:]
    assert read_prompts(f"{three_shards}/../**/{{000,00*}}.tar") == numbered(17)
    assert read_prompts(three_shards, limit=10) == numbered(10)


def test_literal_name_wins_over_pattern(tmp_path: Path) -> None:
    assert read_prompts(write_txt(tmp_path / "{a,b}[1].txt", ["fox"])) == ["fox"]


# Errors before training


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "prompts is empty"),
        ("absent.txt", "no such file.*absent.txt"),
        ("{000..012}.tar", "000.tar.* and 8 more"),
        ("*.tar", "no file matches"),
        ("{a,b.tar", "braces are not balanced"),
        ("x" * 5000 + ".txt", "no such file"),
        (".", "no file matches"),
        ("notes.md", "suffix '.md'.*.txt, .csv, .*.tar"),
        ("empty.txt", "no prompt can be read from prompts = 'empty.txt'.*file without a prompt: 1"),
        ("blank.txt", "no prompt can be read.*blank prompt: 2"),
        ("empty.csv", "no prompt can be read"),
        ("header.csv", "no prompt can be read"),
        ("{empty,header}.csv", "no prompt can be read.*without a prompt: 2"),
    ],
)
def test_bad_paths_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {"notes.md": "fox", "blank.txt": "\n \n", "header.csv": "prompt\n"}
    for name in ("notes.md", "empty.txt", "blank.txt", "empty.csv", "header.csv"):
        Path(name).write_text(contents.get(name, ""))
    with pytest.raises(ValueError, match=message):
        open_prompts(path)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    path = write_txt(tmp_path / "prompts.txt", ["fox"])
    with pytest.raises(ValueError, match=r"column='prompt'.*no columns"):
        open_prompts(path, column="prompt")
    with pytest.raises(ValueError, match="holds 0 prompts"):
        open_prompts(path, buffer=0)
    with pytest.raises(ValueError, match="limit=0"):
        read_prompts(path, limit=0)
    for size, start, stop in ((0, 0, 0), (4, 2, 5), (4, 3, 2), (4, -1, 2)):
        with pytest.raises(ValueError, match="global batch"):
            open_prompts(path).next(size, start, stop)
    with pytest.raises(ValueError, match="position=-1"):
        open_prompts(path).restore({"epoch": 0, "position": -1})
    with pytest.raises(ValueError, match="no position in this data, which has epoch, position"):
        open_prompts(path).restore({"epoch": 0, "cursors": {}})


# Damage


def test_tar_cut_anywhere_gives_the_prompts_before(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "shard.tar", txt_members(numbered(4))))
    whole = path.read_bytes()
    end_of_last = 4 * 1024
    for cut in (*range(0, end_of_last, 100), 515, 1024, 1536, end_of_last, end_of_last + 1):
        path.write_bytes(whole[:cut])
        # A member is a header of 512 bytes, and here 8 bytes of text.
        readable = len([i for i in range(4) if cut >= 1024 * i + 512 + 8])
        if readable == 0:
            with pytest.raises(ValueError, match=r"not a tar|truncated"):
                open_prompts(str(path))
            continue
        stream = open_prompts(str(path), shuffle=False)
        batch = stream.next(readable + 1, 0, readable + 1)
        assert batch == [*numbered(readable), "prompt 0"]
        assert skip_counts(stream) == {"truncated or damaged tar": 1}
        assert f"{path} (at byte" in stream.skipped.summary()


@pytest.mark.parametrize("offset", [0, 100, 124, 148, 257])
def test_damaged_header_ends_a_tar_and_is_named(tmp_path: Path, offset: int) -> None:
    path = Path(write_tar(tmp_path / "shard.tar", txt_members(numbered(5))))
    damaged = bytearray(path.read_bytes())
    damaged[3 * 1024 + offset] ^= 0x55
    path.write_bytes(damaged)
    stream = open_prompts(str(path), shuffle=False)
    assert stream.next(4, 0, 4) == [*numbered(3), "prompt 0"]
    assert f"truncated or damaged tar: 2 ({path} (at byte 3072, before " in stream.skipped.summary()


def test_bad_members_and_unreadable_tars_among_good_ones(
    three_shards: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(three_shards)
    (folder / "003.tar").write_bytes(b"no tar at all" * 100)
    write_tar(folder / "004.tar", [("x.txt", b"\xff\xff"), ("y.txt", b" \n"), ("z.jpg", b"z")])
    write_tar(folder / "005.tar", [("z.jpg", b"z")])
    with caplog.at_level(logging.WARNING, logger="sfumato.data.left_out"):
        stream = open_prompts(three_shards)
        for _ in range(3):
            assert sorted(stream.next(17, 0, 17)) == sorted(numbered(17))
    expected = {
        "not a tar": 1,
        "prompt that is not UTF-8": 1,
        "blank prompt": 1,
        "file without a prompt": 1,
    }
    assert skip_counts(stream) == expected
    assert f"{folder}/004.tar y.txt" in stream.skipped.summary()
    # Once a file and reason, not once an epoch.
    assert len(caplog.records) == len(expected)


def test_an_epoch_without_prompts_is_an_error_not_a_loop(three_shards: str) -> None:
    stream = open_prompts(three_shards)
    stream.next(17, 0, 17)
    for shard in Path(three_shards).iterdir():
        shard.unlink()
    with pytest.raises(ValueError, match=r"epoch 1 has no readable prompt.*unreadable file: 3"):
        stream.next(1, 0, 1)
