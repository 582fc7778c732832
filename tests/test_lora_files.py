"""LoRA files: written for diffusers, kohya and ComfyUI, read back, gone on from, merged."""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from runs import command, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_flux import write_tiny_flux
from tiny_qwen_image import write_tiny_qwen_image
from tiny_sd3 import write_tiny_sd3
from tiny_sdxl import write_tiny_sdxl
from torch import Tensor

from sfumato.compose import compose_train, load_settings
from sfumato.config import LoraConfig, MergeConfig, ModelConfig, SamplerConfig, TrainConfig
from sfumato.diffusion.randomness import Rng
from sfumato.models.adapters import LoraRoles
from sfumato.models.flux import Flux
from sfumato.models.formats import read_pipeline
from sfumato.models.generate import generate, image_size
from sfumato.models.lora.kohya import kohya_state
from sfumato.models.lora.read import read_lora
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import load_model
from sfumato.models.stable_diffusion import UNET_LINEAR
from sfumato.models.stable_diffusion_xl import published_names
from sfumato.run.export import export
from sfumato.training.checkpoint import Snapshot, list_checkpoints, write_checkpoint

PROMPT = "a red star"
DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"
CPU = torch.device("cpu")

# What is trained of each family, and a size of images that is not the tiny model's own.
PARTS = {
    "sd": ["network", "text_encoder"],
    "sdxl": ["network", "text_encoder", "text_encoder_2"],
    "sd3": ["network", "text_encoder", "text_encoder_2"],
    "flux": ["network", "text_encoder"],
    "qwen": ["network"],
}
SIDE = {"flux": 32, "qwen": 32}
# diffusers takes the single blocks of a Flux file apart at their published width alone.
DOUBLE_BLOCKS = [r"transformer_blocks\..*\.(to_[qv]|to_out\.0|add_k_proj|net\.2|norm1\.linear)"]
CONVOLUTION = r"mid_block\.resnets\.0\.conv1"


@pytest.fixture(scope="module")
def folders(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    write_tiny_sdxl(root / "sdxl")
    write_tiny_sd3(root / "sd3", medium=True, t5=False)
    write_tiny_flux(root / "flux", distilled=False)
    write_tiny_qwen_image(root / "qwen")
    return {"sd": sd_folder, **{name: root / name for name in ("sdxl", "sd3", "flux", "qwen")}}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settings(folder: Path, parts: Sequence[str] = ("network",), **lora: Any) -> ModelConfig:
    return ModelConfig(str(folder), parts=list(parts), lora=LoraConfig(**{"rank": 4, **lora}))


def load(config: ModelConfig) -> PipelineModel:
    model = load_model(config)
    assert isinstance(model, PipelineModel)
    return model


@torch.no_grad()
def moved(config: ModelConfig, seed: int = 0) -> PipelineModel:
    """Return a model whose trained weights have moved."""
    model = load(config)
    for i, parameter in enumerate(model.trainable().values()):
        parameter += 0.1 * normal(*parameter.shape, seed=1000 * seed + i)
    return model


def saved(model: PipelineModel, folder: Path) -> Path:
    folder.mkdir(parents=True)
    model.save_adapter(folder)
    return folder


def sampler(name: str) -> SamplerConfig:
    side = SIDE.get(name)
    return SamplerConfig(2, guidance_scale=3.0, height=side, width=side)


def our_image(model: PipelineModel, how: SamplerConfig) -> Tensor:
    return generate(model, [PROMPT], [0], how)


def their_image(model: PipelineModel, exported: Path, name: str, how: SamplerConfig) -> Tensor:
    shape = model.latent_shape(*image_size(model, how))
    noise = Rng([0]).normal(*shape, device=CPU)
    return model.image_elsewhere(exported, name, PROMPT, noise, how)


def deltas(model: PipelineModel) -> dict[str, Tensor]:
    """Return what each adapter adds to the weight of its layer."""
    return {
        f"{name}.{layer}": adapter.get_delta_weight("default").detach()
        for name, part in model.parts.items()
        if isinstance(part, LoraRoles)
        for layer, adapter in part.adapters().items()
    }


def layers_of(file: Path) -> set[str]:
    """Return the layers that a kohya file names; each has all three tensors."""
    keys = set(load_file(file))
    found = {key.partition(".")[0] for key in keys}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert keys == {f"{layer}.{part}" for layer in found for part in parts}
    return found


# --- Written


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "qwen"])
def test_diffusers_gives_the_same_image_with_the_kohya_file(
    folders: dict[str, Path], tmp_path: Path, name: str
):
    targets = {"flux": DOUBLE_BLOCKS, "sd": [*UNET_LINEAR, CONVOLUTION]}.get(name)
    config = settings(folders[name], PARTS[name], alpha=8.0, targets=targets)
    model, how = moved(config), sampler(name)
    lora = saved(model, tmp_path / "lora")
    (tmp_path / "kohya" / "lora").mkdir(parents=True)
    shutil.copy(lora / KOHYA, tmp_path / "kohya" / "lora" / DIFFUSERS)
    expected = our_image(model, how)
    found = their_image(model, tmp_path / "kohya", "lora", how)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (our_image(load(config), how) - expected).abs().max() > 1e-2


