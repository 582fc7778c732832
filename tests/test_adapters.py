"""Adapters: on exactly the layers stated, nothing at the start, the same when merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from tiny_sd import load_tiny_sd, perturb_adapters, unet_parameters
from torch import Tensor, nn

from sfumato.config import LoraConfig, ModelConfig
from sfumato.models.adapters import CopyRoles, LoraRoles
from sfumato.models.stable_diffusion import UNET_LINEAR


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unet(sd_folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet").eval()


def attention_and_feed_forward(unet: nn.Module) -> set[str]:
    """Name the linear layers of diffusers' attention and feed-forward classes."""
    wanted: set[nn.Module] = set()
    for module in unet.modules():
        if isinstance(module, Attention):
            wanted |= {module.to_q, module.to_k, module.to_v, module.to_out[0]}  # type: ignore
        if isinstance(module, FeedForward):
            wanted |= {inner for inner in module.modules() if isinstance(inner, nn.Linear)}
    return {name for name, module in unet.named_modules() if module in wanted}


@torch.no_grad()
def run(network: Any, seed: int = 0) -> Tensor:
    x_t, states = normal(2, 4, 8, 8, seed=seed), normal(2, 77, 32, seed=seed + 1)
    return network(x_t, torch.tensor(500), states).sample


def test_default_targets_are_attention_and_feed_forward_with_rank_32(unet: Any):
    wanted = attention_and_feed_forward(unet)
    sizes = {name: unet.get_submodule(name).weight.shape for name in wanted}
    roles = LoraRoles(unet, LoraConfig(), UNET_LINEAR)
    shapes = {n: p.shape for n, p in unet.named_parameters() if p.requires_grad}
    assert len(wanted) == 4 * (2 * 4 + 2)  # blocks of self- and cross-attention and feed-forward
    assert shapes == {
        f"{name}.{part}.default.weight": (32, size[1]) if part == "lora_A" else (size[0], 32)
        for name, size in sizes.items()
        for part in ("lora_A", "lora_B")
    }
    assert roles.networks() == (unet,)


def test_adapters_change_nothing_at_the_start(unet: Any):
    before = run(unet)
    roles = LoraRoles(unet, LoraConfig(), UNET_LINEAR)
    for role in ("policy", "reference"):
        with roles.acting(role) as network:
            assert torch.equal(run(network), before)
    drawn = [p for n, p in unet.named_parameters() if "lora_A" in n]
    assert all(parameter.abs().max() > 0 for parameter in drawn)


def test_chosen_targets(unet: Any):
    LoraRoles(unet, LoraConfig(rank=2), [r".*attn2\.to_k", r"mid_block.*\.ff\.net\.2"])
    found = {n.partition(".lora")[0] for n, p in unet.named_parameters() if p.requires_grad}
    expected = {n for n, _ in unet.named_modules() if n.endswith("attn2.to_k")}
    assert found == expected | {"mid_block.attentions.0.transformer_blocks.0.ff.net.2"}
    assert len(expected) == 4


def test_targets_that_match_nothing_are_refused_with_names_that_exist(unet: Any):
    with pytest.raises(ValueError) as caught:
        LoraRoles(unet, LoraConfig(), [".*to_q", "attn.qkv"])
    assert "model.lora.targets: attn.qkv match no layer of UNet2DCond" in str(caught.value)
    assert "'time_embedding.linear_1'" in str(caught.value)


@pytest.mark.parametrize("alpha", [None, 4.0, 1.0])
def test_scaling_is_alpha_over_rank(sd_folder: Path, unet: Any, alpha: float | None):
    lora = LoraConfig(rank=4, alpha=alpha)
    model = load_tiny_sd(sd_folder, ModelConfig(str(sd_folder), lora=lora))
    perturb_adapters(model)
    weights = {n: p.detach() for n, p in unet_parameters(model).items()}
    with torch.no_grad():
        for name in attention_and_feed_forward(unet):
            down, up = (weights[f"{name}.lora_{x}.default.weight"] for x in "AB")
            unet.get_submodule(name).weight += (1.0 if alpha is None else alpha / 4) * up @ down
    assert isinstance(model.roles, LoraRoles)
    with model.roles.acting("policy") as network:
        torch.testing.assert_close(run(network), run(unet), atol=1e-5, rtol=1e-5)
    merged = model.roles.merged()
    torch.testing.assert_close(merged.state_dict(), unet.state_dict(), atol=1e-6, rtol=1e-6)

    # The file says it with alpha = rank.
    state = model.roles.adapter_state()
    assert len(state) == len(weights)
    for name in attention_and_feed_forward(unet):
        delta = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        base = load_file(sd_folder / "unet" / "diffusion_pytorch_model.safetensors")
        found = unet.get_submodule(name).weight - base[f"{name}.weight"]
        torch.testing.assert_close(delta, found, atol=1e-6, rtol=1e-6)


