"""Files and folders: written whole, read or refused, hashed, locked.

Nothing appears under its own name before it is complete: it is written beside its name, synced to
the disk and renamed. A kill or a full disk leaves what was there before.

A folder that is replaced has a record, .sfumato.json, of the files that Sfumato wrote. Only these
are ever removed or overwritten.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

RECORD = ".sfumato.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNFINISHED = re.compile(r"\.tmp-\d+(-[0-9a-f]{8})?(?P<old>-old)?")
_LARGEST = 2**30  # bytes of a file that is read into memory whole


@contextmanager
def new_file(
    path: Path, *, shared: bool = False, failure: type[ValueError] = ValueError
) -> Iterator[Path]:
    """Give a path to write to; the file then replaces `path`. The mode is the umask's.

    Args:
        shared: several processes may write the same file at once; a killed one's stays beside it.

    Raises:
        failure: the file cannot be written; `path` is as it was.
    """
    unique = f"-{os.urandom(4).hex()}" if shared else ""
    beside = path.with_name(f".{path.name}.tmp{unique}")
    with writing(path, failure):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)  # a killed writer's, perhaps of another mode
            beside.touch()
            mode = beside.stat().st_mode
            yield beside
            beside.chmod(mode)  # safetensors makes files that only their owner can read
            _sync(beside)
            beside.replace(path)
            _sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def write_text(
    path: Path, text: str, *, shared: bool = False, failure: type[ValueError] = ValueError
) -> None:
    """Write a text file whole, or not at all; as `new_file`."""
    with new_file(path, shared=shared, failure=failure) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(
    path: Path,
    *,
    shared: bool = False,
    older: Sequence[str] = (),
    failure: type[ValueError] = ValueError,
) -> Iterator[Path]:
    """Give an empty folder to fill; it then replaces `path`. Files get the umask's mode.

    Links to files elsewhere keep their mode. Files of others in `path` stay there.

    Args:
        shared: several processes may make the same folder at once; the first one's stays.
        older: a file, then patterns; a folder with that file and without a record was written by an
            older version, namely the files that the patterns match.

    Raises:
        failure: something cannot be written, `path` is a link, or a file of others has a name that
            is needed; `path` is as it was.
    """
    unique = f"-{os.urandom(4).hex()}" if shared else ""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}{unique}")
    with writing(path, failure):
        try:
            if not shared:
                refuse_link(path, failure=failure)
                clear_unfinished(path)
            beside.mkdir(parents=True)
            yield beside
            if not shared:
                _record(beside, _files(beside))
                if path.is_dir():
                    others = others_in(path, older)
                    _refuse_clash(beside, path, others, failure)
                    _record(path, set(_files(path)).difference(others))
            mode = beside.stat().st_mode & 0o666
            for file in (file for file in beside.rglob("*") if file.is_file()):
                if file.lstat().st_nlink == 1 and not file.is_symlink():
                    file.chmod(mode)
                _sync(file)
            _exchange(beside, path, shared=shared)
            _sync(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def clear_unfinished(path: Path) -> None:
    """Remove what a killed `new_folder` left beside `path`; bring back what it had put aside."""
    for stale in sorted(path.parent.glob(f".{path.name}.tmp-*")):
        match = _UNFINISHED.fullmatch(stale.name.removeprefix(f".{path.name}"))
        if match is None or stale.is_symlink():
            continue
        if not match["old"]:
            shutil.rmtree(stale, ignore_errors=True)
        elif not path.exists():
            stale.rename(path)
        else:
            _discard(stale, path)


def remove_folder(path: Path, *, older: Sequence[str] = ()) -> None:
    """Remove a folder of `new_folder`; a kill leaves no half of it under its own name.

    Raises:
        ValueError: it is a link, or holds files of others; it is as it was.
    """
    refuse_link(path)
    refuse_others(path, older)
    hidden = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def refuse_link(path: Path, *, failure: type[ValueError] = ValueError) -> None:
    """Refuse to replace or remove what is a link, or a file where a folder should be.

    Raises:
        failure: naming it.
    """
    kind = "a symbolic link" if path.is_symlink() else "a file"
    if path.is_symlink() or path.is_file():
        raise failure(
            f"{path} is {kind}, and Sfumato replaces and removes only folders that it made; move "
            "it away and run the same command again"
        )


def refuse_others(
    path: Path, older: Sequence[str] = (), *, failure: type[ValueError] = ValueError
) -> None:
    """Refuse a folder with files that Sfumato did not write.

    Raises:
        failure: naming the first.
    """
    if others := others_in(path, older):
        raise failure(
            f"{path} holds {others[0]}, which Sfumato did not write; move it away and run the "
            "same command again"
        )


def others_in(path: Path, older: Sequence[str] = ()) -> list[str]:
    """Return the relative paths of the files in a folder that Sfumato did not write, sorted.

    Args:
        older: as in `new_folder`.
    """
    if (path / RECORD).is_file():
        content = parse_object((path / RECORD).read_bytes()) or {}
        names = content.get("files")
        own = {RECORD, *map(str, names if isinstance(names, list) else ())}
        return [name for name in _files(path) if name not in own]
    patterns = older if older and (path / older[0]).is_file() else ()
    return [name for name in _files(path) if not any(fnmatchcase(name, p) for p in patterns)]


def read_object(
    path: Path, advice: str, *, failure: type[ValueError] = ValueError
) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        advice: what to do about a bad file, such as "download the model again".

    Raises:
        failure: the file is missing, unreadable, or holds something else; naming it.
    """
    content = read_json(path, advice, failure=failure)
    if not isinstance(content, dict):
        raise failure(f"{path} holds a JSON {type(content).__name__}, not an object; {advice}")
    return content


