"""The original layouts: names, diffusers' own converter, and files of LDM and NeMo that load."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from tiny_sd import reference_pipeline
from torch import Tensor, nn

from sfumato.config import ModelConfig, NetworkConfig
from sfumato.models.origins.network_weights import check_start, start_network
from sfumato.models.origins.original import PREFIX, original_names
from sfumato.models.origins.unets import UNETS, construct_unet, unet_settings

State = dict[str, Tensor]
PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724}  # of stable-diffusion-v1-5 and -2-base


def small(kind: str, seed: int = 0) -> UNet2DConditionModel:
    """Return the U-Net of Stable Diffusion 1 or 2 with a tenth of its channels."""
    heads = 4 if kind == "sd1" else [2, 4, 8, 8]
    narrow = {
        "block_out_channels": [32, 64, 128, 128],
        "attention_head_dim": heads,
        "cross_attention_dim": 24,
        "norm_num_groups": 16,
        "sample_size": 8,
    }
    torch.manual_seed(seed)
    network: Any = UNet2DConditionModel.from_config({**UNETS[kind], **narrow})
    return network.eval()


def on_meta(config: str) -> Any:
    with torch.device("meta"):
        return construct_unet(unet_settings(config))


@torch.no_grad()
def prediction(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 5, 24, generator=generator)
    return network(x, torch.tensor([10, 700]), states).sample


def ldm(network: nn.Module) -> State:
    """Return a network's weights as LDM's checkpoints have them."""
    state = network.state_dict()
    return {f"{PREFIX}{name}": state[key] for key, name in original_names(state).items()}


def averaged(state: State) -> State:
    """Return LitEma's copies: names without model. and dots, beside its own counters."""
    shadow = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": 2 * tensor
        for key, tensor in state.items()
    }
    return {**shadow, "model_ema.decay": torch.tensor(0.9999)}


def nemo(network: nn.Module, prefix: str = "model.model.diffusion_model.") -> State:
    """Return a network's weights as NeMo's later checkpoints have them.

    Its group norms hold the activation, which shifts what follows them by one; each attention has
    its own norm, and the feed-forward begins with one.
    """
    rules = [
        (r"in_layers\.2\.", "in_layers.1."),
        (r"out_layers\.3\.", "out_layers.2."),
        (r"^out\.2\.", "out.1."),
        (r"transformer_blocks\.0\.norm([12])\.", r"transformer_blocks.0.attn\1.norm."),
        (r"ff\.net\.0\.proj\.", "ff.net.1.proj."),
        (r"ff\.net\.2\.", "ff.net.3."),
        (r"transformer_blocks\.0\.norm3\.", "transformer_blocks.0.ff.net.0."),
    ]
    named = {}
    for key, tensor in ldm(network).items():
        name = key.removeprefix(PREFIX)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        named[f"{prefix}{name}"] = tensor
    return named


def settings(file: Path, **network: Any) -> ModelConfig:
    start = NetworkConfig(from_pretrained=str(file), **network)
    return ModelConfig(pretrained=None, network=start, allow_pickle=True, trainable="full")


def started(kind: str, config: ModelConfig) -> UNet2DConditionModel:
    """Return another small network after it has taken what the settings name."""
    network = small(kind, seed=1)
    check_start(config)
    start_network(network, "unet", config)
    return network


# --- Names


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_published_networks_have_their_number_of_parameters(kind: str):
    network = on_meta(kind)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[kind]
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_turns_every_original_name_back(kind: str):
    network = on_meta(kind)
    state = network.state_dict()
    theirs = convert_ldm_unet_checkpoint(
        {f"{PREFIX}{name}": key for key, name in original_names(state).items()}, network.config
    )
    assert theirs == {key: key for key in state}
    assert len(theirs) == 686  # as in v1-5-pruned-emaonly.safetensors, model.diffusion_model.*


def test_names_are_those_of_the_published_checkpoint():
    # A few that a reader can look up in v1-5-pruned.safetensors.
    names = original_names(on_meta("sd1").state_dict())
    known = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "down_blocks.3.resnets.1.conv2.weight": "input_blocks.11.0.out_layers.3.weight",
        "mid_block.resnets.1.norm1.weight": "middle_block.2.in_layers.0.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "conv_norm_out.weight": "out.0.weight",
        "conv_out.bias": "out.2.bias",
    }
    assert {key: names[key] for key in known} == known


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_reads_the_original_layout_as_the_same_weights(kind: str):
    network = small(kind)
    theirs = convert_ldm_unet_checkpoint(ldm(network), network.config)
    other = small(kind, seed=1)
    assert not torch.equal(prediction(other), prediction(network))
    other.load_state_dict(theirs)
    assert torch.equal(prediction(other), prediction(network))


