"""What a cache is named after: the content of what encodes, and nothing else."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.config import LoraConfig, MergeConfig, ModelConfig
from sfumato.data.prepared.format import CacheIdentity
from sfumato.models.registry import load_encoders
from sfumato.preparation.encoder_hash import cache_identity

VAE, CLIP = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture
def model(tmp_path: Path, sd_folder: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "somewhere" / "else"))


def identity(folder: Path, **changes: Any) -> CacheIdentity:
    settings: dict[str, Any] = {"height": 32, "width": 32, "flip": False, "dtype": "float16"}
    model = {key: changes.pop(key) for key in ("variant", "allow_pickle") if key in changes}
    config = ModelConfig(pretrained=str(folder), **model)
    return cache_identity(config, **(settings | changes))


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def nudge(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return a change of one bit of one weight."""

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = weights[name].view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
        return weights

    return change


def set_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut_in_shards(file: Path) -> None:
    """Store a part in two files with an index, as large ones are."""
    weights = load_file(file)
    names = sorted(weights)
    halves, stem = (names[::2], names[1::2]), file.name.removesuffix(".safetensors")
    told = {}
    for i, half in enumerate(halves, 1):
        shard = file.with_name(f"{stem}-{i:05d}-of-00002.safetensors")
        save_file({name: weights[name] for name in half}, shard, metadata={"format": "pt"})
        told |= dict.fromkeys(half, shard.name)
    index = {"metadata": {"total_size": 0}, "weight_map": told}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()


# --- The same encoder


def test_a_copy_elsewhere_is_the_same(sd_folder: Path, model: Path) -> None:
    assert identity(model) == identity(sd_folder)


def same_but_for_the_decoder(model: Path) -> None:
    rewrite(model / VAE, nudge("decoder.conv_in.weight"))
    rewrite(model / VAE, nudge("post_quant_conv.weight"))


def same_but_for_the_network(model: Path) -> None:
    rewrite(model / "unet/diffusion_pytorch_model.safetensors", nudge("conv_in.weight"))


def same_in_shards(model: Path) -> None:
    cut_in_shards(model / VAE)
    cut_in_shards(model / CLIP)


def same_under_other_names(model: Path) -> None:
    """As transformers 5 writes it, which leaves out the first word."""
    rewrite(model / CLIP, lambda w: {k.removeprefix("text_model."): t for k, t in w.items()})


def same_with_stored_positions(model: Path) -> None:
    """As older versions of transformers wrote it."""
    position = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewrite(model / CLIP, lambda weights: weights | position)


def same_with_other_notes(model: Path) -> None:
    set_json(model / "vae/config.json", _diffusers_version="9", scaling_factor=1.0, sample_size=9)
    set_json(model / "vae/config.json", _name_or_path="x", mid_block_add_attention=True)
    set_json(model / "text_encoder/config.json", transformers_version="9", torch_dtype="float16")
    set_json(model / "tokenizer/tokenizer_config.json", name_or_path="x")


@pytest.mark.parametrize(
    "change",
    [
        same_but_for_the_decoder,
        same_but_for_the_network,
        same_in_shards,
        same_under_other_names,
        same_with_stored_positions,
        same_with_other_notes,
    ],
)
def test_what_encodes_alike_is_the_same(
    sd_folder: Path, model: Path, change: Callable[[Path], None]
) -> None:
    """It is loaded too, so that what is called the same does give the same."""
    change(model)
    assert identity(model) == identity(sd_folder)
    found, expected = (load_encoders(ModelConfig(str(p))) for p in (model, sd_folder))
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.encode_moments(image), expected.encode_moments(image))
    states = [each.encode_prompts(["a ring"]).tensors["states"] for each in (found, expected)]
    assert torch.equal(*states)


