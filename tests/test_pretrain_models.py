"""Models put together of parts around a network that begins at random, and stages of them."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from runs import fork, in_child
from safetensors.torch import load_file, save_file
from split import write_split
from tiny_clip import write_tiny_clip
from tiny_open_clip import (
    CONFIG,
    WEIGHTS,
    OpenClipText,
    OpenClipVision,
    shard,
    write_tiny_open_clip,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sfumato.config import ModelConfig, NetworkConfig, SamplerConfig, TrainConfig
from sfumato.models.generate import generate
from sfumato.models.origins import conversion
from sfumato.models.origins.network_weights import check_start, find_source, without_start
from sfumato.models.origins.unets import build_network, unet_settings
from sfumato.models.registry import find_family, load_encoders, load_model
from sfumato.models.stable_diffusion import StableDiffusion
from sfumato.run.export import ExportError, export
from sfumato.training.checkpoint import Snapshot, write_checkpoint

PROMPT, CPU = "a red star", torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_tiny_clip(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """Return the settings of a tiny U-Net for the states of the tiny CLIP."""
    return write_unet(tmp_path / "unet.json", 32)


def write_unet(file: Path, text_size: int) -> Path:
    narrow = {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": text_size,
        "norm_num_groups": 8,
        "sample_size": 8,
    }
    file.write_text(json.dumps({**unet_settings("sd1"), **narrow}))
    return file


def of_parts(unet: Path, sd: Path, clip: Path, **more: Any) -> ModelConfig:
    start = NetworkConfig(config=str(unet), from_pretrained=more.pop("start", None))
    parts: dict[str, Any] = {"autoencoder": str(sd), "text_encoder": str(clip)}
    return ModelConfig(pretrained=None, network=start, trainable="full", **{**parts, **more})


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.trainable().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- A network at random


def test_a_network_at_random_follows_the_seed_alone(
    unet: Path, sd_folder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = of_parts(unet, sd_folder, clip)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(weights(load_model(config)))
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "another"))  # the folder is made anew
    torch.manual_seed(1)
    assert same(weights(load_model(config)), drawn[0])
    assert {tensor.dtype for tensor in drawn[0].values()} == {torch.float32}


def test_a_network_at_random_begins_as_ldms_does(unet: Path):
    torch.manual_seed(0)
    network: Any = build_network(unet_settings(str(unet)))
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    assert network(x, 5, states).sample.abs().max() == 0
    last = [n for n, _ in network.named_modules() if n.endswith((".conv2", ".proj_out"))]
    assert len(last) == 8 + 4  # of residual blocks, of transformers
    drawn = {n for n, p in network.named_parameters() if p.ndim > 1 and not p.any()}
    assert drawn == {f"{name}.weight" for name in [*last, "conv_out"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sd3", r"model.network.config = 'sd3': no such file; choose one of sd1, sd2, or give"),
        ("vae", r"describes AutoencoderKL; give the config.json of a UNet2DConditionModel"),
    ],
)
def test_settings_of_no_network_are_named(sd_folder: Path, text: str, expected: str):
    config = str(sd_folder / "vae") if text == "vae" else text
    with pytest.raises(ValueError, match=expected):
        unet_settings(config)


# --- A folder of parts


def test_parts_make_a_folder_that_is_found_again(
    unet: Path, sd_folder: Path, clip: Path, cache: Path
):
    config = of_parts(unet, sd_folder, clip, prediction_type="v_prediction", image_size=64)
    family, folder = find_family(config, SamplerConfig(num_inference_steps=4))
    assert family is StableDiffusion
    assert folder.parent == cache
    assert find_family(config)[1] == folder
    assert list(cache.iterdir()) == [folder]
    assert not list((folder / "unet").glob("*.safetensors"))
    assert StableDiffusion.read_limits(folder).size == (64, 64)
    steps = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert steps["prediction_type"] == "v_prediction"
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert vae.samefile(sd_folder / "vae" / vae.name)
    # Another setting, or another file of a part, is another folder.
    assert find_family(of_parts(unet, sd_folder, clip))[1] != folder
    (clip / "vocab.json").write_text((clip / "vocab.json").read_text() + "\n")
    assert find_family(config)[1] != folder


def test_the_noise_follows_the_schedule_of_stable_diffusion(
    unet: Path, sd_folder: Path, clip: Path
):
    from tiny_sd import load_tiny_sd

    ours, theirs = load_model(of_parts(unet, sd_folder, clip)), load_tiny_sd(sd_folder)
    assert ours.times(4, 32, 32) == theirs.times(4, 32, 32)
    t = torch.tensor([0.1, 0.5, 1.0])
    assert torch.equal(ours.process.alpha(t), theirs.process.alpha(t))


def test_a_whole_clip_gives_its_text_tower(unet: Path, sd_folder: Path, clip: Path):
    from transformers import CLIPModel

    encoders = load_encoders(of_parts(unet, sd_folder, clip))
    tokens = CLIPTokenizer.from_pretrained(clip)(
        PROMPT, padding="max_length", max_length=77, return_tensors="pt"
    )
    theirs: Any = CLIPModel.from_pretrained(clip)
    expected = theirs.text_model(tokens.input_ids).last_hidden_state
    found = encoders.encode_prompts([PROMPT]).tensors["states"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_pipelines_folder_gives_its_parts(unet: Path, sd_folder: Path):
    encoders = load_encoders(of_parts(unet, sd_folder, sd_folder))
    theirs: Any = CLIPTextModel.from_pretrained(sd_folder / "text_encoder")
    tokens = CLIPTokenizer.from_pretrained(sd_folder / "tokenizer")(
        PROMPT, padding="max_length", max_length=77, return_tensors="pt"
    )
    found = encoders.encode_prompts([PROMPT]).tensors["states"]
    expected = theirs(tokens.input_ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert encoders.trainable() == {}


def test_two_processes_may_make_the_folder_at_once(
    unet: Path, sd_folder: Path, clip: Path, cache: Path
):
    config = of_parts(unet, sd_folder, clip)
    child = fork(lambda: find_family(config))
    folder = find_family(config)[1]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(cache.iterdir()) == [folder]


def test_the_slower_process_takes_what_the_faster_made(
    unet: Path, sd_folder: Path, clip: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    config = of_parts(unet, sd_folder, clip)
    first = find_family(config)[1]
    moved = cache.with_name("moved")
    first.rename(moved)
    rename = Path.rename

    def slow(beside: Path, folder: Path) -> Path:
        shutil.copytree(moved, folder)
        return rename(beside, folder)

    monkeypatch.setattr(Path, "rename", slow)
    assert find_family(config)[1] == first
    assert list(cache.iterdir()) == [first]


def test_a_full_disk_leaves_no_folder(
    unet: Path, sd_folder: Path, clip: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    write = Path.write_text

    def full(file: Path, *arguments: Any, **named: Any) -> int:
        if file.name == "scheduler_config.json":
            raise OSError(28, "No space left on device")
        return write(file, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match=r"could not be written.*no space.*SFUMATO_CACHE"):
        find_family(of_parts(unet, sd_folder, clip))
    assert list(cache.iterdir()) == []


def test_a_killed_process_leaves_no_folder_behind_its_name(
    unet: Path, sd_folder: Path, clip: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    config = of_parts(unet, sd_folder, clip)

    def die() -> None:
        monkeypatch.setattr("sfumato.files._exchange", lambda *_, **__: os._exit(9))
        find_family(config)

    assert in_child(die) == 9
    assert all(path.name.startswith(".") for path in cache.iterdir())
    folder = find_family(config)[1]
    assert (folder / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"autoencoder": None}, "model.network.config = .*; give model.autoencoder too"),
        (
            {"autoencoder": None, "text_encoder": None},
            "give model.autoencoder and model.text_encoder too",
        ),
        ({"pretrained": "M"}, r"give one of the two: a diffusers folder or hub id, or sd1, sd2"),
        ({"image_size": 30}, "image_size = 30 must be a multiple of 4 pixels; the nearest is 32"),
        ({"autoencoder": "/none/here"}, "model.autoencoder = '/none/here': no such folder"),
    ],
)
def test_parts_that_are_not_given_are_named(
    unet: Path, sd_folder: Path, clip: Path, change: dict[str, Any], expected: str
):
    config = of_parts(unet, sd_folder, clip)
    for name, value in change.items():
        vars(config)[name] = value
    with pytest.raises(ValueError, match=expected):
        find_family(config)


def test_parts_that_do_not_fit_are_named(unet: Path, sd_folder: Path, clip: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"text_encoder = .* gives states of 32 numbers, and .*768"
    ):
        find_family(of_parts(Path("sd1"), sd_folder, clip))
    odd = {**json.loads(unet.read_text()), "in_channels": 9}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    with pytest.raises(ValueError, match=r"gives latents of 4 channels, and .* reads 9"):
        find_family(of_parts(tmp_path / "odd.json", sd_folder, clip))
    with pytest.raises(ValueError, match=r"autoencoder = .*clip.* is of no class; give an Autoenc"):
        find_family(of_parts(unet, clip, clip))
    with pytest.raises(ValueError, match=r"has no vocab.json with merges.txt"):
        find_family(of_parts(unet, sd_folder, clip, tokenizer=str(sd_folder / "vae")))


def test_a_network_at_random_must_be_trained_whole(unet: Path, sd_folder: Path, clip: Path):
    config = of_parts(unet, sd_folder, clip)
    config.trainable = "lora"
    with pytest.raises(ValueError, match=r"is for training the whole network, and model.trainable"):
        load_model(config)
    load_encoders(config)
    config.trainable, config.parts = "full", ["text_encoder"]
    with pytest.raises(ValueError, match=r"with model.parts = \['text_encoder'\] does not"):
        load_model(config)


# --- Parts in the files of the original code


def original_vae(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Return an AutoencoderKL's weights as LDM names them."""
    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
        (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (
            r"decoder\.up_blocks\.(\d)\.resnets",
            lambda match: f"decoder.up.{levels - 1 - int(match[1])}.block",
        ),
        (
            r"decoder\.up_blocks\.(\d)\.upsamplers\.0",
            lambda match: f"decoder.up.{levels - 1 - int(match[1])}.upsample",
        ),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    named = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        is_matrix = ".attn_1." in key and tensor.ndim == 2
        named[key] = tensor[:, :, None, None] if is_matrix else tensor
    return named


def padded(folder: Path, length: int, pad: int = 0) -> Tensor:
    """Return the prompt's tokens, filled up as OpenCLIP's tokenizer fills up."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    words = [
        vocabulary[symbol] for word in PROMPT.split() for symbol in (*word[:-1], f"{word[-1]}</w>")
    ]
    tokens = [vocabulary["<|startoftext|>"], *words, vocabulary["<|endoftext|>"]]
    return torch.tensor([[*tokens, *[pad] * (length - len(tokens))]])


def check_states(config: ModelConfig, expected: Tensor) -> None:
    found = load_encoders(config).encode_prompts([PROMPT]).tensors["states"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.fixture
def as_vit_h(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let ViT-H have other sizes: those of a small model."""

    def patch(text: dict[str, int], vision: dict[str, int]) -> None:
        monkeypatch.setattr(conversion, "VIT_H", {"text": text, "vision": vision})

    return patch


def test_an_open_clip_in_a_checkpoint_of_stable_diffusion_2_is_read_as_that_reads_it(
    sd_folder: Path, clip: Path, tmp_path: Path
):
    torch.manual_seed(0)
    theirs = OpenClipText(514, 128, 3).eval()
    state = {f"cond_stage_model.model.{key}": t for key, t in theirs.state_dict().items()}
    rest = {"visual.conv1.weight": torch.zeros(2), "logit_scale": torch.zeros(1)}
    save_file({**state, **rest}, clip / "sd2.safetensors")
    unet = write_unet(tmp_path / "wide.json", 128)
    check_states(
        of_parts(unet, sd_folder, clip / "sd2.safetensors"), theirs.states(padded(clip, 77), 1)
    )


@pytest.mark.parametrize("has_images", [True, False])
def test_a_file_of_the_sizes_of_vit_h_is_read_without_its_last_layer(
    sd_folder: Path, clip: Path, tmp_path: Path, as_vit_h: Callable[..., None], has_images: bool
):
    torch.manual_seed(0)
    theirs = OpenClipText(514, 128, 3).eval()
    images = OpenClipVision(48, 2, heads=3, size=32, patch=8, dim=24, quick=False)
    both = {f"visual.{key}": t for key, t in images.state_dict().items()} if has_images else {}
    save_file({**theirs.state_dict(), **both}, clip / "h.safetensors")
    config = of_parts(write_unet(tmp_path / "u.json", 128), sd_folder, clip / "h.safetensors")
    text = {"hidden_size": 128, "num_hidden_layers": 3}
    vision = {"hidden_size": 48, "num_hidden_layers": 2, "patch_size": 8}
    # ViT-g's text tower is as large as ViT-H's.
    others = [({**text, "num_hidden_layers": 9}, vision)]
    others += [(text, {**vision, "num_hidden_layers": 9})] if has_images else []
    for other in others:
        as_vit_h(*other)
        with pytest.raises(ValueError, match=r"does not say which OpenCLIP model it is"):
            find_family(config)
    as_vit_h(text, vision)
    check_states(config, theirs.states(padded(clip, 77), 1))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "sharded", "pickled"])
