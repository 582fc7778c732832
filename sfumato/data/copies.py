"""Files and folders of a store that are read whole: copied to this machine, and kept there."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, final

from sfumato.data.shard_cache import StoreError
from sfumato.data.store import RANGE, Objects, check_address, home, is_address
from sfumato.files import digest, new_file

# What the libraries call the version of an object; the next of a name has another.
_VERSIONS = (
    *("ETag", "etag", "generation", "blob_id", "LastModified", "Last-Modified", "mtime"),
    *("Content-MD5", "Digest"),
)
_COPIES = "files"  # below `home`
_WITHOUT_LISTS = ("http", "https")
_THREADS = 8  # they wait for the store
State = tuple[int | None, list[str]]  # bytes and versions of an object


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
    return is_address(path) and (path.endswith("/") or not PurePosixPath(path).suffix)


def copy_of_folder(address: str, key: str) -> Path:
    """Return a folder at an address as a copy on this machine, under the same name.

    Files are fetched of which no copy of this listing is here. Hidden ones are left out.

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
    copies = home() / _COPIES
    return f" {path.relative_to(copies).parts[0]}" if copies in path.parents else ""


@final
class Copies(Objects):
    """Objects at an address, copied whole."""

    def copy(self, name: str) -> Path:
        """Return a copy of an object, in a folder of its own; see `copy_of`."""

        def look() -> State:
            self._system.invalidate_cache()
            return _state(self._system.info(f"{self._root}/{name}"))

        while True:
            size, versions = state = self._ask(name, look)
            path = home() / _COPIES / digest([self.address, name, size, versions]) / name
            if any(versions) and path.is_file() and path.stat().st_size == size:
                return path
            self._fetch(name, size, path)
            if self._ask(name, look) == state:
                return path
            path.unlink(missing_ok=True)  # the object was replaced meanwhile

    def copy_all(self) -> Path:
        """Return a copy of the folder at the address; see `copy_of_folder`."""
        while True:
            states = self._list()
            listed = [(name, *state) for name, state in states.items()]
            folder = home() / _COPIES / digest([self.address, listed])
            folder /= PurePosixPath(self.address).name

            def fetch(name: str, folder: Path = folder, states: Any = states) -> None:
                path, (size, versions) = folder / name, states[name]
                if not (any(versions) and path.is_file() and path.stat().st_size == size):
                    self._fetch(name, size, path)

            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(fetch, states):
                    pass
            if self._list() == states:
                return folder
            for name in states:  # an object was replaced meanwhile
                (folder / name).unlink(missing_ok=True)

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

    def _fetch(self, name: str, size: int | None, path: Path) -> None:
        with new_file(path, shared=True, failure=StoreError) as beside:
            with beside.open("wb") as file:
                if size is None:
                    file.write(self._read(name))
                while size is not None and (start := file.tell()) < size:
                    file.write(self._range(name, start, min(start + RANGE, size), size))
            os.utime(beside, (0, 0))  # what was made of an earlier copy is not stale


def _state(about: Mapping[str, Any]) -> State:
    return about.get("size"), [str(about.get(each, "")) for each in _VERSIONS]
