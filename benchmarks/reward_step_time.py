"""Measure a DRaFT+ step of Sfumato with each differentiable reward against a bare torch loop.

The reward and its gradient at random images, then two whole steps of both loops are compared; the
measurement stops where they differ. Time is this process's own, on one thread, by turns. Networks
are random: a U-Net of 6 M parameters at 128 px, reward towers of 12 to 60 M at 224 px. In the end
the balance of two rewards' gradients is measured against their plain sum.

    python benchmarks/reward_step_time.py --out reward_step_time.json     # about 9 minutes
    python benchmarks/reward_step_time.py --only clip_iqa several
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bare_rewards import (
    Classifier,
    Clip,
    ClipIqa,
    ClipScore,
    ImageReward,
    OnClip,
    OnSiglip,
    brightness,
    load_clip,
    redness,
    sharpness,
)
from loops import Bare, Case, Ours, open_ours, write_models
from measure import LIMIT, explain_slowness, machine, quiet, time_pairs, time_turns
from networks import SIZES
from parity import check_parity, compare, distance
from reward_networks import SIDE, WIDTH, write_rewards
from tiny_aesthetic import PublishedHead

from sfumato.compose import DEMO_MODELS
from sfumato.config import (
    AestheticRewardConfig,
    BrightnessRewardConfig,
    ClassifierRewardConfig,
    ClipIqaRewardConfig,
    ClipRewardConfig,
    ColorRewardConfig,
    FunctionRewardConfig,
    HpsRewardConfig,
    ImageRewardConfig,
    RewardConfig,
    WeightedPartConfig,
    WeightedRewardConfig,
)

LABEL, PIXELS = 7, SIZES["6m"].pixels
CASE = Case(
    model="6m",
    device="cpu",
    dtype="float32",
    full=False,
    batch=2,
    gradient_checkpointing=False,
    reward="clip",
    num_inference_steps=5,
)
ALLOWED = {"loss": 1e-4, "gradient": 1e-3, "update": 1e-2}
SEVERAL = "several"
WAYS = ("summed", "measured", "equalised")
DEMO = DEMO_MODELS / "text_image"


@dataclass(frozen=True)
class Kind:
    """A reward: Sfumato's settings and the bare one, both of the folder of networks."""

    settings: Callable[[Path], RewardConfig]
    bare: Callable[[Path], Any]


def hps(folder: Path) -> Clip:
    from sfumato.clip import load_hps

    where = str(folder / "hps")
    parts = load_hps(where, version="2.1", processor=where, preprocessing="letterbox")
    return Clip(parts.model, parts.tokenizer, 1.0)


def image_reward(folder: Path) -> ImageReward:
    from sfumato.clip import load_image_reward

    where = str(folder / "blip")
    return ImageReward(load_image_reward(where, where))


def head(folder: Path, version: str) -> PublishedHead:
    found = PublishedHead(version, WIDTH).eval()
    state = torch.load(folder / f"{version}.pth", weights_only=True)
    found.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return found.requires_grad_(False)


def clip(folder: Path, score: str = "model") -> ClipRewardConfig:
    return ClipRewardConfig(pretrained=str(folder), score=score)


def aesthetic(folder: Path, tower: str, version: str) -> AestheticRewardConfig:
    predictor = str(folder / f"{version}.pth")
    return AestheticRewardConfig(pretrained=str(folder / tower), predictor=predictor)


def classifier(folder: Path) -> ClassifierRewardConfig:
    return ClassifierRewardConfig(pretrained=str(folder / "resnet"), label=str(LABEL))


KINDS = {
    "clip (PickScore)": Kind(lambda f: clip(f / "clip"), lambda f: load_clip(f / "clip")),
    "clip_score": Kind(lambda f: clip(f / "clip", "clipscore"), lambda f: ClipScore(f / "clip")),
    "clip_iqa": Kind(
        lambda f: ClipIqaRewardConfig(pretrained=str(f / "clip")), lambda f: ClipIqa(f / "clip")
    ),
    "hpsv2": Kind(
        lambda f: HpsRewardConfig(pretrained=str(f / "hps"), processor=str(f / "hps")), hps
    ),
    "image_reward": Kind(
        lambda f: ImageRewardConfig(pretrained=str(f / "blip"), processor=str(f / "blip")),
        image_reward,
    ),
    "aesthetic 2": Kind(
        lambda f: aesthetic(f, "clip", "2"), lambda f: OnClip(f / "clip", head(f, "2"))
    ),
    "aesthetic 2.5": Kind(
        lambda f: aesthetic(f, "siglip", "2.5"), lambda f: OnSiglip(f / "siglip", head(f, "2.5"))
    ),
    "classifier": Kind(classifier, lambda f: Classifier(f / "resnet", LABEL, SIDE)),
    "function": Kind(
        lambda f: FunctionRewardConfig(path=f"{Path(__file__).parent}/bare_rewards.py:sharpness"),
        lambda f: sharpness,
    ),
    "color": Kind(lambda f: ColorRewardConfig(), lambda f: redness),
    "brightness": Kind(lambda f: BrightnessRewardConfig(), lambda f: brightness),
    "demo text_image": Kind(lambda f: clip(DEMO), lambda f: load_clip(DEMO)),
}


