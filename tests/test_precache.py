"""Caches of moments and states: equal to diffusers' own encoding, whatever happens in between."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import WRITERS
from image_files import gradient, png, write_folder
from PIL import Image
from prepared import Picture, write_prepared
from runs import in_child, in_processes, kill, on_event
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.compose import DEMO_IMAGES, DEMO_MODELS
from sfumato.config import (
    LoraConfig,
    MergeConfig,
    ModelConfig,
    PackConfig,
    PrecacheConfig,
    PrepareConfig,
    ShardDataConfig,
    TrainingConfig,
)
from sfumato.data.prepared.folder import PreparedFolder
from sfumato.data.prepared.format import CachedRecord, PreparedError, record_text
from sfumato.data.prepared.open import open_shards
from sfumato.data.sample import Sample
from sfumato.models.registry import load_encoders, load_model
from sfumato.preparation import precache as precaching
from sfumato.preparation.encoder_hash import cache_identity
from sfumato.preparation.precache import precache
from sfumato.preparation.prepare import prepare
from sfumato.preparation.settings import check_prepare
from sfumato.training.distribution import Distribution

WORDS = ("ring", "star", "dot")


def pictures(count: int) -> list[Picture]:
    """Return pictures that all differ, of several sizes, with one to three captions."""
    made = []
    for i in range(count):
        height, width = 40 + 8 * (i % 5), 36 + 9 * (i % 3)
        captions = tuple(f"a {word} of {i}" for word in WORDS[: 1 + i % 3])
        made.append(Picture(png(height, width, i), height, width, captions))
    return made


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def settings(folder: Path, model: Path, **precaching: Any) -> PrepareConfig:
    own: dict[str, Any] = {"batch_size": 2, "workers": 2} | precaching
    return PrepareConfig(
        out=str(folder),
        precache=PrecacheConfig(**own),
        model=ModelConfig(pretrained=str(model)),
    )


def run(config: PrepareConfig) -> dict[str, int]:
    """Precache in this process."""
    check_prepare(config)
    distribution = Distribution(TrainingConfig())
    try:
        return precache(config, distribution)
    finally:
        distribution.close()


def caches(folder: Path) -> dict[str, bytes]:
    """Return all files of the caches, hidden ones too."""
    files = sorted(path for path in (folder / "cache").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def cache_of(folder: Path, kind: str) -> Path:
    (found,) = (folder / "cache").glob(f"{kind}-*")
    return found


def record_of(folder: Path, kind: str, name: str = "00000") -> CachedRecord:
    return PreparedFolder(folder).cached_record(cache_of(folder, kind).name, name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    """Return a folder of three tars, precached by one process without a stop."""
    folder = write_prepared(tmp_path_factory.mktemp("whole"), pictures(12), per_shard=5)
    assert run(settings(folder, sd_folder)) == {"kept": 12}
    return folder


def test_parts_make_the_cache_of_one_process(whole: Path, tmp_path: Path, sd_folder: Path) -> None:
    folder = write_prepared(tmp_path / "data", pictures(12), per_shard=5)
    config = replace(settings(folder, sd_folder), stages=["precache"])
    for own in ("1/2", "0/2"):
        prepare(replace(config, part=own))
    assert caches(folder) == caches(whole)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    prepare(config)
    assert caches(folder) == caches(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before


# --- What is in it


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with pictures of the demo, precached with the demo's model."""
    lines = (DEMO_IMAGES / "old" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:5]]
    made = [
        Picture(
            (DEMO_IMAGES / "old" / row["file_name"]).read_bytes(),
            64,
            64,
            (str(next(value for key, value in row.items() if key != "file_name")), "a drawing"),
        )
        for row in rows
    ]
    folder = write_prepared(tmp_path_factory.mktemp("demo"), made, per_shard=5)
    assert run(settings(folder, DEMO_MODELS / "base", flip=True, batch_size=3)) == {"kept": 5}
    return folder


