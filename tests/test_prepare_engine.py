"""Preparation as a map over shards: any engine and number of workers, killed or not: same bytes."""

import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shard_functions
from image_files import png, write_folder, write_tar
from runs import fork

from sfumato.config import DownloadConfig, FilterConfig, PackConfig, PrepareConfig, ShardDataConfig
from sfumato.data.entries import Entry, FileBlob
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prepared.format import PreparedError, record_text
from sfumato.data.prepared.open import open_shards
from sfumato.preparation import cluster, sources
from sfumato.preparation import pack as packing
from sfumato.preparation.cluster import Cluster
from sfumato.preparation.engine import ALONE, Local, Progress, map_shards
from sfumato.preparation.filter import filter_samples
from sfumato.preparation.index import write_index
from sfumato.preparation.pack import pack
from sfumato.preparation.pack_plan import Count, Plan
from sfumato.preparation.prepare import hold, prepare
from sfumato.preparation.settings import check_prepare
from sfumato.preparation.sources import Listing, Whole
from sfumato.preparation.tars import tidied
from sfumato.preparation.verify import verify

NO_IMAGE = "not an image (JPEG, PNG, WEBP, BMP)"


def tree(folder: Path) -> dict[str, bytes]:
    """Return all files, hidden ones too, but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three tars of 7, 6 and 8 rows, with duplicates, bad pictures and a lost caption."""
    folder, number = tmp_path_factory.mktemp("source"), 0
    for name, rows in (("a", 7), ("b", 6), ("c", 8)):
        members: list[tuple[str, bytes]] = []
        for row in range(rows):
            look = number % 17
            data = png(16 + look % 3, 20, look)
            members.append((f"{row}.png", b"<html>" if number in {2, 9} else data))
            members.append((f"{row}.txt", b" " if number == 8 else b"a ring"))
            number += 1
        write_tar(folder / f"{name}.tar", members)
    return folder


def settings(source: Path, out: Path, **given: Any) -> PrepareConfig:
    return PrepareConfig(
        str(out),
        stages=["pack", "filter", "index"],
        pack=PackConfig(f"{source}/*.tar", samples_per_shard=5),
        filter=FilterConfig("once", duplicates="drop"),
        **given,
    )


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what one process prepares."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(settings(source, out))
    return out


# --- The map


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers: int) -> None:
    ticks: list[int] = []
    made = map_shards(shard_functions.double, range(20), Local(workers), tick=ticks.append)
    assert list(made) == [2 * item for item in range(20)]
    assert sum(ticks) == 20


def test_few_results_wait_for_a_slow_shard() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(200):
            taken.append(item)
            yield item

    made = map_shards(shard_functions.first_last, items(), Local(2))
    assert next(made) == 0
    assert len(taken) <= 2 * 8 + 1
    assert list(made) == [*range(1, 200)]


def test_a_shard_of_a_dead_worker_is_made_by_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks: list[int] = []
    function = partial(shard_functions.dying_once, tmp_path / "died")
    made = map_shards(function, range(6), Local(2), tick=ticks.append)
    assert list(made) == [0, 2, 4, 6, 8, 10]
    assert sum(ticks) == 12, "rows of the dead worker do not count"
    said = capsys.readouterr().err
    assert "a worker died while it made 1 (killed by SIGKILL); another makes it again" in said


def test_a_shard_that_kills_every_worker_is_named() -> None:
    with pytest.raises(PreparedError, match=r"3 workers died, .* made 2 \(killed by SIGKILL\); if"):
        list(map_shards(shard_functions.always_dying, range(4), Local(2)))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_of_the_user_ends_the_map(workers: int) -> None:
    with pytest.raises(ValueError, match=r"^the shard 3 is bad$"):
        list(map_shards(shard_functions.refusing, range(9), Local(workers)))


def test_another_error_says_where_in_the_worker_it_was() -> None:
    with pytest.raises(KeyError) as error:
        list(map_shards(shard_functions.failing, range(9), Local(2)))
    assert "in a worker" in error.value.__notes__[0] and "in failing" in error.value.__notes__[0]


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    function = partial(shard_functions.beating, tmp_path)
    child = fork(lambda: list(map_shards(function, range(2), Local(2))))
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    time.sleep(0.5)
    before = tree(tmp_path)
    time.sleep(0.5)
    assert tree(tmp_path) == before


def wait_for(condition: Any) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("a minute went by")


