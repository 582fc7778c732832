"""What is the user's stays: folders are cleaned by record, and nothing is overwritten unasked."""

import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.config import DownloadConfig, PrepareConfig
from sfumato.files import RECORD, clear_unfinished, new_folder, remove_folder
from sfumato.preparation.download import download
from sfumato.preparation.prepare import prepare
from sfumato.preparation.tars import claim, forget_others
from sfumato.preparation.url_table import write_table


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize("theirs", ["notes.txt", "pipeline/readme.md", ".hidden", "a/b/c.bin"])
def test_files_of_the_user_stay_in_a_folder_that_is_replaced(tmp_path: Path, theirs: str) -> None:
    path = tmp_path / "export"
    for written in (["pipeline/old.bin", "lora/a"], ["pipeline/new.bin"], ["pipeline/new.bin"]):
        with new_folder(path) as folder:
            write(folder, *written)
        if "lora/a" in written:
            write(path, theirs)
    assert files(path) == sorted([RECORD, "pipeline/new.bin", theirs])
    assert (path / theirs).read_text() == theirs
    assert names(tmp_path) == ["export"]


@pytest.mark.parametrize("theirs", ["pipeline/new.bin", "pipeline", "pipeline/new.bin/deeper"])
def test_a_file_of_the_user_under_a_needed_name_is_refused(tmp_path: Path, theirs: str) -> None:
    path = tmp_path / "export"
    write(path, theirs)
    with pytest.raises(ValueError, match="in the way"), new_folder(path) as folder:
        write(folder, "pipeline/new.bin")
    assert files(path) == [theirs]
    assert names(tmp_path) == ["export"]


@pytest.mark.parametrize("record", ["", "{", "[]", '{"files": 3}', '{"files": [{}, 1]}'])
def test_a_damaged_record_lists_nothing(tmp_path: Path, record: str) -> None:
    path = tmp_path / "export"
    write(path, "a.txt", "b.txt")
    (path / RECORD).write_text(record)
    with pytest.raises(ValueError, match=r"a\.txt is in the way"), new_folder(path) as folder:
        write(folder, "a.txt")
    assert files(path) == [RECORD, "a.txt", "b.txt"]


def test_a_record_leads_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "export"
    write(tmp_path, "mine.txt")
    write(path, "a.txt")
    (path / RECORD).write_text('{"files": ["../mine.txt", "a.txt"]}')
    with new_folder(path) as folder:
        write(folder, "b.txt")
    assert files(tmp_path) == ["export/" + RECORD, "export/b.txt", "mine.txt"]


def test_a_folder_of_an_older_version_is_known_by_its_patterns(tmp_path: Path) -> None:
    older = ("summary.json", "summary.json", "images/[0-9]*.png")
    for marker in ("summary.json", "other.json"):
        path = tmp_path / marker
        write(path, marker, "images/000.png", "images/mine.png")
        if marker != "summary.json":
            with pytest.raises(ValueError, match="in the way"), new_folder(path, older=older) as f:
                write(f, "images/000.png")
            continue
        with new_folder(path, older=older) as folder:
            write(folder, marker)
        assert files(path) == [RECORD, "images/mine.png", marker]


KILLED = """
import os, sys
from pathlib import Path
from sfumato.files import new_folder
left = int(sys.argv[2])
true_rename = Path.rename
def rename(self, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return true_rename(self, target)
Path.rename = rename
with new_folder(Path(sys.argv[1])) as beside:
    (beside / "a.txt").write_text("new")
"""


@pytest.mark.parametrize("renames", range(7))
def test_a_kill_at_any_rename_loses_no_file_of_the_user(tmp_path: Path, renames: int) -> None:
    path = tmp_path / "folder"
    with new_folder(path) as folder:
        write(folder, "a.txt")
    write(path, "mine/one.txt", "two.txt")
    subprocess.run([sys.executable, "-c", KILLED, str(path), str(renames)], check=False)
    clear_unfinished(path)
    assert files(path) == [RECORD, "a.txt", "mine/one.txt", "two.txt"]
    assert names(tmp_path) == ["folder"]


def test_only_names_that_sfumato_gives_are_unfinished(tmp_path: Path) -> None:
    write(tmp_path, ".export.tmp-12/half", ".export.tmp-mine/a", ".export.tmp-1.bak/b")
    with new_folder(tmp_path / "export") as folder:
        write(folder, "a")
    assert names(tmp_path) == [".export.tmp-1.bak", ".export.tmp-mine", "export"]


