"""Draws the pictures of the README from the runs of `sfumato demo`.

python benchmarks/pictures.py [--demo runs/demo] [--out docs]
"""

import argparse
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from PIL import Image, ImageDraw, ImageFont

from sfumato.compose import DEMO_IMAGES
from sfumato.report.comparison import from_base, steps_at_equal_reward
from sfumato.report.records import RunRecord, read_runs, read_scores
from sfumato.training.folder import RunFolder

SCALE, GAP, TITLE, LABEL = 2, 4, 44, 230  # pixels; pictures are enlarged pixel by pixel
LARGEST = 300_000  # bytes of a file
# What is done, with which command, and what it is about.
ROAD = (
    ("pictures", "sfumato demo\n--pictures DIR", "emoji in four styles"),
    ("prepare", "sfumato prepare\nrecipe=prepare/demo", "tars, captions, latents"),
    ("pretrain", "sfumato train\nrecipe=demo_base", "a base model from scratch"),
    ("fine-tune", "sfumato train\nrecipe=demo_finetune", "four things it never met"),
    ("align", "sfumato train\nrecipe=demo_draft_plus", "an ImageNet network is the reward"),
    ("evaluate", "sfumato evaluate\nrun=runs/NAME", "the same noise, before and after"),
    ("report", "sfumato report\nruns/NAME ...", "reward against diversity"),
)
ROWS = (4, 3)  # boxes in a row of the road


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--plus", default="draft_plus_kl_100", help="the run beside draft")
    parser.add_argument("--prompts", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="rows")
    parser.add_argument("--noises", type=int, default=4, help="pictures of a prompt in a row")
    options = parser.parse_args()
    files = sorted(options.demo.glob("*/config.yaml"))
    records = read_runs([RunFolder(file.parent) for file in files])
    by_name = {record.name: record for record in records}
    draft, plus = by_name["draft"], by_name[options.plus]
    draw_grid(draft, plus, options.out / "demo_grid.png", options.prompts, options.noises)
    draw_curves(records, options.out / "demo_reward_diversity.png")
    draw_road(records, plus, options.out / "demo_road.png")


