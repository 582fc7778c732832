"""Caches of a run's own pictures: the same training, without decoding or encoding in its steps."""

import inspect
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WRITERS, write_pictures
from image_files import config_of, png, skip_counts
from nightly import nightly_but
from runs import assert_same_state, command, in_child, in_processes, kill, metrics, on_call, start
from safetensors.torch import save_file
from test_sums import flip as damaged
from tiny_sd import load_tiny_sd, write_tiny_sd

from sfumato.compose import compose_train
from sfumato.config import (
    CONF,
    DataConfig,
    ImageDataConfig,
    MergeConfig,
    ModelConfig,
    SupervisedConfig,
    TrainConfig,
    TrainingConfig,
)
from sfumato.data import encoded as reading
from sfumato.data import sample as sampling
from sfumato.data.encoded import Pictures
from sfumato.data.images import open_pictures
from sfumato.data.order import PoolOrder
from sfumato.data.prepared.format import PreparedError
from sfumato.data.sample import Sample
from sfumato.data.stream import OrderedStream
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.stable_diffusion import StableDiffusion
from sfumato.objectives.supervised import Supervised
from sfumato.preparation import precache
from sfumato.preparation.image_cache import cache_pictures
from sfumato.run.open_data import is_cached, why_uncached
from sfumato.training.distribution import Distribution

