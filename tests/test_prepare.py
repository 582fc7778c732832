"""Filter, index, verify, and `sfumato prepare` as a whole: every sample in one counted bin."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import png, write_tar
from prepared import toy_identity, write_cache
from runs import in_processes
from shard_functions import let_die

import sfumato
from sfumato.cli import main
from sfumato.config import (
    DownloadConfig,
    FilterConfig,
    ModelConfig,
    PackConfig,
    PrecacheConfig,
    PrepareConfig,
)
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prepared.format import CachedRecord, PreparedError, made_of, record_text
from sfumato.files import sha256_of
from sfumato.preparation import precache as precaching
from sfumato.preparation.filter import filter_samples
from sfumato.preparation.index import write_index
from sfumato.preparation.pack import pack
from sfumato.preparation.prepare import hold, prepare
from sfumato.preparation.verify import verify

SIZES = [(64, 64), (64, 128), (128, 128), (32, 96), (96, 64), (128, 64), (64, 65)]
CAPTIONS = ["tiny", "a longer caption", "a caption that is much too long to be kept"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three tars of 21 samples, of which the last four are copies of the first."""
    source = tmp_path_factory.mktemp("source")
    members: list[tuple[str, bytes]] = []
    for i in range(21):
        number = i if i < 17 else i - 17
        score = None if i == 5 else [i / 10, f"{i / 10}"][i % 2]
        members += [
            (f"{i:02d}.png", png(*SIZES[number % 7], number)),
            (f"{i:02d}.txt", CAPTIONS[i % 3].encode()),
            (f"{i:02d}.json", json.dumps({"score": score}).encode()),
        ]
    tar = write_tar(source / "a.tar", members)
    out = tmp_path_factory.mktemp("prepared") / "out"
    pack(PackConfig(str(tar), samples_per_shard=8, columns=["score"]), DownloadConfig(), out)
    filter_samples(FilterConfig(), out)
    write_index(out)
    return out


@pytest.fixture
def out(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "out"))


def kept(out: Path, name: str) -> list[int]:
    """Return the numbers of the samples that a selection keeps."""
    found = []
    for number, place in enumerate(sorted((out / "selections" / name).glob("*.json"))):
        found += [8 * number + i for i in PreparedFolder(out).kept_record(name, place.stem).kept]
    return found


# Filter


@pytest.mark.parametrize(
    ("bounds", "keeps", "reason"),
    [
        ({"min_size": 64}, lambda i, h, w: min(h, w) >= 64, "smaller side below 64"),
        ({"max_size": 96}, lambda i, h, w: max(h, w) <= 96, "larger side above 96"),
        ({"max_aspect": 1.5}, lambda i, h, w: max(h, w) / min(h, w) <= 1.5, "aspect above 1.5"),
        ({"min_caption": 5}, lambda i, h, w: len(CAPTIONS[i % 3]) >= 5, "caption below 5"),
        ({"max_caption": 20}, lambda i, h, w: len(CAPTIONS[i % 3]) <= 20, "caption above 20"),
    ],
)
def test_a_bound_keeps_what_it_says(
    out: Path, bounds: dict[str, Any], keeps: Any, reason: str
) -> None:
    bins = filter_samples(FilterConfig("chosen", **bounds), out)
    sizes = [SIZES[(i if i < 17 else i - 17) % 7] for i in range(21)]
    expected = [i for i, (height, width) in enumerate(sizes) if keeps(i, height, width)]
    assert 0 < len(expected) < 21
    assert kept(out, "chosen") == expected
    assert bins == {"kept": len(expected), reason: 21 - len(expected)}


def test_a_score_beyond_any_float_is_none(tmp_path: Path) -> None:
    tar = tmp_path / "huge.tar"
    for_each = [10**400, 1, -(10**400)]
    write_tar(
        tar,
        [
            entry
            for i, score in enumerate(for_each)
            for entry in (
                (f"{i}.png", png(8, 8, i)),
                (f"{i}.txt", b"huge"),
                (f"{i}.json", json.dumps({"score": score}).encode()),
            )
        ],
    )
    pack(PackConfig(str(tar), columns=["score"]), DownloadConfig(), tmp_path / "out")
    bins = filter_samples(FilterConfig(score="score", min_score=0.0), tmp_path / "out")
    assert bins == {"kept": 1, "no score in score": 2}