def main() -> None:
    options = parse()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    quiet()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(CASE, folder)
        write_rewards(folder)
        for name in options.only:
            print(f"\n{name}", flush=True)
            measured = balance if name == SEVERAL else measure
            found[name] = measured(name, folder, options.steps, options.pairs)
    content = {"case": asdict(CASE), "machine": machine("cpu"), "rewards": found}
    if options.out:
        options.out.write_text(json.dumps(content, indent=2) + "\n")
    print(table(content))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = (*KINDS, SEVERAL)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="REWARD")
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps per turn")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each loop")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def measure(name: str, folder: Path, steps: int, pairs: int) -> dict[str, Any]:
    """Compare both loops with a reward, and time them."""
    kind = KINDS[name]
    bare_reward = kind.bare(folder)
    ours = open_ours(CASE, folder, reward=kind.settings(folder))
    bare = Bare(CASE, folder, reward=bare_reward)
    assert ours.reward is not None
    value, gradient = compare_rewards(ours.reward, bare_reward)
    parity = compare(ours, bare)
    print(f"value {value:.1e}, gradient {gradient:.1e}, {parity}", flush=True)
    check_parity(parity, ALLOWED)
    timing = time_pairs(ours.step, bare.step, steps, pairs, "cpu", "cpu")
    explain_slowness(timing, ours.step, bare.step, "cpu")
    millions = sum(p.numel() for p in ours.reward.parameters()) / 1e6
    return {
        **asdict(timing),
        "million_parameters": millions,
        "reward_value": value,
        "reward_gradient": gradient,
        "parity": asdict(parity),
    }


def compare_rewards(ours: Any, bare: Any) -> tuple[float, float]:
    """Return how far two rewards and their gradients at random images are apart, relatively."""
    prompts = ["a zebra", "a bagel"]
    images = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    found = [reward(images, prompts) for reward in (ours, bare)]
    gradients = [torch.autograd.grad(each.sum(), images)[0] for each in found]
    assert gradients[1].norm() > 0, "the reward is constant, so that gradients say nothing"
    value = (found[0] - found[1]).norm().item() / max(1.0, found[1].norm().item())
    gradient = distance([gradients[0]], [gradients[1]])
    assert value < 1e-5, f"the rewards differ: {found}"
    assert gradient < 1e-4, f"the gradients of the rewards differ by {gradient}"
    return value, gradient


def balance(name: str, folder: Path, steps: int, turns: int) -> dict[str, Any]:
    """Time the sum of two rewards, by the ways in which their gradients are balanced."""
    loops = {way: two_rewards(folder, way) for way in WAYS}
    seconds = time_turns({w: loop.step for w, loop in loops.items()}, steps, turns, "cpu", "cpu")
    plain = seconds["summed"]
    return {
        way: {
            "seconds": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, plain, strict=True)),
        }
        for way, found in seconds.items()
    }


def two_rewards(folder: Path, way: str) -> Ours:
    kinds = ("clip (PickScore)", "aesthetic 2.5")
    parts = {f"part_{i}": KINDS[kind].settings(folder) for i, kind in enumerate(kinds)}
    weighted = {name: WeightedPartConfig(reward=reward) for name, reward in parts.items()}
    reward = WeightedRewardConfig(parts=weighted, gradients=way)
    return open_ours(CASE, folder, reward=reward)


def table(content: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    found = dict(content["rewards"])
    ways = found.pop(SEVERAL, {})
    lines = [f"\nbatch {CASE.batch}, T = {CASE.num_inference_steps}; {content['machine']}", ""]
    lines += ["| reward | million parameters | ours, s/step | bare, s/step | ours / bare |"]
    lines += ["|---|---|---|---|---|"]
    lines += [
        f"| {name} | {each['million_parameters']:.1f} | {each['ours']:.3f} | {each['bare']:.3f} "
        f"| {each['ratio']:.3f}{' (too slow)' if each['ratio'] > LIMIT else ''} |"
        for name, each in found.items()
    ]
    if ways:
        lines += ["", "| two rewards, gradients= | s/step | to summed |", "|---|---|---|"]
        lines += [
            f"| {w} | {each['seconds']:.3f} | {each['ratio']:.3f} |" for w, each in ways.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
