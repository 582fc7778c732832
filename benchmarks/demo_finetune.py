"""How well a run of recipe=demo_finetune has learned the moon, and what it has forgotten.

sfumato train recipe=demo_finetune
python benchmarks/demo_finetune.py [--run runs/demo_finetune] [--prompts 200] [--sheet sheet.png]
"""

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from moons import ALL_SHAPES, CONCEPT, old_scenes, split
from torch import Tensor

from sfumato.compose import DEMO_MODELS, load_settings
from sfumato.demo.reader import read_image
from sfumato.demo.world import ATTRIBUTES, Scene, random_scene, render
from sfumato.images import save_image
from sfumato.models.generate import generate_in_batches
from sfumato.models.registry import load_model
from sfumato.training.checkpoint import list_checkpoints, read_shown_weights, step_of
from sfumato.training.folder import RunFolder
from sfumato.training.state import load_weights

CHOSEN_ON = 200  # the first of these prompts, on which the recipe's settings were chosen


def show(name: str, asked: Sequence[Scene], images: Tensor) -> None:
    """Print the shares of pictures that are entirely right and right in each attribute."""
    seen = [read_image(image, ALL_SHAPES) for image in images]
    pairs = list(zip(asked, seen, strict=True))
    right = sum(want == found for want, found in pairs) / len(pairs)
    shares = [
        sum(found is not None and want.values()[i] == found.values()[i] for want, found in pairs)
        / len(pairs)
        for i in range(len(ATTRIBUTES))
    ]
    each = ", ".join(f"{a} {s:.3f}" for a, s in zip(ATTRIBUTES, shares, strict=True))
    print(f"{name}: {right:.3f} of {len(pairs)} entirely right; {each}")
    shapes = Counter(found.shape if found else "nothing" for found in seen)
    counts = ", ".join(f"{shape} {count}" for shape, count in shapes.most_common())
    print(f"  shapes seen: {counts}")


def show_judge(count: int) -> None:
    """Print how well the reader reads pictures that are right, and these from the autoencoder."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(DEMO_MODELS / "base" / "vae")
    rng = random.Random("judge")
    old = [random_scene(rng) for _ in range(count)]
    for name, scenes in ((CONCEPT, split().rest[:count]), ("old shapes", old)):
        images = render(scenes, rng, ALL_SHAPES)
        show(f"judge, {name}, rendered", scenes, images)
        with torch.no_grad():
            latents = vae.encode(images * 2 - 1).latent_dist.mean
            decoded = vae.decode(latents).sample / 2 + 0.5
        show(f"judge, {name}, through the autoencoder", scenes, decoded)


def new_scenes(count: int) -> list[Scene]:
    """Return scenes of the old shapes that no training picture shows."""
    rng, known = random.Random("benchmark"), set(old_scenes())
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene not in known:
            scenes.append(scene)
    return scenes


def compare(run: Path, count: int, *, all_steps: bool) -> Tensor:
    """Print the figures of the base model and of checkpoints; return pictures, a row for each."""
    folder = RunFolder(run)
    config = load_settings(folder.config)
    model = load_model(config.model)
    sets = {
        f"{CONCEPT}, held out": split().rest[CHOSEN_ON : CHOSEN_ON + count],
        "old shapes, held out": new_scenes(CHOSEN_ON + count)[CHOSEN_ON:],
    }
    checkpoints = list_checkpoints(folder.checkpoints)
    sheet = []
    for place in [None, *(checkpoints if all_steps else checkpoints[-1:])]:
        if place is not None:
            load_weights(model, read_shown_weights(place), str(place))
        side = "base" if place is None else f"step {step_of(place)}"
        for name, scenes in sets.items():
            images = generate_in_batches(
                model,
                [scene.caption() for scene in scenes],
                list(range(count)),
                config.sampler,
                32,
                schedule="base" if place is None else "draft",
            )
            show(f"{side}, {name}", scenes, images)
            sheet.append(images[:16].permute(1, 2, 0, 3).reshape(3, 64, -1))
    return torch.cat(sheet, dim=1)


def main() -> None:
    """Measure and print; a sheet of pictures, base above tuned, goes to --sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo_finetune"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--no-judge", action="store_true", help="leave out the reader's own test")
    parser.add_argument("--all-steps", action="store_true", help="not only the last")
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    if not options.no_judge:
        show_judge(options.prompts)
    sheet = compare(options.run, options.prompts, all_steps=options.all_steps)
    if options.sheet:
        save_image(sheet, options.sheet)


if __name__ == "__main__":
    main()
