"""Weights from outside: a component is whole, finite and of its class, or it is refused.

The parts of a folder must agree, which JSON files alone tell.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WRITERS
from safetensors.torch import load_file, save_file
from tiny_clip import write_tiny_clip
from torch import Tensor

from sfumato.clip import load_clip
from sfumato.config import ModelConfig, SamplerConfig
from sfumato.models.loading import load_family, load_on_meta
from sfumato.models.registry import FAMILIES, find_family

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
NETWORKS = [
    (family, name)
    for family, kind in FAMILIES.items()
    for name in (kind.network_name, "vae", *kind.encoders)
]


def first_matrix(tensors: Mapping[str, Tensor]) -> str:
    return next(name for name, tensor in sorted(tensors.items()) if tensor.ndim > 1)


def lacking(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = first_matrix(tensors)
    return {key: tensor for key, tensor in tensors.items() if key != name}


def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = first_matrix(tensors)
    return tensors | {name: torch.cat([tensors[name], tensors[name]])}


def not_finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    changed = tensors[first_matrix(tensors)].clone()
    changed.view(-1)[-1] = float("nan")
    return tensors | {first_matrix(tensors): changed}


def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"blocks_of_another.weight": torch.zeros(2)}


def under(prefix: str) -> Change:
    return lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


FAULTS: dict[str, tuple[Change, str]] = {
    "lacking": (lacking, r"1 weights are missing \(.+\)\. The file is incomplete"),
    "wider": (wider, r"1 weights are of another shape \(.+in the file, .+in the network"),
    "not finite": (not_finite, r"1 weights with NaN or infinity"),
    "unexpected": (more, r"1 weights are unexpected \(.*blocks_of_another\.weight\)"),
    "module.": (under("module."), r"begin with 'module\.', as DistributedDataParallel"),
    "_orig_mod.": (under("_orig_mod."), r"begin with '_orig_mod\.', as torch\.compile"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weights")
    for name, write in WRITERS.items():
        write(root / name)
    return {name: root / name for name in WRITERS}


@pytest.fixture
def changed(folders: dict[str, Path], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that links a folder and copies the part that a test will change."""

    def act(family: str, part: str) -> Path:
        folder = tmp_path / family
        shutil.copytree(folders[family], folder, copy_function=lambda a, b: Path(b).symlink_to(a))
        copy_part(folders[family] / part, folder / part)
        return folder

    yield act


def copy_part(source: Path, target: Path) -> None:
    if source.is_file():
        target.unlink()
        shutil.copy(source, target)
    else:
        shutil.rmtree(target)
        shutil.copytree(source, target)


def edit(file: Path, **changes: object) -> None:
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: v for key, v in content.items() if v != "leave out"}))


def edit_weights(part: Path, change: Change) -> None:
    (file,) = part.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def load(folder: Path) -> Any:
    config = ModelConfig(str(folder), dtype="float32")
    family, folder = find_family(config)
    return load_family(family, folder, config)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("family", "part"), NETWORKS)
