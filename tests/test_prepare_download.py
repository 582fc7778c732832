"""Download: every row of a table ends in one counted bin, whatever its URL gives."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from image_files import encode, gradient, png
from nightly import nightly_but
from PIL import Image

from sfumato.config import DownloadConfig, PackConfig
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prepared.format import PreparedError
from sfumato.preparation.download import download
from sfumato.preparation.pack import pack

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

# Writes what img2dataset 1.47 writes, without a network: http://fake/N is a picture, others fail.
FAKE = """#!{python}
import glob, io, json, os, pathlib, signal, sys, tarfile
sys.path.insert(0, {tests!r})
from image_files import png
from pyarrow import parquet
given = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
assert given["input_format"] == "parquet" and given["output_format"] == "webdataset"
assert given["incremental_mode"] == "incremental" and given["enable_wandb"] == "False"
out, size = pathlib.Path(given["output_folder"]), int(given["number_sample_per_shard"])
done = {{int(pathlib.Path(f).name.split("_")[0]) for f in glob.glob(str(out / "*.json"))}}
extra = json.loads(given.get("save_additional_columns", "[]"))
with open(out.parent / "calls", "a") as calls:
    calls.write("called\\n")
shard = 0
for file in sorted(glob.glob(given["url_list"] + "/*.parquet")):
    columns = [given["url_col"], given["caption_col"], *extra]
    rows = parquet.read_table(file, columns=columns).to_pylist()
    for first in range(0, len(rows), size):
        number, shard = shard, shard + 1
        if number in done:
            continue
        status = {{}}
        with tarfile.open(out / f"{{number:05d}}.tar", "w") as tar:
            # In the order in which threads are done.
            for i, row in reversed(list(enumerate(rows[first : first + size]))):
                name = row["url"].rpartition("/")[2]
                said = {{"gone": "HTTP Error 404: Not Found", "hang": "<urlopen error timed out>",
                        "html": "Image decoding error", "odd": "never heard of"}}.get(name)
                if name == os.environ.get("FAKE_DIES_AT"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if name == "lost":
                    continue
                status[said or "success"] = status.get(said or "success", 0) + 1
                if said:
                    continue
                key = f"{{number * 100 + i:07d}}"
                parts = ((".jpg", png(8, 8, int(name))), (".txt", row["caption"].encode()),
                         (".json", json.dumps({{**row, "key": key}}).encode()))
                for suffix, data in parts:
                    member = tarfile.TarInfo(key + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        if "FAKE_FAILS" in os.environ and number == 1:
            print("shard 1 failed with error [Errno 28] No space left on device")
            continue
        good, count = status.get("success", 0), len(rows[first : first + size])
        stats = {{"count": count, "successes": good, "failed_to_download": 0, "failed_to_resize": 0,
                 "status_dict": status}}
        (out / f"{{number:05d}}_stats.json").write_text(json.dumps(stats))
"""
ROWS = [{"url": f"http://fake/{i}", "caption": f"picture {i}", "score": i / 2} for i in range(12)]
for number, name in ((2, "gone"), (5, "hang"), (6, "html"), (7, "odd"), (8, "lost")):
    ROWS[number] = {**ROWS[number], "url": f"https://fake/{name}"}
REASONS = {"HTTP 404": 1, "failed for another reason": 2, "not an image": 1, "timed out": 1}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the fake program before all others on the PATH."""
    place = tmp_path / "bin" / "img2dataset"
    place.parent.mkdir()
    place.write_text(FAKE.format(python=sys.executable, tests=str(Path(__file__).parent)))
    place.chmod(0o755)
    monkeypatch.setenv("PATH", str(place.parent), prepend=os.pathsep)
    return place


def table(tmp_path: Path, rows: list[dict[str, Any]], name: str = "table.parquet") -> Path:
    place = tmp_path / name
    parquet.write_table(pyarrow.Table.from_pylist(rows), place)
    return place


def config_of(place: Path | str, **settings: Any) -> DownloadConfig:
    return DownloadConfig(str(place), **{"samples_per_shard": 5, **settings})


def calls(out: Path) -> int:
    return len((out / "calls").read_text().splitlines())


def packed_captions(out: Path, config: DownloadConfig) -> list[str]:
    pack(PackConfig(samples_per_shard=4), config, out)
    names = sorted(place.stem for place in (out / "shards").glob("*.json"))
    return [m.captions[0] for name in names for m in PreparedFolder(out).tar_record(name).samples]


def test_every_row_ends_in_one_bin_and_a_second_call_does_nothing(
    tmp_path: Path, fake: Path
) -> None:
    config, out = config_of(table(tmp_path, ROWS)), tmp_path / "out"
    assert download(config, out) == {"kept": 7, **REASONS}
    assert download(config, out) == {"kept": 7, **REASONS}
    assert calls(out) == 1


def test_rows_that_name_nothing_to_fetch_are_counted_before(tmp_path: Path, fake: Path) -> None:
    bad = [
        {"url": None, "caption": "no URL"},
        {"url": "http://fake/3", "caption": "  "},
        {"url": "http://fake/3", "caption": None},
        {"url": "file:///etc/passwd", "caption": "of this machine"},
        {"url": "nonsense", "caption": "no URL"},
    ]
    place = table(tmp_path, [*({**row, "score": 0.0} for row in bad), *ROWS])
    assert download(config_of(place), tmp_path / "out") == {
        "kept": 7,
        **REASONS,
        "URL that is not of http or https": 1,
        "blank caption": 1,
        "no URL": 1,
        "no caption": 1,
        "not a URL": 1,
    }


def test_pictures_are_packed_in_the_order_of_the_table(tmp_path: Path, fake: Path) -> None:
    config, out = config_of(table(tmp_path, ROWS), columns=["score"]), tmp_path / "out"
    download(config, out)
    good = [i for i in range(12) if i not in {2, 5, 6, 7, 8}]
    assert packed_captions(out, config) == [f"picture {i}" for i in good]
    first = PreparedFolder(out).tar_record("000000")
    assert [m.columns for m in first.samples] == [{"score": i / 2} for i in good[:4]]
    assert {m.suffix for m in first.samples} == {"png"}  # whatever img2dataset calls it


KINDS = ["csv", "tsv", "json", "jsonl", "folder", "glob"]


# tests/test_tables.py reads each kind.
@pytest.mark.parametrize("kind", nightly_but(["jsonl", "glob"], KINDS))
def test_a_table_may_be_of_several_kinds(tmp_path: Path, fake: Path, kind: str) -> None:
    place = tmp_path / "tables"
    place.mkdir()
    path = str(place / f"t.{kind}")
    if kind in ("csv", "tsv"):
        lines = [("score", "url", "caption"), *((r["score"], r["url"], r["caption"]) for r in ROWS)]
        separator = "," if kind == "csv" else "\t"
        Path(path).write_text("\n".join(separator.join(map(str, line)) for line in lines))
    elif kind in ("json", "jsonl"):
        lines = [json.dumps(row) for row in ROWS]
        Path(path).write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    else:
        table(place, ROWS[:7], "a.parquet")
        table(place, ROWS[7:], "b.parquet")
        path = str(place) + ("/*.parquet" if kind == "glob" else "")
    config = config_of(path, columns=["score"])
    assert download(config, tmp_path / "out") == {"kept": 7, **REASONS}
    assert len(packed_captions(tmp_path / "out", config)) == 7


def test_a_table_may_be_a_data_set_of_the_hub(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, **settings: Any) -> str:
        asked.append((name, settings))
        table(tmp_path / "hub", ROWS)
        return str(tmp_path / "hub")

    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download(config_of("laion/aesthetic"), tmp_path / "out")["kept"] == 7
    name, settings = asked[-1]
    assert name == "laion/aesthetic" and not settings.get("local_files_only")
    assert settings["repo_type"] == "dataset" and settings["allow_patterns"] == ["*.parquet"]


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"download.table = 'nobody/none' is no folder here.*check the id"
    ):
        download(config_of("nobody/none"), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ["width"]}, "download.columns has width, which img2dataset writes itself"),
        ({"columns": ["mood"]}, "no column 'mood'; its columns are 'url', 'caption', 'score'"),
    ],
)
def test_a_table_that_cannot_be_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    config = config_of(table(tmp_path, ROWS))
    vars(config).update(settings)
    with pytest.raises(ValueError, match=message):
        download(config, tmp_path / "out")
    assert not (tmp_path / "out" / "download").exists()


