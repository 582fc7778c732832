"""Paths that stand for files: a file, a folder, a glob or a brace pattern."""

import glob
import os.path
from collections.abc import Iterator, Sequence
from pathlib import Path

from braceexpand import braceexpand

from sfumato.data.copies import copy_of
from sfumato.data.store import check_address, is_address

_NAMED_FILES = 5
# Unlike Path's methods, these take a pattern that is longer than any file name.
is_file, is_folder = os.path.isfile, os.path.isdir


def find_files(path: str, key: str, suffixes: Sequence[str]) -> tuple[Path, ...]:
    """List the files that a path stands for, sorted where a folder or a glob names them.

    Args:
        path: a file; a folder, for the .tar files in it; a glob (`shards/*.tar`, `**` for any
            depth) or a brace pattern (`shards/{000..012}.tar`). An address of a file in a store, or
            a brace pattern of them, gives copies on this machine.
        key: of the setting that holds the path, for messages.
        suffixes: of the files that can be read.

    Raises:
        ValueError: a file that is named is missing, a glob finds none, or a suffix is unknown.
    """
    whole = Path(path).expanduser()
    if is_address(path):
        return tuple(copy_of(each, key) for each in addresses_of(path, key, suffixes))
    if not path.strip():
        raise ValueError(f"{key} is empty; name a file, a folder or a pattern")
    if is_file(whole):
        files = (whole,)
    elif is_folder(whole):
        files = tuple(path for path in _glob(f"{glob.escape(str(whole))}/*") if is_tar(path))
    else:
        files = tuple(dict.fromkeys(expand_pattern(str(whole), key)))
    if not files:
        raise ValueError(
            f"no file matches {key} = {path!r}; give a file, a folder with .tar files in it, or a "
            "pattern that matches files"
        )
    for file in files:
        if file.suffix.lower() not in suffixes:
            raise ValueError(
                f"{key} names {file}, whose suffix {file.suffix!r} is unknown; give a folder, or "
                f"a file of {', '.join(suffixes)}"
            )
    return files


def addresses_of(pattern: str, key: str, suffixes: Sequence[str] = ()) -> list[str]:
    """Return the addresses of files that an address with a brace pattern stands for.

    Args:
        suffixes: that are accepted; none accepts all.

    Raises:
        ValueError: it is a folder, a glob or no pattern, or a suffix is unknown.
    """
    check_address(key, pattern)
    found = _expanded(pattern, key)
    for each in found:
        if glob.has_magic(each):
            raise ValueError(
                f"{key} = {pattern!r} is a glob, and a store is not searched; name its files, as "
                "in s3://BUCKET/FOLDER/{000..012}.tar"
            )
        if suffixes and not each.lower().endswith(tuple(suffixes)):
            folder = "; that of a folder of pictures ends with /" if ".tar" in suffixes else ""
            raise ValueError(
                f"{key} = {each!r} is no file that can be read from a store; give the address of a "
                f"file of {', '.join(suffixes)}{folder}"
            )
    return found


def is_tar(path: Path) -> bool:
    """Tell a tar by its suffix."""
    return path.suffix.lower() == ".tar"


def expand_pattern(pattern: str, key: str) -> Iterator[Path]:
    """Yield the files of a brace pattern whose alternatives may be globs.

    Raises:
        ValueError: its braces are not balanced, or a file that it names is missing.
    """
    names = _expanded(pattern, key)
    missing = [name for name in names if not glob.has_magic(name) and not is_file(name)]
    if missing:
        more = f" and {len(missing) - _NAMED_FILES} more" if len(missing) > _NAMED_FILES else ""
        raise ValueError(
            f"no such file: {', '.join(missing[:_NAMED_FILES])}{more}; check {key} = {pattern!r}"
        )
    for name in names:
        yield from _glob(name) if glob.has_magic(name) else (Path(name),)


def _expanded(pattern: str, key: str) -> list[str]:
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        raise ValueError(
            f"{key} = {pattern!r} is neither a file nor a brace pattern: its braces are not "
            "balanced"
        ) from None


def _glob(pattern: str) -> tuple[Path, ...]:
    # Not Path.glob: it takes no absolute pattern, and it finds hidden files (macOS's ._000.tar).
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    return tuple(Path(name) for name in names if is_file(name))