@pytest.mark.parametrize("kind", ["link", "dangling", "file"])
def test_a_link_or_a_file_instead_of_a_folder_is_named(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / "export", tmp_path / "elsewhere"
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(elsewhere)
    if kind == "link":
        write(elsewhere, "mine.txt")
    word = "a file" if kind == "file" else "a symbolic link"
    with pytest.raises(ValueError, match=f"export is {word}"), new_folder(path):
        pass
    with pytest.raises(ValueError, match=f"export is {word}"):
        remove_folder(path)
    assert path.is_symlink() == (kind != "file")
    assert kind != "link" or files(elsewhere) == ["mine.txt"]


def test_a_folder_with_files_of_the_user_is_not_removed(tmp_path: Path) -> None:
    with new_folder(tmp_path / "step") as folder:
        write(folder, "weights")
    write(tmp_path / "step", "notes.txt")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which Sfumato did not write"):
        remove_folder(tmp_path / "step")
    assert files(tmp_path / "step") == [RECORD, "notes.txt", "weights"]


def record(name: str) -> str:
    return f'{{"format": 1, "name": "{name}", "made_of": "x"}}'


def test_numbered_files_of_others_are_refused_and_never_removed(tmp_path: Path) -> None:
    write(tmp_path, "000001.tar", "000001.json", "000007.json", "notes.json", ".mine.tmp")
    claim(tmp_path, ["000000"])
    with pytest.raises(ValueError, match=r"000001\.json .* did not write"):
        claim(tmp_path, ["000000", "000001"])
    write(tmp_path, "000000.tar", "000000.json", ".000000.tar.tmp")
    forget_others(tmp_path, set())
    assert files(tmp_path) == sorted(
        [".mine.tmp", ".written", "000001.json", "000001.tar", "000007.json", "notes.json"]
    )


def test_records_of_an_older_version_are_known_by_what_they_hold(tmp_path: Path) -> None:
    write(tmp_path, "000000.tar", "000001.tar", "000002.tar", "000002.json")
    for name in ("000000", "000001"):
        (tmp_path / f"{name}.json").write_text(record(name))
    claim(tmp_path, ["000000"])
    forget_others(tmp_path, {"000000"})
    assert files(tmp_path) == [".written", "000000.json", "000000.tar", "000002.json", "000002.tar"]


def table(folder: Path) -> DownloadConfig:
    folder.mkdir(parents=True)
    rows = [{"url": f"http://localhost:9/{i}.png", "caption": f"a {i}"} for i in range(5)]
    (folder / "urls.csv").write_text(
        "url,caption\n" + "".join(f"{r['url']},{r['caption']}\n" for r in rows)
    )
    return DownloadConfig(table=str(folder / "urls.csv"), samples_per_shard=2)


def test_a_table_of_the_user_in_the_folder_of_the_table_is_refused(tmp_path: Path) -> None:
    config = table(tmp_path / "in")
    write(tmp_path / "out", "table/urls.parquet", "table/notes.txt")
    with pytest.raises(ValueError, match=r"table/urls\.parquet .* did not write"):
        download(config, tmp_path / "out")
    assert files(tmp_path / "out") == ["table/notes.txt", "table/urls.parquet"]
    (tmp_path / "out/table/urls.parquet").unlink()
    write_table(config, tmp_path / "out")
    assert files(tmp_path / "out" / "table") == [
        RECORD,
        "000000.parquet",
        "notes.txt",
        "table.json",
    ]
    write(tmp_path / "out", "table/more.parquet")
    with pytest.raises(ValueError, match=r"table/more\.parquet .* did not write"):
        download(config, tmp_path / "out")


@pytest.mark.parametrize("theirs", ["00000_stats.json", "00000.tar", "notes.json", "00000.parquet"])
def test_files_of_the_user_where_img2dataset_writes_are_refused(
    tmp_path: Path, theirs: str
) -> None:
    config = table(tmp_path / "in")
    write(tmp_path / "out" / "download", theirs)
    with pytest.raises(ValueError, match=rf"download/{theirs} .* not of this download"):
        download(config, tmp_path / "out")
    assert files(tmp_path / "out") == [f"download/{theirs}"]


@pytest.mark.parametrize("theirs", ["notes.json", "00009_stats.json"])
def test_a_begun_download_keeps_the_files_of_the_user(tmp_path: Path, theirs: str) -> None:
    config = table(tmp_path / "in")
    write_table(config, tmp_path / "out")
    write(tmp_path / "out" / "download", theirs, "00001_stats.json")  # of a killed img2dataset
    with pytest.raises(ValueError, match=rf"download/{theirs} .* not of this download"):
        download(config, tmp_path / "out")
    assert files(tmp_path / "out" / "download") == [theirs]


def test_an_index_of_the_user_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "out/index.json")
    config = PrepareConfig(out=str(tmp_path / "out"), stages=["pack"])
    config.pack.path = str(tmp_path)
    with pytest.raises(ValueError, match=r"index\.json"):
        prepare(config)
    assert (tmp_path / "out/index.json").read_text() == "out/index.json"
