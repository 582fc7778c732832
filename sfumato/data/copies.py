"""Files and folders of a store that are read whole: copied to this machine, and kept there."""

import glob
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, final

from sfumato.data.shard_cache import StoreError
from sfumato.data.store import RANGE, Objects, ResizedError, check_address, home, is_address
from sfumato.files import digest, lock, new_file

# What the libraries call the version of an object; the next of a name has another.
_VERSIONS = (
    *("ETag", "etag", "generation", "blob_id", "LastModified", "Last-Modified", "mtime"),
    *("Content-MD5", "Digest"),
)
_COPIES = "files"  # below `home`
_WITHOUT_LISTS = ("http", "https")
_THREADS = 8  # they wait for the store
_TRIES = 3  # of an object that is replaced while it is copied
State = tuple[int | None, str]  # bytes and version of an object


def copy_of(address: str, key: str) -> Path:
    """Return a whole file at an address as a copy on this machine, under the same name.

    It is fetched if no copy of its size and version is here. Copies stay until somebody removes
    them.

    Args:
        key: of the setting that holds the address, for messages.

    Raises:
        ValueError: the address may hold credentials.
        StoreError: the file cannot be read, or the copy not be written.
    """
    check_address(key, address)
    parent, _, name = address.rpartition("/")
    if not parent.partition("://")[2]:
        raise ValueError(
            f"{key} = {address} names no file; give an address such as s3://BUCKET/FILE"
        )
    return Copies(parent).copy(name)


def is_folder_address(path: str) -> bool:
    """Tell the address of a folder: it ends with a slash, or its last part has no suffix."""
    plain = not glob.has_magic(path) and "{" not in path
    return is_address(path) and plain and (path.endswith("/") or not PurePosixPath(path).suffix)


def copy_of_folder(address: str, key: str) -> Path:
    """Return a folder at an address as a copy on this machine, under the same name.

    An object is fetched if no copy of its size and version is here. Hidden ones are left out. A
    copy never changes; a changed folder has another.

    Args:
        key: of the setting that holds the address, for messages.

    Raises:
        ValueError: the address may hold credentials, or its store lists no folders.
        StoreError: the folder is empty or cannot be read, or the copy not be written.
    """
    check_address(key, address)
    if address.partition("://")[0] in _WITHOUT_LISTS:
        raise ValueError(
            f"{key} = {address!r} is a folder, and a web server does not list its files; name "
            "files, as in https://HOST/FOLDER/{000..012}.tar"
        )
    return Copies(address).copy_all()


def version_of(path: Path) -> str:
    """Return which version of an object a file copies; "" if it is no copy."""
    return f" {path.stat().st_mtime_ns}" if home() / _COPIES in path.parents else ""


class _ReplacedError(Exception):
    """An object that was replaced while it was copied."""


@final
class Copies(Objects):
    """Objects at an address, copied whole.

    The time of a copy is a number of its version, long ago: what was made of an earlier copy is
    not stale because another copy is newer, and another version has another time.
    """

    def copy(self, name: str) -> Path:
        """Return a copy of an object, in a folder of its own; see `copy_of`."""
        return self._held(name, self._look(name))

    def copy_all(self) -> Path:
        """Return a copy of the folder at the address; see `copy_of_folder`."""
        states = self._list()
        listed = [(name, *state) for name, state in states.items()]
        folder = home() / _COPIES / digest([self.address, listed])
        folder /= PurePosixPath(self.address).name

        def link(name: str) -> None:
            copy, path = self._held(name, states[name]), folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists() or not path.samefile(copy):
                    path.unlink(missing_ok=True)
                    with suppress(FileExistsError):  # by another process
                        path.hardlink_to(copy)
            except OSError as error:
                raise StoreError(
                    f"{path} cannot be written ({error.strerror}); free some space, or set "
                    "XDG_CACHE_HOME to a folder on another disk"
                ) from None

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(link, states))
        return folder

    def _look(self, name: str) -> State:
        def look() -> State:
            self._system.invalidate_cache()
            return _state(self._system.info(f"{self._root}/{name}"))

        return self._ask(name, look)

    def _list(self) -> Mapping[str, State]:
        """Return the objects below the address in order, by their names there."""

        def look() -> Mapping[str, Any]:
            self._system.invalidate_cache()
            return self._system.find(self._root, detail=True)

        found: dict[str, State] = {}
        start = self._root.rstrip("/") + "/"
        for path, about in sorted(self._ask("", look).items()):
            parts = path.removeprefix(start).split("/")
            if path.startswith(start) and all(p and not p.startswith(".") for p in parts):
                found["/".join(parts)] = _state(about)
        if not found:
            raise StoreError(
                f"{self.address}/ has no files; check the address, and whether all was uploaded"
            )
        return found

    def _held(self, name: str, state: State) -> Path:
        """Return the copy of an object of this state, or of the one that took its place."""
        busy, unmade = "", "set XDG_CACHE_HOME to a folder on another disk"
        for _ in range(_TRIES):
            size, version = state
            folder = home() / _COPIES / digest([self.address, name, size, version])
            path = folder / PurePosixPath(name).name
            with lock(folder, busy=busy, unmade=unmade, wait=True, failure=StoreError):
                if version and path.is_file() and path.stat().st_size == size:
                    return path
                with suppress(_ReplacedError):
                    self._fetch(name, state, path)
                    return path
            state = self._look(name)
        raise StoreError(
            f"{self.address}/{name} was replaced {_TRIES} times while it was copied; copy it to a "
            "disk, or wait until the upload ends"
        )

    def _fetch(self, name: str, state: State, path: Path) -> None:
        size, version = state
        with new_file(path, failure=StoreError) as beside:
            with beside.open("wb") as file:
                if size is None:
                    file.write(self._read(name))
                while size is not None and (start := file.tell()) < size:
                    try:
                        data = self._range(name, start, min(start + RANGE, size), size)
                    except ResizedError:
                        raise _ReplacedError from None
                    file.write(data)
            if self._look(name) != state:
                raise _ReplacedError
            time = int(digest(version)[:12], 16)  # in ns, below four days
            os.utime(beside, ns=(time, time))


def _state(about: Mapping[str, Any]) -> State:
    versions = (str(about[each]) for each in _VERSIONS if about.get(each))
    return about.get("size"), next(versions, "")  # of a list and of one object they are alike