def test_diffusers_takes_its_own_file_from_the_folder(folders: dict[str, Path], tmp_path: Path):
    model, how = moved(settings(folders["sd"])), sampler("sd")
    lora = saved(model, tmp_path / "lora")
    assert {file.name for file in lora.iterdir()} == {DIFFUSERS, KOHYA}
    (lora / KOHYA).write_bytes(b"not to be read")
    found = their_image(model, tmp_path, "lora", how)
    torch.testing.assert_close(found, our_image(model, how), atol=1e-4, rtol=0)


# As comfy/lora.py and networks/lora.py, lora_flux.py, lora_sd3.py, lora_qwen_image.py spell them.
SPELT = {
    "sd": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
    ),
    "sdxl": (
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k",
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_2",
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_out_0",
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj",
        "lora_te2_text_model_encoder_layers_1_self_attn_v_proj",
    ),
    "sd3": (
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "lora_unet_joint_blocks_1_x_block_attn2_proj",
        "lora_unet_joint_blocks_2_context_block_attn_qkv",
        "lora_unet_joint_blocks_1_context_block_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_self_attn_k_proj",
    ),
    "flux": (
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_1_txt_attn_proj",
        "lora_unet_double_blocks_1_txt_mlp_2",
        "lora_unet_single_blocks_1_linear1",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    ),
    "qwen": (
        "lora_unet_transformer_blocks_0_attn_add_k_proj",
        "lora_unet_transformer_blocks_0_attn_to_add_out",
        "lora_unet_transformer_blocks_1_img_mlp_net_0_proj",
        "lora_unet_transformer_blocks_1_txt_mlp_net_2",
    ),
}
COUNTS = {  # of layers there, by prefix: blocks x layers in each
    "sd": {"lora_unet": 4 * 10, "lora_te": 2 * 4},
    "sdxl": {"lora_unet": (1 + 1 + 2) * 2 * 10, "lora_te1": 2 * 4, "lora_te2": 2 * 4},
    "sd3": {"lora_unet": 2 * 10 + 5, "lora_te1": 2 * 4, "lora_te2": 2 * 4},
    "flux": {"lora_unet": 2 * 8 + 2 * 1, "lora_te1": 2 * 4},
    "qwen": {"lora_unet": 2 * 12},
}


@pytest.mark.parametrize("name", list(SPELT))
def test_layers_are_spelt_as_comfyui_and_kohya_do(
    folders: dict[str, Path], tmp_path: Path, name: str
):
    found = layers_of(saved(load(settings(folders[name], PARTS[name])), tmp_path / "lora") / KOHYA)
    assert set(SPELT[name]) <= found
    prefixes = [prefix_of(layer) for layer in found]
    assert {prefix: prefixes.count(prefix) for prefix in set(prefixes)} == COUNTS[name]