def demo_pixels(folder: Path) -> Tensor:
    """Return the demo's pictures (b, 3, 64, 64) in [-1, 1], read by Pillow alone."""
    with tarfile.open(folder / "shards" / "00000.tar") as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
        opened = [Image.open(io.BytesIO(file.read())) for file in files if file is not None]
        arrays = [np.asarray(picture.convert("RGB")).astype(np.float32) for picture in opened]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def assert_rounded(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float16) -> None:
    """Assert equality to the rounding of a dtype, and of sums taken in another order."""
    assert found.dtype == dtype
    slack = torch.finfo(dtype).eps * expected.abs() + 1e-4
    assert ((found.float() - expected).abs() <= slack).all()


@torch.no_grad()
def test_moments_are_those_of_diffusers(demo: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(DEMO_MODELS / "base" / "vae")
    images = demo_pixels(demo)
    stored = load_file(cache_of(demo, "moments") / "00000.safetensors")
    assert set(stored) == {"moments", "mirrored"}
    for name, pixels in (("moments", images), ("mirrored", images.flip(-1))):
        # Means and log-variances, which are limited only where latents are drawn.
        assert_rounded(stored[name], vae.encode(pixels).latent_dist.parameters)
    assert record_of(demo, "moments").rows == (0, 1, 2, 3, 4)


@torch.no_grad()
def test_latents_drawn_from_the_cache_are_those_of_the_images(demo: Path) -> None:
    model = load_model(ModelConfig(pretrained=str(DEMO_MODELS / "base")))
    stored = load_file(cache_of(demo, "moments") / "00000.safetensors")["moments"].float()
    noise = torch.randn(5, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    images = demo_pixels(demo)
    for drawn in (None, noise):
        found, expected = model.draw_latents(stored, drawn), model.encode_images(images, drawn)
        assert expected.std() > 0.3
        assert (found - expected).abs().max() < 4e-3  # fp16 keeps 11 bits of values up to 4


@torch.no_grad()
def test_states_are_those_of_diffusers(demo: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    pipeline: Any = StableDiffusionPipeline.from_pretrained(DEMO_MODELS / "base")
    record = json.loads((demo / "shards" / "00000.json").read_text())
    captions = [text for sample in record["samples"] for text in sample["captions"]]
    assert len(set(captions)) > 3
    stored = load_file(cache_of(demo, "text") / "00000.safetensors")
    assert stored["offsets"].tolist() == [0, 2, 4, 6, 8, 10]
    expected, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
    assert_rounded(stored["states"], expected)
    empty = load_file(cache_of(demo, "text") / "empty.safetensors")
    assert_rounded(empty["states"], pipeline.encode_prompt([""], "cpu", 1, False)[0])


def test_manifests_say_what_the_folders_are_named_after(demo: Path) -> None:
    for kind in ("moments", "text"):
        folder = cache_of(demo, kind)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest.pop("format"), manifest.pop("kind")) == (1, kind)
        compact = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        assert folder.name == f"{kind}-{sha256(compact.encode())[:16]}"
    moments = json.loads((cache_of(demo, "moments") / "manifest.json").read_text())
    assert len(moments.pop("autoencoder")) == 64
    assert moments == {
        **{"format": 1, "kind": "moments", "height": 64, "width": 64},
        **{"crop": "center", "resize": "lanczos", "flip": True, "dtype": "float16"},
    }


def test_records_tell_the_files(whole: Path) -> None:
    for kind in ("moments", "text"):
        for name, rows in (("00000", 5), ("00001", 5), ("00002", 2)):
            content = (cache_of(whole, kind) / f"{name}.safetensors").read_bytes()
            record = record_of(whole, kind, name)
            assert (record.bytes, record.sha256) == (len(content), sha256(content))
            assert record.rows == tuple(range(rows))
            assert record.dropped == {}


def test_pictures_are_cut_as_in_training_from_tars(whole: Path, sd_folder: Path) -> None:
    """One of 72 x 45 pixels is resized to 51 x 32, and cut ten lines from the top, on paper."""
    model = load_encoders(ModelConfig(pretrained=str(sd_folder)))
    picture = Image.fromarray(gradient(72, 45, 4))
    box = (0, 10 * 72 / 51, 45, 42 * 72 / 51)
    cut = np.asarray(picture.resize((32, 32), Image.Resampling.LANCZOS, box)).astype(np.float32)
    image = torch.from_numpy(cut).permute(2, 0, 1)[None] / 127.5 - 1
    stored = load_file(cache_of(whole, "moments") / "00000.safetensors")["moments"][4]
    with torch.no_grad():
        assert_rounded(stored, model.encode_moments(image)[0])


@pytest.mark.parametrize("family", WRITERS)
def test_every_family(tmp_path: Path, family: str) -> None:
    """Captions of other lengths than their neighbours' come out as if encoded alone."""
    WRITERS[family](tmp_path / "model")
    made = [
        Picture(png(40, 44, i), 40, 44, ("a ring " * (1 + i), "a star")[: 1 + i % 2])
        for i in range(3)
    ]
    folder = write_prepared(tmp_path / "data", made)
    config = settings(folder, tmp_path / "model", height=32, width=32, dtype="float32")
    assert run(config) == {"kept": 3}
    model = load_encoders(config.model)
    stored = load_file(cache_of(folder, "moments") / "00000.safetensors")["moments"]
    raw = ShardDataConfig(str(folder), shuffle=False, workers=0)
    for row, sample in enumerate(open_shards(raw, height=32, width=32, seed=0).next(3, 0, 3)):
        assert isinstance(sample, Sample)
        with torch.no_grad():
            assert_rounded(stored[row], model.encode_moments(sample.pixels[None])[0], torch.float32)
    states = load_file(cache_of(folder, "text") / "00000.safetensors")
    assert states.pop("offsets").tolist() == [0, 1, 3, 4]
    for row, text in enumerate(text for picture in made for text in picture.captions):
        alone = model.encode_prompts([text]).tensors
        assert alone.keys() == states.keys()
        for name, tensor in alone.items():
            found, length = states[name][row], tensor.shape[1]
            assert found.dtype == tensor.dtype
            assert torch.allclose(found[:length].float(), tensor[0].float(), atol=1e-4)
            assert not found[length:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes(tmp_path: Path, sd_folder: Path, whole: Path, dtype: str) -> None:
    folder = write_prepared(tmp_path, pictures(5), per_shard=5)
    run(settings(folder, sd_folder, dtype=dtype))
    for kind in ("moments", "text"):
        found, half = (
            load_file(cache_of(place, kind) / "00000.safetensors") for place in (folder, whole)
        )
        for name in found.keys() - {"offsets"}:
            kept = getattr(torch, dtype)
            exact = found[name].float()
            assert found[name].dtype == kept
            slack = max(torch.finfo(each).eps for each in (kept, torch.float16))
            assert torch.allclose(exact, half[name].float(), rtol=slack, atol=1e-3)


def test_training_reads_the_same_from_tars_and_from_the_cache(
    tmp_path: Path, sd_folder: Path
) -> None:
    """From pictures to rows through every stage: moments and states of the same samples."""
    write_folder(tmp_path / "pictures", [(40, 36), (64, 40), (36, 90), (33, 33), (50, 70)])
    out = tmp_path / "data"
    model = ModelConfig(str(sd_folder))
    prepare(
        PrepareConfig(
            out=str(out),
            stages=["pack", "filter", "precache", "index"],
            pack=PackConfig(str(tmp_path / "pictures"), samples_per_shard=2),
            precache=PrecacheConfig(flip=True),
            model=model,
        )
    )
    loaded = load_encoders(model)
    identity = cache_identity(model, height=32, width=32, flip=True, dtype="float16")
    drawn = ShardDataConfig(str(out), flip=True, workers=0)
    stored = replace(drawn, cached=True)
    raw = open_shards(drawn, height=32, width=32, seed=3).next(20, 0, 20)
    cached = open_shards(stored, height=32, width=32, seed=3, identity=identity).next(20, 0, 20)
    seen = set()
    for image, row in zip(raw, cached, strict=True):
        assert row.encoded is not None
        assert (image.caption, image.original) == (row.caption, row.original)
        with torch.no_grad():
            moments = row.encoded.moments
            assert_rounded(moments, loaded.encode_moments(image.pixels[None])[0])
        for text, states in ((image.caption, row.encoded.text), ("", row.encoded.empty)):
            expected = loaded.encode_prompts([text]).tensors
            assert states.keys() == expected.keys()
            assert_rounded(states["states"], expected["states"])
        seen.add(moments.float().sum().item())
    assert len(seen) > 5, "mirrored ones too"


# --- What may happen in between


def assert_whole(folder: Path) -> None:
    """Assert that each record's file is what it says, and that no other file has a final name."""
    for record in (folder / "cache").rglob("0*.json"):
        content = record.with_suffix(".safetensors").read_bytes()
        told = json.loads(record.read_text())
        assert (told["bytes"], told["sha256"]) == (len(content), sha256(content))
    for file in (folder / "cache").rglob("*.safetensors"):
        if not file.name.startswith("."):
            load_file(file)


def copied(whole: Path, place: Path) -> Path:
    """Return a copy of a prepared folder without its caches."""
    return Path(shutil.copytree(whole, place, ignore=shutil.ignore_patterns("cache")))


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_write_the_same_bytes_as_one(
    tmp_path: Path, sd_folder: Path, whole: Path, world: int
) -> None:
    """Three shards on two processes, and on four, one of which has none."""
    folder = copied(whole, tmp_path / "data")

    def act(rank: int) -> None:
        assert run(settings(folder, sd_folder)) == {"kept": 12}

    in_processes(world, act)
    assert caches(folder) == caches(whole)


@pytest.mark.parametrize("other", [{"workers": 0}, {"workers": 3}, {"selection": "all"}])
def test_what_does_not_matter_does_not_change_a_byte(
    tmp_path: Path, sd_folder: Path, whole: Path, other: Mapping[str, Any]
) -> None:
    folder = copied(whole, tmp_path / "data")
    run(settings(folder, sd_folder, **other))
    assert caches(folder) == caches(whole)


def test_the_number_of_threads_does_not_change_a_byte(
    tmp_path: Path, sd_folder: Path, whole: Path
) -> None:
    folder = copied(whole, tmp_path / "data")
    torch.set_num_threads(2)
    try:
        run(settings(folder, sd_folder))
    finally:
        torch.set_num_threads(1)
    assert caches(folder) == caches(whole)


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, sd_folder: Path, whole: Path
) -> None:
    """Each attempt is killed when a file is about to take its place, the first or a later one."""
    folder = copied(whole, tmp_path / "data")
    codes, finished = [], 0
    for number in (1, 4, 5, 6, 7):

        def act(number: int = number) -> None:
            on_event(number, kill, {"os.rename"})
            run(settings(folder, sd_folder))

        codes.append(in_child(act))
        assert_whole(folder)
        assert len(list((folder / "cache").rglob("0*.json"))) >= finished
        finished = len(list((folder / "cache").rglob("0*.json")))
    assert codes == [-9] * 5
    assert 0 < finished < 6
    run(settings(folder, sd_folder))
    assert caches(folder) == caches(whole)


def test_killed_while_it_writes_it_leaves_nothing_half_written(
    tmp_path: Path, sd_folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, save, written = copied(whole, tmp_path / "data"), precaching.save_file, [0]

    def save_half(tensors: dict[str, Tensor], file: Path) -> None:
        save(tensors, file)
        written[0] += 1
        if written[0] == 5:  # of the empty prompt, then a text shard and one of moments each
            os.truncate(file, file.stat().st_size // 2)
            kill()

    with monkeypatch.context() as patched:
        patched.setattr(precaching, "save_file", save_half)
        assert in_child(lambda: run(settings(folder, sd_folder))) == -9
    (half,) = (folder / "cache").rglob(".*.tmp*")
    assert half.stat().st_size > 0
    assert_whole(folder)
    run(settings(folder, sd_folder))
    assert caches(folder) == caches(whole)


def test_one_of_two_processes_is_killed(tmp_path: Path, sd_folder: Path, whole: Path) -> None:
    """What the other had finished is not made again."""
    folder = copied(whole, tmp_path / "data")

    def act(rank: int) -> None:
        if rank == 1:
            on_event(3, kill, {"os.rename"})  # between the two caches of its shard
            run(settings(folder, sd_folder))
        else:
            with pytest.raises(RuntimeError):  # of gloo, whose neighbour is gone
                run(settings(folder, sd_folder))
            kill()

    in_processes(2, act, code=-signal.SIGKILL)
    assert_whole(folder)
    done = {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("0*.json")}
    assert 0 < len(done) < 6
    run(settings(folder, sd_folder))
    assert caches(folder) == caches(whole)
    assert {p: p.stat().st_mtime_ns for p in done} == done


def test_what_is_finished_is_not_made_again_and_needs_no_encoder(
    tmp_path: Path, sd_folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "data"))
    monkeypatch.setattr(precaching, "load_encoders", None)
    assert run(settings(folder, sd_folder)) == {"kept": 12}
    (cache_of(folder, "moments") / "00001.safetensors").unlink()
    monkeypatch.undo()
    before = (cache_of(folder, "moments") / "00000.json").stat().st_mtime_ns
    assert run(settings(folder, sd_folder)) == {"kept": 12}
    assert (cache_of(folder, "moments") / "00000.json").stat().st_mtime_ns == before
    assert caches(folder) == caches(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_it_clearly_and_loses_nothing(
    small_disk: Path, sd_folder: Path, whole: Path
) -> None:
    folder = copied(whole, small_disk / "data")
    config = settings(folder, sd_folder)
    filler, seen = small_disk / "filler", set()
    for kilobytes in (2, 12, 24, 40, 56):
        filler.unlink(missing_ok=True)
        filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - kilobytes * 1024))
        with pytest.raises(PreparedError, match=r"written: no space is left.*Free some"):
            run(config)
        assert_whole(folder)
        assert not list((folder / "cache").rglob(".*.tmp*"))
        seen.add(len(list((folder / "cache").rglob("0*.json"))))
    assert len(seen) > 2, "the disk was full at different points"
    filler.unlink()
    assert run(config) == {"kept": 12}
    assert caches(folder) == caches(whole)


def test_a_full_disk_of_one_process_ends_both(
    tmp_path: Path, sd_folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, save = copied(whole, tmp_path / "data"), precaching.save_file

    def fail(tensors: dict[str, Tensor], file: Path) -> None:
        if "00001" in file.name:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, file)

    def act(rank: int) -> None:
        expected = "another process failed" if rank == 0 else "no space is left"
        with pytest.raises(ValueError, match=expected):
            run(settings(folder, sd_folder))

    with monkeypatch.context() as patched:
        patched.setattr(precaching, "save_file", fail)
        in_processes(2, act)
    assert {p.stem for p in (folder / "cache").rglob("0*.json")} == {"00000"}
    run(settings(folder, sd_folder))
    assert caches(folder) == caches(whole)


# --- What is left out, and what is refused


def test_a_picture_that_cannot_be_decoded_is_counted(tmp_path: Path, sd_folder: Path) -> None:
    """Each kept sample is in one bin, and the caches have the others."""
    made = pictures(7)
    made[1] = replace(made[1], data=made[1].data[:60])
    made[5] = replace(made[5], data=b"<html>")
    made[6] = replace(made[6], data=b"<html>")
    folder = write_prepared(
        tmp_path,
        made,
        per_shard=5,
        selections={"odd": lambda i: i % 2 == 1, "last": lambda i: i > 4},
    )
    damaged, none = "truncated or damaged image", "not an image (JPEG, PNG, WEBP, BMP)"
    bins = {"kept": 4, none: 2, damaged: 1}
    config = settings(folder, sd_folder)
    assert run(config) == bins
    assert record_of(folder, "moments").rows == (0, 2, 3, 4)
    assert record_of(folder, "moments").dropped == {damaged: 1}
    assert record_of(folder, "moments", "00001").rows == ()
    assert record_of(folder, "text").rows == (0, 1, 2, 3, 4)
    none_there = load_file(cache_of(folder, "moments") / "00001.safetensors")
    assert none_there["moments"].shape == (0, 8, 8, 8)
    before = caches(folder)
    assert run(config) == bins
    assert run(settings(folder, sd_folder, selection="odd")) == {"kept": 1, none: 1, damaged: 1}
    assert run(settings(folder, sd_folder, selection="last")) == {"kept": 0, none: 2}
    assert run(config) == bins
    assert {k: v for k, v in caches(folder).items() if "safetensors" in k} == {
        k: v for k, v in before.items() if "safetensors" in k
    }


def test_a_second_selection_keeps_what_the_first_one_had(tmp_path: Path, sd_folder: Path) -> None:
    folder = write_prepared(
        tmp_path, pictures(8), selections={"low": lambda i: i < 3, "high": lambda i: i > 5}
    )
    run(settings(folder, sd_folder, selection="low"))
    assert [record_of(folder, "moments", n).rows for n in ("00000", "00001")] == [(0, 1, 2), ()]
    nothing = load_file(cache_of(folder, "text") / "00001.safetensors")
    assert nothing["offsets"].tolist() == [0]
    assert nothing["states"].shape[0] == 0
    before = record_of(folder, "moments")
    assert run(settings(folder, sd_folder, selection="high")) == {"kept": 2}
    assert record_of(folder, "moments") == before
    assert record_of(folder, "moments", "00001").rows == (2, 3)
    assert run(settings(folder, sd_folder, selection="low")) == {"kept": 3}
    assert run(settings(folder, sd_folder)) == {"kept": 8}
    assert run(settings(folder, sd_folder, selection="low")) == {"kept": 3}
    assert record_of(folder, "text").rows == (0, 1, 2, 3)


def test_a_changed_setting_makes_only_what_it_must(
    tmp_path: Path, sd_folder: Path, whole: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "data"))
    text, moments = cache_of(folder, "text").name, cache_of(folder, "moments").name
    run(settings(folder, sd_folder, height=16, width=24))
    there = {path.name for path in (folder / "cache").iterdir()}
    assert len(there) == 3
    (small,) = there - {text, moments}
    assert load_file(folder / "cache" / small / "00000.safetensors")["moments"].shape[2:] == (4, 6)
    assert caches(folder).items() >= caches(whole).items()


def test_a_tar_that_was_packed_anew_is_encoded_anew(
    tmp_path: Path, sd_folder: Path, whole: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "data"))
    others = [replace(p, captions=("something else",)) for p in pictures(13)[1:]]
    write_prepared(folder, others, per_shard=5)
    assert run(settings(folder, sd_folder)) == {"kept": 12}
    fresh = write_prepared(tmp_path / "fresh", others, per_shard=5)
    run(settings(fresh, sd_folder))
    assert caches(folder) == caches(fresh)


