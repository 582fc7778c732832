"""Objects of a store (s3://, gs://, hf://, https://) as files on this machine.

An address of prepared data is opened by fsspec, and its objects are read in ranges, each tried
again after a cut. `Store.hold` is the one door: where a reader would open a file of a folder, it
holds the local file of an object, whole and compared with its SHA-256, in a cache on the disk.
Reading ahead is holding early, in the seeded order of the data. Files that are read whole, such as
prompts, are copied (`copies.py`). Nothing else knows of stores.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, final
from urllib.parse import urljoin, urlsplit

from sfumato.data.shard_cache import LocalFile, ShardCache, StoreError, key_of

Result = TypeVar("Result")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)  # seconds before each further try
RANGE = 2**23  # bytes that are asked for at once
TIMEOUT = 60.0  # seconds for such a range
_DENIED, _MISSING, _BEYOND_END = (401, 403, 407), (404, 410), 416
_WITHOUT = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
_WITH_REVISION = "hf"  # its addresses name a revision behind an @
_INDEX = "index.json"
_DOWNGRADE = ("https", "http")
# They log addresses and tracebacks of each try.
_TALKERS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
AGAIN = "upload the prepared folder again, index.json last"
_CREDENTIALS = "give the credentials as its library reads them"
_HOW = {
    "s3": " (AWS_PROFILE, AWS_ACCESS_KEY_ID or ~/.aws, and AWS_ENDPOINT_URL)",
    "gs": " (gcloud auth application-default login)",
    "hf": " (hf auth login, or HF_TOKEN)",
}
_LOGGER = logging.getLogger(__name__)


class ResizedError(StoreError):
    """An object of another size than was expected."""


class _OtherHostError(Exception):
    """A server that sends its readers to another host, which `args` name."""


def is_address(path: str) -> bool:
    """Tell the address of a store from a path."""
    return "://" in path


def check_address(key: str, address: str) -> None:
    """Refuse an address that no store has, or that holds credentials; these are not shown.

    Raises:
        ValueError: naming the key.
    """
    scheme, _, rest = address.partition("://")
    if re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) is None or not rest.strip("/"):
        raise ValueError(
            f"{key} is no address of a store; give one such as s3://BUCKET/FOLDER, or a path"
        )
    before, at, _ = rest.partition("@")
    has_name = bool(at) and (scheme != _WITH_REVISION or ":" in before)
    if has_name or "?" in rest:
        shown = re.sub(r"^.*@", "***@", rest, flags=re.DOTALL)
        shown = re.sub(r"\?.*", "?***", shown, flags=re.DOTALL)
        raise ValueError(
            f"{key}={scheme}://{shown} may hold credentials, which no run folder must hold; give "
            f"the address without {'a name or a password' if has_name else 'a query'}, and the "
            "credentials as the library of the store reads them (docs/prepare.md)"
        )


def check_addresses(leaves: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse credentials in any setting; the address of a server has rules of its own.

    Args:
        leaves: key, value and default of each setting.

    Raises:
        ValueError: as `check_address`.
    """
    for key, value, _ in leaves:
        if isinstance(value, str) and is_address(value) and not key.endswith(".url"):
            check_address(key, value)