def prefix_of(layer: str) -> str:
    return "_".join(layer.split("_")[:2])


def test_blocks_of_sdxl_are_counted_through(folders: dict[str, Path], tmp_path: Path):
    unet: Any = UNet2DConditionModel.from_pretrained(folders["sdxl"] / "unet")
    here: dict[str, str] = {"mid_block.attentions.0.": "middle_block.1."}
    for side, blocks, number in (("input", unet.down_blocks, 1), ("output", unet.up_blocks, 0)):
        way = "down" if side == "input" else "up"
        for i, block in enumerate(blocks):
            attentions = vars(block)["_modules"].get("attentions")
            for j in range(len(block.resnets)):
                if attentions is not None:
                    here[f"{way}_blocks.{i}.attentions.{j}."] = f"{side}_blocks.{number}.1."
                number += 1
            number += side == "input"  # the downsampler; upsamplers share a block
    names = [name for name, _ in unet.named_modules() if "attentions.0." in f"{name}."]
    found = published_names(names + [n for n, _ in unet.named_modules() if "resnets" in n])
    expected = {
        name.replace(start, there, 1): (name,)
        for name in names
        for start, there in here.items()
        if name.startswith(start)
    }
    assert found == expected
    # As published: SDXL's first and last attention, with two layers a block.
    layers = ["down_blocks.0.resnets.0", "down_blocks.0.resnets.1"]
    first, last = "down_blocks.1.attentions.0.proj_in", "up_blocks.1.attentions.2.proj_out"
    assert list(published_names([*layers, first, last])) == [
        "input_blocks.4.1.proj_in",
        "output_blocks.5.1.proj_out",
    ]


def test_a_kohya_file_of_sd3_is_the_same_change_of_the_published_network(
    folders: dict[str, Path], tmp_path: Path
):
    # v is left out, so that fused layers have a part without adapter.
    targets = [r".*attn2?\.(to_[qk]|to_out\.0)", r".*\.(add_[kv]_proj|to_add_out)", r".*net\.2"]
    model = moved(settings(folders["sd3"], targets=targets, alpha=2.0))
    state = load_file(saved(model, tmp_path / "lora") / KOHYA)
    published = {
        f"joint_blocks.{i}.{side}.{layer}"
        for i in range(3)
        for side in ("x_block", "context_block")
        for layer in ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2")
    }
    spelt = {f"lora_unet_{name.replace('.', '_')}": f"{name}.weight" for name in published}
    changes = {spelt[layer]: change(state, layer) for layer in layers_of(tmp_path / "lora" / KOHYA)}
    # diffusers' own converter of published checkpoints says which layers that changes.
    found = convert_sd3_transformer_checkpoint_to_diffusers(Checkpoint(changes))
    expected = {f"{key.removeprefix('transformer.')}.weight": d for key, d in deltas(model).items()}
    assert len(expected) == 3 * (3 + 2 + 1) + 2 * (1 + 3 + 1)
    for key, tensor in found.items():
        if key in expected:
            torch.testing.assert_close(tensor, expected.pop(key), atol=1e-6, rtol=1e-5)
        else:
            assert not tensor.any(), key
    assert not expected


def change(state: Mapping[str, Tensor], layer: str) -> Tensor:
    """Return alpha / rank x up down, as both programs compute it."""
    down, up = state[f"{layer}.lora_down.weight"], state[f"{layer}.lora_up.weight"]
    return state[f"{layer}.alpha"] / len(down) * up @ down


