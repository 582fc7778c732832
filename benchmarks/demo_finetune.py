"""How well a run of recipe=demo_finetune has learned four new names, and what it has forgotten.

sfumato train recipe=demo_finetune
python benchmarks/demo_finetune.py [--run runs/demo_finetune] [--pictures DIR] [--sheet FILE]

No prompt is a caption of a training picture. New names are read by the nearest drawing: the
text-image model has never met them. It reads the old ones. --pictures is a folder that `sfumato
demo --pictures` wrote; with it there are more real pictures to compare with.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_scores import Drawings, Reader, load_features, read_pictures, rows_of, shares, told
from torch import Tensor

from sfumato.compose import DEMO_IMAGES, load_settings
from sfumato.demo.images import NEW_NAMES, Row, read_rows
from sfumato.demo.pictures import THINGS
from sfumato.evaluation.metrics import kid
from sfumato.images import save_image
from sfumato.models.generate import generate_in_batches
from sfumato.models.registry import load_model
from sfumato.training.checkpoint import list_checkpoints, read_shown_weights, step_of
from sfumato.training.folder import RunFolder
from sfumato.training.state import load_weights

REAL = 1000  # old pictures of --pictures that are looked at
SHOWN = 16  # of each kind, on the sheet


def untrained(names: Sequence[str], trained: Path, count: int) -> list[Row]:
    """Return rows of these names whose captions no training picture has."""
    known = {row["text"] for row in read_rows(trained)}
    rows = [row for row in rows_of(names) if row["text"] not in known]
    return random.Random("benchmark").sample(rows, min(count, len(rows)))


class Judges:
    """Reads pictures of new and of old names, and compares them with real ones.

    Attributes:
        real: features of real pictures, by the kind that they are compared with, and by a label.
    """

    def __init__(self, folder: Path | None) -> None:
        self.features = load_features()
        new, held_out = (read_pictures(DEMO_IMAGES / name) for name in ("new", "new_held_out"))
        old = read_pictures(folder / "things", count=REAL) if folder else None
        old = old or read_pictures(DEMO_IMAGES / "old")
        drawings = Drawings(self.features, [held_out, old])
        self.read = {"new names": drawings, "old names": Reader()}
        self.real: dict[str, dict[str, Tensor]] = {
            "new names": {"new_held_out": self.features(held_out[0])},
            "old names": {"things" if folder else "old": self.features(old[0])},
        }
        if folder:
            trained = {row["file_name"] for row in new[1]}
            pictures, rows = read_pictures(folder / "new_things", names=NEW_NAMES)
            others = [i for i, row in enumerate(rows) if row["file_name"] not in trained]
            self.real["new names"]["new_things"] = self.features(pictures[others])
        # No picture of `new` is in a drawing's mean.
        for kind, (pictures, rows) in {"new names": new, "old names": old}.items():
            print(f"real pictures, {kind}: {told(shares(rows, self.read[kind](pictures)))}")

    def show(self, side: str, kind: str, pictures: Tensor, rows: Sequence[Row]) -> None:
        """Print the shares that are read right, and KID from real pictures."""
        found = shares(rows, self.read[kind](pictures))
        print(f"{side}, {kind}, {len(rows)} pictures: {told(found)}")
        own = self.features(pictures)
        for name, real in self.real[kind].items():
            far = 1000 * kid(own, real)
            print(f"  KID x 1000 from {len(real)} of {name}: {far:.1f}", flush=True)


def main() -> None:
    """Measure and print; a sheet of pictures, base above tuned, goes to --sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo_finetune"))
    parser.add_argument("--prompts", type=int, default=200, help="of new names, and of old ones")
    parser.add_argument("--all-steps", action="store_true", help="not only the last")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    judges = Judges(options.pictures / "pictures" if options.pictures else None)
    sets = {
        "new names": untrained(NEW_NAMES, DEMO_IMAGES / "new", options.prompts),
        "old names": untrained(THINGS, DEMO_IMAGES / "old", options.prompts),
    }
    folder = RunFolder(options.run)
    config = load_settings(folder.config)
    model = load_model(config.model)
    checkpoints, sheet = list_checkpoints(folder.checkpoints), list[Tensor]()
    for place in [None, *(checkpoints if options.all_steps else checkpoints[-1:])]:
        if place is not None:
            load_weights(model, read_shown_weights(place), str(place))
        side = "base" if place is None else f"step {step_of(place)}"
        for kind, rows in sets.items():
            images = generate_in_batches(
                model,
                [row["text"] for row in rows],
                range(len(rows)),
                config.sampler,
                32,
                schedule="base" if place is None else "draft",
            )
            judges.show(side, kind, images, rows)
            sheet.append(images[:SHOWN].permute(1, 2, 0, 3).flatten(2))
    if options.sheet:
        save_image(torch.cat(sheet, dim=1), options.sheet)


if __name__ == "__main__":
    main()
