"""DRaFT+ with each differentiable reward, on the tiny pipeline of each family."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from families import PIXELS, WRITERS
from tiny_aesthetic import write_head, write_tiny_siglip
from tiny_classifiers import write_classifier
from tiny_clip import write_tiny_clip
from tiny_hps import write_tiny_hps
from tiny_hpsv3 import write_tiny_hpsv3
from tiny_image_reward import write_tiny_image_reward

from sfumato.compose import compose_train
from sfumato.config import LoraConfig, ModelConfig
from sfumato.diffusion.randomness import Rng
from sfumato.models.model import TextToImageModel
from sfumato.models.registry import load_model
from sfumato.run.build import build_objective, build_scorer

PROMPTS = ["a red star", "a blue ring"]
REWARDS: Mapping[str, tuple[str, ...]] = {
    "pickscore": ("reward=clip", "reward.pretrained={0}/clip", "reward.score=model_over_26"),
    "clipscore": ("reward=clip", "reward.pretrained={0}/clip", "reward.score=clipscore"),
    "clip_iqa": ("reward=clip_iqa", "reward.pretrained={0}/clip"),
    "hpsv2": ("reward=hpsv2", "reward.pretrained={0}/hps", "reward.processor={0}/clip"),
    "hpsv3": (
        "reward=hpsv3",
        "reward.pretrained={0}/qwen",
        "reward.processor={0}/qwen",
        "reward.dtype=float32",
    ),
    "image_reward": (
        "reward=image_reward",
        "reward.pretrained={0}/blip",
        "reward.processor={0}/blip",
    ),
    "aesthetic 2": (
        "reward=aesthetic",
        "reward.pretrained={0}/clip",
        "reward.predictor={0}/2.pth",
    ),
    "aesthetic 2.5": (
        "reward=aesthetic",
        "reward.pretrained={0}/siglip",
        "reward.predictor={0}/2.5.pth",
    ),
    "classifier": ("reward=classifier", "reward.pretrained={0}/resnet", "reward.label=tabby"),
    "function": ("reward=function", "reward.path={0}/own.py:score"),
    "several": (
        "reward=weighted",
        "reward.gradients=equalised",
        "reward.parts.a.kind=clip",
        "reward.parts.a.pretrained={0}/clip",
        "reward.parts.b.kind=color",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of all rewards."""
    place = tmp_path_factory.mktemp("rewards")
    write_tiny_clip(place / "clip")
    write_tiny_siglip(place / "siglip")
    write_tiny_hps(place / "hps")
    write_tiny_hpsv3(place / "qwen")
    write_tiny_image_reward(place / "blip")
    write_classifier(place / "resnet", "resnet")
    for version in ("2", "2.5"):
        write_head(place / f"{version}.pth", version)
    source = "def score(images, prompts):\n    return images.square().mean((1, 2, 3))\n"
    (place / "own.py").write_text(source)
    return place


@pytest.fixture(scope="module", params=list(WRITERS))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TextToImageModel]:
    place = tmp_path_factory.mktemp("families") / request.param
    WRITERS[request.param](place)
    torch.manual_seed(0)
    yield load_model(ModelConfig(pretrained=str(place), lora=LoraConfig(rank=2)))


@pytest.mark.parametrize("reward", REWARDS)
def test_two_steps_of_draft_plus(model: TextToImageModel, folder: Path, reward: str) -> None:
    """Gradients are finite and not all zero; the KL is 0 at first, and more after a step."""
    given = [text.format(folder) for text in REWARDS[reward]]
    size = [f"sampler.height={PIXELS}", f"sampler.width={PIXELS}", "sampler.guidance_scale=2"]
    rest = ["model.pretrained=M", "data.prompts=P", "sampler.num_inference_steps=2"]
    config, _ = compose_train([*given, *size, *rest, "objective.clamp_images=false"])
    scorer = build_scorer(config)
    assert scorer is not None
    scorer.prepare(dict)
    objective = build_objective(config, scorer)
    parameters = list(model.trainable().values())
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    divergences = []
    for step in range(2):
        optimizer.zero_grad()
        loss = objective.loss(model, PROMPTS, Rng([1, 2]))
        loss.value.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert all(grad.isfinite().all() for grad in gradients), step
        assert max(float(grad.abs().max()) for grad in gradients) > 0, step
        divergences.append(float(loss.metrics["kl"]))
        optimizer.step()
    assert divergences[0] == 0 < divergences[1]
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