def home() -> Path:
    """Return the folder of this machine where objects of stores are kept."""
    return (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sfumato").expanduser()


class Objects:
    """Objects at an address, read in ranges.

    Attributes:
        address: without a slash at its end.
    """

    def __init__(self, address: str) -> None:
        """Open the address; nothing is read yet.

        Raises:
            StoreError: the library of the store is not installed, or refuses the address.
        """
        self.address = address.rstrip("/")
        self._system, self._root = _open(self.address)

    def _read(self, name: str) -> bytes:
        return self._ask(name, lambda: self._cat(name, None, None))

    def _range(self, name: str, start: int, stop: int, size: int) -> bytes:
        """Read some bytes of an object of `size` bytes, or all the rest."""

        def ask() -> bytes:
            try:
                data = self._cat(name, start, stop)
            except Exception as error:
                if _status(error) != _BEYOND_END:
                    raise
                data = b""
            if len(data) == size:  # a server that knows no ranges sends all
                return data[start:]
            if len(data) != stop - start:
                actual = self._size(name)
                if actual not in (None, size):
                    raise ResizedError(
                        f"{self.address}/{name} has {actual:,} bytes, and had {size:,} when it was "
                        f"indexed; {AGAIN}"
                    )
                raise EOFError(f"{len(data)} of {stop - start} bytes")
            return data

        return self._ask(name, ask)

    def _size(self, name: str) -> int | None:
        try:
            self._system.invalidate_cache()
            return self._system.info(f"{self._root}/{name}").get("size")
        except Exception:  # noqa: BLE001, the libraries share no class of errors
            return None

    def _cat(self, name: str, start: int | None, stop: int | None) -> bytes:
        path = f"{self._root}/{name}"
        if not self._system.async_impl:  # hf://, which reads on beyond a range unless told
            return self._system.cat_file(path, start=start, end=stop, cache_type="none")
        from fsspec.asyn import sync

        call = self._system._cat_file
        data: Any = sync(self._system.loop, call, path, start=start, end=stop, timeout=TIMEOUT)
        return data

    def _ask(self, name: str, ask: Callable[[], Result]) -> Result:
        """Ask a store; again after a pause where that may help.

        Raises:
            StoreError: it does not help.
        """
        reason = ""
        for pause in (*PAUSES, None):
            try:
                return ask()
            except StoreError:
                raise
            except Exception as error:  # noqa: BLE001, the libraries share no class of errors
                # Their texts are never shown, as they may hold signed addresses.
                reason, refusal = _reason(error), _refusal(error, self.address)
            if refusal is not None:
                raise StoreError(f"{self.address}/{name} {refusal}")
            if pause is None or reason == RuntimeError.__name__:  # as the process ends
                break
            _LOGGER.warning("%s/%s: %s; it is tried again", self.address, name, reason)
            time.sleep(pause)
        raise StoreError(
            f"{self.address}/{name} cannot be read ({reason}), tried {len(PAUSES) + 1} times; "
            "check that the store can be reached, and run the same command again"
        )


@final
class Store(Objects):
    """A prepared folder at an address, whose shards are held in a cache."""

    def __init__(self, address: str, cache: ShardCache) -> None:
        """Open the address; nothing is read yet.

        Raises:
            StoreError: the library of the store is not installed, or refuses the address.
        """
        super().__init__(address)
        self._cache = cache

    def hold(self, name: str, size: int, sha256: str) -> LocalFile:
        """Return the local file of an object with these bytes.

        Raises:
            StoreError: it cannot be read, or is another one; or the cache cannot be written.
        """
        return self._cache.hold(
            sha256, size, lambda file: self._download(name, size, sha256, file), sha256
        )

    def hold_record(self, name: str) -> LocalFile:
        """Return the local file of an object without a sum; another index has other records.

        Raises:
            StoreError: as `hold`.
        """
        key = self._key(name)
        held = self._cache.find(key)
        if held is None:
            content = self._index if name == _INDEX else self._read(name)
            held = self._cache.hold(key, len(content), lambda file: _write(file, content, 0))
        return held

    def forget_record(self, name: str) -> None:
        """Remove the local file of a record that turned out damaged."""
        self._cache.forget(self._key(name))

    def sizes(self, folder: str) -> dict[str, int] | None:
        """Return the bytes of each object of a folder by name; None where a store lists none.

        Raises:
            StoreError: it cannot be read.
        """
        if self.address.startswith(("http:", "https:")):
            return None
        path = f"{self._root}/{folder}"
        self._system.invalidate_cache()
        listed = self._ask(folder, lambda: self._system.ls(path, detail=True))
        return {PurePosixPath(each["name"]).name: each["size"] or 0 for each in listed}

    @cached_property
    def _index(self) -> bytes:
        if self.address.startswith(("http:", "https:")):  # which tells no size for certain
            return self._read(_INDEX)
        size = self._ask(_INDEX, lambda: self._system.info(f"{self._root}/{_INDEX}")["size"])
        starts = range(0, size, RANGE)
        return b"".join(self._range(_INDEX, i, min(i + RANGE, size), size) for i in starts)

    @cached_property
    def _index_hash(self) -> str:
        return hashlib.sha256(self._index).hexdigest()

    def _key(self, name: str) -> str:
        return key_of(self._index_hash, name)

    def _download(self, name: str, size: int, sha256: str, file: int) -> None:
        """Write an object to a file; one that was altered on the way is read twice."""
        actual = ""
        for _ in range(2):
            found, start = hashlib.sha256(), 0
            while start < size:
                data = self._range(name, start, min(start + RANGE, size), size)
                _write(file, data, start)
                found.update(data)
                start += len(data)
            actual = found.hexdigest()
            if actual == sha256:
                return
        raise StoreError(
            f"{self.address}/{name} is damaged or was changed: its SHA-256 is {actual}, "
            f"and {sha256} when it was indexed; {AGAIN}"
        )


def _open(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and its root there."""
    from fsspec.core import url_to_fs

    scheme, missing = address.partition("://")[0], ""
    if scheme in _TALKERS:
        logging.getLogger(_TALKERS[scheme]).setLevel(logging.CRITICAL)
    try:
        options = _OPTIONS.get(scheme, dict)()
        return url_to_fs(address, **options)
    except ImportError:
        missing = "its library is not installed; pip install 'sfumato[stores]'"
    except Exception as error:  # noqa: BLE001, the libraries share no class of errors
        missing = f"its library fails ({type(error).__name__}); {_CREDENTIALS}"
        if str(error).startswith("Protocol not known"):
            missing = f"fsspec knows no {scheme}://; give one of s3://, gs://, hf:// or https://"
    raise StoreError(f"{address} cannot be opened: {missing}")


def _http_options() -> dict[str, Any]:
    """Return settings of fsspec's HTTP: bytes as they lie there, and never from another host."""
    return {
        "client_kwargs": {"trace_configs": [_stay()], "trust_env": True},  # ~/.netrc, proxies
        "headers": {"Accept-Encoding": "identity"},
        "skip_instance_cache": True,
    }


def _gs_options() -> dict[str, Any]:
    return {"session_kwargs": {"trace_configs": [_stay()], "trust_env": True}}


def _stay() -> Any:
    """Return what refuses redirects to another host, for sessions of aiohttp."""
    from aiohttp import TraceConfig  # pyright: ignore[reportMissingImports]

    async def follow(session: Any, context: Any, sent: Any) -> None:
        del session, context
        target = urlsplit(urljoin(str(sent.url), sent.response.headers.get("Location", "")))
        if target.hostname != sent.url.host or (sent.url.scheme, target.scheme) == _DOWNGRADE:
            raise _OtherHostError(f"{target.scheme}://{target.hostname}")

    trace = TraceConfig()
    trace.on_request_redirect.append(follow)
    return trace


_OPTIONS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "http": _http_options,
    "https": _http_options,
    "gs": _gs_options,
    "gcs": _gs_options,
}


def _status(error: Exception) -> int | None:
    """Return the HTTP status in an error of any of the libraries."""
    held = vars(error)
    response = held.get("response")
    if isinstance(response, dict):  # botocore's
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if response is not None:
        return vars(response).get("status_code")
    found = str(held.get("status", held.get("code")))
    if found.isdecimal():
        return int(found)
    cause = error.__cause__  # s3fs turns botocore's errors into Python's
    return _status(cause) if isinstance(cause, Exception) else None


def _reason(error: Exception) -> str:
    status = _status(error)
    return type(error).__name__ if status is None else f"{type(error).__name__}, status {status}"


def _refusal(error: Exception, address: str) -> str | None:
    """Say what a store refuses, and what to do; None where asking again may help."""
    status, scheme = _status(error), address.partition("://")[0]
    cause = error if isinstance(error, _OtherHostError) else error.__cause__
    if isinstance(cause, _OtherHostError):
        return (
            f"leads to another host, {cause}; if you trust that one, give its address instead of "
            f"{address}"
        )
    lacks = type(error).__name__ in _WITHOUT
    denied = isinstance(error, PermissionError) or str(error).startswith("Forbidden")  # gcsfs's 403
    if lacks or denied or status in _DENIED:
        why = "no credentials were found" if lacks else "access is denied"
        return (
            f"cannot be read: {why}; {_CREDENTIALS}{_HOW.get(scheme, '')}, and check that they may "
            "read this address"
        )
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "cannot be read: HF_HUB_OFFLINE is set; unset it, or give a folder on a disk"
    # fsspec's HTTP calls every failure to look at a file so; the cause has the status.
    if status in _MISSING or (status is None and isinstance(error, FileNotFoundError)):
        return "is not there; check the address, and whether all was uploaded"
    return None


def _write(file: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, start)
        view, start = view[written:], start + written
