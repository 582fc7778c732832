"""Draws the pictures of the README from the runs of `sfumato demo`.

python benchmarks/pictures.py [--demo runs/demo] [--out docs]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFont

from sfumato.report.comparison import from_base, steps_at_equal_reward
from sfumato.report.records import RunRecord, read_runs, read_scores
from sfumato.training.folder import RunFolder

SCALE, GAP, TITLE = 2, 2, 22  # pixels; pictures are enlarged whole pixel by whole pixel
LARGEST = 300_000  # bytes of a file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--prompts", type=int, nargs="+", default=[0, 1, 2, 3], help="rows")
    parser.add_argument("--noises", type=int, default=4, help="pictures of a prompt in a row")
    options = parser.parse_args()
    files = sorted(options.demo.glob("*/config.yaml"))
    records = read_runs([RunFolder(file.parent) for file in files])
    records.sort(key=lambda record: (record.kl_coeff or 0, record.name))
    draw_grid(records, options.out / "demo_grid.png", options.prompts, options.noises)
    draw_curves(records, options.out / "demo_reward_diversity.png")


def draw_grid(records: Sequence[RunRecord], out: Path, prompts: Sequence[int], noises: int) -> None:
    """Draw the base model and each run's last step: a row is a prompt, with the same noises."""
    columns = [("base model", _pictures(records[0], 0))]
    columns += [(record.name.replace("_", " "), _last(record)) for record in records]
    first = Image.open(columns[0][1][prompts[0], 0])
    side = SCALE * first.width
    width, height = noises * (side + GAP), len(prompts) * (side + GAP)
    sheet = Image.new("RGB", (len(columns) * (width + 4 * GAP), TITLE + height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, (name, pictures) in enumerate(columns):
        left = column * (width + 4 * GAP)
        pen.text((left, 2), name, fill="black", font=font)
        for row, prompt in enumerate(prompts):
            for noise in range(noises):
                picture = Image.open(pictures[prompt, noise]).convert("RGB")
                picture = picture.resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(picture, (left + noise * (side + GAP), TITLE + row * (side + GAP)))
    save(sheet, out)


def _pictures(record: RunRecord, step: int) -> dict[tuple[int, int], str]:
    return {(one.prompt_index, one.index): one.image for one in read_scores(record, step)}


def _last(record: RunRecord) -> dict[tuple[int, int], str]:
    assert record.final is not None, f"{record.name} is not evaluated"
    return _pictures(record, record.final.step)


def draw_curves(records: Sequence[RunRecord], out: Path) -> None:
    """Draw the diversity of each run over its reward; circles are steps nearest the same reward."""
    base = next(record.base for record in records if record.base)
    equal = {record.name: step for record, step in steps_at_equal_reward(records, base)}
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for record in records:
        curve = [(one.step, one.reward or 0.0, one.diversity) for one in from_base(record, base)]
        _, rewards, diversities = zip(*curve, strict=True)
        name = record.name.replace("_", " ")
        line = axes.plot(rewards, diversities, marker=".", label=name)
        for step, reward, diversity in curve:
            if step == equal.get(record.name):
                axes.plot(reward, diversity, "o", ms=11, mfc="none", mec=line[0].get_color())
    axes.set_xlabel("reward")
    axes.set_ylabel(base.diversity_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    check(out)


def save(image: Image.Image, out: Path) -> None:
    image.quantize(256).save(out, optimize=True)
    check(out)


def check(out: Path) -> None:
    size = out.stat().st_size
    assert size <= LARGEST, f"{out} has {size} bytes, more than {LARGEST}; draw fewer pictures"
    print(f"{out}: {size} bytes")


if __name__ == "__main__":
    main()