def test_without_the_program_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the program img2dataset.*pip install img2dataset"):
        download(config_of(table(tmp_path, ROWS)), tmp_path / "out")


def test_a_killed_download_goes_on(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = config_of(table(tmp_path, ROWS)), tmp_path / "out"
    monkeypatch.setenv("FAKE_DIES_AT", "html")
    with pytest.raises(PreparedError, match=f"failed with code -{signal.SIGKILL:d}.*to go on"):
        download(config, out)
    first = (out / "download" / "00000.tar").stat().st_mtime_ns
    # Killed while it wrote what a shard holds, it would take the shard for done.
    (out / "download" / "00001_stats.json").write_text('{"count": 5, "succ')
    monkeypatch.delenv("FAKE_DIES_AT")
    assert download(config, out) == {"kept": 7, **REASONS}
    assert (out / "download" / "00000.tar").stat().st_mtime_ns == first
    (out / "download" / "00002.tar").unlink()
    assert download(config, out) == {"kept": 7, **REASONS}
    assert calls(out) == 3


def test_a_shard_that_failed_is_said(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = config_of(table(tmp_path, ROWS)), tmp_path / "out"
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(PreparedError, match=r"1 of its shards are not done \(the first is 00001\)"
                                            r": no space left on the disk"):  # fmt: skip
        download(config, out)
    monkeypatch.delenv("FAKE_FAILS")
    assert download(config, out)["kept"] == 7


def test_another_table_is_not_mixed_into_a_download(tmp_path: Path, fake: Path) -> None:
    place, out = table(tmp_path, ROWS), tmp_path / "out"
    download(config_of(place), out)
    os.utime(place)  # touched, but the same
    assert download(config_of(place), out)["kept"] == 7
    for config in (config_of(place, columns=["score"]), config_of(place, samples_per_shard=4)):
        with pytest.raises(PreparedError, match="holds a download of another table"):
            download(config, out)
    table(tmp_path, ROWS[:-1])
    with pytest.raises(PreparedError, match="holds a download of another table"):
        download(config_of(place), out)


def test_samples_lost_in_a_damaged_download_have_a_bin(tmp_path: Path, fake: Path) -> None:
    config, out = config_of(table(tmp_path, ROWS)), tmp_path / "out"
    kept = download(config, out)["kept"]
    tar = out / "download" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    bins = pack(PackConfig(samples_per_shard=4), config, out)
    assert bins["lost in a damaged tar"] > 0
    assert sum(bins.values()) == kept
    tar.unlink()
    with pytest.raises(PreparedError, match=r"00000.tar is missing; run the stage download again"):
        pack(PackConfig(samples_per_shard=4), config, out)


def test_an_img2dataset_that_outlived_its_caller_is_waited_for(tmp_path: Path, fake: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with (out / "img2dataset.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(PreparedError, match="was started before still writes to"):
            download(config_of(table(tmp_path, ROWS)), out)
    assert download(config_of(table(tmp_path, ROWS)), out)["kept"] == 7


# The real program


class Answers(BaseHTTPRequestHandler):
    """Give pictures and everything that is none."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/")
        number = int("0" + "".join(letter for letter in name if letter.isdigit()))
        body = encode(Image.fromarray(gradient(40, 50, number)), "JPEG")
        if name == "gone":
            self.send_error(404)
            return
        if name == "hang":
            time.sleep(3)
        body = {"html": b"<html>", "cut": body[: len(body) // 2], "png": png(20, 20)}.get(
            name, body
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.skipif(shutil.which("img2dataset") is None, reason="img2dataset is not on the PATH")
@pytest.mark.parametrize("image_size", [None, 32])
def test_the_real_program_is_driven_and_read(
    tmp_path: Path, server: str, image_size: int | None
) -> None:
    names = [*(f"img{i}" for i in range(8)), "gone", "hang", "html", "cut", "png"]
    rows = [{"url": f"{server}/{name}", "caption": name, "score": 1} for name in names]
    config = config_of(
        table(tmp_path, rows), timeout=1, image_size=image_size, columns=["score"], threads=4
    )
    out = tmp_path / "out"
    bins = download(config, out)
    failed = {"HTTP 404": 1, "timed out": 1}
    assert bins == ({"kept": 11, **failed} if image_size is None else
                    {"kept": 9, **failed, "not an image": 2})  # fmt: skip
    assert packed_captions(out, config) == [*names[:8], "png"]
    sizes = {(m.height, m.width) for m in PreparedFolder(out).tar_record("000000").samples}
    assert sizes == ({(40, 50)} if image_size is None else {(32, 40)})
    before = {p: p.stat().st_mtime_ns for p in (out / "download").iterdir()}
    assert download(config, out) == bins
    assert before == {p: p.stat().st_mtime_ns for p in (out / "download").iterdir()}
    if image_size is None:
        member = PreparedFolder(out).tar_record("000000").samples[0]
        with (out / "shards" / "000000.tar").open("rb") as tar:
            tar.seek(member.offset)
            assert tar.read(member.size) == encode(Image.fromarray(gradient(40, 50, 0)), "JPEG")


def test_what_was_downloaded_is_packed_whole_without_naming_its_columns_again(
    tmp_path: Path, fake: Path
) -> None:
    config, out = config_of(table(tmp_path, ROWS), columns=["score"]), tmp_path / "out"
    download(config, out)
    pack(PackConfig(samples_per_shard=4), config, out)
    before = PreparedFolder(out).tar_record("000000")
    assert before.samples[0].columns.keys() == {"score"}
    pack(PackConfig(samples_per_shard=4), DownloadConfig(), out)
    assert PreparedFolder(out).tar_record("000000") == before