def test_a_tar_that_was_changed_is_refused(tmp_path: Path, sd_folder: Path, whole: Path) -> None:
    folder = copied(whole, tmp_path / "data")
    tar = folder / "shards" / "00001.tar"
    content = tar.read_bytes()
    member = json.loads(tar.with_suffix(".json").read_text())["samples"][2]
    changed = bytearray(content)
    changed[member["offset"] + 40] ^= 1
    for damage, said in (
        (bytes(changed), rf"00001.tar: {member['key']}.png is not the picture that was packed"),
        (content[:-512], rf"00001.tar has {len(content) - 512} bytes, .* says {len(content)}"),
        (None, "00001.tar is missing"),
    ):
        tar.unlink()
        if damage is not None:
            tar.write_bytes(damage)
        with pytest.raises(PreparedError, match=said):
            run(settings(folder, sd_folder))
        assert_whole(folder)
        tar.write_bytes(content)
    run(settings(folder, sd_folder))
    assert caches(folder) == caches(whole)


@pytest.mark.parametrize(("dtype", "held"), [("float16", False), ("bfloat16", True)])
def test_values_that_a_dtype_cannot_hold_name_the_sample(
    tmp_path: Path, sd_folder: Path, dtype: str, held: bool
) -> None:
    model = Path(shutil.copytree(sd_folder, tmp_path / "model"))
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["quant_conv.weight"] *= 1e8
    save_file(weights, file, metadata={"format": "pt"})
    folder = write_prepared(tmp_path / "data", pictures(2))
    config = settings(folder, model, dtype=dtype)
    if held:
        assert run(config) == {"kept": 2}
        return
    with pytest.raises(ValueError, match=r"00000.tar: 0+\.png: .* float16 cannot hold; set"):
        run(config)