def test_an_open_clip_is_read_as_its_config_says(
    sd_folder: Path, tmp_path: Path, kind: str, quick: bool
):
    """All layers, its activation, its length, its padding: nothing of ViT-H's."""
    folder, pad = tmp_path / "open", 5
    theirs, _ = write_tiny_open_clip(folder, quick=quick)
    settings = json.loads((folder / CONFIG).read_text())
    settings["model_cfg"]["text_cfg"]["pad_id"] = pad
    (folder / CONFIG).write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"architecture": "vit_tiny"}')  # as timm's folders have it
    if kind == "sharded":
        shard(folder, WEIGHTS)
    if kind == "pickled":
        torch.save(load_file(folder / WEIGHTS), folder / "open_clip_pytorch_model.bin")
        (folder / WEIGHTS).unlink()
    path = folder / WEIGHTS if kind == "file" else folder
    config = of_parts(write_unet(tmp_path / "u.json", 64), sd_folder, path)
    if kind == "pickled":
        with pytest.raises(ValueError, match=r"open_clip_pytorch_model.bin is a pickle"):
            find_family(config)
        config = replace(config, allow_pickle=True)
    check_states(config, theirs.states(padded(folder, 40, pad)))


def test_an_open_clip_that_says_it_is_vit_h_is_read_without_its_last_layer(
    sd_folder: Path, tmp_path: Path, as_vit_h: Callable[..., None]
):
    theirs, _ = write_tiny_open_clip(tmp_path / "open")
    as_vit_h(
        {"hidden_size": 64, "num_hidden_layers": 3},
        {"hidden_size": 48, "num_hidden_layers": 2, "patch_size": 8},
    )
    config = of_parts(write_unet(tmp_path / "u.json", 64), sd_folder, tmp_path / "open")
    check_states(config, theirs.states(padded(tmp_path / "open", 40), 1))


