"""Reward hacking in the demo, and what the default guards say of it.

The demo's DRaFT, which has no penalty, hacks its reward. The default guards, as guards that stop,
are to end it before. The demo's DRaFT+ must not be stopped: each warning there is a false alarm.
Held-out is the demo's text-image model, which no reward sees, on images of its prompts, which start
from the same noise for each checkpoint. docs/reward_hacking.md has the figures.

    python benchmarks/guard.py run --out guard --seeds 0 1 2 3     # trains, resumable
    python benchmarks/guard.py score --out guard --seeds 0 1 2 3   # held-out scores
    python benchmarks/guard.py table --out guard --seeds 0 1 2 3   # the figures
    python benchmarks/guard.py pictures --out guard                # docs/hacking_*.png
    python benchmarks/guard.py cost                                # seconds of a validation's parts
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import quiet

STEPS, EVERY = 40, 2  # of a run; between its validations
RUNS: Mapping[str, Sequence[str]] = {
    "draft": ("objective.kl_coeff=0",),
    "plus_100": ("objective.kl_coeff=100",),
    "plus_300": ("objective.kl_coeff=300",),
}
VALIDATION = 20  # images, as many of each prompt
IMAGES = 40  # of each prompt, for the held-out score
SHOWN, COLUMNS = (0, 10, 20, 30, 40), 10
HELD_OUT = "held_out/text_image"
GAUGES = ("edges", "high_frequencies", "diversity", "dark", "grid", "sharpness")


def settings(out: Path, name: str, seed: int, *more: str) -> list[str]:
    from sfumato.demo.experiment import write_prompts

    out.mkdir(parents=True, exist_ok=True)
    prompts = out / "prompts.txt"
    prompts.write_text(write_prompts(0))
    return [
        "recipe=demo_draft_plus",
        f"runs_dir={out}",
        f"name={name}_{seed}",
        *RUNS[name],
        f"training.seed={seed}",
        f"training.max_steps={STEPS}",
        f"training.checkpoint_every_steps={EVERY}",
        f"validation.prompts={prompts}",
        f"validation.num_images={VALIDATION}",
        f"validation.every_steps={EVERY}",
        "training.tensorboard=false",
        "verify=false",
        *more,
    ]


def train(overrides: Sequence[str]) -> Any:
    from sfumato.compose import compose_train
    from sfumato.run.run import train as train_run
    from sfumato.training.distribution import Distribution

    config, plain = compose_train(overrides)
    distribution = Distribution(config.training)
    try:
        outcome = train_run(config, plain, distribution)
    finally:
        distribution.close()
    if outcome.stopped_by is not None:
        sys.exit(f"stopped by {outcome.stopped_by}")
    return outcome


def run(out: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    for name in names:
        for seed in seeds:
            train(settings(out, name, seed))


def first_alarm(rows: Sequence[Mapping[str, float]]) -> tuple[int, str] | None:
    """Return the first step at which a default guard is beyond its limit, and all that are.

    The limits are those of today, which a run that was made earlier did not have.
    """
    found = ((int(row["step"]), ", ".join(alarms(row))) for row in rows)
    return next(((step, said) for step, said in found if said), None)


def alarms(row: Mapping[str, float]) -> list[str]:
    """Return the default guards that one row of metrics is beyond."""
    from sfumato.training.guards import DEFAULTS, FALLS

    return [
        name
        for name in DEFAULTS
        if f"validation/gauge/{name}" in row
        and (row[f"validation/gauge/{name}"] < limit_of(row, name)) == (name in FALLS)
    ]


def limit_of(row: Mapping[str, float], name: str) -> float:
    from sfumato.training.guards import DEFAULTS

    guard, base = DEFAULTS[name], row[f"validation/gauge_base/{name}"]
    limit = guard.limit or 0.0
    return base * limit if guard.relative == "ratio" else base + limit


@torch.no_grad()
def images_of(model: Any, config: Any, run: Path, step: int, count: int) -> tuple[Any, list[str]]:
    from sfumato.demo.experiment import PROMPTS
    from sfumato.diffusion.randomness import derive
    from sfumato.models.generate import generate_in_batches
    from sfumato.training.checkpoint import read_shown_weights
    from sfumato.training.state import load_weights

    if step:
        load_weights(model, read_shown_weights(run / "checkpoints" / f"step-{step:06d}"))
    prompts = [prompt for prompt in PROMPTS for _ in range(count)]
    seeds = [derive(7, i) for i in range(len(prompts))]
    schedule = "draft" if step else "base"
    images = generate_in_batches(model, prompts, seeds, config.sampler, 30, schedule=schedule)
    return images, prompts


def model_of(run: Path) -> tuple[Any, Any]:
    from sfumato.compose import load_settings
    from sfumato.models.registry import load_model

    config = load_settings(run / "config.yaml")
    model = load_model(config.model)
    model.trained.eval()
    return model, config


def marks(out: Path, name: str, seed: int) -> list[int]:
    """Return the steps that are scored: the first, the last so far, and the first alarm's."""
    from sfumato.training.checkpoint import list_checkpoints, step_of

    alarm = first_alarm(logged(out, name, seed))
    last = step_of(list_checkpoints(out / f"{name}_{seed}" / "checkpoints")[-1])
    return sorted({0, last, *([alarm[0]] if alarm else [])})


