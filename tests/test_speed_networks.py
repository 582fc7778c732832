"""Channels last, compiled blocks, and counted FLOPs: faster or measured, and the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import assert_same_state, command, last_state, metrics, start
from tiny_sd import load_tiny_sd
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from toy import ToyModel

from sfumato.compose import compose_train
from sfumato.config import ModelConfig, TrainConfig, TrainingConfig
from sfumato.training.checkpoint import Snapshot
from sfumato.training.compiling import arrange, lay_channels_last, repeated_blocks
from sfumato.training.distribution import Distribution, like
from sfumato.training.flops import FlopCounter, Meter, attention_flops, peak_by_name
from sfumato.training.optimizer import build_optimizer
from sfumato.training.sharding import check_sharding

FULL = (
    "model.trainable=full",
    "sampler.guidance_scale=1.0",
    "sampler.num_inference_steps=2",
    "training.max_steps=4",
    "validation.every_steps=2",
    "optimizer.lr=1e-3",
    "optimizer.eps=1e-4",  # where a gradient is rounding alone, 1e-8 would make a step of it
)
LAST = "model.channels_last=true"


def assert_close(found: Snapshot, expected: Snapshot) -> None:
    for part in ("weights", "ema"):
        ours, theirs = vars(found)[part], vars(expected)[part]
        assert ours.keys() == theirs.keys()
        difference = sum((ours[n] - t).square().sum() for n, t in theirs.items())
        assert difference.sqrt() <= 1e-5 * sum(t.square().sum() for t in theirs.values()).sqrt()


# --- Channels last


def test_channels_last_changes_nothing_beyond_rounding(tmp_path: Path, sd_folder: Path) -> None:
    """The losses, the weights, the files' layout; and the export is what diffusers loads."""
    start(command(tmp_path, "usual", *FULL, model=sd_folder))
    start(command(tmp_path, "last", *FULL, LAST, "verify=true", model=sd_folder))
    for left, right in zip(metrics(tmp_path / "last"), metrics(tmp_path / "usual"), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)
    found, expected = last_state(tmp_path / "last"), last_state(tmp_path / "usual")
    assert_close(found, expected)
    for name, weight in expected.weights.items():
        assert found.weights[name].stride() == weight.stride()
    assert (
        "(verified: diffusers gives the same image"
        in (tmp_path / "last" / "export.json").read_text()
    )


def test_channels_last_is_resumed_bitwise(tmp_path: Path, sd_folder: Path) -> None:
    start(command(tmp_path, "whole", *FULL, LAST, model=sd_folder))
    start(command(tmp_path, "run", *FULL, LAST, "training.max_steps=2", model=sd_folder))
    start(command(tmp_path, "run", *FULL, LAST, model=sd_folder))
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_convolutions_of_network_and_autoencoder_are_laid_out(sd_folder: Path) -> None:
    model = load_tiny_sd(sd_folder)
    kept = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    arrange(model, TrainConfig(model=ModelConfig(channels_last=True)))
    for network in (model.network, model.pipeline.vae):
        weights = [p for p in network.parameters() if p.ndim == 4]
        assert len(weights) > 10
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, kept[name])
    assert not model.network.conv_in.weight.is_contiguous()


def test_adamw_takes_moments_laid_out_as_the_weights() -> None:
    """Fused AdamW pairs numbers by their places in memory; restored moments must share them."""
    config, gradients = compose_optimizer(), torch.randn(3, 4, 3, 3, 3)
    finals = []
    for last in (False, True):
        conv = nn.Conv2d(3, 4, 3, bias=False)
        nn.init.constant_(conv.weight, 0.1)
        if last:
            lay_channels_last(conv)
        optimizer = build_optimizer([conv.weight], config)
        for gradient in gradients:
            conv.weight.grad = like(gradient, conv.weight)
            optimizer.step()
            moments = optimizer.state[conv.weight]
            for kind in ("exp_avg", "exp_avg_sq"):  # as through a file
                moments[kind] = like(moments[kind].contiguous(), conv.weight)
        finals.append(conv.weight.detach().contiguous())
    assert torch.equal(*finals)


