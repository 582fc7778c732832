"""Files and folders that are whole or not there, whatever happens while they are written."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfumato.files import (
    clear_unfinished,
    digest,
    lock,
    new_file,
    new_folder,
    parse_object,
    read_json,
    read_object,
    remove_folder,
    sha256_of,
    write_text,
)
from sfumato.hub import fetch


class OddError(ValueError):
    """The failure class of a caller."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "a.txt").write_text(text)


def test_a_file_is_written_beside_its_place_and_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with new_file(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


def test_a_folder_is_filled_beside_its_place_and_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for text in ("old", "new"):
        with new_folder(path) as beside:
            fill(beside, text)
    assert (path / "inner" / "a.txt").read_text() == "new"
    assert names(path.parent) == ["folder"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), OSError(errno.EACCES, "no")])
def test_what_cannot_be_written_leaves_the_old_and_no_trace(tmp_path: Path, error: OSError) -> None:
    write_text(tmp_path / "a.txt", "old")
    with new_folder(tmp_path / "folder") as beside:
        fill(beside, "old")
    with (
        pytest.raises(OddError, match=r"a\.txt could not be written"),
        new_file(tmp_path / "a.txt", failure=OddError) as beside,
    ):
        beside.write_text("half")
        raise error
    with (
        pytest.raises(OddError, match="folder could not be written"),
        new_folder(tmp_path / "folder", failure=OddError) as beside,
    ):
        fill(beside, "half")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "folder" / "inner" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt", "folder"]


def test_a_full_disk_is_named_also_where_the_error_has_no_number(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    for error in (OSError(errno.EDQUOT, "q"), SafetensorError("No space left on device (os)")):
        message = r"no space is left.*Free some space"
        with pytest.raises(ValueError, match=message), new_file(tmp_path / "a"):
            raise error


def test_other_errors_pass_and_leave_no_trace(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_file(tmp_path / "a"):
        raise KeyError("mine")
    with pytest.raises(KeyError), new_folder(tmp_path / "b"):
        raise KeyError("mine")
    assert names(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with new_file(tmp_path / "a.safetensors") as beside:
            save_file({"a": torch.zeros(1)}, beside)
        with new_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            save_file({"a": torch.zeros(1)}, folder / "inner" / "a.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "a.safetensors", tmp_path / "folder" / "inner" / "a.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_of_processes_that_make_a_shared_folder_the_first_wins(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with new_folder(path, shared=True) as slow:
        fill(slow, "slow")
        with new_folder(path, shared=True) as fast:
            fill(fast, "fast")
    assert (path / "inner" / "a.txt").read_text() == "fast"
    assert names(tmp_path) == ["folder"]


def test_linked_files_keep_their_mode(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("theirs")
    theirs.chmod(0o600)
    with new_folder(tmp_path / "folder") as folder:
        (folder / "hard.txt").hardlink_to(theirs)
        (folder / "soft.txt").symlink_to(theirs)
    assert theirs.stat().st_mode & 0o777 == 0o600


KILLED = """
import os, sys
from pathlib import Path
from sfumato.files import new_folder
renames = int(sys.argv[2])
true_rename = Path.rename
def rename(self, target):
    global renames
    if renames == 0:
        os._exit(9)
    renames -= 1
    return true_rename(self, target)
Path.rename = rename
with new_folder(Path(sys.argv[1])) as beside:
    (beside / "a.txt").write_text("new")
"""


@pytest.mark.parametrize(("renames", "content"), [(0, "old"), (1, "old"), (2, "new"), (3, "new")])
def test_a_kill_between_two_renames_loses_no_folder(
    tmp_path: Path, renames: int, content: str
) -> None:
    path = tmp_path / "folder"
    with new_folder(path) as beside:
        (beside / "a.txt").write_text("old")
    code = subprocess.run([sys.executable, "-c", KILLED, str(path), str(renames)], check=False)
    assert code.returncode == (0 if renames == 3 else 9)
    clear_unfinished(path)
    assert (path / "a.txt").read_text() == content
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    with new_folder(path) as beside:
        (beside / "a.txt").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if Path(target) == path and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ValueError, match="folder could not be written"), new_folder(path):
        pass
    assert (path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_removed_folder_is_gone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as folder:
        fill(folder, "a")
    remove_folder(tmp_path / "folder")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[1]", "list, not an object"),
        (b"null", "NoneType, not an object"),
    ],
)
def test_a_file_without_an_object_is_named_with_advice(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OddError, match=rf"a\.json .*{words}.*; plant a tree"):
        read_object(path, "plant a tree", failure=OddError)


def test_objects_and_values_are_read(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", '{"é": 1}')
    assert read_object(tmp_path / "a.json", "") == {"é": 1}
    write_text(tmp_path / "a.json", "[1]")
    assert read_json(tmp_path / "a.json", "") == [1]
    assert parse_object('{"a": 1}') == {"a": 1}
    for text in ("", "[1]", "{", b"\xff", "1" * 5000, "[" * 100_000):
        assert parse_object(text) is None


def test_a_folder_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        read_object(tmp_path, "")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "a") == expected
    assert digest({"b": [1], "a": "é"}) == digest(json.loads('{"a": "\\u00e9", "b": [1]}'))
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_locked_folder_is_busy_until_it_is_closed(tmp_path: Path) -> None:
    def hold() -> Callable[[], None]:
        return lock(tmp_path / "run", busy="it is busy", unmade="", failure=OddError).close

    close = hold()
    with pytest.raises(OddError, match="it is busy"):
        hold()
    close()
    hold()()
    (tmp_path / "file").write_text("")
    with pytest.raises(OddError, match=r"cannot be made .*choose another"):
        lock(tmp_path / "file" / "x", busy="", unmade="choose another", failure=OddError)


def test_a_hub_id_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    for name in ("nobody/nothing", "no/such/id"):
        with pytest.raises(ValueError, match=rf"model\.pretrained = '{name}'.*check the id"):
            fetch(name, "model.pretrained", ["*.json"])


def test_the_local_cache_of_the_hub_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def snapshot_download(name: str, **options: object) -> str:
        calls.append(options.get("local_files_only", False))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert fetch("a/b", "s", ["*"]) == tmp_path
    assert calls == [True]
    fetch("a/b", "s", ["*"], complete=lambda folder: (folder / "x").exists())
    assert calls == [True, True, False]