def test_a_component_is_whole_or_refused(
    changed: Callable[..., Path], family: str, part: str, fault: str
):
    change, message = FAULTS[fault]
    folder = changed(family, part)
    edit_weights(folder / part, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{part} of model.pretrained: {folder / part}")


def test_a_reward_is_whole_or_refused(tmp_path: Path):
    write_tiny_clip(tmp_path / "whole")
    load_clip(str(tmp_path / "whole"))
    for name, (change, message) in FAULTS.items():
        folder = tmp_path / name.strip("._")
        shutil.copytree(tmp_path / "whole", folder)
        edit_weights(folder, change)
        with pytest.raises(ValueError, match=message):
            load_clip(str(folder))


def test_published_files_with_a_class_more_are_read(
    changed: Callable[..., Path], folders: dict[str, Path], tmp_path: Path
):
    """OpenAI publishes the text encoder of SD 1 as a whole CLIPModel, with position_ids."""
    write_tiny_clip(tmp_path / "clip")
    folder = changed("stable_diffusion", "text_encoder")
    whole = load_file(tmp_path / "clip" / "model.safetensors")
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    edit_weights(folder / "text_encoder", lambda own: {**whole, **own, **positions})
    expected = load(folders["stable_diffusion"]).encode_prompts(["a cat"]).tensors["states"]
    assert torch.equal(load(folder).encode_prompts(["a cat"]).tensors["states"], expected)


def test_classes_are_those_of_the_pipelines():
    import diffusers

    for family in FAMILIES.values():
        types = getattr(diffusers, family.pipeline_name)._get_signature_types()
        for name, known in family.classes.items():
            assert known in {kind.__name__ for kind in types[name]}, (family, name)
        assert {"vae", family.network_name, *family.encoders, *family.tokenizers} == set(
            family.classes
        )


@pytest.mark.parametrize(
    "entry",
    [
        ["diffusers", "AutoencoderTiny"],
        ["stranger", "AutoencoderKL"],
        ["os", "system"],
        "AutoencoderKL",
        ["diffusers"],
    ],
)
@pytest.mark.parametrize("act", [load_family, load_on_meta])
def test_only_known_classes_are_imported(
    changed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entry: Any,
    act: Any,
):
    (tmp_path / "stranger.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = changed("stable_diffusion", "model_index.json")
    edit(folder / "model_index.json", vae=entry)
    with pytest.raises(
        ValueError, match=r"model_index\.json: vae is .+(needs AutoencoderKL|are imported)"
    ):
        load(folder)
    with pytest.raises(
        ValueError, match=r"model_index\.json: vae is .+(needs AutoencoderKL|are imported)"
    ):
        act(FAMILIES["stable_diffusion"], folder, ModelConfig(str(folder)))


def test_parts_that_a_family_does_not_read_are_not_imported(
    changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "stranger.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = changed("stable_diffusion", "model_index.json")
    edit(folder / "model_index.json", safety_checker=["stranger", "Model"])
    load(folder)
    edit(folder / "model_index.json", image_encoder=["stranger", "Model"])
    with pytest.raises(ValueError, match=r"image_encoder is \['stranger', 'Model'\]"):
        load(folder)


AGREEMENTS = [
    ("stable_diffusion", "unet", {"in_channels": 9}, "in_channels in unet is 9"),
    ("stable_diffusion", "unet", {"out_channels": 8}, "out_channels in unet is 8"),
    ("stable_diffusion", "unet", {"cross_attention_dim": 64}, "cross_attention_dim in unet is 64"),
    ("stable_diffusion", "unet", {"time_cond_proj_dim": 32}, "time_cond_proj_dim = 32"),
    ("stable_diffusion", "unet", {"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
    ("stable_diffusion", "unet", {"encoder_hid_dim": 8}, "encoder_hid_dim = 8"),
    ("stable_diffusion", "unet", {"addition_embed_type": "image"}, "addition_embed_type = 'image'"),
    ("stable_diffusion", "unet", {"attention_type": "gated"}, "attention_type = 'gated'"),
    ("stable_diffusion", "vae", {"latent_channels": 16}, "latent_channels in vae is 16"),
    ("stable_diffusion", "text_encoder", {"vocab_size": 5}, "vocab_size = 5"),
    ("stable_diffusion_xl", "unet", {"in_channels": 9}, "in_channels in unet is 9"),
    ("stable_diffusion_xl", "unet", {"addition_embed_type": "image"}, "addition_embed_type"),
    ("stable_diffusion_xl", "text_encoder_2", {"hidden_size": 8}, "hidden_size in text_encoder +"),
    ("stable_diffusion_xl", "text_encoder_2", {"projection_dim": 8}, "projection_dim in text_enc"),
    ("stable_diffusion_3", "transformer", {"in_channels": 4}, "in_channels in transformer is 4"),
    ("stable_diffusion_3", "text_encoder_3", {"d_model": 8}, "d_model in text_encoder_3 is 8"),
    ("stable_diffusion_3", "text_encoder", {"projection_dim": 8}, "pooled_projection_dim is"),
    ("flux", "transformer", {"in_channels": 384}, "in_channels in transformer is 384"),
    ("flux", "text_encoder", {"hidden_size": 8}, "hidden_size in text_encoder is 8"),
    ("flux", "text_encoder_2", {"d_model": 8}, "d_model in text_encoder_2 is 8"),
    ("flux", "text_encoder_2", {"vocab_size": 5}, "vocab_size = 5"),
    ("qwen_image", "transformer", {"in_channels": 128}, "in_channels in transformer is 128"),
    ("qwen_image", "transformer", {"zero_cond_t": True}, "zero_cond_t = True"),
    ("qwen_image", "vae", {"z_dim": 8}, "z_dim in vae"),
]


@pytest.mark.parametrize(("family", "part", "changes", "message"), AGREEMENTS)
def test_parts_that_do_not_fit_are_refused_from_json(
    changed: Callable[..., Path], family: str, part: str, changes: dict[str, Any], message: str
):
    folder = changed(family, part)
    edit(folder / part / "config.json", **changes)
    for file in (folder / part).glob("*.safetensors"):
        file.write_bytes(b"")  # no weight is read
    with pytest.raises(ValueError, match=re.escape(message)):
        find_family(ModelConfig(str(folder)))


def test_a_tokenizer_fits_its_encoder(changed: Callable[..., Path]):
    for length in ("leave out", 1000, 2):
        folder = changed("stable_diffusion", "tokenizer")
        edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
        with pytest.raises(ValueError, match="model_max_length"):
            find_family(ModelConfig(str(folder)))
        shutil.rmtree(folder)
    folder = changed("stable_diffusion", "tokenizer")
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<my-style>": 70000}')
    with pytest.raises(ValueError, match=r"has 70001 tokens.+vocab_size"):
        find_family(ModelConfig(str(folder)))


def test_noise_is_not_predicted_from_noise(changed: Callable[..., Path]):
    folder = changed("stable_diffusion", "scheduler")
    file = folder / "scheduler" / "scheduler_config.json"
    edit(file, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr.+prediction_type = epsilon"):
        find_family(ModelConfig(str(folder)), SamplerConfig())
    find_family(ModelConfig(str(folder)))  # to encode with it
    edit(file, prediction_type="v_prediction")
    find_family(ModelConfig(str(folder)), SamplerConfig())
