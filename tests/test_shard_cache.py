"""Disk cache of a store's shards: bounded, shared by processes, never without a file in use."""

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from prepared import pictures, write_prepared
from runs import fork, in_child, kill
from test_store import opened, same, settings

from sfumato.data import shard_cache
from sfumato.data.ahead import Forerunner
from sfumato.data.epochs import AHEAD, ShardEpochs
from sfumato.data.shard_cache import ShardCache, StoreError

KB = 1000


def content(name: str, size: int = KB) -> bytes:
    return (name.encode() * size)[:size]


def key(name: str, size: int = KB) -> str:
    return hashlib.sha256(content(name, size)).hexdigest()


def writer(name: str, size: int = KB) -> Callable[[int], None]:
    def write(file: int) -> None:
        os.pwrite(file, content(name, size), 0)

    return write


def hold(cache: ShardCache, name: str, size: int = KB) -> shard_cache.LocalFile:
    return cache.hold(key(name, size), size, writer(name, size), key(name, size))


def kept(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.name != ".lock"}


def test_a_file_is_written_once_and_its_bytes_are_right(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "a" / "b", 10 * KB)
    held = hold(cache, "x")
    assert held.path.read_bytes() == content("x")

    def fail(_: int) -> None:
        raise AssertionError("it is there")

    assert cache.hold(key("x"), KB, fail, key("x")).path == held.path
    assert kept(cache) == {key("x")}


def test_the_least_recently_used_file_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * KB)
    for name in "abc":
        hold(cache, name)
    hold(cache, "a")
    hold(cache, "d")
    assert kept(cache) == {key(name) for name in "acd"}
    hold(cache, "e", 2 * KB)
    assert kept(cache) == {key("d"), key("e", 2 * KB)}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_file_in_use_stays(tmp_path: Path, elsewhere: bool) -> None:
    """In use here or in another process; then the cache grows beyond its limit, and says so."""
    cache = ShardCache(tmp_path, 3 * KB)
    child = 0
    if elsewhere:
        child = fork(lambda: (hold(cache, "a"), (tmp_path / "ready").touch(), time.sleep(60)))
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
    held = None if elsewhere else hold(cache, "a")
    for name in "bcdefg":
        hold(cache, name)
    assert (tmp_path / key("a")).read_bytes() == content("a")
    assert len(kept(cache) - {"ready"}) == 3
    if elsewhere:
        os.kill(child, 9)
        os.waitpid(child, 0)
    del held
    for name in "bcd":
        hold(cache, name)
    assert not (tmp_path / key("a")).exists()


def test_a_cache_whose_files_are_all_in_use_grows_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path, 2 * KB)
    held = [hold(cache, name) for name in "abc"]
    assert all(file.path.exists() for file in held)
    assert caplog.text.count("beyond data.shards.cache_gb") == 1
    del held
    hold(cache, "d")
    assert len(kept(cache)) == 2