def compose_optimizer() -> Any:
    return TrainConfig().optimizer


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.channels_last=true", r"model.channels_last=true.* training.strategy=fsdp"),
        ("training.compile=full", r"training.compile=full.* training.strategy=fsdp"),
    ],
)
def test_what_sharding_cannot_do_is_refused(sd_folder: Path, setting: str, said: str) -> None:
    config, _ = compose_train(
        [
            f"model.pretrained={sd_folder}",
            "objective=supervised",
            "data.images.path=.",
            "training.strategy=fsdp",
            setting,
        ]
    )
    with pytest.raises(ValueError, match=said):
        check_sharding(config, 2)


# --- Compiled


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compile up to the graphs of forward and backward, but not to C++; give what is compiled."""
    found: list[str] = []
    original = nn.Module.compile

    def compile_graphs(self: nn.Module, **settings: Any) -> None:
        found.append(type(self).__name__)
        original(self, backend="aot_eager", **settings)

    monkeypatch.setattr(nn.Module, "compile", compile_graphs)
    return found


@pytest.mark.nightly
def test_compiled_blocks_train_like_the_others(
    tmp_path: Path, sd_folder: Path, captured: list[str]
) -> None:
    """Adapters on for the policy, off for the reference, activations recomputed, and resumed."""
    from torch._dynamo.utils import counters

    short = ["sampler.guidance_scale=1.0", "sampler.num_inference_steps=1", "model.lora.rank=2"]
    short += ["training.max_steps=2", "validation.num_images=1", "objective.kl_coeff=0.5"]
    short += ["model.gradient_checkpointing=true", "optimizer.eps=1e-4"]
    short += ["validation.every_steps=0", "training.checkpoint_every_steps=1"]
    compiled = [*short, "training.compile=regional"]
    start(command(tmp_path, "usual", *short, model=sd_folder))
    counters.clear()
    start(command(tmp_path, "fast", *compiled, model=sd_folder))
    assert set(captured) == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert counters["stats"]["unique_graphs"] >= len(captured)
    assert not counters["graph_break"]
    for left, right in zip(metrics(tmp_path / "fast"), metrics(tmp_path / "usual"), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)
    found, expected = last_state(tmp_path / "fast"), last_state(tmp_path / "usual")
    assert_close(found, expected)
    assert metrics(tmp_path / "fast")[2]["kl"] > 0
    assert found.state["flops"] > 0
    start(command(tmp_path, "again", *compiled, "training.max_steps=1", model=sd_folder))
    start(command(tmp_path, "again", *compiled, model=sd_folder))
    assert last_state(tmp_path / "again").state == found.state
    assert_close(last_state(tmp_path / "again"), found)


def test_compiling_keeps_the_names_of_weights(sd_folder: Path) -> None:
    for how in ("regional", "full"):
        model = load_tiny_sd(sd_folder, ModelConfig(str(sd_folder), trainable="full"))
        names = list(model.trained.state_dict())
        arrange(model, TrainConfig(training=TrainingConfig(compile=how)))
        assert list(model.trained.state_dict()) == names
        compiled = [m for m in model.network.modules() if m._compiled_call_impl is not None]
        blocks = repeated_blocks(model.network, model.repeated)
        assert len(blocks) > 5
        assert compiled == (blocks if how == "regional" else [model.network])


def test_a_model_of_a_script_is_laid_out_and_compiled_whole(captured: list[str]) -> None:
    model = ToyModel(ModelConfig())
    model.reference.add_module("convolution", nn.Conv2d(3, 4, 3))
    settings = ModelConfig(channels_last=True), TrainingConfig(compile="full")
    arrange(model, TrainConfig(model=settings[0], training=settings[1]))
    kernel = model.reference.get_parameter("convolution.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert captured == ["ToyNetwork", "ToyNetwork"]


def test_a_network_without_known_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"regional knows no repeated blocks of ToyNetwork"):
        config = TrainConfig(training=TrainingConfig(compile="regional"))
        arrange(ToyModel(ModelConfig()), config)


# --- Counted


class Attention(nn.Module):
    """Two projections around attention; the first one's input has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 3 * 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("recomputed", [False, True])