def score(out: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Write the held-out score of each marked checkpoint."""
    from sfumato.rewards.build import build_reward

    for seed in seeds:
        for name in names:
            place = out / f"{name}_{seed}"
            file = out / f"{name}_{seed}_scores.json"
            scores = json.loads(file.read_text()) if file.exists() else {}
            model, config = model_of(place)
            held_out = build_reward(config.validation.rewards["text_image"])
            base = out / "base.json"
            if base.exists():
                scores["0"] = json.loads(base.read_text())
            for step in marks(out, name, seed):
                if str(step) not in scores:
                    images, prompts = images_of(model, config, place, step, IMAGES)
                    scores[str(step)] = held_out(images, prompts).mean().item()
                    print(place, step, scores[str(step)], flush=True)
                file.write_text(json.dumps(scores))
                if not step:
                    base.write_text(json.dumps(scores["0"]))


def logged(out: Path, name: str, seed: int) -> list[dict[str, float]]:
    lines = (out / f"{name}_{seed}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def table(out: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Print the first alarm, of which guards, and the held-out scores there and at the end."""
    print("| run | seed | first alarm | of | held-out: base | there | at the end | validations |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        for seed in seeds:
            scores = json.loads((out / f"{name}_{seed}_scores.json").read_text())
            rows = [row for row in logged(out, name, seed) if f"validation/{HELD_OUT}" in row]
            alarm = first_alarm(rows)
            step, key = alarm or ("-", "-")
            there = f"{scores[str(step)]:.3f}" if alarm else "-"
            end = max(map(int, scores))
            print(
                f"| {name} | {seed} | {step} | {key} | {scores['0']:.3f} | {there} | "
                f"{scores[str(end)]:.3f} (step {end}) | "
                f"{sum(map(bool, map(alarms, rows)))} of {len(rows)} with an alarm |"
            )


def pictures(out: Path, folder: Path) -> None:
    """Draw the pictures and the curves of docs/reward_hacking.md, of seed 0."""
    import matplotlib.pyplot as plt
    from PIL import Image, ImageDraw

    from sfumato.training.guards import DEFAULTS

    cell, margin = 68, 52
    sheet = Image.new("RGB", (margin + COLUMNS * cell, len(SHOWN) * cell), "white")
    for y, step in enumerate(SHOWN):
        ImageDraw.Draw(sheet).text((4, y * cell + 28), f"step {step}", fill="black")
        place = out / "draft_0" / "samples" / f"step-{step:06d}"
        for x in range(COLUMNS):
            sheet.paste(Image.open(place / f"{x:03d}-tuned.png"), (margin + x * cell, y * cell))
    sheet.save(folder / "hacking_pictures.png", optimize=True)
    figure, axes = plt.subplots(2, 4, figsize=(12, 5))
    panels = ["reward", HELD_OUT, *(f"gauge/{name}" for name in GAUGES)]
    for panel, ax in zip(panels, axes.flat, strict=True):
        title, rows = panel.rpartition("/")[2], []
        for name in RUNS:
            rows = [row for row in logged(out, name, 0) if f"validation/{HELD_OUT}" in row]
            values = [row[f"validation/{panel}"] for row in rows]
            ax.plot([row["step"] for row in rows], values, label=name)
        if title in DEFAULTS:
            ax.axhline(limit_of(rows[0], title), color="black", lw=0.8, ls="--")
        ax.set_title(title)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "hacking_curves.png", dpi=80)


def cost(images: int) -> None:
    """Print the seconds of sampling, of gauges and of the sharpness, in one validation."""
    from sfumato.compose import compose_train
    from sfumato.models.generate import generate_in_batches
    from sfumato.models.registry import load_model
    from sfumato.rewards.build import build_reward
    from sfumato.run.build import grid_period
    from sfumato.training.gauges import build_gauges, diversity

    config = compose_train(["recipe=demo_draft_plus"])[0]
    model, reward = load_model(config.model), build_reward(config.reward)
    gauges = build_gauges(reward, grid_period(model, config))
    prompts, parts = ["a zebra"] * images, dict[str, float]()

    def timed(name: str, act: Callable[..., Any], *given: Any) -> Any:
        started = time.process_time()
        found = act(*given)
        parts[name] = parts.get(name, 0.0) + time.process_time() - started
        return found

    with torch.no_grad():
        for _ in range(2):  # the first warms up
            parts.clear()
            sampled = (model, prompts, range(images), config.sampler, 16)
            made = timed("sampling", generate_in_batches, *sampled)
            timed("reward", reward, made, prompts)
            for name, gauge in gauges.items():
                kind = "sharpness" if name == "sharpness" else "gauges of pictures"
                timed(kind, gauge, made, prompts)
            timed("gauges of pictures", diversity, made, prompts)
    total = sum(parts.values())
    for name, seconds in parts.items():
        print(f"{name}: {seconds:.3f} CPU s, {100 * seconds / total:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "score", "table", "pictures", "cost"))
    parser.add_argument("--out", type=Path, default=Path("guard"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    match options.action:
        case "run":
            run(options.out, options.only, options.seeds)
        case "score":
            score(options.out, options.only, options.seeds)
        case "table":
            table(options.out, options.only, options.seeds)
        case "pictures":
            pictures(options.out, options.docs)
        case _:
            cost(8)


if __name__ == "__main__":
    main()