class Checkpoint(dict[str, Tensor]):
    """A checkpoint of zeros but for what is given."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        blocks = {f"joint_blocks.{i}.x_block.attn.qkv.weight": torch.zeros(96, 32) for i in (0, 2)}
        super().__init__({**blocks, "context_embedder.weight": torch.zeros(32, 64), **given})

    def pop(self, key: str, *_default: Any) -> Tensor:
        return super().pop(key, torch.zeros(6, 1))


def test_diffusers_reads_all_blocks_of_a_flux_file_at_the_published_width():
    with torch.device("meta"):
        network: Any = FluxTransformer2DModel(
            num_layers=1, num_single_layers=2, num_attention_heads=24, attention_head_dim=128
        )
    targets = ("attn.to_q", "attn.to_v", "attn.add_k_proj", "ff.net.2", "proj_out", "norm.linear")
    layers = [name for name, _ in network.named_modules() if name.endswith(targets)]
    layers.remove("proj_out")
    adapter: dict[str, Tensor] = {}
    for i, name in enumerate(layers):
        linear = network.get_submodule(name)
        adapter[f"{name}.lora_A.weight"] = normal(2, linear.in_features, seed=i)
        adapter[f"{name}.lora_B.weight"] = normal(linear.out_features, 2, seed=i + 100)
    state = kohya_state({"transformer": adapter}, network, "transformer", Flux.kohya)
    assert state is not None
    found: Any = FluxPipeline.lora_state_dict(dict(state))
    assert len(layers) == 4 + 2 * 4
    for name in {key.partition(".lora_")[0] for key in found}:
        down, up = (found[f"{name}.lora_{part}.weight"] for part in "AB")
        own = name.removeprefix("transformer.")
        if own in layers:
            # The ranks come back too, so that training can go on.
            assert torch.equal(down, adapter[f"{own}.lora_A.weight"])
            assert torch.equal(up, adapter[f"{own}.lora_B.weight"])
            layers.remove(own)
        else:
            assert not (up @ down).any(), name
    assert not layers


def test_no_kohya_file_is_written_where_a_layer_has_no_name(
    folders: dict[str, Path], tmp_path: Path
):
    model = load(settings(folders["sd3"], targets=[r".*norm1_context\.linear"]))
    with pytest.warns(UserWarning, match=r"no name for 3 of the adapted layers, such as tra"):
        saved(model, tmp_path / "lora")
    assert [file.name for file in (tmp_path / "lora").iterdir()] == [DIFFUSERS]


# --- Gone on from


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sd", DIFFUSERS),
        ("sd", KOHYA),
        ("sdxl", KOHYA),
        ("sd3", DIFFUSERS),  # diffusers reads no other
        ("flux", KOHYA),
        ("qwen", KOHYA),
    ],
)
def test_training_goes_on_from_a_file(
    folders: dict[str, Path], tmp_path: Path, name: str, file: str
):
    targets = DOUBLE_BLOCKS if name == "flux" else None
    config = settings(folders[name], PARTS[name], targets=targets, alpha=2.0)
    model = moved(config)
    place = saved(model, tmp_path / "lora")
    path, times = place, 1.0
    if file == KOHYA:  # as its trainers write them, with an alpha that is not the rank
        path, times = place / file, 0.5
        state = load_file(path)
        save_file({k: t * times if "alpha" in k else t for k, t in state.items()}, path)
    config.lora = replace(config.lora, start=str(path), alpha=12.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(config)
    expected, found = deltas(model), deltas(again)
    assert found.keys() == expected.keys()
    for layer, delta in found.items():
        torch.testing.assert_close(delta, times * expected[layer], atol=1e-6, rtol=1e-5)
    assert max(delta.abs().max() for delta in found.values()) > 0.01
    assert all(parameter.dtype == torch.float32 for parameter in again.trainable().values())
    # The reference is the base without it.
    with torch.no_grad(), again.roles.acting("reference"):
        assert all(layer.disable_adapters for layer in again.roles.adapters().values())  # type: ignore[attr-defined]


def test_layers_that_a_file_says_nothing_of_start_at_zero(folders: dict[str, Path], tmp_path: Path):
    first = moved(settings(folders["sd"], targets=[r".*attn1\.to_q"]))
    place = saved(first, tmp_path / "lora")
    message = r"lacks 36 of the 40 trained layers, which start at zero, such as unet\.do"
    with pytest.warns(UserWarning, match=message):
        model = load(settings(folders["sd"], start=str(place)))
    known = deltas(first)
    for layer, delta in deltas(model).items():
        torch.testing.assert_close(delta, known.get(layer, torch.zeros_like(delta)))


def test_zeros_that_fill_a_block_diagonal_are_not_gone_on_from(
    folders: dict[str, Path], tmp_path: Path
):
    layer = r"transformer_blocks\.0\.attn\."
    first = moved(settings(folders["flux"], targets=[f"{layer}to_[qv]"]))
    file = saved(first, tmp_path / "lora") / KOHYA
    with pytest.warns(UserWarning, match=r"lacks 1 of the 3 trained .*\.attn\.to_k"):
        model = load(settings(folders["flux"], targets=[f"{layer}to_[qkv]"], start=str(file)))
    assert all(p.any() == ("to_k.lora_B" not in name) for name, p in model.trainable().items())


def kohya_file(place: Path, **layers: tuple[Tensor, Tensor, float]) -> str:
    """Write a file of down, up and alpha by layer; return its path."""
    state = {}
    for layer, (down, up, alpha) in layers.items():
        state[f"{layer}.lora_down.weight"] = down.clone()
        state[f"{layer}.lora_up.weight"] = up.clone()
        state[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(state, place)
    return str(place)


LAYER = "mid_block.attentions.0.transformer_blocks.0"
SPELT_LAYER = f"lora_unet_{LAYER.replace('.', '_')}"


def test_each_layer_has_its_own_alpha_and_rank(folders: dict[str, Path], tmp_path: Path):
    pairs = {
        part: (normal(rank, 64, seed=i), normal(64, rank, seed=i + 9), alpha)
        for i, (part, rank, alpha) in enumerate(
            [("attn1.to_q", 4, 1.0), ("attn1.to_k", 2, 3.0), ("attn1.to_out.0", 4, 4.0)]
        )
    }
    spelt = {f"{SPELT_LAYER}_{part.replace('.', '_')}": pair for part, pair in pairs.items()}
    path = kohya_file(tmp_path / "lora.safetensors", **spelt)
    found = read_lora(load(settings(folders["sd"])).pipeline, "unet", path, "model.merge.a.path")
    assert not found.strangers
    assert found.layers.keys() == {f"unet.{LAYER}.{part}" for part in pairs}
    for part, (down, up, alpha) in pairs.items():
        delta = found.layers[f"unet.{LAYER}.{part}"].delta
        torch.testing.assert_close(delta, alpha / len(down) * up @ down)


@pytest.mark.parametrize(
    ("notes", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 1}}, 0.25),
    ],
)
def test_settings_in_the_metadata_are_read_as_diffusers_reads_them(
    folders: dict[str, Path], tmp_path: Path, notes: dict[str, Any], scale: float
):
    file, layer = tmp_path / DIFFUSERS, f"{LAYER}.attn1.to_q"
    down, up = normal(4, 64), normal(64, 4, seed=1)
    state = {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    settings_there = {f"unet.{key}": value for key, value in notes.items()}
    settings_there["unet.target_modules"] = [layer]
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(settings_there)})
    model = load(settings(folders["sd"]))
    found = read_lora(model.pipeline, "unet", str(tmp_path), "model.merge.a.path")
    torch.testing.assert_close(found.layers[f"unet.{layer}"].delta, scale * up @ down)
    theirs = read_pipeline(
        folders["sd"], model.config, {"default": torch.float32}, model.left_out(folders["sd"])
    )
    theirs.load_lora_weights(tmp_path)
    adapter = theirs.unet.get_submodule(layer)
    assert adapter.scaling[adapter.active_adapters[0]] == scale


def test_a_run_goes_on_where_its_start_is_gone(sd_folder: Path, tmp_path: Path):
    file = saved(moved(settings(sd_folder)), tmp_path / "lora") / DIFFUSERS
    lora = [f"model.lora.start={file.parent}", "model.lora.rank=4"]
    given = [
        *command(tmp_path, "run", *lora, model=sd_folder),
        "validation.num_images=1",
        "sampler.num_inference_steps=1",
        "training.global_batch_size=2",
    ]
    start([*given, "training.max_steps=2"])
    checkpoint = load_file(
        list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "weights.safetensors"
    )
    kept = f"unet.{LAYER}.attn1.to_q.lora_A.default.weight"
    begun = load_file(file)[f"unet.{LAYER}.attn1.to_q.lora_A.weight"]
    assert 0 < (checkpoint[kept] - begun).abs().max() < 0.1  # two steps away, and not elsewhere
    file.unlink()
    with pytest.raises(ValueError, match=r"model\.lora\.start = '.*': there is no file"):
        compose_train([*given, "name=another"])
    with pytest.warns(UserWarning, match="does not exist any more: until a checkpoint is loaded"):
        outcome = start([*given, "training.max_steps=3"])
    assert outcome.step == 3
    assert (tmp_path / "run" / "export" / "lora" / DIFFUSERS).exists()


# --- Merged


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_files_are_merged_into_policy_and_reference(
    folders: dict[str, Path], tmp_path: Path, trainable: str, dtype: str
):
    targets = [r".*attn1\.to_[qk]", CONVOLUTION]
    first = moved(settings(folders["sd"], PARTS["sd"], targets=targets))
    second = moved(settings(folders["sd"], targets=[r".*attn1\.to_q"]), seed=1)
    merge = {
        "a": MergeConfig(str(saved(first, tmp_path / "a") / KOHYA), 0.7),
        "b": MergeConfig(str(saved(second, tmp_path / "b")), -0.5),
    }
    config = replace(settings(folders["sd"]), trainable=trainable, dtype=dtype, merge=merge)
    model, plain = load(config), load(replace(config, merge={}))
    added: dict[str, Tensor] = {}
    for each, scale in ((first, 0.7), (second, -0.5)):
        for name, delta in deltas(each).items():
            added[name] = added.get(name, 0) + scale * delta.double()
    assert len(added) == 4 * 2 + 1 + 2 * 4
    for component in ("unet", "text_encoder"):
        for name, _ in model.parts[component].policy.named_modules():
            if f"{component}.{name}" not in added:
                continue
            before, after = (
                weight_of(each.parts[component].policy.get_submodule(name))
                for each in (plain, model)
            )
            expected = before.double() + added.pop(f"{component}.{name}")
            assert after.dtype == before.dtype
            if after.dtype == torch.float32:
                torch.testing.assert_close(after.double(), expected, atol=1e-6, rtol=0)
            else:  # one rounding for each file
                assert ((after - expected).abs() <= 2**-7 * expected.abs() + 1e-3).all()
    assert not added
    one, other = (dict(network.named_parameters()) for network in (model.roles.networks() * 2)[:2])
    assert all(torch.equal(one[name], other[name]) for name in one)


def weight_of(layer: Any) -> Tensor:
    return (
        layer.get_base_layer().weight if "lora_A" in dict(layer.named_children()) else layer.weight
    )


@pytest.mark.parametrize("name", ["sdxl", "sd3", "qwen"])
def test_merging_is_diffusers_own_arithmetic(folders: dict[str, Path], tmp_path: Path, name: str):
    place = saved(moved(settings(folders[name], PARTS[name])), tmp_path / "style")
    config = replace(settings(folders[name]), merge={"style": MergeConfig(str(place), 0.6)})
    model, how = moved(config, seed=1), sampler(name)
    lora = saved(model, tmp_path / "lora")
    expected = our_image(model, how)
    found = their_image(model, tmp_path, "lora", how)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    without = our_image(moved(settings(folders[name]), seed=1), how)
    assert (without - expected).abs().max() > 1e-2
    for file in lora.iterdir():
        with safe_open(file, "pt") as tensors:
            told = json.loads(tensors.metadata()["sfumato_merged_into_base"])
        assert told == [{"file": "style", "scale": 0.6}]


@pytest.mark.parametrize("parts", [["network"], ["text_encoder"]])
def test_exports_hold_what_was_merged_into_frozen_parts(
    folders: dict[str, Path], tmp_path: Path, parts: list[str]
):
    place = saved(moved(settings(folders["sd"], PARTS["sd"])), tmp_path / "style")
    config = replace(settings(folders["sd"], parts), merge={"style": MergeConfig(str(place), 0.6)})
    model = moved(config, seed=1)
    weights = {name: p.detach() for name, p in model.trainable().items()}
    checkpoint = write_checkpoint(tmp_path, Snapshot(1, weights, {}, {}, {}))
    train = TrainConfig(model=config, sampler=sampler("sd"))
    lines = export(train, checkpoint, tmp_path / "out", CPU, PROMPT)
    assert all("verified" in line for line in lines)
    found = their_image(model, tmp_path / "out", "pipeline", sampler("sd"))
    torch.testing.assert_close(found, our_image(model, sampler("sd")), atol=1e-4, rtol=0)
    keys = load_file(tmp_path / "out" / "pipeline" / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in keys)  # transformers 4 finds no others


def test_merges_are_settings_of_the_command_line(sd_folder: Path, tmp_path: Path):
    given = command(tmp_path, "run", "model.merge.a.path=x", model=sd_folder)
    config, _ = compose_train([*given, "model.merge.a.scale=0.5", "model.merge.b={path: y}"])
    assert config.model.merge == {"a": MergeConfig("x", 0.5), "b": MergeConfig("y", 1.0)}
    with pytest.raises(ValueError, match=r"model\.merge\.a\.path = 'x': there is no file x; give"):
        load(config.model)
    with pytest.raises(ValueError, match=r"model\.merge\.a\.scale ?= ?0\.0 "):
        compose_train([*given, "model.merge.a.scale=0"])
    with pytest.raises(
        ValueError, match=r"model\.lora\.start=x has no effect with .*trainable=full"
    ):
        compose_train([*given, "model.lora.start=x", "model.trainable=full"])


# --- Files that do not fit


def read_into(folder: Path, path: str | Path, **lora: Any) -> None:
    load(settings(folder, start=str(path), **lora))


def test_a_file_of_another_model_matches_nothing(folders: dict[str, Path], tmp_path: Path):
    place = saved(moved(settings(folders["qwen"])), tmp_path / "lora") / DIFFUSERS
    message = (
        r"start = '.*': \d+ layers match none .*such as transformer\.transf.*"
        r"\(nearest: unet\.\S+, unet\.\S+, unet\.\S+\); train these"
    )
    with pytest.raises(ValueError, match=message):
        read_into(folders["sd"], place)
    kohya = saved(moved(settings(folders["sd3"])), tmp_path / "sd3") / KOHYA
    with pytest.raises(ValueError, match=r"layers match none .*such as lora_unet_joint_block"):
        read_into(folders["sd3"], kohya)


@pytest.mark.parametrize("use", ["start", "merge"])
def test_a_file_that_matches_in_part_is_refused_with_both_sides(
    folders: dict[str, Path], tmp_path: Path, use: str
):
    pair = (normal(4, 64), normal(64, 4), 4.0)
    given = {f"{SPELT_LAYER}_attn1_to_q": pair, f"{SPELT_LAYER}_attn1_to_z": pair}
    path = kohya_file(tmp_path / "lora.safetensors", **given)
    sides = (
        rf"1 of 2 layers match none .*such as unet\.{LAYER}.*\(nearest: .*to_q.*"
        r"\); the file lacks \d+ of the .* \d+, such as .*; "
    )
    config = settings(folders["sd"])
    if use == "start":
        config.lora.start = path
        sides = rf"model\.lora\.start.*{sides}train these"
    else:
        config.merge = {"a": MergeConfig(path)}
        sides = rf"model\.merge\.a\.path.*{sides}is the file for another"
    with pytest.raises(ValueError, match=sides):
        load(config)
    # What changes nothing may be left out.
    given[f"{SPELT_LAYER}_attn1_to_z"] = (pair[0], torch.zeros(64, 4), 4.0)
    kohya_file(tmp_path / "lora.safetensors", **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(config)


def test_layers_that_are_not_trained_are_named(folders: dict[str, Path], tmp_path: Path):
    place = saved(moved(settings(folders["sd"], PARTS["sd"])), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"8 of 48 layers match none .*such as text_encoder"):
        read_into(folders["sd"], place)


def test_what_diffusers_drops_without_a_word_is_named(folders: dict[str, Path], tmp_path: Path):
    model = moved(settings(folders["flux"], targets=DOUBLE_BLOCKS))
    file = saved(model, tmp_path / "lora") / KOHYA
    t5 = {f"lora_te2_encoder_block_0.lora_{part}.weight": normal(4, 4) for part in ("up", "down")}
    save_file({**load_file(file), **t5}, file)
    config = replace(settings(folders["flux"]), merge={"a": MergeConfig(str(file))})
    with pytest.raises(ValueError, match=r"1 of 21 layers match none .*such as lora_te2_encod"):
        load(config)


def test_ranks_and_shapes_have_to_be_those_of_the_file(folders: dict[str, Path], tmp_path: Path):
    place = saved(moved(settings(folders["sd"])), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"has rank 4 at unet\..*model\.lora\.rank = 8; set model"):
        read_into(folders["sd"], place, rank=8)
    pair = (normal(4, 65), normal(64, 4), 4.0)
    path = kohya_file(tmp_path / "lora.safetensors", **{f"{SPELT_LAYER}_attn1_to_q": pair})
    with pytest.raises(ValueError, match=r"attn1\.to_q is 64 x 65 in .* 64 x 64 in the model"):
        read_into(folders["sd"], path)


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("gone.safetensors", None, r"there is no file .*gone\.safetensors; give a \.safetensors"),
        ("", None, rf"there is no file .*{DIFFUSERS}; give"),
        ("lora.ckpt", {}, r"is no \.safetensors file; .* can run code"),
        ("damaged.safetensors", None, r"is damaged \("),
        ("empty.safetensors", {}, r"holds no layer that changes anything"),
        ("dora.safetensors", {"dora_scale": 1}, r"is no plain LoRA: 1 of its tensors .* DoRA,"),
        ("lokr.safetensors", {"lokr_w1": 1}, r"is no plain LoRA: 1 .*such as .*_attn1_to_q\.lokr"),
        ("half.safetensors", {"lora_down.weight": 1}, r"could not be read as a LoRA file of a Sta"),
    ],
)
def test_what_is_no_lora_file_is_refused(
    sd_folder: Path, tmp_path: Path, name: str, state: dict[str, int] | None, message: str
):
    tmp_path.joinpath("damaged.safetensors").write_bytes(b"0" * 100)
    if state is not None:
        tensors = {f"{SPELT_LAYER}_attn1_to_q.{key}": torch.ones(4, 4) for key in state}
        save_file(tensors, tmp_path / name)
    config = settings(sd_folder)
    config.merge = {"a": MergeConfig(str(tmp_path / name))}
    with pytest.raises(ValueError, match=message):
        load(config)


def test_older_settings_have_nothing_to_merge(sd_folder: Path, tmp_path: Path):
    _, plain = compose_train(command(tmp_path, "run", model=sd_folder))
    del plain["model"]["merge"], plain["model"]["lora"]["start"]
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(plain))
    assert load_settings(file).model == settings(sd_folder, rank=32)
