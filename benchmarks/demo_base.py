"""How good the shipped demo models are: base model, attribute reader, preference reward.

python benchmarks/demo_base.py [--prompts 200] [--models DIR]
"""

import argparse
import random
from pathlib import Path

import torch

from sfumato.compose import DEMO_MODELS, compose_train
from sfumato.demo.preference import judge, vary
from sfumato.demo.reader import read_image
from sfumato.demo.world import ATTRIBUTES, Scene, partial, random_scene, render
from sfumato.images import save_image
from sfumato.models.generate import generate_in_batches
from sfumato.models.registry import load_model
from sfumato.rewards.clip import ClipReward


def show(name: str, asked: list[Scene], seen: list[Scene | None]) -> None:
    """Print the share of pictures that are entirely right, and of each attribute."""
    pairs = list(zip(asked, seen, strict=True))
    right = sum(want == found for want, found in pairs) / len(pairs)
    print(f"{name}: {right:.3f} of {len(pairs)} entirely right")
    for attribute, *values in zip(
        ATTRIBUTES,
        zip(*(want.values() for want, _ in pairs), strict=True),
        zip(*(found.values() if found else (None,) * 5 for _, found in pairs), strict=True),
        strict=True,
    ):
        share = sum(a == b for a, b in zip(*values, strict=True)) / len(pairs)
        print(f"  {attribute}: {share:.3f}")


def main() -> None:
    """Measure and print; a sheet of pictures goes to --sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--models", type=Path, default=DEMO_MODELS)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    rng = random.Random("benchmark")
    scenes = [random_scene(rng) for _ in range(options.prompts)]
    show(
        "attribute reader on rendered pictures", scenes, list(map(read_image, render(scenes, rng)))
    )

    recipe = ["recipe=demo_draft_plus", f"model.pretrained={options.models / 'base'}"]
    config, _ = compose_train([*recipe, "data.prompts=none"])
    images = generate_in_batches(
        load_model(config.model),
        [scene.caption() for scene in scenes],
        list(range(len(scenes))),
        config.sampler,
        32,
    )
    show("base model at its default guidance", scenes, list(map(read_image, images)))
    if options.sheet:
        rows = images[: len(images) // 8 * 8].reshape(-1, 8, 3, 64, 64)
        save_image(rows.permute(2, 0, 3, 1, 4).reshape(3, -1, 512), options.sheet)

    reward = ClipReward.from_pretrained(str(options.models / "reward"))
    others = [vary(scene, rng) for scene in scenes]
    asked = [partial(rng.choice(pair), rng, 0.3) for pair in zip(scenes, others, strict=True)]
    captions = [scene.caption() for scene in asked]
    with torch.no_grad():
        first, second = (reward(render(side, rng), captions) for side in (scenes, others))
    labels = judge(asked, scenes, others)
    untied = labels[:, 0] != 0.5
    agreed = ((first > second) == (labels[:, 0] > 0.5))[untied].float().mean()
    print(f"preference reward: agrees with the judge on {agreed:.3f} of {int(untied.sum())} pairs")


if __name__ == "__main__":
    main()