def test_progress_tells_rate_and_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("pack", 40, "row") as progress:
        progress.tick(20)
        progress.add(17, {"no caption": 2, "too large": 1})
        progress.add(3, {"no caption": 1, "a": 1, "b": 1})
    said = capsys.readouterr().err
    assert re.search(
        r"pack: +50%.*20/40.*row/s, 6 left out: 3 no caption, 1 too large, 1 a, \.", said
    )
    assert progress.bins == {"kept": 20, "a": 1, "b": 1, "no caption": 3, "too large": 1}


# --- The plan


def brute(counts: list[int], per_shard: int) -> list[list[tuple[int, int]]]:
    rows = [(index, row) for index, count in enumerate(counts) for row in range(count)]
    return [rows[first : first + per_shard] for first in range(0, len(rows), per_shard)]


def entry(container: int, row: int) -> Entry:
    file = Path(f"{container}.tar")
    return Entry(file, str(row), ("a fox",), FileBlob(file))


def test_a_tar_covers_n_rows_wherever_containers_end() -> None:
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.choice([0, 0, 1, 2, 5, 13]) for _ in range(draw.randrange(1, 9))]
        listings = [Listing([entry(i, r) for r in range(n)], {}) for i, n in enumerate(sizes)]
        containers = [Whole(str(i), "", 0, each) for i, each in enumerate(listings)]
        counts = [Count(str(i), "", n, {f"lost {i}": 1}) for i, n in enumerate(sizes)]
        shards = list(Plan(containers, counts, 4).shards())
        expected = brute(sizes, 4)
        found = [[entry for part in shard.parts for entry in part.read()] for shard in shards]
        assert found == [[entry(i, row) for i, row in rows] for rows in expected]
        assert [shard.rows for shard in shards] == [
            (4 * number, 4 * number + len(rows)) for number, rows in enumerate(expected)
        ]
        assert [shard.name for shard in shards] == Plan(containers, counts, 4).names
        if shards:
            lost = sum((Counter(shard.dropped) for shard in shards), Counter())
            assert lost == Counter({f"lost {i}": 1 for i in range(len(sizes))})
        for shard, rows in zip(shards, expected, strict=True):
            begun = {f"lost {i}" for i, row in rows if row == 0}
            assert begun <= shard.dropped.keys()


def test_keys_are_numbers_of_rows_and_all_is_counted(source: Path, whole: Path) -> None:
    records = [PreparedFolder(whole).tar_record(f"{i:06d}") for i in range(4)]
    # Row 8 has no caption, so it is no row; 20 are left, of which 2 and 8 (of old 9) are bad.
    assert [record.rows for record in records] == [(0, 5), (5, 10), (10, 15), (15, 20)]
    keys = [int(member.key) for record in records for member in record.samples]
    assert keys == [number for number in range(20) if number not in {2, 8}]
    assert [dict(record.dropped) for record in records] == [
        {NO_IMAGE: 1},
        {NO_IMAGE: 1, "blank caption": 1},
        {},
        {},
    ]
    bins = PreparedFolder(whole).index().bins["pack"]
    assert bins == {"kept": 18, NO_IMAGE: 2, "blank caption": 1}
    verify(whole)


def test_tars_are_counted_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    config = PackConfig(f"{folder}/*.tar", samples_per_shard=5)
    pack(config, DownloadConfig(), tmp_path / "out")
    listed: list[str] = []
    list_one = sources._list_one

    def counting(tar: Path, *others: Any) -> Any:
        listed.append(tar.name)
        return list_one(tar, *others)

    monkeypatch.setattr(sources, "_list_one", counting)
    pack(config, DownloadConfig(), tmp_path / "out")
    assert listed == []
    shutil.copy(folder / "a.tar", folder / "b.tar")
    pack(config, DownloadConfig(), tmp_path / "out")
    # Tar 1 begins in a.tar, and was packed again with what changed behind it.
    assert listed == ["b.tar", "a.tar", "b.tar", "c.tar"]
    pack(config, DownloadConfig(), tmp_path / "anew")
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")


