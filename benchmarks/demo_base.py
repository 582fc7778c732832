"""How good the demo's base model is, by judges that are measured on real pictures too.

python benchmarks/demo_base.py [--prompts 200] [--models DIR] [--pictures DIR] [--sheet FILE]

--pictures is a folder that `sfumato demo --pictures` wrote. With it the distances to pictures that
the model learned from, and to those of the held-back style, are measured too.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_scores import (
    Reader,
    in_batches,
    load_classifier,
    load_features,
    neighbours,
    read_pictures,
    rows_of,
    shares,
    small,
    told,
    top_1,
)
from torch import Tensor

from sfumato.compose import DEMO_IMAGES, DEMO_MODELS, compose_train
from sfumato.demo.images import Row
from sfumato.demo.pictures import THINGS, phrase
from sfumato.evaluation.metrics import kid
from sfumato.images import save_image
from sfumato.models.generate import generate_in_batches
from sfumato.models.registry import load_model

COLUMNS = 8  # of the sheet


def psnr(models: Path, pictures: Tensor) -> float:
    """Return the mean PSNR of pictures that the autoencoder encodes and decodes."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(models / "base" / "vae")

    def decoded(part: Tensor) -> Tensor:
        return (vae.decode(vae.encode(part * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)

    errors = (in_batches(decoded, pictures) - pictures).square().mean((1, 2, 3))
    return (-10 * errors.log10()).mean().item()


def show_distances(
    models: Path, folder: Path, generated: Tensor, asked: Tensor, held: Tensor, held_rows: list[Row]
) -> None:
    """Print KID and nearest neighbours of generated pictures.

    Args:
        asked: pictures of the captions of `held`, which are real pictures of the held-back style.
    """
    features = load_features(models)
    known, rows = read_pictures(folder / "things")
    of = {"things": features(known), "held": features(held)}
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    halves = kid(*(of["things"][half] for half in order.chunk(2)))
    ours = features(generated)
    print("KID x 1000, of the classifier's features")
    print(f"  generated, from things: {1000 * kid(ours, of['things']):.1f}")
    print(f"  half of things, from the other half: {1000 * halves:.1f}")
    print(f"  generated, from the held-back style: {1000 * kid(features(asked), of['held']):.1f}")
    same = [i for i, row in enumerate(rows) if row["name"] in {one["name"] for one in held_rows}]
    print(
        "  the other styles of the same names, from the held-back style: "
        f"{1000 * kid(of['things'][same], of['held']):.1f}"
    )
    print("nearest picture of things: median distance, memorised share (demo_scores.neighbours)")
    for name, pictures, seen in (("generated", generated, ours), ("held-back", held, of["held"])):
        for kind, own, others in (
            ("16 x 16 pixels", small(pictures), small(known)),
            ("features", F.normalize(seen, dim=1), F.normalize(of["things"], dim=1)),
        ):
            distance, share = neighbours(own, others, rows)
            print(f"  {name}, {kind}: {distance:.3f}, {share:.3f}")


def main() -> None:
    """Measure and print; a sheet of pictures goes to --sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--models", type=Path, default=DEMO_MODELS)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    models, count, rng = options.models, options.prompts, random.Random("benchmark")
    folder = options.pictures / "pictures" if options.pictures else None

    recipe = ["recipe=demo_draft_plus", f"model.pretrained={models / 'base'}"]
    config, _ = compose_train(recipe)
    model = load_model(config.model)

    def draw(prompts: list[str]) -> Tensor:
        return generate_in_batches(model, prompts, range(len(prompts)), config.sampler, 32)

    read, classifier = Reader(models), load_classifier(160, models)

    def show(name: str, pictures: Tensor, rows: list[Row], *, whole: bool) -> None:
        """Print what judges say of pictures; `whole` prompts ask for style and background too."""
        found = shares(rows, read(pictures))
        names = [phrase(row["name"]) for row in rows]
        right, log_p = top_1(classifier, pictures, names)
        said = told(found if whole else {"name": found["name"]})
        print(f"{name}, {len(rows)} pictures: read right: {said}")
        print(f"  classifier at 160 px: top-1 {right:.3f}, mean log p {log_p:.3f}", flush=True)

    full = rng.choices(rows_of(THINGS), k=count)
    generated = draw([row["text"] for row in full])
    show("base model, full prompts", generated, full, whole=True)
    bare = rng.choices(rows_of(THINGS), k=count)
    show("base model, bare prompts", draw([phrase(r["name"]) for r in bare]), bare, whole=False)
    if options.sheet:
        rows = generated[: len(generated) // COLUMNS * COLUMNS].unflatten(0, (-1, COLUMNS))
        save_image(rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2), options.sheet)
    place = folder / "things" if folder else DEMO_IMAGES / "old"
    show("real pictures", *read_pictures(place, count=count), whole=True)
    if folder:
        held, rows = read_pictures(folder / "held_things")
        show("real pictures of the held-back style", held, rows, whole=True)
        others, _ = read_pictures(folder / "held_style", count=count)
        print(f"autoencoder, held-back style: {psnr(models, others):.2f} dB")
        asked = draw([row["text"] for row in rng.sample(rows, min(count, len(rows)))])
        show_distances(models, folder, generated, asked, held, rows)


if __name__ == "__main__":
    main()