def test_a_network_that_ldm_cannot_name_is_refused():
    with pytest.raises(ValueError, match=r"no name for add_embedding.linear_1; it is for Stable"):
        original_names(["down_blocks.0.resnets.0.norm1.weight", "add_embedding.linear_1.weight"])
    odd = ["down_blocks.0.resnets.0.norm1.weight", "down_blocks.1.resnets.1.norm1.weight"]
    odd.append("down_blocks.1.resnets.0.norm1.weight")
    with pytest.raises(ValueError, match=r"levels of \[1, 2\] residual blocks"):
        original_names(odd)


# --- Files


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("suffix", ["ckpt", "pt", "safetensors"])
def test_an_ldm_checkpoint_gives_the_same_prediction(tmp_path: Path, kind: str, suffix: str):
    network, file = small(kind), tmp_path / f"model.{suffix}"
    rest = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1), "betas": torch.zeros(3)}
    state = {**ldm(network), **rest}
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "global_step": 7}, file)
    assert torch.equal(prediction(started(kind, settings(file))), prediction(network))


@pytest.mark.parametrize(
    ("prefix", "stated"),
    [
        ("model.model.diffusion_model.", None),
        ("model.model.diffusion_model.", True),
        ("model.diffusion_model.", None),
        ("model.model._orig_mod.diffusion_model.", None),
        ("model.model.diffusion_model._orig_mod.", True),
        ("", None),
    ],
)
def test_a_nemo_checkpoint_gives_the_same_prediction(
    tmp_path: Path, prefix: str, stated: bool | None
):
    network, file = small("sd2"), tmp_path / "model.ckpt"
    torch.save({"state_dict": nemo(network, prefix)}, file)
    found = started("sd2", settings(file, from_NeMo=stated))
    assert torch.equal(prediction(found), prediction(network))


def test_older_nemo_checkpoints_have_the_names_of_ldm(tmp_path: Path):
    network, file = small("sd1"), tmp_path / "model.ckpt"
    state = {f"model.{key}": tensor for key, tensor in ldm(network).items()}
    torch.save({"state_dict": state}, file)
    found = started("sd1", settings(file, from_NeMo=True))
    assert torch.equal(prediction(found), prediction(network))


def test_averaged_weights_are_taken_where_they_are_asked_for(tmp_path: Path):
    network, file = small("sd1"), tmp_path / "model.safetensors"
    save_file({**ldm(network), **averaged(ldm(network))}, file)
    plain, average = (started("sd1", settings(file, ema=ema)) for ema in (False, True))
    for name, tensor in network.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)
        assert torch.equal(average.state_dict()[name], 2 * tensor)


def test_averages_of_some_tensors_are_not_taken_and_this_is_said(tmp_path: Path):
    network, file = small("sd1"), tmp_path / "model.safetensors"
    partial = averaged(ldm(network))
    del partial[next(iter(partial))]
    save_file({**ldm(network), **partial}, file)
    with pytest.warns(UserWarning, match="the averages in this file lack .*plain weights"):
        found = started("sd1", settings(file, ema=True))
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


class Callback:
    """Something that Lightning would have pickled beside the weights."""

    def __init__(self) -> None:
        self.best = 3


def test_objects_beside_the_weights_are_left_out(tmp_path: Path):
    network, file = small("sd1"), tmp_path / "model.ckpt"
    torch.save({"state_dict": ldm(network), "callbacks": {Callback: {"a": Callback()}}}, file)
    assert torch.equal(prediction(started("sd1", settings(file))), prediction(network))


class Harm:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.system, (f"touch {self.place}",)


def test_a_pickle_runs_nothing(tmp_path: Path):
    file, place = tmp_path / "model.ckpt", tmp_path / "harmed"
    torch.save({"state_dict": ldm(small("sd1")), "harm": Harm(place)}, file)
    with pytest.raises(ValueError, match=r"model.ckpt cannot be read .*save only the weights"):
        started("sd1", settings(file))
    assert not place.exists()
    torch.load(file, weights_only=False)
    assert place.exists()  # it would have


def test_a_pickle_is_refused_unless_it_is_allowed(tmp_path: Path):
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": ldm(small("sd1"))}, file)
    config = settings(file)
    config.allow_pickle = False
    with pytest.raises(ValueError, match=r"from_pretrained = .* model.ckpt is a pickle.*allow_pi"):
        check_start(config)
    with pytest.raises(ValueError, match=r"set model.allow_pickle=true"):
        start_network(small("sd1"), "unet", config)