def test_an_encoder_that_overflows_is_named_as_such(tmp_path: Path, sd_folder: Path) -> None:
    model = Path(shutil.copytree(sd_folder, tmp_path / "model"))
    file = model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["text_model.final_layer_norm.weight"] *= 2e38  # finite weights, states that are not
    save_file(weights, file, metadata={"format": "pt"})
    folder = write_prepared(tmp_path / "data", pictures(2))
    with pytest.raises(ValueError, match="the empty prompt: the encoder gives values that are not"):
        run(settings(folder, model))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"selection": "larg"},
            r"precache.selection = 'larg' is not a selection of .* all;",
        ),
        ({"height": 30}, r"precache.height = 30 must be a multiple of 4 pixels.*nearest is 32"),
        ({"width": 1}, r"precache.width = 1 must be"),
        ({"crop": "random"}, r"precache.crop='random'.*data.shards.cached=false"),
        ({"dtype": "fp16"}, r"precache.dtype='fp16' is unknown; choose one of float16, float32"),
        ({"batch_size": 0}, r"precache.batch_size=0 is too small; give 1 or more"),
        ({"workers": -1}, r"precache.workers=-1 is too small; give 0 or more"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    tmp_path: Path, sd_folder: Path, changes: Mapping[str, Any], said: str
) -> None:
    folder = write_prepared(tmp_path / "data", pictures(2))
    with pytest.raises(ValueError, match=said):
        run(settings(folder, sd_folder, **changes))
    assert not (folder / "cache").exists()


