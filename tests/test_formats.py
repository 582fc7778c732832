"""What is read: folders and cache found, damage named before weights load, no pickle unasked."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny_sd import write_tiny_sd

from sfumato.config import ModelConfig, SamplerConfig
from sfumato.models.formats import VARIANT, copy_frozen, find_model, read_model_index
from sfumato.models.registry import find_family, load_model
from sfumato.models.stable_diffusion import StableDiffusion

VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def sd_copy(sd_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sd_folder, tmp_path / "copy")


def load(folder: Path | str, **changes: bool) -> StableDiffusion:
    model = load_model(ModelConfig(str(folder), **changes))
    assert isinstance(model, StableDiffusion)
    return model


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# --- Wrong folders


def remove(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def name_family(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "model_index.json", lambda content: content.update(_class_name=name)
    )


def single_file(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    (folder / "v1-5-pruned.ckpt").touch()


def pickle_only(folder: Path) -> None:
    (folder / VAE).rename(folder / "vae" / "diffusion_pytorch_model.bin")


DAMAGES = [
    (remove("."), "no such folder; give a diffusers folder, or a hub id such as"),
    (remove("model_index.json"), "has no model_index.json; give the top folder"),
    (single_file, r"no model_index.json \(single files such as v1-5-pruned.ckpt are not read\)"),
    (write("model_index.json", "{"), "model_index.json is damaged: .*; download the model again"),
    (write("model_index.json", "[]"), "names no pipeline class"),
    (write("model_index.json", "{}"), "names no pipeline class"),
    (
        name_family("KandinskyPipeline"),
        "is a KandinskyPipeline; Sfumato knows StableDiffusionPipeline",
    ),
    (remove("vae"), "lacks vae/config.json; the folder is incomplete"),
    (remove("unet/config.json"), "lacks unet/config.json"),
    (remove("tokenizer"), "lacks tokenizer/tokenizer_config.json"),
    (remove("tokenizer/vocab.json"), r"tokenizer has no tokenizer.json or vocab.json with merges"),
    (write("tokenizer/vocab.json", "{"), r"vocab.json is damaged: .*; download the model again"),
    (write("unet/config.json", "{"), r"unet/config.json is damaged: .*; download the model again"),
    (remove("scheduler"), "lacks scheduler/scheduler_config.json"),
    (remove("text_encoder/model.safetensors"), "text_encoder holds no weights; download or export"),
    (write("vae/config.json", "[]"), "vae/config.json holds no settings; download the model again"),
    (pickle_only, "only pickled weights .* can run code; .* set model.allow_pickle=true"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_wrong_folder_is_named_before_a_weight_is_loaded(
    sd_copy: Path, damage: Callable[[Path], object], message: str
):
    damage(sd_copy)
    with pytest.raises(ValueError, match=message):
        find_family(ModelConfig(str(sd_copy)))


def shorten(folder: Path) -> None:
    data = (folder / VAE).read_bytes()
    (folder / VAE).write_bytes(data[: len(data) // 2])


def change_shape(folder: Path) -> None:
    tensors = load_file(folder / VAE)
    tensors["decoder.conv_out.bias"] = torch.zeros(5)
    save_file(tensors, folder / VAE, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [shorten, change_shape, write("text_encoder/config.json", "{}")])
def test_unreadable_component_is_an_error_of_one_line(
    sd_copy: Path, damage: Callable[[Path], object]
):
    damage(sd_copy)
    expected = r"(vae|text_encoder) of model\.pretrained: .+ (could not be read|does not fit)"
    with pytest.raises(ValueError, match=expected) as caught:
        load(sd_copy)
    assert str(sd_copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["v1-5.ckpt", "v1-5.safetensors"])
def test_a_single_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="is a file; give a diffusers folder"):
        find_model(str(tmp_path / name))


# --- Hub ids


def test_hub_id_is_found_in_the_local_cache(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = "0" * 40
    cached = tmp_path / "models--someone--tiny-sd"
    shutil.copytree(sd_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_model("someone/tiny-sd") == cached / "snapshots" / commit
    assert load("someone/tiny-sd").image_size() == (32, 32)
    with pytest.raises(ValueError, match=r"model.pretrained = 'someone/other' is no folder"):
        find_model("someone/other")


@pytest.mark.parametrize("name", ["no-such-folder", "./a/b", "/no/such/folder", "~/x", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id(name: str):
    with pytest.raises(ValueError, match="no such folder; give a diffusers folder, or a hub"):
        find_model(name)


def test_a_folder_here_comes_before_the_hub(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(sd_folder, tmp_path / "someone" / "model")
    monkeypatch.chdir(tmp_path)
    assert find_model("someone/model") == Path("someone/model")


# --- Pickle


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_pickles_beside_safetensors_are_never_opened(sd_copy: Path, tmp_path: Path):
    mark = tmp_path / "opened"
    for part in ("unet", "vae"):
        (sd_copy / part / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    (sd_copy / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    load(sd_copy)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb works


def test_pickled_weights_load_where_they_are_allowed(sd_folder: Path, sd_copy: Path):
    for part, name in (
        ("vae", "diffusion_pytorch_model"),
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = sd_copy / part / f"{name}.safetensors"
        pickled = "pytorch_model" if part == "text_encoder" else name
        torch.save(load_file(file), sd_copy / part / f"{pickled}.bin")
        file.unlink()
    with pytest.raises(ValueError, match=r"model\.allow_pickle=true"):
        load(sd_copy)
    found, expected = load(sd_copy, allow_pickle=True), load(sd_folder)
    for part in ("vae", "text_encoder"):
        states = [vars(m.pipeline)[part].state_dict() for m in (found, expected)]
        torch.testing.assert_close(*states, atol=0, rtol=0)
    base = [
        {n: p for n, p in m.network.state_dict().items() if "lora_" not in n}
        for m in (found, expected)
    ]
    torch.testing.assert_close(*base, atol=0, rtol=0)


# --- Variants and copies


def test_variant_names_the_files(sd_copy: Path):
    for name in (VAE, "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        file = sd_copy / name
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    model = load_model(ModelConfig(str(sd_copy), variant="fp16"))
    assert model.image_size() == (32, 32)
    with pytest.raises(ValueError, match=r"the variants fp16.+set model\.variant=fp16"):
        load(sd_copy)
    with pytest.raises(ValueError, match=r"model\.variant = bf16; set model\.variant=fp16"):
        load_model(ModelConfig(str(sd_copy), variant="bf16"))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model-00001-of-00002.safetensors", None),
        ("model.safetensors.index.json", None),
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
        ("model.safetensors.index.fp16.json", "fp16"),
    ],
)
def test_a_variant_is_read_from_a_files_name(name: str, variant: str | None):
    match = VARIANT.fullmatch(name)
    assert (match and match[1]) == variant


def test_frozen_parts_are_copied_byte_for_byte(sd_copy: Path, tmp_path: Path):
    checker = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    edit_json(sd_copy / "model_index.json", lambda content: content.update(checker))
    target = tmp_path / "target"
    target.mkdir()
    copy_frozen(sd_copy, target, ["vae", "text_encoder"])
    names = {p.relative_to(target) for p in target.rglob("*") if p.is_file()}
    index = Path("model_index.json")
    assert names == {
        index,
        *(
            p.relative_to(sd_copy)
            for part in ("vae", "text_encoder")
            for p in (sd_copy / part).iterdir()
        ),
    }
    assert all((target / n).read_bytes() == (sd_copy / n).read_bytes() for n in names - {index})
    written = read_model_index(target)
    assert written["safety_checker"] == written["feature_extractor"] == [None, None]
    assert written["_class_name"] == "StableDiffusionPipeline"


def test_tiny_pipelines_are_the_same_at_every_call(sd_folder: Path, tmp_path: Path):
    write_tiny_sd(tmp_path / "again")
    for file in sd_folder.rglob("*.safetensors"):
        again = load_file(tmp_path / "again" / file.relative_to(sd_folder))
        torch.testing.assert_close(load_file(file), again, atol=0, rtol=0)


@pytest.mark.parametrize(("stated", "size"), [(8, (32, 32)), ([8, 16], (32, 64))])
def test_the_size_of_images_is_the_one_stated(sd_copy: Path, stated: Any, size: tuple[int, int]):
    restate(sd_copy / "unet" / "config.json", sample_size=stated)
    assert load(str(sd_copy)).image_size() == size


def test_a_model_that_states_no_size_is_asked_for_one(sd_copy: Path):
    restate(sd_copy / "unet" / "config.json", sample_size=None)
    settings = ModelConfig(str(sd_copy))
    with pytest.raises(ValueError, match=r"states no size of its images; set sampler.height"):
        find_family(settings, SamplerConfig())
    find_family(settings, SamplerConfig(height=32, width=32))


def restate(file: Path, **changes: Any) -> None:
    """Change settings in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (None, {"unet/diffusion_pytorch_model.safetensors", "vae/config.json", "a/spiece.model"}),
        (
            "fp16",
            {
                "unet/diffusion_pytorch_model.safetensors",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "t/model.fp16-00001-of-00002.safetensors",
                "vae/config.json",
                "a/spiece.model",
            },
        ),
    ],
)
def test_what_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variant: str | None, expected: set[str]
):
    files = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "t/model.fp16-00001-of-00002.safetensors",
        "safety_checker/model.safetensors",
        "vae/config.json",
        "a/spiece.model",
        "flux1-dev.safetensors",
    ]
    asked: list[dict[str, Any]] = []

    def download(_: str, *, repo_type: str, local_files_only: bool = False, **patterns: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("nothing here")
        assert repo_type == "model"
        asked.append(patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_model("someone/model", variant=variant)
    assert set(filter_repo_objects(files, **asked[0])) == expected


def test_a_variant_beside_sharded_weights_is_exported_whole(tmp_path: Path):
    """As in SD3's third encoder: two shards of each precision, each with an index of its own."""
    source, part = tmp_path / "source", tmp_path / "source" / "text_encoder"
    part.mkdir(parents=True)
    (source / "model_index.json").write_text('{"_class_name": "X"}')
    for mark, end in (("", ""), (".fp16", ".fp16")):
        shards = [f"model{mark}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for shard in shards:
            (part / shard).write_text(mark)
        index = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
        (part / f"model.safetensors.index{end}.json").write_text(json.dumps(index))
    (part / "config.json").write_text("{}")
    copy_frozen(source, tmp_path / "out", ["text_encoder"], variant="fp16")
    out = tmp_path / "out" / "text_encoder"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *index["weight_map"].values(),
    }
    assert {(out / name).read_text() for name in index["weight_map"].values()} == {".fp16"}