def test_scores_may_be_numbers_or_text_or_missing(out: Path) -> None:
    bins = filter_samples(FilterConfig("good", score="score", min_score=0.3, max_score=1.2), out)
    assert kept(out, "good") == [3, 4, *range(6, 13)]
    assert bins == {"kept": 9, "no score in score": 1, "score above 1.2": 8, "score below 0.3": 3}
    with pytest.raises(ValueError, match=r"'points' is no column of the packed tars.*'score'"):
        filter_samples(FilterConfig("other", score="points", min_score=1.0), out)


def test_of_duplicates_the_first_that_is_good_is_kept(out: Path) -> None:
    assert filter_samples(FilterConfig("once", duplicates="drop"), out) == {
        "kept": 17,
        "duplicate": 4,
    }
    assert kept(out, "once") == list(range(17))
    # Sample 0 has a short caption, so that its copy, 17, is the first that is good.
    filter_samples(FilterConfig("long", duplicates="drop", min_caption=5), out)
    assert 0 not in kept(out, "long") and 17 in kept(out, "long")


def test_duplicates_are_those_of_a_plain_set(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.preparation.filter import _Seen

    random, seen, plain = np.random.default_rng(0), _Seen(), set[int]()
    for _ in range(60):
        hashes = random.integers(0, 3000, random.integers(0, 80), np.uint64)
        assert seen.has(hashes).tolist() == [int(h) in plain for h in hashes]
        seen.add(hashes)
        plain |= {int(h) for h in hashes}


def test_a_changed_bound_remakes_and_the_same_does_not(out: Path) -> None:
    place = out / "selections" / "all"
    before = {p.name: p.stat().st_mtime_ns for p in place.iterdir()}
    filter_samples(FilterConfig(), out)
    assert before == {p.name: p.stat().st_mtime_ns for p in place.iterdir()}
    filter_samples(FilterConfig(min_size=64), out)
    changed = kept(out, "all")
    shutil.rmtree(place)
    filter_samples(FilterConfig(min_size=64), out)
    assert kept(out, "all") == changed != list(range(21))


def test_a_filter_killed_between_tars_goes_on(out: Path) -> None:
    filter_samples(FilterConfig("once", duplicates="drop"), out)
    place = out / "selections" / "once"
    whole = {p.name: p.read_bytes() for p in place.iterdir()}
    (place / "000002.json").unlink()
    (place / ".000002.json.tmp").write_text("{")
    filter_samples(FilterConfig("once", duplicates="drop"), out)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == whole


def test_nothing_is_filtered_before_it_is_packed(tmp_path: Path) -> None:
    with pytest.raises(PreparedError, match=r"holds no packed tars; run: sfumato prepare out="):
        filter_samples(FilterConfig(), tmp_path)


# Index


def test_the_index_sums_up_what_went_in_and_what_was_kept(out: Path) -> None:
    filter_samples(FilterConfig("once", duplicates="drop"), out)
    write_index(out)
    index = PreparedFolder(out).index()
    assert [tar.samples for tar in index.tars] == [8, 8, 5]
    assert index.selections == {"all": (8, 8, 5), "once": (8, 8, 1)}
    assert index.bins == {
        "pack": {"kept": 21},
        "filter all": {"kept": 21},
        "filter once": {"kept": 17, "duplicate": 4},
    }


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "shards/000001.tar").unlink(), "000001.tar is missing, and its record"),
        (lambda out: os.truncate(out / "shards/000001.tar", 512), "000001.tar has 512 bytes"),
        (
            lambda out: (out / "selections/all/000002.json").unlink(),
            r"selection 'all' has no record of 000002; run: .* filter.name=all",
        ),
        (lambda out: (out / "shards/000000.json").write_text("{"), "000000.json is damaged"),
    ],
)
def test_an_index_is_refused_where_something_is_missing(
    out: Path, spoil: Any, message: str
) -> None:
    before = (out / "index.json").read_bytes()
    spoil(out)
    with pytest.raises(PreparedError, match=message):
        write_index(out)
    assert (out / "index.json").read_bytes() == before


def test_a_selection_of_other_tars_is_refused(out: Path, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "b.tar", [("0.png", png()), ("0.txt", b"other")])
    pack(PackConfig(str(tar), samples_per_shard=8), DownloadConfig(), out)
    with pytest.raises(PreparedError, match=r"000000\.json was made of another tar.*run: "):
        write_index(out)
    filter_samples(FilterConfig(), out)
    write_index(out)
    assert [tar.samples for tar in PreparedFolder(out).index().tars] == [1]
    verify(out)