def lose(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t for key, t in state.items() if key != "ln_final.bias"}


def widen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "positional_embedding": torch.zeros(41, 64)}


def add(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "transformer.resblocks.0.ls_1.gamma": torch.zeros(64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, r"1 weights are missing \(ln_final.bias\)"),
        (widen, r"positional_embedding: \(41, 64\) in the file, \(40, 64\) in the network"),
        (add, r"unexpected \(transformer.resblocks.0.ls_1.gamma\)"),
    ],
)
def test_an_open_clip_that_does_not_fit_its_config_is_named(
    sd_folder: Path, tmp_path: Path, change: Any, message: str
):
    folder = tmp_path / "open"
    write_tiny_open_clip(folder)
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        find_family(of_parts(write_unet(tmp_path / "u.json", 64), sd_folder, folder))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_folder_of_vit_h_is_read_as_stable_diffusion_2_reads_it(
    unet: Path, sd_folder: Path, clip: Path, as_vit_h: Callable[..., None], is_sharded: bool
):
    """transformers' own folder of ViT-H: the layer before the last, and zeros to fill up."""
    from transformers import CLIPModel

    theirs: Any = CLIPModel.from_pretrained(clip).eval()
    towers = theirs.config.text_config, theirs.config.vision_config
    sizes = [
        {key: vars(tower)[key] for key in ("hidden_size", "num_hidden_layers")} for tower in towers
    ]
    if is_sharded:
        shard(clip, "model.safetensors")
    as_vit_h(*sizes)
    tokens = padded(clip, 77)
    states = theirs.text_model(tokens, output_hidden_states=True).hidden_states
    check_states(of_parts(unet, sd_folder, clip), theirs.text_model.final_layer_norm(states[-2]))