def test_merged_network_is_plain_and_another_one(sd_folder: Path):
    model = load_tiny_sd(sd_folder)
    perturb_adapters(model)
    assert isinstance(model.roles, LoraRoles)
    merged = model.roles.merged()
    plain = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sd_folder / "unet"))
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in plain.named_modules()]  # type: ignore[union-attr]
    with model.roles.acting("policy") as network:
        expected = run(network)
        torch.testing.assert_close(run(merged), expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            for parameter in merged.parameters():
                parameter.zero_()
        assert torch.equal(run(network), expected)


def test_reference_ends_with_its_context_even_after_an_error(sd_folder: Path):
    model = load_tiny_sd(sd_folder)
    perturb_adapters(model)
    with model.roles.acting("policy") as network:
        policy = run(network)
    with pytest.raises(RuntimeError, match="inside"), model.roles.acting("reference") as network:
        assert not torch.equal(run(network), policy)
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")
    with model.roles.acting("policy") as network:
        assert torch.equal(run(network), policy)
    assert all(p.requires_grad for n, p in model.network.named_parameters() if "lora_" in n)


def test_dropout_acts_on_the_adapters_in_training_mode_only(sd_folder: Path):
    lora = LoraConfig(rank=4, dropout=0.5)
    dropping = load_tiny_sd(sd_folder, ModelConfig(str(sd_folder), lora=lora))
    without = load_tiny_sd(sd_folder, ModelConfig(str(sd_folder), lora=LoraConfig(rank=4)))
    for model in (dropping, without):
        perturb_adapters(model)
    torch.manual_seed(0)
    roles = dropping.roles
    with without.roles.acting("policy") as network:
        expected = run(network)
    with roles.acting("policy") as network:
        assert torch.equal(run(network), expected)  # as loaded: evaluation mode
        network.train()
        draws = run(network), run(network)
        assert not torch.equal(*draws)
        network.eval()
        assert torch.equal(run(network), expected)
    dropping.network.train()
    with roles.acting("reference") as network, without.roles.acting("reference") as other:
        assert torch.equal(run(network), run(other))


def test_frozen_copy_does_not_follow_the_policy(unet: Any):
    before = run(unet)
    roles = CopyRoles(unet)
    assert roles.networks()[0] is unet
    with torch.no_grad():
        for parameter in roles.policy.parameters():
            parameter *= 1.1
    with roles.acting("reference") as network:
        assert torch.equal(run(network), before)
    with roles.acting("policy") as network:
        moved = run(network)
    assert not torch.equal(moved, before)
    merged = roles.merged()
    assert merged is not unet
    assert torch.equal(run(merged), moved)


def perturb(roles: LoraRoles) -> None:
    with torch.no_grad():
        for i, layer in enumerate(roles.layers):
            layer.lora_B["default"].weight.copy_(
                0.1 * normal(*layer.lora_B["default"].weight.shape, seed=i)
            )


def test_merged_in_place_predicts_the_same_and_gives_the_weights_back(unet: Any):
    roles = LoraRoles(unet, LoraConfig(rank=4), UNET_LINEAR)
    perturb(roles)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    plain = run(unet)
    with roles.acting("reference"):
        base = run(unet)
    with roles.merged_in_place():
        merged = run(unet)
    assert float((plain - base).square().mean().sqrt()) > 1e-3
    rms = float(plain.square().mean().sqrt())
    assert float((merged - plain).square().mean().sqrt()) < 1e-5 * rms
    assert torch.equal(run(unet), plain)
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, before[name])


def test_merging_into_half_precision_is_refused(unet: Any):
    roles = LoraRoles(unet.to(torch.bfloat16), LoraConfig(rank=4), UNET_LINEAR)
    perturb(roles)
    with pytest.raises(ValueError, match="rounds merged weights"), roles.merged_in_place():
        pass
