"""Open prompt files: a path, a directory of tars, a glob or a brace pattern."""

import glob
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from sfumato.data.readers import COLUMN_SUFFIXES, READERS, read_shard
from sfumato.data.skips import SkipLog
from sfumato.data.stream import Stream, prompt_stream

_NAMED_FILES = 5


def open_prompts(
    path: str,
    *,
    column: str | None = None,
    seed: int = 0,
    shuffle: bool = True,
    buffer: int = 10_000,
) -> Stream[str]:
    """Open prompts for training: endless, shuffled, resumable, in bounded memory.

    Formats are told by suffix: `.txt` (one prompt a line), `.csv` and `.jsonl` (one column), and
    WebDataset `.tar` (members `KEY.txt`).

    Args:
        path: a file, a directory of `.tar` files, a glob (`shards/*.tar`, `**` for any depth) or
            a brace pattern (`shards/{000..012}.tar`).
        column: the column of a `.csv` or `.jsonl` file; None takes the first of `prompt`,
            `caption` and `text` that is there.
        seed: with the epoch, decides the order.
        shuffle: False keeps the file order in every epoch.
        buffer: the largest number of prompts held for shuffling.

    Raises:
        ValueError: a file is missing, its suffix unknown, the column not there, or no prompt can
            be read. Only the beginnings of files are looked at.
    """
    shards = find_shards(path)
    log = SkipLog()
    _check(path, shards, column, log)
    read = partial(read_shard, column=column, log=log)
    return prompt_stream(shards, read, log, seed=seed, shuffle=shuffle, buffer=buffer)


def read_prompts(path: str, *, column: str | None = None, limit: int | None = None) -> list[str]:
    """Read prompts in file order, at most `limit` of them; path, column, errors: `open_prompts`.

    Raises:
        ValueError: also, `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} prompts would be none; give 1 or more, or None for all")
    shards = find_shards(path)
    log = SkipLog()
    _check(path, shards, column, log)
    return list(islice(_chain(shards, column, log), limit))


def find_shards(path: str) -> tuple[Path, ...]:
    """List the files that `path` stands for, sorted where a directory or a glob names them.

    Raises:
        ValueError: one that is named is missing, a glob finds none, or a suffix is unknown.
    """
    whole = Path(path).expanduser()
    if not path.strip():
        raise ValueError("the path of the prompts is empty; name a file, a directory or a pattern")
    if _is_file(whole):
        shards = (whole,)
    elif _is_directory(whole):
        shards = _glob(f"{glob.escape(str(whole))}/*.tar")
    else:
        shards = tuple(dict.fromkeys(expand_pattern(str(whole))))
    if not shards:
        raise ValueError(
            f"no file matches {path!r}; give a file, a directory with .tar files in it, or a "
            "pattern that matches files"
        )
    for shard in shards:
        if shard.suffix.lower() not in READERS:
            raise ValueError(
                f"{shard} has the suffix {shard.suffix!r}; prompts are read from "
                + ", ".join(READERS)
            )
    return shards


def expand_pattern(pattern: str) -> Iterator[Path]:
    """Yield the files of a brace pattern whose alternatives may be globs.

    Raises:
        ValueError: its braces are not balanced, or a file that it names is missing.
    """
    try:
        names = tuple(braceexpand(pattern, escape=False))
    except ValueError:
        raise ValueError(
            f"{pattern!r} is neither a file nor a brace pattern: its braces are not balanced"
        ) from None
    missing = [name for name in names if not glob.has_magic(name) and not _is_file(Path(name))]
    if missing:
        more = f" and {len(missing) - _NAMED_FILES} more" if len(missing) > _NAMED_FILES else ""
        raise ValueError(
            f"no such file: {', '.join(missing[:_NAMED_FILES])}{more}; check the path of the "
            f"prompts, {pattern!r}"
        )
    for name in names:
        yield from _glob(name) if glob.has_magic(name) else (Path(name),)


def _glob(pattern: str) -> tuple[Path, ...]:
    # Not Path.glob: it takes no absolute pattern, and it finds hidden files (macOS's ._000.tar).
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    return tuple(Path(name) for name in found if _is_file(Path(name)))


def _is_file(path: Path) -> bool:
    # A pattern can be longer than any file name, and then asking is an error.
    try:
        return path.is_file()
    except OSError:
        return False


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _check(path: str, shards: Sequence[Path], column: str | None, log: SkipLog) -> None:
    """Fail now rather than hours into a run: every column is there, one prompt can be read."""
    with_columns = [shard for shard in shards if shard.suffix.lower() in COLUMN_SUFFIXES]
    if column is not None and not with_columns:
        raise ValueError(
            f"column={column!r} was given, but {path!r} has no columns; leave it out, or give "
            "a .csv or .jsonl file"
        )
    readable = [next(read_shard(shard, column, log), None) for shard in with_columns]
    if any(prompt is not None for prompt in readable):
        return
    if next(_chain(shards, column, log), None) is None:
        raise ValueError(f"no prompt can be read from {path!r}: {log.report().summary()}")


def _chain(shards: Sequence[Path], column: str | None, log: SkipLog) -> Iterator[str]:
    for shard in shards:
        yield from read_shard(shard, column, log)