def test_a_tar_of_bad_rows_alone_is_empty(tmp_path: Path) -> None:
    """Selections, the index, verify and training pass over it."""
    members = [
        (f"{i}.{suffix}", data)
        for i in range(9)
        for suffix, data in (
            ("png", b"" if i < 6 else png(16, 16, i)),
            ("txt", b"a"),
            ("json", b'{"score": 7}'),
        )
    ]
    write_tar(tmp_path / "a.tar", members)
    config, out = PackConfig(f"{tmp_path}/a.tar", samples_per_shard=3), tmp_path / "out"
    config.columns = ["score"]
    assert pack(config, DownloadConfig(), out) == {"kept": 3, "zero-byte file": 6}
    counts = [len(PreparedFolder(out).tar_record(f"{i:06d}").samples) for i in range(3)]
    assert counts == [0, 0, 3]
    before = tree(out)
    assert pack(config, DownloadConfig(), out) == {"kept": 3, "zero-byte file": 6}
    assert tree(out) == before
    scored = FilterConfig(score="score", min_score=1.0, duplicates="drop")
    assert filter_samples(scored, out) == {"kept": 3}
    write_index(out)
    verify(out)
    stream = open_shards(ShardDataConfig(str(out), workers=0), height=16, width=16, seed=0)
    assert len(stream.next(3, 0, 3)) == 3