# Caches, as the index and verify see them


@pytest.fixture
def cached(out: Path) -> Path:
    """Return the folder with a cache; what its tensors hold plays no role here."""
    identity = toy_identity()
    write_cache(out, identity)
    for cache in (identity.moments_folder, identity.text_folder):
        for name in ("000000", "000001", "000002"):
            claim(out, cache, name)
    write_index(out)
    return out


def claim(out: Path, cache: str, name: str, **changes: Any) -> None:
    """Write a record anew, as if precache had made what the file holds."""
    record, tar = (
        PreparedFolder(out).cached_record(cache, name),
        PreparedFolder(out).tar_record(name),
    )
    values = {**vars(record), "made_of": made_of(cache, tar, record.rows), **changes}
    (out / "cache" / cache / f"{name}.json").write_text(record_text(CachedRecord(**values)))


def test_caches_are_indexed_and_verified(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = PreparedFolder(cached).index()
    identity = toy_identity()
    assert index.caches.keys() == {identity.moments_folder, identity.text_folder}
    assert [shard.samples for shard in index.caches[identity.text_folder]] == [8, 8, 5]
    assert index.bins[identity.moments_folder] == {"kept": 21}
    verify(cached)
    assert capsys.readouterr().out.splitlines() == [
        "pack: 3 tars: 21 of 21 kept",
        "filter all: 21 of 21 kept",
        f"{identity.moments_folder}: 21 of 21 kept",
        f"{identity.text_folder}: 21 of 21 kept",
        "index: 3 tars of 21 samples",
    ]


def test_a_cache_that_is_not_finished_or_of_other_tars_is_left_out(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moments, text = toy_identity().moments_folder, toy_identity().text_folder
    (cached / "cache" / moments / "000001.json").unlink()
    assert write_index(cached).caches.keys() == {text}
    claim(cached, text, "000000", made_of="0" * 64)
    assert not write_index(cached).caches
    prepare(PrepareConfig(str(cached), stages=["index"]))
    said = capsys.readouterr().out
    assert f"{moments} is left out, as it is not finished or not of these tars" in said
    (cached / "cache" / moments / "000000.safetensors").unlink()
    with pytest.raises(PreparedError, match=r"000000.safetensors is missing, and its record"):
        write_index(cached)


# Verify


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def faults(out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the faults that verify prints, after checking that it fails on account of them."""
    capsys.readouterr()
    with pytest.raises(PreparedError) as error:
        verify(out)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert f"faults, {len(said)} in all" in str(error.value)
    return [line.strip().replace(f"{out}/", "") for line in said]


def test_a_flipped_bit_of_a_picture_is_found(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    member = PreparedFolder(out).tar_record("000001").samples[3]
    flip(out / "shards" / "000001.tar", member.offset + 20)
    assert faults(out, capsys) == [
        "shards/000001.tar differs from the SHA-256 of its record",
        f"shards/000001.tar: {member.key}.png is not what its record says",
    ]


def test_a_flipped_bit_of_a_caption_is_found(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = out / "shards" / "000000.tar"
    flip(tar, tar.read_bytes().index(b"a longer caption", tar.read_bytes().index(b"000000001.txt")))
    assert "shards/000000.tar: 000000001.txt is not what its record says" in faults(out, capsys)


def test_a_record_that_was_edited_is_found(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = out / "shards" / "000000.json"
    content = json.loads(place.read_text())
    content["samples"][2]["captions"] = ["something else"]
    del content["samples"][7]
    place.write_text(json.dumps(content))
    found = faults(out, capsys)
    assert "shards/000000.tar: 000000002.txt is not what its record says" in found
    assert "shards/000000.tar: 000000007.png is not in its record" in found
    wrong = "selections/all/000000.json has 8 samples in its bins, and the tar has 7; run: "
    assert any(fault.startswith(wrong) for fault in found)
    lost = "has 7 samples and 0 rows that were left out, and covers 8 rows"
    assert f"the record of shards/000000.tar {lost}" in found


def test_every_fault_is_told_and_not_the_first_alone(
    cached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moments, text = toy_identity().moments_folder, toy_identity().text_folder
    (cached / "shards" / "000000.tar").unlink()
    (cached / "shards" / "000009.tar").write_bytes(b"")
    flip(cached / "cache" / moments / "000001.safetensors", -1)
    os.truncate(cached / "cache" / text / "000002.safetensors", 100)
    (cached / "cache" / text / "empty.safetensors").unlink()
    (cached / "selections" / "all" / "000001.json").unlink()
    index = json.loads((cached / "index.json").read_text())
    index["bins"]["pack"]["kept"] = 20
    (cached / "index.json").write_text(json.dumps(index))
    found = "\n".join(faults(cached, capsys))
    for expected in (
        "shards/000000.tar is missing",
        "shards/000009.json is missing",
        f"cache/{moments}/000001.safetensors differs from the SHA-256 of its record",
        f"cache/{text}/000002.safetensors has 100 bytes",
        f"cache/{text}/empty.safetensors is missing",
        "selections/all/000001.json is missing",
        "the index cannot be made anew",
    ):
        assert expected in found, expected


def test_another_empty_prompt_is_found(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = toy_identity().text_folder
    empty = cached / "cache" / text / "empty.safetensors"
    assert PreparedFolder(cached).index().empty == {text: sha256_of(empty)}
    flip(empty, -1)
    (found,) = faults(cached, capsys)
    assert found.startswith(f"cache/{text}/empty.safetensors differs from its SHA-256 in index")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": tuple(range(7))}, "has 8 rows of moments, and 7 belong there"),
        ({"rows": tuple(range(9))}, "rows that are not ascending numbers below 8"),
        ({"dropped": {"lost": 1}}, "has more samples in its bins than the 8 of the tar"),
        ({"made_of": "0" * 64}, "was made of another tar; run the stage precache again"),
    ],
)
def test_a_cached_record_that_is_wrong_is_found(
    cached: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    claim(cached, toy_identity().moments_folder, "000000", **changes)
    assert any(message in fault for fault in faults(cached, capsys))


def test_a_cache_that_lacks_samples_of_every_selection_is_found(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = toy_identity()
    write_cache(out, identity, without_moments={2})
    for cache in (identity.moments_folder, identity.text_folder):
        for name in ("000000", "000001", "000002"):
            claim(out, cache, name)
    write_index(out)
    (fault,) = faults(out, capsys)
    assert fault.startswith(f"cache/{identity.moments_folder} lacks samples of every selection")
    claim(out, identity.moments_folder, "000000", dropped={"broken": 1})
    write_index(out)
    verify(out)


def test_a_shard_that_vanished_since_the_index_is_found(
    cached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in cached.rglob("000002.*"):
        place.unlink()
    found = faults(cached, capsys)
    assert "index.json lists other tars than there are (000002); run the stage index" in found
    shutil.rmtree(cached / "cache")
    assert any("other caches than there are (moments-" in fault for fault in faults(cached, capsys))


def test_what_was_never_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreparedError, match="is no prepared folder"):
        verify(tmp_path)


# The command


def test_impossible_settings_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    def check(message: str, **settings: Any) -> None:
        given = {"stages": ["pack", "filter", "index"], "pack": PackConfig("somewhere")} | settings
        with pytest.raises(ValueError, match=message):
            prepare(PrepareConfig(str(tmp_path / "out"), **given))

    check("stages='packs' is unknown; choose one of download, pack", stages=["packs"])
    check("stages=\\[\\] is empty", stages=[])
    check("stages has precache, which needs the model", stages=["pack", "precache"])
    check("download.table is missing", stages=["download"])
    check("are both given; prepare them in two", download=DownloadConfig("t.parquet"))
    check("pack.samples_per_shard=0 is too small", pack=PackConfig("a", samples_per_shard=0))
    check("pack.max_pixels=1000000000 is too large", pack=PackConfig("a", max_pixels=10**9))
    check("pack.repeats and pack.weight are for training", pack=PackConfig("a", repeats=2))
    check("filter.name='../x' names a folder", filter=FilterConfig("../x"))
    check("filter.duplicates='no' .* one of keep, drop", filter=FilterConfig(duplicates="no"))
    check("min_size=9 is above filter.max_size=8", filter=FilterConfig(min_size=9, max_size=8))
    check("filter.score names the column", filter=FilterConfig(min_score=1.0))
    check("download.timeout=0 is too small", download=DownloadConfig(timeout=0))
    assert not (tmp_path / "out").exists()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sfumato", "prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prepares_says_what_it_kept_and_verifies(model: Path, tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar", [("0.png", png()), ("0.txt", b"a"), ("1.png", b""), ("1.txt", b"b")]
    )
    out = tmp_path / "out"
    said = [
        "pack: 1 of 2 kept; dropped 1 zero-byte file",
        "filter all: 1 of 1 kept",
        "index: 1 tars of 1 samples, 1 selections, 0 caches",
    ]
    for stages in ("[index,pack,filter]", "[pack]"):
        result = run(f"out={out}", f"stages={stages}", f"pack.path={tar}")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines() == (said[:1] if stages == "[pack]" else said)
    result = run("verify", str(out))
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == (
        "index: 1 tars of 1 samples"
    )
    (out / "shards" / "000000.tar").unlink()
    result = run("verify", str(out))
    assert result.returncode == 2
    assert "000000.tar is missing" in result.stdout and "faults, 2 in all" in result.stderr


BASE = Path(sfumato.__file__).parent / "demo" / "model" / "base"


def test_all_stages_run_with_the_demo_model(model: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(model, tmp_path / "out"))
    config = PrepareConfig(
        str(out),
        stages=["filter", "precache", "index"],
        filter=FilterConfig("once", duplicates="drop"),
        precache=PrecacheConfig(height=32, width=32, batch_size=8, workers=1),
        model=ModelConfig(str(BASE)),
    )
    prepare(config)
    index = PreparedFolder(out).index()
    assert sorted(name.partition("-")[0] for name in index.caches) == ["moments", "text"]
    assert all(index.bins[name] == {"kept": 17} for name in index.caches)
    verify(out)


def test_two_processes_and_two_workers_leave_the_same_folder_as_one_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two workers is killed while it encodes."""
    members = [(f"{i}.{s}", d) for i in range(6) for s, d in (("png", png(32, 32, i)),
                                                              ("txt", b"a star"))]  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", members)
    settings = [f"pack.path={tar}", "pack.samples_per_shard=2", f"model.pretrained={BASE}"]
    settings += ["precache.height=32", "precache.width=32", "precache.workers=1"]
    for processes, name, more in ((1, "one", []), (2, "two", []), (1, "workers", ["workers=2"])):
        capfd.readouterr()
        given = ["sfumato", "prepare", f"out={tmp_path / name}", *settings, *more]
        monkeypatch.setattr(sys, "argv", given)
        if more:
            let_die(monkeypatch, precaching, "000001", 1, tmp_path / "died")
        in_processes(processes, lambda _: main())
        said = capfd.readouterr()
        lines = [line.partition(":")[0] for line in said.out.splitlines()]
        assert lines == ["pack", "filter all", "precache", "index"]
    assert "a worker died while it made 000001" in said.err
    trees = [
        {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
        for out in (tmp_path / "one", tmp_path / "two", tmp_path / "workers")
    ]
    assert trees[0] == trees[1] == trees[2]
    assert sum(name.endswith(".safetensors") for name in trees[0]) == 7


def test_a_mistake_on_the_first_process_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    settings = [f"out={tmp_path / 'out'}", f"pack.path={tmp_path / 'empty'}"]
    result = torchrun(*settings, f"model.pretrained={BASE}")
    assert result.returncode != 0
    assert "there is no picture with a caption" in result.stderr


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "sfumato", "prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def test_the_recipe_of_laion_composes() -> None:
    result = run("recipe=prepare/laion_aesthetic", "out=X", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "table: laion/laion2B-en-aesthetic" in result.stdout


def test_two_preparations_of_one_folder_do_not_meet(model: Path, tmp_path: Path) -> None:
    config = PrepareConfig(out=str(tmp_path / "out"), stages=["index"])
    with (
        hold(tmp_path / "out"),
        pytest.raises(ValueError, match="another sfumato prepare works on"),
    ):
        prepare(config)


def test_an_index_tells_which_samples_a_selection_keeps(out: Path) -> None:
    even = write_index(out).kept["all"]
    assert write_index(out).kept["all"] == even
    before = kept(out, "all")
    filter_samples(FilterConfig(min_caption=5), out)
    assert len(kept(out, "all")) < len(before)
    assert write_index(out).kept["all"] != even


def tar_of(place: Path, *looks: tuple[int, str, tuple[int, int]]) -> Path:
    """Write a tar of pictures by number, caption and size; the same number is the same picture."""
    members: list[tuple[str, bytes]] = []
    for i, (number, caption, size) in enumerate(looks):
        members += [(f"{i}.png", png(*size, number)), (f"{i}.txt", caption.encode())]
    return write_tar(place, members)


def test_duplicates_in_one_tar_are_dropped(tmp_path: Path) -> None:
    size = (16, 16)
    looks = [(1, "a", size), (1, "long", size), (2, "long", size), (1, "long", size)]
    source = tar_of(tmp_path / "a.tar", *looks)
    pack(PackConfig(str(source)), DownloadConfig(), tmp_path / "out")
    config = FilterConfig("once", duplicates="drop", min_caption=2)
    bins = filter_samples(config, tmp_path / "out")
    assert bins == {"kept": 2, "caption below 2": 1, "duplicate": 1}
    assert kept(tmp_path / "out", "once") == [1, 2]


def test_a_tar_that_changed_is_looked_at_in_all_that_come_after(tmp_path: Path) -> None:
    """Its pictures may have been the first of duplicates that lie behind it."""
    size, source, out = (16, 16), tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name, numbers in (("a", (1, 2)), ("b", (1, 3)), ("c", (1, 4))):
        tar_of(source / f"{name}.tar", *((n, "x", size) for n in numbers))
    config = PackConfig(f"{source}/*.tar", samples_per_shard=2)
    once = FilterConfig("once", duplicates="drop")
    pack(config, DownloadConfig(), out)
    filter_samples(once, out)
    last = out / "shards/000002.json"
    before = last.read_bytes()
    tar_of(source / "a.tar", (5, "x", size), (2, "x", size))
    pack(config, DownloadConfig(), out)
    assert last.read_bytes() == before, "it is the first tar that changed"
    filter_samples(once, out)
    found = [PreparedFolder(out).kept_record("once", f"{i:06d}").kept for i in range(3)]
    assert found == [(0, 1), (0, 1), (1,)]


def test_a_sample_is_dropped_for_the_first_bound_that_it_breaks(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "a.tar", (1, "", (16, 96)), (1, "x", (16, 96)), (2, "x", (48, 48)))
    pack(PackConfig(str(source)), DownloadConfig(), tmp_path / "out")
    bounds: dict[str, Any] = {"min_size": 32, "max_size": 64, "max_aspect": 2.0, "min_caption": 9}
    reasons = ["smaller side below 32", "larger side above 64", "aspect above 2", "caption below 9"]
    for reason in reasons:
        settings = FilterConfig("s", duplicates="drop", **bounds)
        dropped = filter_samples(settings, tmp_path / "out")
        assert reason in dropped and not {*dropped} & {*reasons[: reasons.index(reason)]}
        bounds.pop(next(iter(bounds)))


def test_records_of_tars_that_are_no_more_are_removed(out: Path) -> None:
    selection = out / "selections/all"
    other = replace(PreparedFolder(out).kept_record("all", "000001"), name="000009")
    (selection / "000009.json").write_text(record_text(other))
    for name in ("000008.json", ".000001.json.tmp"):
        (selection / name).write_text("{}")
    filter_samples(FilterConfig(), out)
    names = [*(f"{i:06d}.json" for i in range(3)), "000008.json"]  # which nobody here wrote
    assert sorted(p.name for p in selection.glob("*.json")) == names
    assert not list(selection.glob(".*.tmp*"))


def test_the_index_tells_selections_of_equal_counts_apart(out: Path) -> None:
    before = write_index(out)
    place = out / "selections/all/000001.json"
    record = PreparedFolder(out).kept_record("all", "000001")
    found = set()
    for rows in ((0, 1, 2), (0, 1, 3)):
        place.write_text(record_text(replace(record, kept=rows, dropped={"x": 5})))
        index = write_index(out)
        assert index.selections["all"][1] == 3
        found.add(index.kept["all"])
    assert len(found | {before.kept["all"]}) == 3


def test_a_selection_that_does_not_sum_up_is_refused(out: Path) -> None:
    record = PreparedFolder(out).kept_record("all", "000001")
    place = out / "selections/all/000001.json"
    place.write_text(record_text(replace(record, kept=record.kept[1:])))
    with pytest.raises(PreparedError, match=r"000001\.json has 7 samples .* has 8; run"):
        write_index(out)