def test_what_does_not_fit_is_listed(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    state = ldm(small("sd1"))
    lost = [key for key in state if "middle_block.0." in key][:12]
    for key in lost:
        del state[key]
    state[f"{PREFIX}label_emb.0.0.weight"] = torch.zeros(2)
    state[f"{PREFIX}out.2.bias"] = torch.zeros(9)
    save_file(state, file)
    with pytest.raises(ValueError) as caught:
        started("sd1", settings(file))
    shown = ", ".join(key.removeprefix(PREFIX) for key in lost[:3])
    message = str(caught.value)
    assert message.startswith(f"model.network.from_pretrained = {str(file)!r} does not fit")
    assert f"{len(lost)} weights are missing ({shown}, ...);" in message
    assert "1 weights are unexpected (label_emb.0.0.weight);" in message
    assert "1 weights are of another shape (out.2.bias: (9,) in the file, (4,) " in message
    assert len(lost) == 10


def test_missing_nemo_names_are_listed(tmp_path: Path):
    file, state = tmp_path / "model.ckpt", nemo(small("sd1"))
    dropped = [key for key in state if ".in_layers.1." in key]
    torch.save({"state_dict": {key: t for key, t in state.items() if key not in dropped}}, file)
    with pytest.raises(ValueError, match=rf"{len(dropped)} weights are missing \(input_blocks.1.0"):
        started("sd1", settings(file))
    assert len(dropped) == 44
    stated = settings(file, from_NeMo=False)
    with pytest.raises(ValueError, match=r"unexpected \(input_blocks.1.1.*attn1.norm.weight"):
        started("sd1", stated)


def test_a_network_of_another_kind_does_not_load(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file(ldm(small("sd2")), file)
    with pytest.raises(ValueError, match=r"32 weights are of another shape .*proj_in.weight: \(32"):
        started("sd1", settings(file))


def test_names_of_diffusers_load_as_they_are(tmp_path: Path):
    network, file = small("sd2"), tmp_path / "unet.safetensors"
    save_file(network.state_dict(), file)
    assert torch.equal(prediction(started("sd2", settings(file))), prediction(network))
    with pytest.raises(ValueError, match=r"has the names of diffusers, and .*from_NeMo = true"):
        started("sd2", settings(file, from_NeMo=True))


def test_transformer_engines_layers_are_refused(tmp_path: Path):
    file, state = tmp_path / "model.ckpt", nemo(small("sd1"))
    renamed = {key.replace(".ff.net.1.proj.", ".ff.net.fc1_"): t for key, t in state.items()}
    torch.save({"state_dict": renamed}, file)
    with pytest.raises(ValueError, match=r"layers of Transformer Engine's FP8 modules"):
        started("sd1", settings(file))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.nemo", b"x", "model.nemo is no file of weights.*a .nemo is a tar: unpack it"),
        ("model.safetensors", b"x", "model.safetensors is damaged"),
        ("model.ckpt", b"not a pickle", "model.ckpt cannot be read"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, content: bytes, expected: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        started("sd1", settings(tmp_path / name))


def test_a_diffusers_folder_gives_its_network(tmp_path: Path, sd_folder: Path):
    from tiny_sd import reference_pipeline

    theirs = reference_pipeline(sd_folder).unet
    for place in (sd_folder, sd_folder / "unet"):
        network: Any = UNet2DConditionModel.from_config(theirs.config)
        start_network(network, "unet", settings(place))
        saved = load_file(sd_folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensor, saved[key]) for key, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match=r"holds no network; give a run folder or one of its"):
        check_start(settings(sd_folder / "vae" / ".." / "tokenizer"))
    sharded = tmp_path / "unet"
    theirs.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    network = UNet2DConditionModel.from_config(theirs.config)
    start_network(network, "unet", settings(sharded))
    assert all(torch.equal(tensor, saved[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("size", ["100KB", "10GB"])
def test_a_variant_of_a_diffusers_folder_gives_its_network(
    tmp_path: Path, sd_folder: Path, size: str
) -> None:
    theirs: Any = reference_pipeline(sd_folder).unet
    theirs.save_pretrained(tmp_path / "unet")
    theirs.conv_in.bias.data += 1
    theirs.save_pretrained(tmp_path / "unet", max_shard_size=size, variant="fp16")
    network: Any = UNet2DConditionModel.from_config(theirs.config)
    config = replace(settings(tmp_path / "unet"), variant="fp16")
    start_network(network, "unet", config)
    assert torch.equal(network.conv_in.bias, theirs.conv_in.bias)


def test_averages_of_a_diffusers_folder_are_left_where_they_are_not_asked_for(
    tmp_path: Path, sd_folder: Path
) -> None:
    theirs: Any = reference_pipeline(sd_folder).unet
    bias = theirs.conv_in.bias.detach().clone()
    theirs.save_pretrained(tmp_path / "unet")
    theirs.conv_in.bias.data += 1
    theirs.save_pretrained(tmp_path / "unet", variant="non_ema")
    for ema, more in ((True, 0), (False, 1)):
        network: Any = UNet2DConditionModel.from_config(theirs.config)
        start_network(network, "unet", settings(tmp_path / "unet", ema=ema))
        assert torch.equal(network.conv_in.bias, bias + more)
