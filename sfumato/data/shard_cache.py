"""Disk cache of objects of a store, bounded, which all processes of a machine share.

A whole file has the name of its content, and an unfinished one `.part` behind it. Whoever reads a
file holds a shared lock (flock) on it, and whoever writes it a lock of its own. The least recently
used file that nobody holds goes first. A killed process holds nothing; what it left unfinished is
written again, or goes like others.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import resource
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from sfumato.files import sha256_of

_OURS = re.compile(r"[0-9a-f]{64}(\.part)?")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OPEN_FILES = 2**16
_POLL = 0.02  # seconds between looks at a file that somebody else writes
_LOGGER = logging.getLogger(__name__)
_whole: set[tuple[str, int, int]] = set()  # files that this process has compared with their sums
_warned: set[Path] = set()  # folders that have grown beyond their limit


class StoreError(ValueError):
    """A store that cannot be read, or a cache that cannot be written."""


class CacheError(StoreError):
    """A cache that cannot be made or written: a fault of this machine."""


@final
class LocalFile:
    """A file on this machine; a file of the cache stays there for as long as this object lives."""

    def __init__(self, path: Path, lock: int | None = None) -> None:
        """Take over a descriptor that holds a lock on the file."""
        self.path = path
        if lock is not None:
            weakref.finalize(self, os.close, lock)


@final
class ShardCache:
    """Files by 64 hex digits, made when they are first asked for."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Make the folder; `limit` is of the bytes in it.

        Raises:
            StoreError: the folder cannot be made.
        """
        self.folder, self.limit = folder, limit
        _allow_open_files()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                pass
        except OSError as error:
            raise CacheError(
                f"the cache {folder} cannot be made, or cannot be locked ({error.strerror}); set "
                "data.shards.cache_dir to a folder on a disk of this machine"
            ) from None

    def hold(
        self, key: str, size: int, write: Callable[[int], None], sha256: str | None = None
    ) -> LocalFile:
        """Return the file of a key; it is written if it is not there, or not whole.

        Args:
            size: of the file, in bytes.
            write: writes all of it to a descriptor.
            sha256: with which the file is compared, once in this process; None does not compare.

        Raises:
            StoreError: the disk is full, or the file is larger than the cache; or as `write`.
        """
        if size > self.limit:
            raise CacheError(
                f"the cache {self.folder} may have {self.limit:,} bytes (data.shards.cache_gb), "
                f"and one shard has {size:,}; set a larger data.shards.cache_gb"
            )
        path = self.folder / key
        with self._explained():
            while (held := self._find(path, size, sha256)) is None:
                with self._unfinished(path) as part:
                    if part is None:
                        continue
                    self._make_room(size, part)
                    write(part)
                    if sha256 is None:
                        os.fsync(part)  # what has no sum is never compared
                    with self._alone():  # whoever counts the files meets it under one name
                        path.with_suffix(".part").replace(path)
                    if sha256 is not None:  # `write` has compared it
                        _whole.add(_state(path, part))
        return held

    def find(self, key: str) -> LocalFile | None:
        """Return the file of a key without a sum, if it is there."""
        with self._explained():
            return self._find(self.folder / key, 0, None)

    def forget(self, key: str) -> None:
        """Remove the file of a key; who reads it goes on reading."""
        (self.folder / key).unlink(missing_ok=True)

    def _find(self, path: Path, size: int, sha256: str | None) -> LocalFile | None:
        """Return a whole file; None if there is none, after a damaged one was removed."""
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        held = LocalFile(path, lock)
        fcntl.flock(lock, fcntl.LOCK_SH)
        about = os.fstat(lock)
        if not about.st_nlink:  # it was removed meanwhile
            return None
        state = _state(path, lock)
        if sha256 is not None and state not in _whole:
            if about.st_size != size or sha256_of(path) != sha256:
                if _is_at(lock, path):  # and nobody has fetched it again
                    path.unlink(missing_ok=True)
                return None
            _whole.add(state)
        with suppress(OSError):  # somebody else's file: its order alone is lost
            os.utime(lock, ns=(time.time_ns(), about.st_mtime_ns))
        return held

    @contextmanager
    def _unfinished(self, path: Path) -> Iterator[int | None]:
        """Hold the unfinished file, or give None if somebody else has finished it meanwhile."""
        part = path.with_suffix(".part")
        lock = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock_at(lock, part) or path.exists():
                yield None
                return
            try:
                yield lock
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        finally:
            if path.exists() and _is_at(lock, part):
                part.unlink(missing_ok=True)
            os.close(lock)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's list of files."""
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _make_room(self, size: int, part: int) -> None:
        """Give an unfinished file its size; remove files that nobody holds until it fits."""
        with self._alone():
            os.ftruncate(part, 0)
            with os.scandir(self.folder) as entries:
                files = [each for each in entries if _OURS.fullmatch(each.name)]
            found: list[tuple[int, int, Path]] = []
            for file in files:
                with suppress(FileNotFoundError):
                    about = file.stat()
                    found.append((about.st_atime_ns, about.st_size, Path(file.path)))
            total = size + sum(each for _, each, _ in found)
            for _, each, path in sorted(found):
                if total <= self.limit:
                    break
                total -= each if _remove_unheld(path) else 0
            if size:
                os.posix_fallocate(part, 0, size)
        if total > self.limit and self.folder not in _warned:
            _warned.add(self.folder)
            _LOGGER.warning(
                "the cache %s grows to %s bytes, beyond data.shards.cache_gb: all files in it are "
                "in use at once",
                *(self.folder, f"{total:,}"),
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in _FULL
            reason = "no space is left on its disk" if full else error.strerror
            advice = "free some space, set a smaller data.shards.cache_gb, or " if full else ""
            if error.errno == errno.EMFILE:
                advice = "allow this process more open files (ulimit -n), or "
            raise CacheError(
                f"the cache {self.folder} cannot be used: {reason}; {advice}set "
                "data.shards.cache_dir to a folder on another disk"
            ) from None


def _allow_open_files() -> None:
    """Raise this process's own limit: each file in use is an open one."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def key_of(*parts: str) -> str:
    """Return the key of what has no SHA-256 of its own."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _state(path: Path, file: int) -> tuple[str, int, int]:
    about = os.fstat(file)
    return str(path), about.st_ino, about.st_mtime_ns


def _is_at(file: int, path: Path) -> bool:
    """Tell whether an open file still lies at a path."""
    with suppress(FileNotFoundError):
        return os.fstat(file).st_ino == path.stat().st_ino
    return False


def _lock_at(file: int, path: Path) -> bool:
    """Wait for the lock of an unfinished file; return False once the file lies there no more.

    Whoever finished it may hold it under its new name for long: so no call waits for the lock.
    """
    while _is_at(file, path):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _is_at(file, path)
        time.sleep(_POLL)
    return False


def _remove_unheld(path: Path) -> bool:
    """Remove a file unless somebody holds it; say whether it is gone."""
    try:
        file = os.open(path, os.O_RDWR)  # on NFS only a file that is open for writing is locked so
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(file)
    return True