def draw_grid(
    draft: RunRecord, plus: RunRecord, out: Path, prompts: Sequence[int], noises: int
) -> None:
    """Draw the base model and two runs' last steps: a row is a prompt, with the same noises."""
    kl = f"DRaFT+, KL {plus.kl_coeff:g}"
    columns = [("base model", draft, 0), ("DRaFT", draft, last(draft)), (kl, plus, last(plus))]
    texts = {one.prompt_index: one.prompt for one in read_scores(draft, 0)}
    side = SCALE * Image.open(next(iter(pictures(draft, 0).values()))).width
    width, height = noises * (side + GAP) + 8 * GAP, len(prompts) * (side + GAP)
    sheet = Image.new("RGB", (LABEL + len(columns) * width, TITLE + height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=28)
    for row, prompt in enumerate(prompts):
        middle = TITLE + row * (side + GAP) + side // 2
        pen.text((GAP, middle), texts[prompt], fill="black", font=font, anchor="lm")
    for column, (name, record, step) in enumerate(columns):
        left, files = LABEL + column * width, pictures(record, step)
        pen.text((left, 4), name, fill="black", font=font)
        for row, prompt in enumerate(prompts):
            for noise in range(noises):
                picture = Image.open(files[prompt, noise]).convert("RGB")
                picture = picture.resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(picture, (left + noise * (side + GAP), TITLE + row * (side + GAP)))
    save(sheet, out)


def pictures(record: RunRecord, step: int) -> dict[tuple[int, int], str]:
    """Return the files of an evaluated step, by prompt and noise."""
    return {(one.prompt_index, one.index): one.image for one in read_scores(record, step)}


def last(record: RunRecord) -> int:
    assert record.final is not None, f"{record.name} is not evaluated"
    return record.final.step


def draw_curves(records: Sequence[RunRecord], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.set_ylabel(plot_curves(records, axes))
    axes.set_xlabel("reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    check(out)


def plot_curves(records: Sequence[RunRecord], axes: Any) -> str:
    """Plot the diversity of each run over its reward; return what diversity is.

    Circles are steps nearest the same reward.
    """
    base = next(record.base for record in records if record.base)
    equal = {record.name: step for record, step in steps_at_equal_reward(records, base)}
    for record in records:
        curve = [(one.step, one.reward or 0.0, one.diversity) for one in from_base(record, base)]
        _, rewards, diversities = zip(*curve, strict=True)
        name = record.name.replace("_", " ")
        line = axes.plot(rewards, diversities, marker=".", label=name)
        for step, reward, diversity in curve:
            if step == equal.get(record.name):
                axes.plot(reward, diversity, "o", ms=11, mfc="none", mec=line[0].get_color())
    return base.diversity_label


def draw_road(records: Sequence[RunRecord], plus: RunRecord, out: Path) -> None:
    """Draw the road from pictures to report: boxes with commands, and the demo's own pictures."""
    base, tuned = pictures(plus, 0), pictures(plus, last(plus))
    prompts = sorted({prompt for prompt, _ in base})[:4]
    strips: dict[str, Sequence[Path | str]] = {
        "pictures": sorted((DEMO_IMAGES / "old").glob("*.png"))[20::40],
        "pretrain": [base[prompt, 0] for prompt in prompts],
        "fine-tune": sorted((DEMO_IMAGES / "new").glob("*.png"))[::27],
        "align": [tuned[prompt, 0] for prompt in prompts],
        "evaluate": [files[prompt, 1] for prompt in prompts[:2] for files in (base, tuned)],
    }
    figure = plt.figure(figsize=(8, 4), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 8), ylim=(0, 4))
    axes.axis("off")
    places = [
        (0.12 + i * 7.76 / count, 2.2 - 2.08 * row, 7.76 / count - 0.22)
        for row, count in enumerate(ROWS)
        for i in range(count)
    ]
    for i, ((name, command, about), place) in enumerate(zip(ROAD, places, strict=True)):
        draw_box(axes, place, f"{i + 1}  {name}", command, about, strips.get(name, ()))
    left, bottom, width = places[-1]
    inset = axes.inset_axes(
        (left + width / 4, bottom + 0.5, width / 2, 0.6), transform=axes.transData
    )
    plot_curves(records, inset)
    inset.set(xticks=[], yticks=[])
    arrow: dict[str, Any] = {"arrowstyle": "-|>", "color": "#57606a", "lw": 1.5}
    for (left, bottom, width), after in pairwise(places):
        y = bottom + 0.84
        if after[1] == bottom:
            axes.annotate("", (after[0], y), (left + width, y), arrowprops=arrow)
        else:  # to the next row
            x, middle = after[0] + after[2] / 2, bottom - 0.2
            right = left + width / 2
            axes.plot([right, right, x], [bottom, middle, middle], color=arrow["color"], lw=1.5)
            axes.annotate("", (x, after[1] + 1.68), (x, middle + 0.01), arrowprops=arrow)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=200)
    save(Image.open(stream).convert("RGB"), out)


def draw_box(
    axes: Any,
    place: tuple[float, float, float],
    name: str,
    command: str,
    about: str,
    files: Sequence[Path | str],
) -> None:
    left, bottom, width = place
    style: dict[str, Any] = {
        "boxstyle": "round,pad=0,rounding_size=0.08",
        "fc": "#f6f8fa",
        "ec": "#57606a",
    }
    axes.add_patch(FancyBboxPatch((left, bottom), width, 1.68, **style))
    middle = left + width / 2
    axes.text(middle, bottom + 1.5, name, ha="center", va="center", size=12, weight="bold")
    axes.text(
        middle, bottom + 0.22, command, ha="center", va="center", size=8.5, family="monospace"
    )
    words = {"ha": "center", "va": "center", "size": 8.5, "color": "#424a53"}
    axes.text(middle, bottom + 1.26, about, **words)
    for i, file in enumerate(files):
        side = min(0.56, (width - 0.1) / len(files) - 0.03)
        x, y = middle + (i - len(files) / 2) * (side + 0.03), bottom + 0.8 - side / 2
        axes.imshow(Image.open(file), extent=(x, x + side, y, y + side), aspect="auto", zorder=2)


def save(image: Image.Image, out: Path) -> None:
    image.quantize(256).save(out, optimize=True)
    check(out)


def check(out: Path) -> None:
    size = out.stat().st_size
    assert size <= LARGEST, f"{out} has {size} bytes, more than {LARGEST}; draw fewer pictures"
    print(f"{out}: {size} bytes")


if __name__ == "__main__":
    main()