def test_half_precision_equals_its_copy_in_full_and_differs_from_what_it_was_rounded_from(
    sd_folder: Path, model: Path
) -> None:
    for file in (VAE, CLIP):
        rewrite(model / file, lambda weights: {k: t.half() for k, t in weights.items()})
    half = identity(model)
    for file in (VAE, CLIP):
        rewrite(model / file, lambda weights: {k: t.float() for k, t in weights.items()})
    assert identity(model) == half
    assert half.moments_folder != identity(sd_folder).moments_folder
    assert half.text_folder != identity(sd_folder).text_folder


def test_the_variant_that_is_loaded_counts(sd_folder: Path, model: Path) -> None:
    """A part without the variant is read from its plain file, as diffusers does."""
    file = model / VAE
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    rewrite(file, nudge("encoder.conv_in.weight"))
    plain, variant, original = identity(model), identity(model, variant="fp16"), identity(sd_folder)
    assert variant == original
    assert plain.text == original.text
    assert plain.moments != original.moments


def test_pickled_weights_are_those_of_the_safetensors(sd_folder: Path, model: Path) -> None:
    for file, name in ((VAE, "diffusion_pytorch_model.bin"), (CLIP, "pytorch_model.bin")):
        torch.save(load_file(model / file), (model / file).with_name(name))
        (model / file).unlink()
    assert identity(model, allow_pickle=True) == identity(sd_folder)
    with pytest.raises(ValueError, match="only pickled weights"):
        identity(model)


# --- Another


@pytest.mark.parametrize(
    ("change", "moments", "text"),
    [
        (lambda m: rewrite(m / VAE, nudge("encoder.conv_in.weight")), True, False),
        (lambda m: rewrite(m / VAE, nudge("quant_conv.bias")), True, False),
        (lambda m: set_json(m / "vae/config.json", act_fn="relu"), True, False),
        (
            lambda m: rewrite(m / CLIP, nudge("text_model.final_layer_norm.bias")),
            False,
            True,
        ),
        (lambda m: set_json(m / "text_encoder/config.json", hidden_act="gelu"), False, True),
        (lambda m: set_json(m / "tokenizer/tokenizer_config.json", pad_token="!"), False, True),
        (lambda m: set_json(m / "tokenizer/vocab.json", dtype=7), False, True),
        (lambda m: (m / "tokenizer/merges.txt").write_text("#version: 0.2\na b\n"), False, True),
    ],
)
def test_each_change_tells_on_what_it_changes(
    sd_folder: Path, model: Path, change: Callable[[Path], None], moments: bool, text: bool
) -> None:
    change(model)
    found, expected = identity(model), identity(sd_folder)
    assert (found.moments != expected.moments) == moments
    assert (found.text != expected.text) == text
    assert (found.moments_folder != expected.moments_folder) == moments
    assert (found.text_folder != expected.text_folder) == text


@pytest.mark.parametrize(
    ("setting", "moments", "text"),
    [
        ({"height": 64}, True, False),
        ({"width": 64}, True, False),
        ({"flip": True}, True, False),
        ({"crop": "random"}, True, False),
        ({"dtype": "bfloat16"}, True, True),
    ],
)
def test_each_setting_tells_on_what_it_changes(
    sd_folder: Path, setting: dict[str, Any], moments: bool, text: bool
) -> None:
    found, expected = identity(sd_folder, **setting), identity(sd_folder)
    assert (found.moments_folder != expected.moments_folder) == moments
    assert (found.text_folder != expected.text_folder) == text


def test_settings_of_training_do_not_count(sd_folder: Path) -> None:
    sizes = {"height": 32, "width": 32, "flip": False, "dtype": "float16"}
    config = ModelConfig(str(sd_folder))
    trained = replace(
        config, dtype="bfloat16", trainable="full", channels_last=True, gradient_checkpointing=True
    )
    assert cache_identity(trained, **sizes) == cache_identity(config, **sizes)


