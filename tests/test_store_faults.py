"""Stores that cut, fail, deny or answer another object: read again, or refused by name."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prepared import pictures, toy_identity, write_cache, write_prepared
from runs import fork
from store_server import SLOW, StoreServer
from test_store import COUNT, opened, same, settings

from sfumato.compose import compose_train
from sfumato.config import PrepareConfig
from sfumato.data import store
from sfumato.data.prepared.format import PreparedError
from sfumato.data.prompts import read_prompts
from sfumato.data.shard_cache import StoreError
from sfumato.preparation.index import write_index
from sfumato.preparation.settings import check_prepare
from sfumato.preparation.verify_store import verify_at, verify_store

pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
EVER = 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prepared folder with tars and a cache, on the disk."""
    folder = tmp_path_factory.mktemp("disk")
    write_prepared(folder, pictures(COUNT, captions=3))
    write_cache(folder, toy_identity(flip=True))
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[StoreServer]:
    served = StoreServer(folder)
    yield served
    served.close()


@pytest.fixture(autouse=True)
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" in request.node.name:
        monkeypatch.setattr(store, "TIMEOUT", SLOW / 2)
    monkeypatch.setattr(store, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(store, "RANGE", 4000)


@pytest.mark.parametrize("kind", ["", "cut", "500", "503", "slow", "wrong", "moved", "no ranges"])
@pytest.mark.parametrize("cached", [False, True])
def test_what_passes_is_read_again(
    folder: Path,
    server: StoreServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    cached: bool,
) -> None:
    """Each of several objects fails once, or is served from elsewhere on this host."""
    if kind == "no ranges":
        server.ranges = False
    elif kind:
        ends = ("index.json", "00001.tar", "00002.safetensors", "00003.json")
        server.faults = {end: (kind, 1) for end in ends if kind != "wrong" or "json" not in end}
    more: dict[str, object] = {"cached": cached, "workers": 3}
    ours, theirs = (opened(settings(p, tmp_path, **more)) for p in (server.address, folder))
    for _ in range(3):
        assert same(ours.next(COUNT, 0, COUNT), theirs.next(COUNT, 0, COUNT))
    assert not ours.skipped
    told = "it is tried again" in caplog.text
    assert told == (kind in {"cut", "500", "503", "slow"})
    if told:
        assert f"{server.address}/index.json" in caplog.text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut", ["ClientPayloadError", "tried 3 times", "run the same command again"]),
        ("500", ["status 500", "tried 3 times"]),
        ("slow", ["Timeout", "tried 3 times"]),
        ("403", ["access is denied", "give the credentials"]),
        ("401", ["access is denied"]),
        ("404", ["is not there", "check the address"]),
        ("redirect", ["another host, http://127.0.0.2", "give its address"]),
        ("truncated", ["bytes, and had", "upload the prepared folder again"]),
        ("wrong", ["is damaged or was changed: its SHA-256 is"]),
    ],
)
@pytest.mark.parametrize("workers", [0, 3])
def test_what_stays_is_named(
    server: StoreServer, tmp_path: Path, kind: str, said: list[str], workers: int
) -> None:
    server.faults = {"00002.tar": (kind, EVER)}
    stream = opened(settings(server.address, tmp_path, workers=workers))
    for _ in range(2):
        with pytest.raises(StoreError) as error:
            stream.next(COUNT, 0, COUNT)
        for part in (f"{server.address}/shards/00002.tar", *said):
            assert part in str(error.value)
        assert "secret" not in str(error.value)
    server.faults.clear()
    if not workers:  # threads have read it ahead
        assert len(stream.next(COUNT, 0, COUNT)) == COUNT, "the batch, once the store is mended"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("404", "index.json is not there"),
        ("403", "access is denied"),
        ("redirect", "leads to another host"),
        ("500", "tried 3 times"),
        ("truncated", "index.json is damaged"),
    ],
)
def test_a_store_without_its_index_is_refused_at_once(
    server: StoreServer, tmp_path: Path, kind: str, said: str
) -> None:
    server.faults = {"index.json": (kind, EVER)}
    with pytest.raises(ValueError, match=said) as error:
        opened(settings(server.address, tmp_path))
    assert server.address in str(error.value)