pytestmark = pytest.mark.usefixtures("unchecked")
KILLED = -9
SHARD = 4  # so that a few pictures make several shards
RESUMED = ("data.images.cache=auto", "data.images.flip=true")
SIZES = [(32, 32), (32, 48), (48, 32), (40, 24), (64, 64), (20, 52), (33, 31), (32, 40), (36, 20)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading, "SHARD", SHARD)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of pictures of several shapes, with one to three captions each."""
    folder = tmp_path_factory.mktemp("images") / "mixed"
    folder.mkdir()
    for i, (height, width) in enumerate(SIZES):
        (folder / f"{i}.png").write_bytes(png(height, width, 20 * i))
        captions = [f"a {name} of {i}" for name in ("ring", "star", "dot")[: 1 + i % 3]]
        (folder / f"{i}.txt").write_text("\n".join(captions))
    return folder


# --- Whole runs


def supervised(folder: Path, name: str, model: Path, images: Path, *more: str) -> list[str]:
    """Return settings of a run of two epochs over six pictures."""
    return command(
        folder,
        name,
        "objective=supervised",
        "reward=none",
        "model.trainable=full",
        f"data.images.path={images}",
        "objective.caption_dropout=0.3",
        *("sampler.height=32", "sampler.width=32", "sampler.num_inference_steps=2"),
        *("training.max_steps=4", "training.global_batch_size=3", "training.micro_batch_size=3"),
        *("validation.num_images=1", "validation.loss_images=2", "validation.every_steps=4"),
        *("optimizer.lr=1e-4", "optimizer.warmup_steps=0", "optimizer.eps=1e-4"),
        "training.ema_decay=null",
        *more,
        model=model,
    )


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


def without(overrides: list[str], *keys: str) -> list[str]:
    return [text for text in overrides if text.partition("=")[0] not in keys]


def trained(overrides: list[str]) -> None:
    start(without(overrides, "objective.kl_coeff", "sampler.guidance_scale"))


@pytest.mark.parametrize(
    "family", nightly_but(["stable_diffusion_xl", "flux", "qwen_image"], WRITERS)
)
def test_the_losses_are_those_of_pictures(tmp_path: Path, family: str) -> None:
    """Over two epochs, with mirrors and dropped captions; float16 keeps 11 bits of a moment."""
    model, images = tmp_path / family, write_pictures(tmp_path / "images")
    WRITERS[family](model)
    for name in ("off", "auto"):
        flags = [f"data.images.cache={name}", "data.images.flip=true"]
        trained(supervised(tmp_path, name, model, images, *flags))
    found, expected = losses(tmp_path / "auto"), losses(tmp_path / "off")
    assert len(expected) == 4 and found != expected
    assert found == pytest.approx(expected, rel=0, abs=1e-4)
    # What validation shows is not encoded beforehand.
    first = [metrics(tmp_path / name)[0]["validation/loss"] for name in ("auto", "off")]
    assert first[0] == first[1]
    starts = [
        json.loads((tmp_path / n / "run.json").read_text())["starts"] for n in ("off", "auto")
    ]
    assert [[each["image_cache"] for each in run] for run in starts] == [[False], [True]]


def test_no_step_decodes_a_picture_or_runs_an_encoder(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the first epoch nor later: each picture is encoded once, before the first step."""
    images = write_pictures(tmp_path / "images")
    calls: Counter[str] = Counter()
    inside = [False]

    def counted(holder: Any, name: str, key: str) -> None:
        place = next(each for each in inspect.getmro(holder) if name in vars(each))
        call = vars(place)[name]

        def wrapped(*args: Any, **settings: Any) -> Any:
            calls[f"{key}, in a step" if inside[0] else key] += 1
            return call(*args, **settings)

        monkeypatch.setattr(place, name, wrapped)

    loss = Supervised.loss

    def step(*args: Any) -> Any:
        inside[0] = True
        found = loss(*args)
        inside[0] = False
        return found

    monkeypatch.setattr(Supervised, "loss", step)
    read = sampling.read_rgb

    def decode(*args: Any) -> Any:
        calls["decoded for the stream"] += 1
        return read(*args)

    monkeypatch.setattr(sampling, "read_rgb", decode)
    counted(StableDiffusion, "encode_moments", "pictures")
    counted(StableDiffusion, "encode_prompts", "prompts")
    off = ["validation.loss_images=0", "validation.every_steps=0"]
    for cache in ("auto", "off"):
        calls.clear()
        held = supervised(tmp_path, cache, sd_folder, images, f"data.images.cache={cache}", *off)
        trained(without(held, "validation.num_images"))
        in_steps = {key: n for key, n in calls.items() if key.endswith("in a step")}
        if cache == "auto":
            assert in_steps == {} and calls["decoded for the stream"] == 6  # validation's prompts
        else:
            assert in_steps == {"pictures, in a step": 4, "prompts, in a step": 4}
            assert calls["decoded for the stream"] > 12


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    """Return a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("uncut")
    images = write_pictures(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SHARD", SHARD)
        trained(supervised(folder, "whole", sd_folder, images, *RESUMED))
    return folder / "whole"


def cache_bytes(run: Path) -> dict[str, bytes]:
    files = sorted(path for path in (run / "cache").rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("function", "number"),
    [("begin_cache", 2), ("write_shard", 3), ("save_tensors", 4), ("_sync", 9), ("take_step", 4)],
)
def test_killed_and_called_again_it_ends_bitwise_the_same(
    tmp_path: Path, sd_folder: Path, uncut: Path, function: str, number: int
) -> None:
    again = supervised(tmp_path, "run", sd_folder, uncut.parent / "images", *RESUMED)

    def die() -> None:
        on_call(number, kill, function)
        trained(again)

    assert in_child(die) == KILLED
    assert in_child(lambda: trained(again)) == 0
    assert_same_state(tmp_path / "run", uncut)
    assert cache_bytes(tmp_path / "run") == cache_bytes(uncut)


@pytest.mark.parametrize("strategy", nightly_but(["ddp"], ["ddp", "fsdp"]))
def test_two_processes_equal_one(tmp_path: Path, sd_folder: Path, strategy: str) -> None:
    """Each encodes shards of its own, all read all; one goes on from what two have made."""
    images = write_pictures(tmp_path / "images")
    flags = ["data.images.cache=auto", "data.images.flip=true", f"training.strategy={strategy}"]
    flags += ["training.global_batch_size=4", "training.micro_batch_size=2"]
    whole, run = (supervised(tmp_path, n, sd_folder, images, *flags) for n in ("whole", "run"))
    trained(whole)
    in_processes(
        2, lambda _: trained([*without(run, "training.max_steps"), "training.max_steps=2"])
    )
    assert cache_bytes(tmp_path / "run") == cache_bytes(tmp_path / "whole")
    assert len(list((tmp_path / "run" / "cache").rglob("00000?.safetensors"))) == 4
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole")[:2], rel=1e-5)
    trained(run)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_reward_with_data_reads_the_cache_too(tmp_path: Path, sd_folder: Path) -> None:
    images = write_pictures(tmp_path / "images")
    for name in ("off", "auto"):
        small = [
            f"data.images.cache={name}",
            "objective.data_coeff=1",
            f"data.images.path={images}",
        ]
        small += ["sampler.height=32", "sampler.width=32", "training.max_steps=2"]
        small += ["validation.num_images=1", "validation.every_steps=0"]
        start(command(tmp_path, name, "objective=draft", *small, model=sd_folder))
    found, expected = losses(tmp_path / "auto"), losses(tmp_path / "off")
    assert found != expected and found == pytest.approx(expected, abs=1e-3)
    assert (tmp_path / "auto" / "cache").is_dir() and not (tmp_path / "off" / "cache").exists()


# --- What is read


def opened(
    images: Path, **settings: Any
) -> tuple[OrderedStream[Any, Sample], Pictures, ImageDataConfig]:
    config = config_of(images, **settings)
    stream, found = open_pictures(config, height=32, width=32, divisor=8, seed=3)
    return stream, found, config


def encode(
    found: Pictures, model: Path, run: Path, change: Callable[[ModelConfig], object] = id
) -> str | None:
    config = ModelConfig(pretrained=str(model))
    change(config)
    distribution = Distribution(TrainingConfig())
    try:
        return cache_pictures(found, config, run, 0, distribution)
    finally:
        distribution.close()


CHOICES: list[dict[str, Any]] = [
    {},
    {"flip": True},
    {"buckets": True, "flip": True},
    {"caption_lines": "random", "buckets": True},
    {"caption_lines": "all", "min_size": 24},
]


@pytest.mark.parametrize("choices", CHOICES)
@torch.no_grad()
def test_rows_are_the_encodings_of_the_same_rows(
    tmp_path: Path, pictures: Path, sd_folder: Path, choices: dict[str, Any]
) -> None:
    """Order, captions, mirrors, crops and sizes stay; moments are those of the pixels."""
    (plain, _, _), (cached, found, _) = opened(pictures, **choices), opened(pictures, **choices)
    assert encode(found, sd_folder, tmp_path / "run") is None
    model = load_tiny_sd(sd_folder)
    assert isinstance(plain.order, PoolOrder)
    seen: set[tuple[str, bytes]] = set()
    for _ in range(2 * plain.order.samples):
        (left,), (right,) = cached.next(1, 0, 1), plain.next(1, 0, 1)
        assert left.encoded is not None and left.image is None
        facts = [(s.caption, s.original, s.crop, s.name, s.size) for s in (left, right)]
        assert facts[0] == facts[1]
        moments = left.encoded.moments.float()[None]
        assert (moments - model.encode_moments(right.pixels[None])).abs().max() < 4e-3
        other = model.encode_moments(right.pixels.flip(-1)[None])
        assert (moments - other).abs().max() > 0.02, "a mirrored picture has other moments"
        seen.add((right.name, right.pixels.numpy().tobytes()))
        for states, text in ((left.encoded.text, left.caption), (left.encoded.empty, "")):
            expected = model.encode_prompts([text]).tensors
            for name in expected:
                assert torch.allclose(states[name].float(), expected[name].float(), atol=4e-3)
    assert (len(seen) > plain.order.samples) == choices.get("flip", False)
    assert cached.state() == plain.state()


def test_the_format_is_that_of_prepare(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    from sfumato.preparation.encoder_hash import cache_identity

    _, found, _ = opened(pictures)
    encode(found, sd_folder, tmp_path)
    config = ModelConfig(pretrained=str(sd_folder))
    identity = cache_identity(config, height=32, width=32, flip=False, dtype="float16")
    folders = {path.name for path in (tmp_path / "cache").iterdir()}
    assert folders == {identity.moments_folder, identity.text_folder}


@pytest.mark.parametrize("workers", [0, 3])
def test_unreadable_pictures_are_replaced_as_without_a_cache(
    tmp_path: Path, pictures: Path, sd_folder: Path, workers: int
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for file in pictures.iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    for name in ("1.png", "6.png"):  # whose headers are good
        os.truncate(images / name, (images / name).stat().st_size // 2)
    (plain, _, _), (cached, found, _) = opened(images), opened(images, workers=workers)
    assert encode(found, sd_folder, tmp_path / "run") is None
    assert found.cache is not None and len(found.cache) == len(SIZES) - 2
    for _ in range(8):
        rows = cached.next(3, 0, 3), plain.next(3, 0, 3)
        assert [str(row) for row in rows[0]] == [str(row) for row in rows[1]]
        assert all(row.encoded is not None for row in rows[0])
    assert skip_counts(cached) == skip_counts(plain) != {}
    (images / "1.png").write_bytes((pictures / "1.png").read_bytes())  # while training reads
    assert all(row.encoded is not None for row in cached.next(9, 0, 9))


def test_where_most_cannot_be_read_it_is_off(
    tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    """Their replacements come in sizes that no cache holds."""
    images = tmp_path / "images"
    images.mkdir()
    for file in pictures.iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    os.truncate(images / "2.png", (images / "2.png").stat().st_size // 2)
    os.truncate(images / "8.png", (images / "8.png").stat().st_size // 2)
    stream, found, _ = opened(images, buckets=True)
    why = encode(found, sd_folder, tmp_path / "run")
    assert why is not None and "pixels cannot be read" in why
    assert found.cache is None and all(row.image is not None for row in stream.next(3, 0, 3))


# --- What is refused, and what is made again


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flip": True}, r"flip \(False in the cache, True in the run\)"),
        ({"height": 40}, r"height \(32 in the cache, 40 in the run\)"),
        ({"seed": 1}, r"autoencoder \(\w{64} in the cache, \w{64} in the run\)"),
    ],
)
def test_another_cache_is_refused_by_name(
    tmp_path: Path, pictures: Path, sd_folder: Path, settings: dict[str, Any], said: str
) -> None:
    """Of other weights, another size, without mirrors: it is neither read nor replaced."""
    _, found, config = opened(pictures)
    encode(found, sd_folder, tmp_path)
    before, model = cache_bytes(tmp_path), sd_folder
    if "seed" in settings:
        write_tiny_sd(model := tmp_path / "other", seed=settings["seed"])
    config.flip = settings.get("flip", False)
    size = settings.get("height", 32)
    _, found = open_pictures(config, height=size, width=32, divisor=8, seed=3)
    with pytest.raises(PreparedError, match=said) as error:
        encode(found, model, tmp_path)
    assert "Remove that folder, or choose another name" in str(error.value)
    assert str(tmp_path / "cache") in str(error.value)
    assert cache_bytes(tmp_path) == before


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "float32"), ("resize", "bicubic"), ("format", 2)]
)
def test_a_changed_manifest_is_refused(
    tmp_path: Path, pictures: Path, sd_folder: Path, field: str, value: Any
) -> None:
    _, found, _ = opened(pictures)
    encode(found, sd_folder, tmp_path)
    (manifest,) = (tmp_path / "cache").glob("moments-*/manifest.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, field: value}))
    with pytest.raises(PreparedError, match=f"{field}|format") as error:
        encode(found, sd_folder, tmp_path)
    assert str(manifest.parent) in str(error.value)


@pytest.mark.parametrize("name", ["000001", "empty"])
@pytest.mark.parametrize("damage", [0.0, 0.5, 1.0, None])
@pytest.mark.parametrize("kind", ["moments", "text"])
def test_a_damaged_shard_is_refused_and_made_again_once_removed(
    tmp_path: Path, pictures: Path, sd_folder: Path, kind: str, damage: float | None, name: str
) -> None:
    if (kind, name) == ("moments", "empty"):
        return  # only states have an empty prompt
    stream, found, _ = opened(pictures, workers=2)
    encode(found, sd_folder, tmp_path)
    before = cache_bytes(tmp_path)
    (file,) = (tmp_path / "cache").glob(f"{kind}-*/{name}.safetensors")
    if damage is None:
        os.truncate(file, file.stat().st_size - 5)
    else:
        damaged(damage)(file)
    stream, found, _ = opened(pictures, workers=2)
    with pytest.raises(PreparedError) as error:
        encode(found, sd_folder, tmp_path)
        for _ in range(3):
            stream.next(9, 0, 9)
    for said in (
        str(file),
        "is damaged or was changed",
        "remove it and run the same sfumato train",
    ):
        assert said in str(error.value)
    file.unlink()
    stream, found, _ = opened(pictures)
    encode(found, sd_folder, tmp_path)
    assert len(stream.next(9, 0, 9)) == 9
    assert cache_bytes(tmp_path) == before


def test_a_damaged_record_is_refused(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    _, found, _ = opened(pictures)
    encode(found, sd_folder, tmp_path)
    (record,) = (tmp_path / "cache").glob("moments-*/000000.json")
    record.write_text(record.read_text()[:-9])
    with pytest.raises(PreparedError, match=r"000000\.json .*run the same sfumato train again"):
        encode(found, sd_folder, tmp_path)


@pytest.mark.parametrize("change", ["picture", "caption", "more"])
def test_what_changed_is_encoded_again_and_nothing_else(
    tmp_path: Path, sd_folder: Path, change: str
) -> None:
    images = write_pictures(tmp_path / "images", count=8)
    _, found, _ = opened(images)
    encode(found, sd_folder, tmp_path)
    before = cache_bytes(tmp_path)
    if change == "picture":
        (images / "5.png").write_bytes((images / "0.png").read_bytes())
    elif change == "caption":
        (images / "5.txt").write_text("another one")
    else:
        (images / "9.png").write_bytes((images / "0.png").read_bytes())
        (images / "9.txt").write_text("one more")
    encode(opened(images)[1], sd_folder, tmp_path)
    after = cache_bytes(tmp_path)
    changed = {Path(name).stem for name in after if after[name] != before.get(name)}
    assert changed == ({"000002"} if change == "more" else {"000001"})
    kinds = {name.split("/")[1].split("-")[0] for name in after if after[name] != before.get(name)}
    assert kinds == {"picture": {"moments"}, "caption": {"text"}}.get(change, {"moments", "text"})
    fresh = tmp_path / "fresh"
    encode(opened(images)[1], sd_folder, fresh)
    assert cache_bytes(fresh) == after


def test_a_full_disk_is_said(
    tmp_path: Path, pictures: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    save = precache.save_file

    def fail(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if "000001" in file.name:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, file)

    _, found, _ = opened(pictures)
    with monkeypatch.context() as patched:
        patched.setattr(precache, "save_file", fail)
        with pytest.raises(
            PreparedError, match=r"000001\.safetensors .*no space is left.*Free some"
        ):
            encode(found, sd_folder, tmp_path)
    assert found.cache is None
    encode(found, sd_folder, tmp_path)
    assert found.cache is not None


def test_values_beyond_float16_say_which_setting_to_change(
    tmp_path: Path, pictures: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = PipelineModel.encode_moments
    monkeypatch.setattr(PipelineModel, "encode_moments", lambda *a: encoding(*a) + 1e6)
    with pytest.raises(
        ValueError, match=r"0\.png.* float16 cannot hold; set data\.images\.cache=off"
    ):
        encode(opened(pictures)[1], sd_folder, tmp_path)


def test_others_files_are_not_touched(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    _, found, _ = opened(pictures)
    encode(found, sd_folder, tmp_path)
    (manifest,) = (tmp_path / "cache").glob("text-*/manifest.json")
    manifest.unlink()
    before = cache_bytes(tmp_path)
    with pytest.raises(PreparedError, match=r"text-.* holds .*, which Sfumato did not write"):
        encode(found, sd_folder, tmp_path)
    assert cache_bytes(tmp_path) == before


# --- What a cache cannot hold


RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*_sft_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_goes_with_a_cache_and_none_sets_it(recipe: str) -> None:
    """A default of a recipe would change the losses of runs that began without."""
    given = [f"recipe={recipe}", "model.pretrained=M", "data.images.path=I"]
    assert compose_train(given)[0].data.images.cache == "off"
    given += ["data.images.cache=auto"]
    if recipe.startswith("sdxl"):
        with pytest.raises(ValueError, match=r"cache=auto has no effect with .+crop=random"):
            compose_train(given)
        given += ["data.images.crop=center"]
    assert why_uncached(compose_train(given)[0]) is None


def test_settings_that_a_cache_cannot_hold_are_refused_where_both_are_typed() -> None:
    base = ["objective=supervised", "model.pretrained=x", "reward=none", "data.images.path=y"]
    for cache, crop, fine in (
        ("auto", "random", False),
        ("off", "random", True),
        ("auto", "center", True),
    ):
        typed = [*base, f"data.images.cache={cache}", f"data.images.crop={crop}"]
        if fine:
            compose_train(typed)
            continue
        with pytest.raises(
            ValueError, match=r"data\.images\.cache=auto has no effect .*crop=random"
        ):
            compose_train(typed)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("crop", "random", "off, as data.images.crop=random cuts each picture anew"),
        ("parts", ["network", "text_encoder"], "off, as model.parts=['network', 'text_encoder']"),
        ("none", None, "6 pictures, encoded in"),
    ],
)
def test_what_switches_it_off_is_said(
    tmp_path: Path,
    sd_folder: Path,
    capfd: pytest.CaptureFixture[str],
    key: str,
    value: Any,
    said: str,
) -> None:
    """As a recipe may have both; the run then reads pictures."""
    from sfumato.run import run

    images = write_pictures(tmp_path / "images")
    made = supervised(tmp_path, "run", sd_folder, images, "data.images.cache=auto")
    config, plain = compose_train(
        [*without(made, "objective.kl_coeff", "sampler.guidance_scale", "training.max_steps"),
         "training.max_steps=1"]
    )  # fmt: skip
    if key == "crop":
        config.data.images.crop = value
    elif key == "parts":
        config.model = replace(config.model, parts=value)
    assert is_cached(config) == (key == "none")
    distribution = Distribution(config.training)
    try:
        run.train(config, plain, distribution)
    finally:
        distribution.close()
    assert f"data.images.cache=auto: {said}" in capfd.readouterr().out
    assert (tmp_path / "run" / "cache").exists() == (key == "none")


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("text_encoder.layers.0.q_proj.lora_A.weight", "changes a text encoder"),
        ("lora_te1_layers_0_q_proj.lora_down.weight", "changes a text encoder"),
        ("unet.down_blocks.0.attn.to_q.lora_A.weight", None),
    ],
)
def test_a_merged_lora_of_a_text_encoder_switches_it_off(
    tmp_path: Path, layer: str, said: str | None
) -> None:
    save_file({layer: torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    images = ImageDataConfig(path="pictures", cache="auto")
    config = TrainConfig(objective=SupervisedConfig(), data=DataConfig(images=images))
    config.model.merge = {"mine": MergeConfig(str(tmp_path / "lora.safetensors"))}
    why = why_uncached(config)
    assert why is None if said is None else said in str(why)
    assert is_cached(config) == (said is None)


def test_a_run_that_began_without_goes_on_without(tmp_path: Path, sd_folder: Path) -> None:
    images = write_pictures(tmp_path / "images")
    trained(supervised(tmp_path, "run", sd_folder, images))
    with pytest.raises(ValueError, match=r"data\.images\.cache: .*choose another name"):
        trained(supervised(tmp_path, "run", sd_folder, images, "data.images.cache=auto"))


def test_held_out_pictures_have_no_cache() -> None:
    typed = ["objective=supervised", "model.pretrained=x", "reward=none", "data.images.path=y"]
    typed += ["validation.images.path=z", "validation.images.cache=auto"]
    with pytest.raises(ValueError, match=r"validation\.images\.cache=auto has no effect"):
        compose_train(typed)