# --- Prepared folders


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_leaves_the_same_folder(
    source: Path, whole: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(settings(source, tmp_path / "out", workers=workers))
    assert tree(tmp_path / "out") == tree(whole)
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "filter once: 15 of 18 kept; dropped 3 duplicate"
    verify(tmp_path / "out", Local(workers))
    (tmp_path / "out/shards/000002.tar").unlink()
    with pytest.raises(PreparedError, match="2 in all"):
        verify(tmp_path / "out", Local(workers))
    assert "shards/000002.tar is missing" in capsys.readouterr().out


def test_a_source_that_is_no_tar_is_packed_by_workers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", [(16, 20)] * 7)
    for name, engine in (("one", ALONE), ("two", Local(2))):
        config = PackConfig(str(folder), samples_per_shard=2)
        assert pack(config, DownloadConfig(), tmp_path / name, engine) == {"kept": 7}
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_worker_that_is_killed_leaves_no_trace(
    source: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard_functions.let_die(monkeypatch, packing, "000001", 3, tmp_path / "died")
    prepare(settings(source, tmp_path / "out", workers=2))
    assert "a worker died while it made 000001 (killed by SIGKILL)" in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(whole)


@pytest.mark.parametrize(
    "pattern", ["shards/.*.tmp-*", "shards/000001.json", "selections/*/*.json"]
)
def test_the_command_killed_and_started_again_leaves_the_same_folder(
    source: Path, whole: Path, tmp_path: Path, pattern: str
) -> None:
    out = tmp_path / "out"
    child = fork(lambda: prepare(settings(source, out, workers=2)))
    wait_for(lambda: any(out.glob(pattern)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    time.sleep(0.3)  # until its workers have seen it
    done = {path: path.stat().st_mtime_ns for path in out.glob("shards/0*.json")}
    prepare(settings(source, out, workers=2))
    assert tree(out) == tree(whole)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_an_error_leaves_nothing_unfinished(tmp_path: Path) -> None:
    """Workers are killed then, in the middle of their files."""
    ours = (".000001.tar.tmp-0a1b2c3d", ".000001.json.tmp", ".00002.safetensors.tmp-0a1b2c3d")
    others = (".mine.tmp", ".000001.tar.tmp-other", "000001.tar", ".written")
    for name in (*ours, *others):
        (tmp_path / name).touch()
    with pytest.raises(OSError, match="full"), tidied(tmp_path, tmp_path / "absent"):
        raise OSError("full")
    assert {path.name for path in tmp_path.iterdir()} == {*others}


# --- Parts


def part(source: Path, out: Path, own: str, **given: Any) -> PrepareConfig:
    return replace(settings(source, out, part=own, **given), stages=["pack"])


def test_parts_and_a_last_process_leave_the_folder_of_one(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    children = [fork(partial(prepare, part(source, out, own))) for own in ("0/3", "2/3")]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    made = {path: path.stat().st_mtime_ns for path in out.glob("shards/0*")}
    assert sorted({path.stem for path in made}) == ["000000", "000002", "000003"]
    prepare(settings(source, out))  # makes 000001, which no part made
    assert tree(out) == tree(whole)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    verify(out)


def test_a_part_that_is_killed_is_made_up_for(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = fork(partial(prepare, part(source, out, "0/1", workers=2)))
    wait_for(lambda: any(out.glob("shards/.*.tmp-*")))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    time.sleep(0.3)  # until its workers have seen it
    prepare(part(source, out, "1/2"))
    prepare(settings(source, out))
    assert tree(out) == tree(whole)


def test_a_part_works_beside_parts_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hold(out, shared=True):
        prepare(part(source, out, "0/2"))
        with pytest.raises(PreparedError, match="another sfumato prepare works on"):
            prepare(settings(source, out))
    with hold(out), pytest.raises(PreparedError, match="another sfumato prepare works on"):
        prepare(part(source, out, "1/2"))


@pytest.mark.parametrize("own", ["3/3", "0/0", "-1/2", "a", "1", "1/2/3", "1/2\n", "²/3"])
def test_what_is_no_part_is_refused(source: Path, tmp_path: Path, own: str) -> None:
    with pytest.raises(ValueError, match="is no part; give I/N") as refused:
        prepare(part(source, tmp_path / "out", own))
    assert repr(own) in str(refused.value) and not (tmp_path / "out").exists()


def test_a_part_of_several_stages_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"part=0/2 shares one stage .*give stages=\[pack\]"):
        prepare(settings(source, tmp_path, part="0/2"))
    address = replace(part(source, tmp_path, "0/2"), pack=PackConfig("s3://bucket/a.tar"))
    with pytest.raises(ValueError, match="would copy the whole input to each machine; copy it to"):
        prepare(address)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="part=0/2 is for one process, and torchrun started 2"):
        prepare(part(source, tmp_path, "0/2"))


# --- What an older version packed

# Of pictures 8 + i pixels high, two in a tar, of which the sixth is damaged.
OLDER = {
    "000000": ("4bbfe4d8a4f2d73ba7d98a3a42517cdf244f3e828288965749b9cfb53d9b87a1", [0, 3]),
    "000001": ("a3b39ed1a86a6389f9a5cfca21b07e3a3cbbecff08fc4781ca518deec38a91c2", [0, 5]),
    "000002": ("5d76deb0b99d613476e18590f97306ad013d2a1501c575eec3bbd5aba9605c6d", [1, 0]),
}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """Return a folder as an older version packed it; `source` lies beside it."""
    source = write_folder(tmp_path / "source", [(8 + i, 9) for i in range(6)])
    (source / "005.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    pack(PackConfig(str(source), samples_per_shard=2), DownloadConfig(), out)
    for name, (made_of, ends) in OLDER.items():
        record = replace(PreparedFolder(out).tar_record(name), made_of=made_of)
        content = json.loads(record_text(record)) | {"ends": ends}
        del content["rows"]
        (out / f"shards/{name}.json").write_text(json.dumps(content))
    return out


def test_tars_of_an_older_version_stay_and_are_read(older: Path) -> None:
    before = tree(older)
    config = PackConfig(str(older.with_name("source")), samples_per_shard=2)
    assert pack(config, DownloadConfig(), older, Local(2)) == {"kept": 5, NO_IMAGE: 1}
    assert tree(older) == before
    assert filter_samples(FilterConfig(), older) == {"kept": 5}
    write_index(older)
    verify(older)
    stream = open_shards(ShardDataConfig(str(older), workers=0), height=8, width=8, seed=0)
    assert len(stream.next(5, 0, 5)) == 5


def test_keys_of_an_older_version_are_numbered_through(
    older: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = older / "shards/000000.json"
    content = json.loads(place.read_text())
    del content["samples"][1]
    place.write_text(json.dumps(content))
    with pytest.raises(PreparedError, match="has faults"):
        verify(older)
    said = "shards/000001.tar: sample 1 has the key 000000002, which breaks the numbering"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("change", ["settings", "input", "tar"])
def test_tars_of_an_older_version_that_do_not_fit_are_packed_anew(
    older: Path, change: str, tmp_path: Path
) -> None:
    source = older.with_name("source")
    config = PackConfig(str(source), samples_per_shard=2)
    if change == "settings":
        config.samples_per_shard = 3
    elif change == "input":
        (source / "002.txt").write_text("another caption")
    else:
        (older / "shards/000001.tar").unlink()
    pack(config, DownloadConfig(), older)
    pack(config, DownloadConfig(), tmp_path / "anew")
    assert tree(older) == tree(tmp_path / "anew")


def test_what_an_older_version_began_is_refused(older: Path) -> None:
    (older / "shards/000002.json").unlink()
    (older / "shards/.unfinished").touch()
    before = tree(older)
    config = PackConfig(str(older.with_name("source")), samples_per_shard=2)
    with pytest.raises(PreparedError, match=r"older version of Sfumato began to pack.* or remove"):
        pack(config, DownloadConfig(), older)
    assert tree(older) == before


# --- Ray


class ElsewhereError(RuntimeError):
    """What Ray says about a cluster of another version."""


def fake_ray(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[Any]:
    calls: list[Any] = []

    def init(**options: Any) -> None:
        calls.append(options)
        if error is not None:
            raise error

    module = SimpleNamespace(init=init, shutdown=lambda: None, __version__="2.60.0")
    monkeypatch.setitem(sys.modules, "ray", module)  # type: ignore[arg-type]
    return calls


def test_ray_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs Ray, .* pip install 'sfumato\[ray\]'"):
        Cluster(None, 2, tmp_path)


START = r"start one with: ray start --head --port=6379"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_cluster_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    calls = fake_ray(monkeypatch, None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and nobody listens
        port = probe.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"no Ray cluster answers at ray={host}:\d+ .*{START}"
        ):
            Cluster(f"{host}:{port}", None, tmp_path)
    assert calls == [], "Ray itself would wait for minutes"


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("auto", ConnectionError("Could not find any running Ray instance."), START),
        ("nonsense", ValueError("Invalid address format: nonsense"), START),
        (
            "auto",
            ElsewhereError("Version mismatch: The cluster was started with: Ray: 2.9.0"),
            r"of another version than Ray 2.60.0 here: Version mismatch.*Ray: 2.9.0; install one",
        ),
        ("auto", ElsewhereError("Version mismatch:\n Python: 3.9"), r"Python: 3.9; install one"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, error: Exception, said: str
) -> None:
    fake_ray(monkeypatch, error)
    with pytest.raises(ValueError, match=said):
        Cluster(address, None, tmp_path)


def test_ray_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="engine=ray works from one process, and torchrun started"):
        check_prepare(settings(tmp_path, tmp_path / "out", engine="ray"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 0}, "workers=0 is too small"),
        ({"engine": "spark"}, "engine='spark' .*one of local, ray"),
    ],
)
def test_impossible_engines_are_refused(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_prepare(settings(tmp_path, tmp_path / "out", **given))


@pytest.fixture(scope="module")
def two_of_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Return a real Ray of two workers on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    cluster = Cluster(None, 2, tmp_path_factory.mktemp("shared"))
    yield cluster
    cluster.close()


def test_ray_leaves_the_same_folder(
    two_of_ray: Cluster,
    source: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of its two workers is killed in the middle of a tar."""
    shard_functions.let_die(monkeypatch, packing, "000001", 3, tmp_path / "died")
    config, out = settings(source, tmp_path / "out"), tmp_path / "out"
    pack(config.pack, config.download, out, two_of_ray)
    said = capsys.readouterr().err
    assert "a worker died while it made 000001" in said and "20/20" in said
    filter_samples(config.filter, out, two_of_ray)
    write_index(out, two_of_ray)
    assert tree(out) == tree(whole)
    verify(out, two_of_ray)


def test_ray_names_a_mistake_of_the_user(two_of_ray: Cluster) -> None:
    with pytest.raises(ValueError, match=r"^the shard 3 is bad$"):
        list(map_shards(shard_functions.refusing, range(9), two_of_ray))


def test_a_shard_that_kills_every_worker_of_ray_is_named(two_of_ray: Cluster) -> None:
    with pytest.raises(PreparedError, match="3 workers died, one after another, while they made 2"):
        list(map_shards(shard_functions.always_dying, range(4), two_of_ray))


def test_a_folder_that_a_worker_of_ray_does_not_see_is_named(two_of_ray: Cluster) -> None:
    shutil.rmtree(two_of_ray._folder)
    try:
        with pytest.raises(
            ValueError, match=r"does not see .*; put out on a disk that all machines"
        ):
            list(map_shards(shard_functions.double, range(2), two_of_ray))
    finally:
        two_of_ray._folder.mkdir()


def test_a_machine_of_ray_that_cannot_load_sfumato_is_named(
    two_of_ray: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_of_ray._check_machines("HOST:6379")
    monkeypatch.setattr(cluster, "_NEEDED", "no_such_module")
    said = (
        r"the machine \S+ of the Ray .* cannot load Sfumato \(ModuleNotFoundError: .*'no_such_mod"
    )
    with pytest.raises(ValueError, match=said):
        two_of_ray._check_machines("HOST:6379")