@pytest.mark.parametrize("record", ["00001.json", "manifest.json", "empty.safetensors"])
def test_a_damaged_record_is_named_by_its_address_and_asked_for_again(
    server: StoreServer, tmp_path: Path, record: str
) -> None:
    server.faults = {record: ("truncated", 2)}
    config = settings(server.address, tmp_path, cached=True, buffer=100)
    for _ in range(4):
        try:
            rows = opened(config).next(COUNT, 0, COUNT)
        except ValueError as error:
            assert server.address in str(error) and record in str(error)
            assert str(tmp_path) not in str(error) and "//127" in str(error)
        else:
            break
    assert len(rows) == COUNT


@pytest.mark.parametrize("cached", [False, True])
def test_processes_of_a_machine_fetch_each_shard_once(
    server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(store, "RANGE", 2**23)

    def read() -> None:
        stream = opened(settings(server.address, tmp_path, cached=cached, workers=3))
        for _ in range(2):
            assert len(stream.next(COUNT, 0, COUNT)) == COUNT

    children = [fork(read) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    shards = [name for name in server.asked if name.endswith((".tar", ".safetensors"))]
    asked = {name: server.asked[name] for name in shards if "empty" not in name}
    assert set(asked.values()) == {1} and len(asked) == (12 if cached else 6)


def test_a_store_that_is_not_there_is_named(tmp_path: Path, server: StoreServer) -> None:
    server.close()
    with pytest.raises(StoreError, match=r"cannot be read \(Client.*check that the store can be"):
        opened(settings(server.address, tmp_path))


BASE = ("model.pretrained=M", "objective=supervised", "sampler.height=16", "sampler.width=16")


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA:wJalr/secret@bucket/folder",
        "https://me:secret@host/folder",
        "https://me@host/secret",
        "https://host/folder?X-Amz-Signature=secret",
        "gs://bucket/folder?token=secret",
        "hf://datasets/me/data?token=secret",
    ],
)
@pytest.mark.parametrize("key", ["data.shards.path", "data.shards.sources.a.path"])
def test_credentials_in_an_address_are_refused_and_not_shown(address: str, key: str) -> None:
    with pytest.raises(ValueError, match="may hold credentials") as error:
        compose_train([*BASE, f"{key}={address}"])
    assert key in str(error.value)
    assert "wJalr" not in str(error.value) and "=secret" not in str(error.value)
    assert ":secret" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["s3://bucket/folder", "hf://datasets/me/data@v1/folder", "http://127.0.0.1:8/a"]
)
def test_addresses_are_accepted_before_they_are_read(address: str) -> None:
    config, _ = compose_train([*BASE, f"data.shards.path={address}"])
    assert config.data.shards.path == address


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s4://bucket/folder", "fsspec knows no s4://; give one of s3://"),
        ("oss://bucket/folder", "not installed; pip install 'sfumato"),
    ],
)
def test_unknown_stores_are_named(tmp_path: Path, address: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        opened(settings(address, tmp_path))


@pytest.mark.parametrize("address", ["://bucket", "simplecache::s3://bucket/a", "s3://", "S3://b"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is no address of a store"):
        compose_train([*BASE, f"data.shards.path={address}"])


def test_nothing_is_prepared_at_an_address() -> None:
    with pytest.raises(ValueError, match=r"out names an address.*upload it afterwards"):
        check_prepare(PrepareConfig(out="s3://bucket/folder"))


# --- Verification


def test_a_whole_folder_in_a_store_is_verified(
    server: StoreServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verify_store(server.address)
    said = capsys.readouterr().out
    tars = len(list((server.folder / "shards").glob("*.tar")))
    shards = len(list((server.folder / "cache").glob("*/0*.safetensors")))
    assert f"{server.address}: {tars + shards} objects of {COUNT} samples; faults: 0" in said
    for file in server.folder.rglob("*.tar"):
        assert server.asked[str(file.relative_to(server.folder))], file
    with pytest.raises(ValueError, match="--workers and --ray are for a folder on a disk"):
        verify_at(server.address, "local", 2, None)


def test_a_selection_of_other_samples_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many samples; and a run that met it goes on once the right records are there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "disk"
    write_prepared(folder, pictures(8), selections={"few": lambda number: number % 4 < 2})
    write_index(folder)
    served = StoreServer(folder)
    config = settings(served.address, tmp_path, selection="few")
    record = folder / "selections" / "few" / "00001.json"
    right = record.read_text()
    verify_store(served.address)
    record.write_text(re.sub(r'"kept": ?\[0, ?1\]', '"kept":[2,3]', right))
    with pytest.raises(PreparedError, match="has faults, 1 in all"):
        verify_store(served.address)
    assert "selection few keeps other samples than the index says" in capsys.readouterr().out
    record.write_text(re.sub(r'"kept": ?\[0, ?1\]', '"kept":[2]', right))
    with pytest.raises(PreparedError, match=r"upload the prepared folder again, index\.json last"):
        opened(config).next(4, 0, 4)
    record.write_text(right)
    assert len(opened(config).next(4, 0, 4)) == 4
    served.close()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(
            (f"shards/00001.{suffix}", kind)
            for suffix in ("tar", "json")
            for kind in ("wrong", "404", "truncated", "403")
        ),
        *(("/empty.safetensors", kind) for kind in ("404", "403")),
    ],
)
def test_faults_of_a_folder_in_a_store_are_named(
    server: StoreServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    name: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server.faults = {name: (kind, EVER)}
    with pytest.raises(PreparedError, match="has faults, 1 in all; upload the prepared folder"):
        verify_store(server.address)
    assert name in capsys.readouterr().out
    server.faults = {}
    verify_store(server.address)
    server.faults = {name: (kind, EVER)}  # what was fetched before is not believed
    with pytest.raises(PreparedError, match="has faults, 1 in all"):
        verify_store(server.address)
    assert not list(tmp_path.rglob("verify-*"))


# --- A real client of S3


def test_rows_from_s3_are_those_from_a_disk(
    folder: Path,
    tmp_path: Path,
    s3: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import s3fs

    system = s3fs.S3FileSystem(skip_instance_cache=True)
    system.mkdir("bucket")
    system.put(f"{folder}/", "bucket/a/folder/", recursive=True)
    caplog.set_level(logging.DEBUG, "sfumato")
    for cached in (False, True):
        more: dict[str, object] = {"cached": cached, "workers": 3}
        ours = opened(settings("s3://bucket/a/folder", tmp_path, **more))
        theirs = opened(settings(folder, tmp_path, **more))
        for _ in range(3):
            assert same(ours.next(COUNT, 0, COUNT), theirs.next(COUNT, 0, COUNT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for text in ("a ring\n", "a dot!\n"):  # as long: its ETag differs
        system.pipe("bucket/p.txt", text.encode())
        assert read_prompts("s3://bucket/p.txt") == [text.strip()]
    system.rm("bucket/a/folder/shards/00001.tar")
    with pytest.raises(
        ValueError,
        match=r"s3://bucket/a/folder/shards/00001\.tar is missing, though index\.json lists it",
    ):
        opened(settings("s3://bucket/a/folder", tmp_path))
    for missing in ("s3://bucket/b", "s3://other/a"):
        with pytest.raises(StoreError, match=rf"{missing}/index\.json is not there"):
            opened(settings(missing, tmp_path))
    assert "secret" not in caplog.text