def test_another_pipeline_reads_the_same_encoder_otherwise(tmp_path: Path) -> None:
    """SDXL's own switch for empty prompts changes what is cached of them."""
    from tiny_sdxl import write_tiny_sdxl

    folder = tmp_path / "sdxl"
    write_tiny_sdxl(folder)
    before = identity(folder)
    assert {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"} < before.text.keys()
    zeros = "force_zeros_for_empty_prompt"
    set_json(folder / "model_index.json", **{zeros: not before.text[zeros]})
    after = identity(folder)
    assert after.text_folder != before.text_folder
    assert after.moments == before.moments


# --- What cannot be


def test_damaged_and_unknown_files_are_named(model: Path) -> None:
    file = model / VAE
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"vae holds weights that cannot be read"):
        identity(model)
    file.write_bytes(content)
    file.rename(file.with_name("weights.safetensors"))
    with pytest.raises(ValueError, match=r"vae holds no weights of a known name \(config.json, w"):
        identity(model)


def test_a_merged_file_that_changes_the_text_encoder_is_refused(
    tmp_path: Path, sd_folder: Path
) -> None:
    sizes = {"height": 32, "width": 32, "flip": False, "dtype": "float16"}
    config = ModelConfig(str(sd_folder), lora=LoraConfig(rank=2))
    layers = {
        "unet": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "diffusers": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "kohya": "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "kohya_xl": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    }
    for name, layer in layers.items():
        file = tmp_path / f"{name}.safetensors"
        save_file({layer: torch.zeros(2, 4)}, file)
        merged = replace(config, merge={name: MergeConfig(str(file))})
        if name == "unet":
            assert cache_identity(merged, **sizes) == cache_identity(config, **sizes)
            continue
        with pytest.raises(ValueError, match=rf"model.merge.{name}.path = .* changes a text enc"):
            cache_identity(merged, **sizes)


@pytest.mark.parametrize(
    "layer",
    [
        "clip_l.encoder.layers.0.fc1",
        "lora.clip_g.x",
        "t5xxl.block.0",
        "base_model.model.encoder.layers.0.fc1",  # peft's names
        "base_model.model.text_model.encoder.layers.0.fc1",
        "base_model.model.model.layers.0.q_proj",
    ],
)
def test_a_merged_file_of_other_names_of_text_encoders_is_refused(
    tmp_path: Path, sd_folder: Path, layer: str
) -> None:
    file = tmp_path / "merged.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.zeros(2, 4)}, file)
    config = ModelConfig(str(sd_folder), merge={"m": MergeConfig(str(file))})
    with pytest.raises(ValueError, match="changes a text encoder"):
        cache_identity(config, height=32, width=32, flip=False, dtype="float16")


def test_the_text_half_tells_the_pipeline_and_where_its_numbers_come_from(sd_folder: Path) -> None:
    """What is hashed: a key that goes missing would give two caches one name."""
    found = cache_identity(
        ModelConfig(str(sd_folder)), height=32, width=32, flip=False, dtype="float16"
    )
    assert found.text.keys() == {"pipeline", "text_encoder", "tokenizer", "dtype"}
    assert found.text["pipeline"] == "StableDiffusionPipeline"
    sizes = {"height", "width", "crop", "resize", "flip", "dtype"}
    assert found.moments.keys() == {"autoencoder", *sizes}


def test_settings_that_older_files_leave_out_are_those_of_newer_ones(
    sd_folder: Path, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"height": 32, "width": 32, "flip": False, "dtype": "float16"}
    model = Path(shutil.copytree(sd_folder, tmp_path / "model"))
    file = model / "vae/config.json"
    content = json.loads(file.read_text())
    for name in ("use_quant_conv", "mid_block_add_attention"):
        assert content.pop(name) is True
    file.write_text(json.dumps(content))
    expected = cache_identity(ModelConfig(str(sd_folder)), **sizes)
    assert cache_identity(ModelConfig(str(model)), **sizes) == expected