def test_flops_are_those_of_the_formulas(recomputed: bool) -> None:
    """2 b n i o of a layer forward, as much for each gradient; of attention 4 b n^2 w, and twice.

    What is outside the network, or computed again, does not count.
    """
    network, outside, x = Attention(), nn.Linear(8, 8).requires_grad_(False), torch.randn(2, 5, 8)
    counter = FlopCounter([network])
    with counter.counting():
        x = outside(x)
        hidden = checkpoint(network, x, use_reentrant=False) if recomputed else network(x)
        hidden.sum().backward()
    first, last, attention = 2 * 2 * 5 * 8 * 24, 2 * 2 * 5 * 8 * 4, 4 * 2 * 5 * 5 * 8
    assert counter.flops == 2 * first + 3 * last + 3 * attention
    network(x)
    assert counter.flops == 2 * first + 3 * last + 3 * attention


@pytest.mark.parametrize("recomputed", [False, True])
def test_flops_of_a_u_net_are_those_that_torch_counts(sd_folder: Path, recomputed: bool) -> None:
    """With attention as plain products, where torch's counter recomputes nothing either."""
    settings = ModelConfig(str(sd_folder), trainable="full", gradient_checkpointing=recomputed)
    model = load_tiny_sd(sd_folder, settings)
    plain = load_tiny_sd(sd_folder, ModelConfig(str(sd_folder), trainable="full"))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.randn(2, 7, width(plain))
    counter = FlopCounter([model.network])
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as torchs:
            plain.network.train()(*inputs).sample.sum().backward()
        with counter.counting():
            model.network.train()(*inputs).sample.sum().backward()
    assert counter.flops == torchs.get_total_flops() > 1e6


def width(model: Any) -> int:
    return model.network.config.cross_attention_dim


def test_rates_are_of_one_device(sd_folder: Path) -> None:
    model = load_tiny_sd(sd_folder, ModelConfig(str(sd_folder), trainable="full"))
    training = TrainingConfig(global_batch_size=8, micro_batch_size=2, peak_tflops=100.0)
    distribution = Distribution(training)
    distribution.world = 4
    meter = Meter(model, training, distribution)
    assert meter.rates(2.0) == {"images_per_second": 4.0, "seconds_per_step": 2.0}
    meter.flops = 3e12
    rates = meter.rates(2.0)
    assert rates["tflops_per_second"] == pytest.approx(8 * 3 / 4 / 2)
    assert rates["mfu"] == pytest.approx(8 * 3 / 4 / 2 / 100)
    distribution.close()


def test_devices_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H200": 989.0,
        "NVIDIA B200": 2250.0,
        "Tesla T4": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_by_name(torch.device("cuda", 0)) == peak
    assert peak_by_name(torch.device("cpu")) is None


def test_every_step_tells_its_throughput(tmp_path: Path, sd_folder: Path) -> None:
    import json

    short = ["training.max_steps=2", "training.peak_tflops=0.5", "validation.num_images=1"]
    start(command(tmp_path, "run", *FULL, *short, model=sd_folder))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1:]
    for row in map(json.loads, lines):
        assert 0 <= row["data_wait"] < row["seconds_per_step"]
        assert row["images_per_second"] == pytest.approx(4 / row["seconds_per_step"])
        assert row["mfu"] == pytest.approx(row["tflops_per_second"] / 0.5)
        assert 1e-6 < row["tflops_per_second"] < 1


def test_attention_is_counted_by_the_shapes_of_queries_keys_and_values() -> None:
    query, key, value = torch.empty(2, 3, 5, 8), torch.empty(2, 3, 7, 8), torch.empty(2, 3, 7, 4)
    assert attention_flops(query, key, value) == 2 * (2 * 3) * (5 * 8 * 7 + 5 * 7 * 4)