def test_a_folder_with_the_text_tower_of_vit_h_and_other_images_is_no_vit_h(
    unet: Path, sd_folder: Path, clip: Path, as_vit_h: Callable[..., None]
):
    """ViT-g has the same text tower; all its layers are read, and its own padding."""
    from transformers import CLIPModel

    text: Any = CLIPModel.from_pretrained(clip).text_model.eval()
    sizes = {key: vars(text.config)[key] for key in ("hidden_size", "num_hidden_layers")}
    as_vit_h(sizes, {"hidden_size": 1280})
    tokens = padded(clip, 77, text.config.pad_token_id)
    check_states(of_parts(unet, sd_folder, clip), text(tokens).last_hidden_state)


def test_a_file_that_is_no_open_clip_is_named(unet: Path, sd_folder: Path, clip: Path):
    save_file({"visual.conv1.weight": torch.zeros(2)}, clip / "other.safetensors")
    with pytest.raises(ValueError, match=r"is no OpenCLIP model: it has no transformer.resblocks"):
        find_family(of_parts(unet, sd_folder, clip / "other.safetensors"))


# --- From stage to stage


def trained(config: ModelConfig, seed: int = 0) -> Any:
    """Return a model whose weights have moved off their zeros."""
    torch.manual_seed(seed)
    model = load_model(config)
    for parameter in model.trainable().values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def write_run(folder: Path, model: Any, ema: Any, *, step: int = 6, max_steps: int = 6) -> Path:
    state = Snapshot(step, weights(model), weights(ema) if ema else {}, {}, {})
    place = write_checkpoint(folder / "checkpoints", state)
    settings = {"training": {"max_steps": max_steps}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return place


@pytest.mark.parametrize("ema", [True, False])
def test_a_stage_starts_from_the_one_before_it(
    unet: Path, sd_folder: Path, clip: Path, tmp_path: Path, ema: bool
):
    config = of_parts(unet, sd_folder, clip)
    last, average = trained(config, 1), trained(config, 2)
    place = write_run(tmp_path / "first", last, average)
    for start in (tmp_path / "first", place):
        following = of_parts(unet, sd_folder, clip, start=str(start))
        following.network.ema = ema
        check_start(following)
        assert same(weights(load_model(following)), weights(average if ema else last))


def test_weights_stand_in_where_there_is_no_average(
    unet: Path, sd_folder: Path, clip: Path, tmp_path: Path
):
    last = trained(of_parts(unet, sd_folder, clip), 1)
    write_run(tmp_path / "first", last, None)
    following = of_parts(unet, sd_folder, clip, start=str(tmp_path / "first"))
    assert same(weights(load_model(following)), weights(last))


def test_a_stage_whose_predecessor_did_not_finish_is_refused(
    unet: Path, sd_folder: Path, clip: Path, tmp_path: Path
):
    first = tmp_path / "first"
    place = write_run(first, trained(of_parts(unet, sd_folder, clip)), None, step=4, max_steps=6)
    following = of_parts(unet, sd_folder, clip, start=str(first))
    with pytest.raises(
        ValueError, match=r"a run that did not finish: it has step 4 of 6.*give .*4"
    ):
        check_start(following)
    following.network.from_pretrained = str(place)  # taken as it is
    check_start(following)
    shutil.rmtree(first / "checkpoints")
    following.network.from_pretrained = str(first)
    with pytest.raises(ValueError, match=r"is a run without a checkpoint; train it first"):
        check_start(following)


def test_a_damaged_checkpoint_is_not_started_from(
    unet: Path, sd_folder: Path, clip: Path, tmp_path: Path
):
    place = write_run(tmp_path / "first", trained(of_parts(unet, sd_folder, clip)), None)
    file = place / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    following = of_parts(unet, sd_folder, clip, start=str(place))
    with pytest.raises(ValueError, match=r"weights.safetensors differs from its SHA-256"):
        load_model(following)


@pytest.mark.parametrize("ema", [True, False])
def test_a_stage_starts_from_shards(
    unet: Path, sd_folder: Path, clip: Path, tmp_path: Path, ema: bool
):
    config = of_parts(unet, sd_folder, clip)
    last, average = trained(config, 1), trained(config, 2)
    state = Snapshot(6, weights(last), weights(average), {}, {})
    assert write_split(tmp_path, state, 2) == [0, 0]
    place = tmp_path / "step-000006"
    following = of_parts(unet, sd_folder, clip, start=str(place))
    following.network.ema = ema
    assert same(weights(load_model(following)), weights(average if ema else last))
    file = place / "shard-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name} differs from its SHA-256"):
        load_model(following)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read"):
        load_model(following)


