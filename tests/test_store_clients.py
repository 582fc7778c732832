"""Prepared folders and files at gs:// and hf://, read by the real clients from loopback servers."""

import os
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from dataset_server import HubServer
from prepared import pictures, toy_identity, write_cache, write_prepared
from test_store import COUNT, opened, same, settings

from sfumato.data import store
from sfumato.data.copies import copy_of, copy_of_folder
from sfumato.data.shard_cache import StoreError
from sfumato.files import lock
from sfumato.preparation.verify_store import verify_store

Put = Callable[[Path, str], None]  # a file, and where it goes below the address


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Put]]:
    """Return an address of a bucket of gcp-storage-emulator, and what uploads a file to it."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="it serves gs://")
    gcsfs = pytest.importorskip("gcsfs", reason="fsspec reads gs:// with gcsfs")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    port = server._api._httpd.server_port
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs.GCSFileSystem.clear_instance_cache()  # one of an earlier server
    system = gcsfs.GCSFileSystem(skip_instance_cache=True)
    yield "gs://bucket/a", lambda file, name: system.put_file(str(file), f"bucket/a/{name}")
    server.stop()
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serve a dataset, me/data, at HF_ENDPOINT."""
    from huggingface_hub import HfFileSystem

    (tmp_path / "hub").mkdir()
    served = HubServer(tmp_path / "hub", "me/data")
    for name, value in {
        "ENDPOINT": served.address,  # HF_ENDPOINT, as constants read it when they are imported
        "HUGGINGFACE_CO_URL_TEMPLATE": served.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    HfFileSystem.clear_instance_cache()
    yield served
    served.close()
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def hf(hub: HubServer) -> tuple[str, Put]:
    """Return an address of the dataset, and what puts a file there."""

    def put(file: Path, name: str) -> None:
        place = hub.folder / "a" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)

    return "hf://datasets/me/data/a", put


@pytest.fixture(params=["gs", "hf"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Put]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(store, "PAUSES", (0.01, 0.01))
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("cached", [False, True])
def test_rows_are_those_from_a_disk(place: tuple[str, Put], tmp_path: Path, cached: bool) -> None:
    address, put = place
    folder = tmp_path / "disk"
    write_prepared(folder, pictures(COUNT, captions=3))
    write_cache(folder, toy_identity(flip=True))
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        put(path, f"folder/{path.relative_to(folder).as_posix()}")
    more: dict[str, object] = {"cached": cached, "workers": 3}
    ours = opened(settings(f"{address}/folder", tmp_path, **more))
    theirs = opened(settings(folder, tmp_path, **more))
    for _ in range(3):
        assert same(ours.next(COUNT, 0, COUNT), theirs.next(COUNT, 0, COUNT))
    assert not ours.skipped


def test_copies_follow_what_lies_there(place: tuple[str, Put], tmp_path: Path) -> None:
    address, put = place
    file = tmp_path / "p.txt"
    for text in ("a ring", "a king"):  # as long: its version differs
        file.write_text(text)
        put(file, "p.txt")
        put(file, "folder/inner/p.txt")
        assert copy_of(f"{address}/p.txt", "data.prompts").read_text() == text
        copy = copy_of_folder(f"{address}/folder", "data.images.path")
        assert [path.read_text() for path in copy.rglob("*.txt")] == [text]


def test_what_is_not_there_is_named(place: tuple[str, Put], tmp_path: Path) -> None:
    address, put = place
    (tmp_path / "p.txt").write_text("a ring")
    put(tmp_path / "p.txt", "p.txt")
    other = address.replace("bucket", "other").replace("me/data", "me/other")
    for missing in (f"{address}/none.txt", f"{other}/p.txt"):
        with pytest.raises(StoreError, match=f"{missing} is not there; check the address"):
            copy_of(missing, "data.prompts")
    for empty in (f"{address}/none", other):
        with pytest.raises(StoreError, match=f"{empty}/.* (has no files|is not there)"):
            copy_of_folder(empty, "data.images.path")
    with pytest.raises(StoreError, match=rf"{address}/none/index\.json is not there"):
        opened(settings(f"{address}/none", tmp_path))


def test_a_hub_that_denies_or_fails_is_named(
    hub: HubServer, hf: tuple[str, Put], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(store, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    address, put = hf
    (tmp_path / "p.txt").write_text("a ring")
    put(tmp_path / "p.txt", "p.txt")
    for status, said in (
        (403, r"access is denied; .*\(hf auth login, or HF_TOKEN\)"),
        (500, r"cannot be read \(HfHubHTTPError, status 500\), tried 3 times"),
    ):
        hub.status = [status] * 100
        with pytest.raises(StoreError, match=said):
            copy_of(f"{address}/p.txt", "data.prompts")
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(StoreError, match="HF_HUB_OFFLINE is set; unset it"):
            copy_of(f"{address}/p.txt", "data.prompts")
    hub.status = [500, 503]
    assert copy_of(f"{address}/p.txt", "data.prompts").read_text() == "a ring"


class _Answers(BaseHTTPRequestHandler):
    """Answers each request alike: with a status, or by sending it elsewhere."""

    status, elsewhere = 403, ""

    def do_GET(self) -> None:
        self.send_response(self.status)
        if self.elsewhere:
            self.send_header("Location", self.elsewhere)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.mark.parametrize(
    ("status", "elsewhere", "said"),
    [
        (403, "", r"access is denied; .*\(gcloud auth application-default login\)"),
        (302, "http://127.0.0.2:9/p.txt", "leads to another host, http://127.0.0.2"),
    ],
)
def test_a_bucket_that_denies_or_redirects_is_named(
    status: int, elsewhere: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcsfs = pytest.importorskip("gcsfs", reason="fsspec reads gs:// with gcsfs")
    answers = type("Answers", (_Answers,), {"status": status, "elsewhere": elsewhere})
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "PAUSES", (0.01, 0.01))
    gcsfs.GCSFileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=said):
        copy_of("gs://bucket/p.txt", "data.prompts")
    server.shutdown()
    server.server_close()
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_a_verification_that_was_killed_leaves_nothing_for_long(
    hub: HubServer, hf: tuple[str, Put], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    address, put = hf
    write_prepared(tmp_path / "disk", pictures(COUNT))
    for path in (tmp_path / "disk").rglob("*.*"):
        put(path, path.relative_to(tmp_path / "disk").as_posix())
    left, used = (tmp_path / "home" / "sfumato" / f"verify-{name}" for name in ("left", "used"))
    for folder in (left, used):
        (folder / "shards").mkdir(parents=True)
        os.utime(folder, (0, 0))
    with lock(used, busy="", unmade=""):
        os.utime(used, (0, 0))
        verify_store(address)
    assert used.exists() and not left.exists()
    assert list(left.parent.glob("verify-*")) == [used]