def test_threads_and_processes_fetch_a_file_once(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path / "cache", 100 * KB), tmp_path / "log"
    names = [f"file {number}" for number in range(12)]

    def slow(name: str) -> Callable[[int], None]:
        def write(file: int) -> None:
            with log.open("a") as lines:
                lines.write(f"{name}\n")
            time.sleep(0.01)
            writer(name)(file)

        return write

    def work() -> None:
        for name in names:
            held = cache.hold(key(name), KB, slow(name), key(name))
            assert held.path.read_bytes() == content(name)

    def several() -> None:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    children = [fork(several) for _ in range(3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * 3
    assert sorted(log.read_text().split("\n")[:-1]) == sorted(names)


def test_who_waits_for_a_file_has_it_while_its_writer_holds_it(tmp_path: Path) -> None:
    """Both hold what the other one waited for, for as long as they like."""
    cache, begun, held = ShardCache(tmp_path, 10 * KB), threading.Event(), []

    def slow(file: int) -> None:
        begun.set()
        time.sleep(0.3)
        writer("a")(file)

    first = threading.Thread(
        target=lambda: held.append(cache.hold(key("a"), KB, slow, key("a"))), daemon=True
    )
    first.start()
    assert begun.wait(30)
    second = threading.Thread(target=lambda: held.append(hold(cache, "a")), daemon=True)
    second.start()
    for thread in (first, second):
        thread.join(30)
    assert len(held) == 2 and held[0].path == held[1].path
    assert kept(cache) == {key("a")}


@pytest.mark.parametrize("half", [0, KB // 2])
def test_what_a_killed_process_left_is_written_again_or_goes(tmp_path: Path, half: int) -> None:
    cache = ShardCache(tmp_path, 3 * KB)

    def die(file: int) -> None:
        os.pwrite(file, content("a")[:half], 0)
        kill()

    for name in ("a", "b"):
        assert in_child(lambda name=name: cache.hold(key(name), KB, die, key(name))) == -9
    assert kept(cache) == {f"{key(name)}.part" for name in "ab"}
    assert hold(cache, "a").path.read_bytes() == content("a")
    for name in "cde":
        hold(cache, name)
    assert kept(cache) == {key(name) for name in "cde"}, "what nobody finished went too"


@pytest.mark.parametrize("damage", [b"", b"short", content("y"), content("x") + b"longer"])
def test_a_file_that_was_damaged_is_fetched_again(tmp_path: Path, damage: bytes) -> None:
    cache = ShardCache(tmp_path, 3 * KB)
    hold(cache, "x").path.write_bytes(damage)
    assert hold(cache, "x").path.read_bytes() == content("x")


def test_files_of_others_stay(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("notes.txt", "0123.part", "a" * 64 + ".tar")]
    for file in others:
        file.write_bytes(b"mine")
    cache = ShardCache(tmp_path, KB)
    for name in "abc":
        hold(cache, name)
    assert all(file.read_bytes() == b"mine" for file in others)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    cache = ShardCache(tmp_path, 3 * KB)
    with monkeypatch.context() as patch, pytest.raises(StoreError) as error:
        patch.setattr(os, "posix_fallocate", full)
        hold(cache, "a")
    for said in (str(tmp_path), "no space is left on its disk", "data.shards.cache_dir"):
        assert said in str(error.value)
    assert kept(cache) == set()
    with pytest.raises(StoreError, match="no space is left"):
        cache.hold(key("a"), KB, full, key("a"))
    assert kept(cache) == set()


@pytest.mark.parametrize("function", ["open", "unlink", "replace"])
def test_other_errors_of_the_disk_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    cache = ShardCache(tmp_path, 3 * KB)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch, pytest.raises(StoreError, match=r"Too many.*ulimit -n"):
        patch.setattr(*((os, "open") if function == "open" else (Path, function)), fail)
        if function == "unlink":  # of a damaged file
            (tmp_path / key("a")).write_bytes(b"damaged")
        hold(cache, "a")
    assert hold(cache, "a").path.read_bytes() == content("a")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be made.*data\.shards\.cache_dir"):
        ShardCache(tmp_path / name, KB)


def test_a_file_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"1,000 bytes \(data\.shards\.cache_gb\).*has 2,000"):
        hold(ShardCache(tmp_path, KB), "a", 2 * KB)


# --- Of a whole folder


@pytest.fixture
def many(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Return a folder of thirty tars with two pictures each, on the disk and in a store."""
    folder = write_prepared(tmp_path / "disk", pictures(60), per_shard=2)
    system = fsspec.filesystem("memory")
    system.put(f"{folder}/", "/bucket/many/", recursive=True)
    yield folder, "memory://bucket/many"
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("workers", [0, 3])
def test_a_cache_of_a_part_of_the_folder_is_enough(
    many: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    folder, address = many
    whole = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    limit = whole // 2
    more: dict[str, object] = {"workers": workers, "buffer": 2, "cache_gb": limit / 10**9}
    ours, theirs = (opened(settings(path, tmp_path, **more)) for path in (address, folder))
    for _ in range(20):
        assert same(ours.next(9, 0, 9), theirs.next(9, 0, 9))
        sizes: list[int] = []
        for path in (tmp_path / "cache").iterdir():
            with suppress(FileNotFoundError):  # other threads remove files meanwhile
                sizes.append(path.stat().st_size if path.suffix != ".part" else 0)
        assert sum(sizes) <= limit
    assert "beyond" not in caplog.text


def test_a_cache_too_small_for_what_is_in_use_is_refused(
    many: tuple[Path, str], tmp_path: Path
) -> None:
    for buffer, gigabytes in ((2, 1e-5), (100, 1e-4)):
        config = settings(many[1], tmp_path, buffer=buffer, cache_gb=gigabytes)
        with pytest.raises(StoreError, match=r"data\.shards\.cache_gb=\S+ is too small") as error:
            opened(config)
        assert f"data.shards.buffer={buffer}" in str(error.value)


def test_shards_are_told_ahead_in_their_order() -> None:
    """At the first row of each window: its shards, and those of the windows behind it."""
    told: list[list[int]] = []
    counts = [3, 0, 5, 4, 1, 2, 6]
    rows = ShardEpochs(
        counts, seed=1, shuffle=True, buffer=4, ahead=lambda shards: told.append(list(shards))
    )
    plain = ShardEpochs(counts, seed=1, shuffle=True, buffer=4)
    order: list[int] = []
    for number in range(3 * rows.samples):
        windows = len(told)
        pick = rows.pick(number)
        assert pick == plain.pick(number)
        assert pick.shard in told[-1]
        if len(told) > windows and windows:
            assert pick.shard in told[-2], "it was told with the window before"
        assert len(told[-1]) >= AHEAD
        order.append(pick.shard)
    assert all(1 not in shards for shards in told), "it has no sample"


def test_work_is_done_early_in_its_order_and_errors_are_left() -> None:
    done: list[int] = []
    finished = threading.Event()

    def work(item: int) -> None:
        if item == 2:
            raise ValueError("left to who asks")
        done.append(item)
        if item == 9:
            finished.set()

    early = Forerunner(work, 1)
    early.expect("a", [1, 2, 3, 9])
    assert finished.wait(30)
    assert done == [1, 3, 9]
    finished.clear()
    early.expect("b", [4, 9])
    assert finished.wait(30)
    assert done == [1, 3, 9, 4, 9]


def test_the_log_is_quiet(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.WARNING)
    hold(ShardCache(tmp_path, KB), "a")
    assert not caplog.records