def test_what_has_to_come_before_is_named(tmp_path: Path, sd_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no packed tars; run: .*\[pack\]"):
        run(settings(tmp_path, sd_folder))
    folder = write_prepared(tmp_path, pictures(5))
    (folder / "selections" / "all" / "00001.json").unlink()
    with pytest.raises(PreparedError, match=r"all/00001.json is missing; .*run the same"):
        run(settings(folder, sd_folder))


def test_a_model_with_merged_changes_is_refused(tmp_path: Path, sd_folder: Path) -> None:
    folder = write_prepared(tmp_path, pictures(1))
    config = settings(folder, sd_folder)
    merged = replace(config.model, merge={"one": MergeConfig("lora.safetensors")})
    started = replace(config.model, lora=LoraConfig(start="lora.safetensors"))
    for model in (merged, started):
        with pytest.raises(ValueError, match=r"model.merge and model.lora.start change no cache"):
            run(replace(config, model=model))


def test_a_selection_beyond_its_tar_is_refused_before_anything_is_encoded(
    tmp_path: Path, sd_folder: Path
) -> None:
    data = write_prepared(tmp_path / "data", pictures(8))
    place = data / "selections/all/00001.json"
    record = PreparedFolder(data).kept_record("all", "00001")
    assert record.tar == "test" or record.tar == ""
    place.write_text(record_text(replace(record, kept=(*record.kept, 4), tar="")))
    with pytest.raises(PreparedError, match="'all' belongs to an older tar 00001"):
        run(settings(data, sd_folder))
    place.write_text(record_text(replace(record, tar="other")))
    with pytest.raises(PreparedError, match="'all' belongs to an older tar 00001"):
        run(settings(data, sd_folder))