def test_a_run_of_adapters_starts_no_stage(unet: Path, sd_folder: Path, clip: Path, tmp_path: Path):
    adapters = load_model(ModelConfig(str(sd_folder)))
    place = write_run(tmp_path / "lora", adapters, None)
    following = of_parts(unet, sd_folder, clip, start=str(place))
    with pytest.raises(ValueError, match=r"holds no whole network, .* adapters .*export/pipeline"):
        load_model(following)


def test_a_start_that_is_gone_is_refused_unless_a_checkpoint_has_the_weights(
    unet: Path, sd_folder: Path, clip: Path, tmp_path: Path
):
    following = of_parts(unet, sd_folder, clip, start=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"gone' does not exist; give a run folder, a diffusers"):
        check_start(following)
    with pytest.raises(ValueError, match=r"gone' does not exist"):
        load_model(following)
    load_model(without_start(following))


def test_a_pretrained_model_takes_another_network(
    sd_folder: Path, sd2_folder: Path, tmp_path: Path
):
    theirs = load_file(sd_folder / "unet" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "unet.safetensors"
    save_file({name: tensor + 1 for name, tensor in theirs.items()}, file)
    start = NetworkConfig(from_pretrained=str(file))
    model = load_model(ModelConfig(str(sd_folder), network=start, trainable="full"))
    found = {name.removeprefix("unet."): tensor for name, tensor in weights(model).items()}
    assert same(found, {name: tensor + 1 for name, tensor in theirs.items()})
    with pytest.raises(ValueError, match=r"weights are of another shape"):
        load_model(ModelConfig(str(sd2_folder), network=start, trainable="full"))


# --- Out again


def test_the_export_loads_in_diffusers_in_both_layouts(
    unet: Path, sd_folder: Path, clip: Path, tmp_path: Path
):
    settings = TrainConfig(model=of_parts(unet, sd_folder, clip, start="/gone/since"))
    settings.sampler = SamplerConfig(num_inference_steps=4)
    model = trained(without_start(settings.model))
    place = write_run(tmp_path / "run", model, None)
    lines = export(settings, place, tmp_path / "out", CPU, PROMPT)
    assert "diffusers gives the same image" in lines[0]
    assert "original (verified: diffusers reads it back as the same weights)" in lines[1]

    sampler = SamplerConfig(num_inference_steps=4, guidance_scale=3.0)
    expected = generate(model, [PROMPT], [0], sampler)
    theirs: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    theirs.set_progress_bar_config(disable=True)

    def image() -> Tensor:
        noise = torch.Generator().manual_seed(0)
        return theirs(
            PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=noise, output_type="pt"
        ).images

    torch.testing.assert_close(image(), expected, atol=1e-4, rtol=0)
    file = tmp_path / "out" / "original" / "unet.safetensors"
    state = load_file(file)
    assert all(key.startswith("model.diffusion_model.") for key in state)
    for parameter in theirs.unet.parameters():
        parameter.data.zero_()
    theirs.unet.load_state_dict(convert_ldm_unet_checkpoint(state, theirs.unet.config))
    torch.testing.assert_close(image(), expected, atol=1e-4, rtol=0)

    # And both start the next stage here.
    pipeline = tmp_path / "out" / "pipeline"
    for start in (file, file.parent, pipeline, pipeline / "unet"):
        following = of_parts(unet, sd_folder, clip, start=str(start))
        check_start(following)
        assert same(weights(load_model(following)), weights(model))


def test_an_original_that_diffusers_reads_otherwise_is_caught(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = TrainConfig(model=ModelConfig(str(sd_folder), trainable="full"))
    place = write_run(tmp_path / "run", trained(settings.model), None)

    def damaged(tensors: dict[str, Tensor], file: Path, metadata: Any) -> None:
        key = "model.diffusion_model.out.2.bias"
        save_file({**tensors, key: tensors[key] + 1}, file, metadata)

    monkeypatch.setattr("sfumato.models.origins.original.save_file", damaged)
    with pytest.raises(ExportError, match=r"1 differ, among them conv_out\.bias"):
        export(settings, place, tmp_path / "out", CPU, PROMPT)
    assert not (tmp_path / "out").exists()


def test_networks_are_described_as_the_published_ones() -> None:
    """Heads, norms and time embedding have no parameters: counting these does not find them."""
    first, second = (unet_settings(name) for name in ("sd1", "sd2"))
    assert first["attention_head_dim"] == 8
    heads = zip(second["block_out_channels"], second["attention_head_dim"], strict=True)
    assert [width // n for width, n in heads] == [64] * 4
    for settings in (first, second):
        assert (settings["flip_sin_to_cos"], settings["freq_shift"]) == (True, 0)
        assert (settings["norm_num_groups"], settings["norm_eps"]) == (32, 1e-5)
        assert (settings["act_fn"], settings["mid_block_scale_factor"]) == ("silu", 1)
        assert (settings["downsample_padding"], settings["center_input_sample"]) == (1, False)


def test_a_stage_starts_from_the_newest_checkpoint_of_a_run(
    sd_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (9, 10, 6):
        (run / f"checkpoints/step-{step}").mkdir(parents=True)
    for steps, unfinished in ((10, False), (12, True)):
        (run / "config.yaml").write_text(f"training: {{max_steps: {steps}}}")
        found = find_source(ModelConfig(network=NetworkConfig(from_pretrained=str(run))))
        assert found.path == run / "checkpoints/step-10"
        assert (found.unfinished is not None) == unfinished