def read_json(path: Path, advice: str, *, failure: type[ValueError] = ValueError) -> Any:
    """Return the JSON value in a file; see `read_object`."""
    content = read_bytes(path, advice, failure=failure)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise failure(f"{path} is damaged: it is not JSON ({error}); {advice}") from error


def read_bytes(
    path: Path, advice: str, *, most: int = _LARGEST, failure: type[ValueError] = ValueError
) -> bytes:
    """Return the bytes of a regular file; a pipe or a device could be read without an end.

    Args:
        advice: what to do about a bad file.
        most: bytes that such a file has at most.

    Raises:
        failure: the file is missing, unreadable, larger, or no regular file; naming it.
    """
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise failure(f"{path} cannot be read (it is not a regular file); {advice}")
        if status.st_size > most:
            raise failure(
                f"{path} has {status.st_size:,} bytes, more than the {most:,} of any such file; "
                f"{advice}"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise failure(f"{path} is missing; {advice}") from error
    except OSError as error:
        raise failure(f"{path} cannot be read ({error.strerror}); {advice}") from error


def parse_object(text: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object in a text, or None where it holds something else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: Any) -> str:
    """Return the SHA-256 of a JSON value, in hex: equal values, equal digests."""
    return hashlib.sha256(compact(content)).hexdigest()


def compact(content: Any) -> bytes:
    """Return a JSON value as sorted, compact text: equal values, equal bytes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def lock(
    folder: Path,
    *,
    busy: str,
    unmade: str,
    shared: bool = False,
    wait: bool = False,
    failure: type[ValueError] = ValueError,
) -> IO[str]:
    """Make a folder and hold it for this process, until the returned file is closed.

    A child that inherits the descriptor holds the folder for as long as the child lives. A file
    system that cannot lock gets a warning on stderr, and nothing is held.

    Args:
        busy: the message if another process holds the folder.
        shared: hold it beside other processes that share it.
        wait: until no other process holds it.
        unmade: the advice if the folder cannot be made.

    Raises:
        failure: another process holds the folder, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")  # NFS takes a shared lock on what can be read alone
    except OSError as error:
        raise failure(f"the folder {folder} cannot be made ({error.strerror}); {unmade}") from error
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise failure(busy) from error
    except OSError as error:
        print(
            f"{folder}: this file system cannot lock ({error.strerror}), so two processes in one "
            "folder would not be noticed",
            file=sys.stderr,
        )
    return file


@contextmanager
def writing(path: Path, failure: type[ValueError] = ValueError) -> Iterator[None]:
    """Explain an error of the disk.

    Raises:
        failure: what lies in the block could not write.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        # safetensors' own error has no errno, and settings are composed without its package.
        code = error.errno if isinstance(error, OSError) else None
        full = code in _FULL or os.strerror(errno.ENOSPC) in str(error)
        reason = "no space is left on the disk" if full else str(error)
        advice = "Free some space" if full else "Correct the cause"
        raise failure(
            f"{path} could not be written: {reason}; nothing half-written is left. {advice} and "
            "run the same command again"
        ) from error


def _exchange(beside: Path, path: Path, *, shared: bool) -> None:
    """Replace a folder by another. The old one stays if that fails, or if it is shared."""
    old = path.with_name(f"{beside.name}-old")
    if path.exists() and not shared:
        path.rename(old)
    try:
        beside.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        if not (shared and path.is_dir()):
            raise
    if old.exists():
        _discard(old, path)


def _discard(old: Path, path: Path) -> None:
    """Remove a replaced folder; the files of others in it go into the new one."""
    if not (old / RECORD).is_file():
        return
    for name in others_in(old):
        if os.path.lexists(path / name):
            return
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).rename(path / name)
    unfinished = old.with_name(old.name.removesuffix("-old"))
    old.rename(unfinished)  # a kill while it is removed must not leave what looks like a folder
    shutil.rmtree(unfinished, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """Return the relative paths of all files and links, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _record(folder: Path, names: Collection[str]) -> None:
    content = {"files": sorted(name for name in names if name != RECORD)}
    write_text(folder / RECORD, json.dumps(content, indent=0) + "\n")


def _refuse_clash(
    beside: Path, path: Path, others: Collection[str], failure: type[ValueError]
) -> None:
    """Refuse new files and folders under the names of files of others, and the reverse."""
    files = set(_files(beside))
    folders = {str(parent) for name in files for parent in Path(name).parents}
    for name in others:
        if name in files | folders or not files.isdisjoint(map(str, Path(name).parents)):
            raise failure(
                f"{path / name} is in the way, and Sfumato did not write it; move it away and run "
                "the same command again"
            )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
