"""Policy and reference are compared in float32 where they predict in half precision."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import pytest
import torch
from families import WRITERS
from nightly import nightly_but
from torch import Tensor

from sfumato.config import DraftConfig, ModelConfig, SamplerConfig
from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel
from sfumato.models.registry import load_model
from sfumato.objectives.draft import Draft
from sfumato.precision import in_float32, is_rounded
from sfumato.rewards.reward import Reward, Score

pytestmark = pytest.mark.usefixtures("unchecked")  # tests/test_draft.py checks them
PROMPTS = ["a red ring", "a blue star on a yellow background"]
SEEDS = [3, 4]
TIMES = [1.0, 0.5, 0.0]  # bfloat16 has 500 and 8,000, which Flux reads as time and guidance
GUIDANCE = 8.0
SIDE = 64  # pixels; of their own size, transformers attend to 4,096 tokens
SCALE = 2.0**16  # float16 has no smaller gradients
SIZES = {  # of adapters whose divergence is near 1e-6, and near 1e-2
    "stable_diffusion": (0.0054, 0.053),
    "stable_diffusion_xl": (0.0128, 0.128),
    "stable_diffusion_3": (0.0077, 0.077),
    "flux": (0.0082,),
    "qwen_image": (0.0078,),
}
BF16, FP16 = torch.bfloat16, torch.float16


@final
class Nothing(Reward):
    """A reward without a gradient of its own."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        return Score(images.mean((1, 2, 3)) * 0, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the tiny pipeline of a family, written once."""

    def write(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"precision_{family}"
        if not path.exists():
            WRITERS[family](path)
        return path

    return write


def load(path: Path, **settings: Any) -> TextToImageModel:
    """Return a model whose weights are numbers that both half precisions have."""
    model = load_model(ModelConfig(pretrained=str(path), **settings))
    with torch.no_grad():
        for name, network in model.networks().items():
            for parameter in network.parameters() if name != "vae" else ():
                parameter.copy_(parameter.bfloat16().half().bfloat16())
    return model


def tune(models: Sequence[TextToImageModel], size: float) -> None:
    """Draw what is trained from a seed, alike in all models."""
    for model in models:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def store(model: TextToImageModel, dtype: torch.dtype | None) -> None:
    """Store the frozen weights in half precision."""
    for name, network in model.networks().items():
        for parameter in network.parameters() if dtype and name != "vae" else ():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def divergence(
    model: TextToImageModel, monkeypatch: pytest.MonkeyPatch, autocast: torch.dtype | None = None
) -> tuple[float, Tensor]:
    """Return the divergence in the last of two steps, and its gradient."""
    monkeypatch.setattr(model, "times", lambda *_: TIMES)
    objective = Draft(
        DraftConfig(kl_coeff=1.0), SamplerConfig(2, GUIDANCE, height=SIDE, width=SIDE), Nothing()
    )
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = objective.loss(model, PROMPTS, Rng(SEEDS))
    gradients = torch.autograd.grad(loss.value * SCALE, list(model.trainable().values()))
    gradient = torch.cat([each.float().flatten() for each in gradients])
    return float(loss.metrics["kl"]), gradient / SCALE


def assert_alike(expected: tuple[float, Tensor], found: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=0.05)
    assert float(torch.cosine_similarity(expected[1], found[1], 0)) > 0.99
    assert float(found[1].norm() / expected[1].norm()) == pytest.approx(1, rel=0.05)


HALVES = [
    *((family, BF16, BF16) for family in WRITERS),
    ("stable_diffusion", None, BF16),
    ("stable_diffusion_3", BF16, None),
    ("stable_diffusion", FP16, FP16),
]


@pytest.mark.parametrize(
    ("family", "stored", "autocast"), nightly_but([*HALVES[1:5], HALVES[-1]], HALVES)
)
def test_divergence_in_half_precision_is_that_of_float32(
    folder: Callable[[str], Path],
    family: str,
    stored: torch.dtype | None,
    autocast: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
):
    exact, model = (load(folder(family)) for _ in range(2))
    store(model, stored)
    found = []
    for size in SIZES[family]:
        tune((exact, model), size)
        expected = divergence(exact, monkeypatch)
        assert_alike(expected, divergence(model, monkeypatch, autocast))
        found.append(expected[0])
    assert 3e-7 < found[0] < 3e-6
    assert all(3e-3 < each < 3e-2 for each in found[1:])


def test_divergence_of_trained_encoders_in_half_precision_is_that_of_float32(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    settings: dict[str, Any] = {"parts": ["network", "text_encoder"]}
    exact, model = (load(folder("stable_diffusion"), **settings) for _ in range(2))
    store(model, BF16)
    tune((exact, model), 0.005)
    assert_alike(divergence(exact, monkeypatch), divergence(model, monkeypatch, BF16))


def test_weights_and_switches_are_as_before(folder: Callable[[str], Path]):
    model = load(folder("stable_diffusion"))
    store(model, BF16)
    network: Any = model.networks()["policy"]
    dtypes = [parameter.dtype for parameter in network.parameters()]
    before = torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", BF16), in_float32(model.device):
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.backends.cudnn.allow_tf32
        layer = torch.nn.Linear(2, 2, dtype=BF16)
        assert layer(torch.ones(1, 2)).dtype == torch.float32
    assert [parameter.dtype for parameter in network.parameters()] == dtypes
    assert (torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")) == before


def test_autocast_and_stored_weights_round(folder: Callable[[str], Path]):
    model = load(folder("stable_diffusion"))
    network = model.networks()["policy"]
    assert not is_rounded(network)
    with torch.autocast("cpu", BF16):
        assert is_rounded(network)
    store(model, FP16)
    assert is_rounded(network)
