"""Prompts, tables and tars at an address: copied whole, as from a disk; else refused by name."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from image_files import config_of, png, write_folder, write_tar
from store_server import SLOW, StoreServer

from sfumato.compose import compose_train
from sfumato.config import DownloadConfig, PackConfig, PairDataConfig
from sfumato.data import store
from sfumato.data.entries import Columns
from sfumato.data.images import open_images
from sfumato.data.left_out import SkipLog
from sfumato.data.pair_tables import list_pairs
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prompts import open_prompts, read_prompt_rows, read_prompts
from sfumato.data.shard_cache import StoreError
from sfumato.data.sources import find_files_of, list_source
from sfumato.preparation.pack import pack
from sfumato.run.identity import digests

pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
EVER = 10**6


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    """Serve a folder with prompts, a table and tars."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(2):
        lines = [f"a {color} fox {number}\n" for color in ("red", "green", "blue") * 200]
        (folder / f"{number}.txt").write_text("".join(lines))
    (folder / "t.csv").write_text("prompt,score\na ring,1\na dot,2\n")
    members = [("0.png", png(16, 20, 0)), ("0.txt", b"a ring"), ("1.png", png(17, 20, 1))]
    write_tar(folder / "a.tar", [*members, ("1.txt", b"a dot")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr("sfumato.data.copies.RANGE", 4000)
    served = StoreServer(folder)
    yield served
    served.close()


def copies(tmp_path: Path) -> list[str]:
    files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return sorted(path.name for path in files if path.name != ".lock")


def test_prompts_from_a_store_are_those_from_a_disk(server: StoreServer, tmp_path: Path) -> None:
    address, disk = f"{server.address}/0.txt", str(server.folder / "0.txt")
    assert read_prompts(address) == read_prompts(disk)
    ours, theirs = (open_prompts(path, seed=3) for path in (address, disk))
    for _ in range(3):
        assert ours.next(400, 0, 400) == theirs.next(400, 0, 400)
    assert server.asked["0.txt"] > 1 and copies(tmp_path) == ["0.txt"]
    asked = server.asked.total()
    read_prompts(address)
    assert server.asked.total() == asked, "it is here"
    both = f"{server.address}/{{0..1}}.txt"
    assert read_prompts(both) == read_prompts(str(server.folder / "{0..1}.txt"))
    here = digests({"data.prompts": str(server.folder / "{0..1}.txt")}, tmp_path)
    assert digests({"data.prompts": both}, tmp_path) == here != {}


def test_another_version_of_a_file_is_fetched_again(server: StoreServer, tmp_path: Path) -> None:
    address = f"{server.address}/t.csv"
    named = {"data.prompts": address}
    assert read_prompt_rows(address)["a dot"]["score"] == "2"
    before = digests(named, tmp_path)
    (server.folder / "t.csv").write_text("prompt,score\na ring,1\na dot,3\n")  # as long
    assert read_prompt_rows(address)["a dot"]["score"] == "3"
    assert digests(named, tmp_path) != before


def test_tars_of_pictures_are_copied_and_listed(server: StoreServer) -> None:
    listed = [
        list_source(path, None, Columns(), SkipLog())
        for path in (f"{server.address}/a.tar", str(server.folder / "a.tar"))
    ]
    ours, theirs = ([(each.position, each.captions) for each in entries] for entries in listed)
    assert ours == theirs and len(ours) == 2


def test_a_table_whose_pictures_lie_beside_it_in_the_store_is_refused(
    server: StoreServer, tmp_path: Path
) -> None:
    (server.folder / "b.csv").write_text("path,caption\n0.png,a ring\n")
    address = f"{server.address}/b.csv"
    said = rf"pack.path = {address} is a table in a store, and its pictures, such as 0.png, are not"
    with pytest.raises(ValueError, match=said):
        pack(PackConfig(address), DownloadConfig(), tmp_path / "out")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "0.png").write_bytes(png(16, 20, 0))
    bins = pack(PackConfig(address, f"{tmp_path}/here"), DownloadConfig(), tmp_path / "out")
    assert bins["kept"] == 1


def test_pairs_whose_pictures_lie_beside_their_table_in_the_store_are_refused(
    server: StoreServer,
) -> None:
    text = "jpg_0,jpg_1,label_0,label_1,caption\n0.png,1.png,1,0,a ring\n"
    (server.folder / "pairs.csv").write_text(text)
    config = PairDataConfig(path=f"{server.address}/pairs.csv")
    said = r"data.pairs.path=http\S+/pairs.csv is a table in a store that names pictures"
    with pytest.raises(ValueError, match=said):
        list(list_pairs(config, "data.pairs", SkipLog()))


def test_tars_that_were_packed_from_a_copy_stay(server: StoreServer, tmp_path: Path) -> None:
    config, out = PackConfig(f"{server.address}/a.tar", samples_per_shard=1), tmp_path / "out"
    pack(config, DownloadConfig(), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    for copy in (tmp_path / "cache").rglob("a.tar"):
        copy.unlink()
    pack(config, DownloadConfig(), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before != {}
    tar = server.folder / "a.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"a ring", b"a king"))  # as long
    pack(config, DownloadConfig(), out)
    assert PreparedFolder(out).tar_record("000000").samples[0].captions == ("a king",)


def test_a_picture_of_a_copied_folder_that_is_as_large_is_packed_again(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "disk", [(16, 20), (20, 16)])
    system = s3fs.S3FileSystem(skip_instance_cache=True)
    system.mkdir("bucket")
    system.put(f"{folder}/", "bucket/folder/", recursive=True)
    config, out = PackConfig("s3://bucket/folder/", samples_per_shard=1), tmp_path / "out"
    pack(config, DownloadConfig(), out)
    before = [PreparedFolder(out).tar_record(f"{i:06d}") for i in range(2)]
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    pack(config, DownloadConfig(), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == written
    data = (folder / "001.png").read_bytes()
    other = png(20, 16, 2)[: len(data)].ljust(len(data), b"\0")
    system.pipe("bucket/folder/001.png", other)
    pack(config, DownloadConfig(), out)
    after = [PreparedFolder(out).tar_record(f"{i:06d}") for i in range(2)]
    assert [one.samples[0].sha256 for one in before] != [one.samples[0].sha256 for one in after]


def test_a_file_that_is_replaced_while_it_is_copied_is_copied_again(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, file = f"{server.address}/0.txt", server.folder / "0.txt"
    text, read, begun = file.read_text(), store.Objects._range, list[int]()

    def replacing(self: store.Objects, name: str, start: int, *others: int) -> bytes:
        data = read(self, name, start, *others)
        if not begun:
            file.write_text(text.replace("fox", "dog"))
        begun.append(start)
        return data

    monkeypatch.setattr(store.Objects, "_range", replacing)
    assert read_prompts(address) == text.replace("fox", "dog").splitlines()
    assert begun.count(0) == 2


@pytest.mark.parametrize("longer", [True, False])
def test_a_file_that_is_replaced_each_time_is_refused(
    server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longer: bool
) -> None:
    file, read = server.folder / "0.txt", store.Objects._range

    def replacing(self: store.Objects, name: str, start: int, *others: int) -> bytes:
        text = file.read_text()
        file.write_text(text + "a fox\n" if longer else text[:-1])
        return read(self, name, start, *others)

    monkeypatch.setattr(store.Objects, "_range", replacing)
    with pytest.raises(StoreError, match=r"0\.txt was replaced 3 times while it was copied; copy"):
        read_prompts(f"{server.address}/0.txt")
    assert copies(tmp_path) == []


@pytest.mark.parametrize("kind", ["cut", "500", "503", "slow", "no ranges"])
def test_what_passes_is_read_again(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    server.ranges = kind != "no ranges"
    if kind == "slow":
        monkeypatch.setattr(store, "TIMEOUT", SLOW / 2)
    server.faults = {"0.txt": (kind, 2)} if server.ranges else {}
    assert read_prompts(f"{server.address}/0.txt") == read_prompts(str(server.folder / "0.txt"))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("403", "access is denied"),
        ("404", "is not there; check the address"),
        ("redirect", "another host, http://127.0.0.2"),
        ("500", "cannot be read .*, tried 3 times"),
    ],
)
def test_what_stays_is_refused_and_leaves_nothing(
    server: StoreServer, tmp_path: Path, kind: str, said: str
) -> None:
    server.faults = {"0.txt": (kind, EVER)}
    with pytest.raises(StoreError, match=said) as error:
        read_prompts(f"{server.address}/0.txt")
    assert f"{server.address}/0.txt" in str(error.value) and "secret" not in str(error.value)
    assert copies(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("https://host/folder", "is a folder, and a web server does not list its files"),
        ("s3://me:hidden@bucket/folder", "may hold credentials"),
        ("s3://bucket/*.tar", "is a glob, and a store is not searched"),
        ("s3://bucket/{0..1.tar", "braces are not balanced"),
        ("s3://bucket/a.safetensors", "is no file that can be read from a store"),
        ("s3://me:hidden@bucket/a.csv", "may hold credentials"),
        ("s3://bucket/folder/*", "is a glob, and a store is not searched"),
        ("s3://bucket/emoji.v2", "that of a folder of pictures ends with /"),
        ("https://host/a.csv?token=hidden", "may hold credentials"),
        ("s4://bucket/a.csv", "fsspec knows no s4://"),
        ("s3://a.csv", "names no file; give an address"),
    ],
)
def test_other_addresses_are_refused(path: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        find_files_of(path, "data.images.path")
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("key", ["data.prompts", "validation.prompts"])
def test_credentials_are_refused_before_a_run_begins(key: str) -> None:
    given = ["model.pretrained=M", "data.prompts=p.txt", "objective=draft", "reward=brightness"]
    with pytest.raises(ValueError, match=f"{key}=https://.* may hold credentials") as error:
        compose_train([*given, f"{key}=https://me:hidden@host/p.txt"])
    assert "hidden" not in str(error.value)


def test_a_folder_of_pictures_in_a_store_is_that_of_a_disk(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "disk", [(16, 20), (20, 16), (16, 16)])
    write_folder(folder / "inner", [(18, 20)])
    system = s3fs.S3FileSystem(skip_instance_cache=True)
    system.mkdir("bucket")
    system.put(f"{folder}/", "bucket/a/folder/", recursive=True)
    for name in ("/../../outside.png", "//etc/x.png", "/.hidden.png"):
        system.pipe(f"bucket/a/folder{name}", png())

    def rows(path: object) -> list[tuple[str, bool]]:
        stream = open_images(config_of(str(path)), height=16, width=16, divisor=1, seed=3)
        return [(each.caption, each.pixels.any().item()) for each in stream.next(8, 0, 8)]

    def identity(path: object) -> str:
        return digests({"data.images.path": str(path)}, tmp_path)["data.images.path"]

    for address in ("s3://bucket/a/folder", "s3://bucket/a/folder/"):
        assert rows(address) == rows(folder)
        assert identity(address) == identity(folder)
    here = tmp_path / "cache" / "sfumato" / "files"
    (copy,) = {path.parent for path in here.glob("*/folder/000.png")}
    names = {path.relative_to(copy) for path in copy.rglob("*.*")}
    on_disk = {path.relative_to(folder) for path in folder.rglob("*.*")}
    assert names == on_disk, "nothing else was copied"
    assert list(tmp_path.rglob("x.png")) == [] and not Path("/etc/x.png").exists()
    before = {path: path.stat().st_ino for path in copy.rglob("*.*")}
    (folder / "000.txt").write_text("pikture 0")  # as long
    system.put(str(folder / "000.txt"), "bucket/a/folder/000.txt")
    assert "pikture 0" in dict(rows("s3://bucket/a/folder"))
    assert identity("s3://bucket/a/folder") == identity(folder)
    assert {path: path.stat().st_ino for path in copy.rglob("*.*")} == before, "a run may read it"
    (other,) = {path.parent for path in here.glob("*/folder/000.png")} - {copy}
    assert (other / "001.png").samefile(copy / "001.png"), "it was not copied again"
    with pytest.raises(StoreError, match="s3://bucket/b/ has no files; check the address"):
        rows("s3://bucket/b")
