"""Two rewards of scales 1 and 100 under equal weights, on the demo: which of them rises?

Redness and brightness are at right angles in the space of colours, so both can rise. Each way of
balancing them trains the same adapters from the same prompts and seeds.

    python benchmarks/several_rewards.py run --out several      # three seeds, about 4 minutes
    python benchmarks/several_rewards.py table --out several
    python benchmarks/several_rewards.py time                   # seconds a step, by turns
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from measure import quiet, time_turns
from methods import Trainee

SEEDS = (0, 1, 2)
STEPS, BATCH, RATE = 12, 8, 2e-3
IMAGES = 4  # of each prompt
SCALES = {"redness 1, brightness 100": (1, 100), "redness 100, brightness 1": (100, 1)}
WAYS: dict[str, tuple[str, ...]] = {
    "plain sum": (),
    "standardise=true": ("reward.standardise=true",),
    "gradients=equalised": ("reward.gradients=equalised",),
}
COLORS = ("reward.parts.classifier=null",)
RED = "reward.parts.red={kind: color, color: red}"
CHEAP = ("objective.truncation_steps=1",)
TIMED = {
    "plain sum": (),
    "gradients=measured": ("reward.gradients=measured",),
    "gradients=equalised": ("reward.gradients=equalised",),
    "standardise=true": ("reward.standardise=true",),
}


class Colors(Trainee):
    """A run of recipe=demo_reward with overrides, evaluated by both colours."""

    def __init__(self, *overrides: str) -> None:
        from sfumato.compose import compose_train

        given = ("recipe=demo_reward", "method=draft_k", "training.precision=no", *overrides)
        super().__init__(compose_train(given)[0])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return redness and brightness, at scale 1, of the same prompts and noise."""
        from sfumato.demo.experiment import PROMPTS
        from sfumato.diffusion.randomness import derive
        from sfumato.models.generate import generate_in_batches
        from sfumato.rewards.simple import BrightnessReward, ColorReward

        texts = [prompt for prompt in PROMPTS for _ in range(IMAGES)]
        seeds = [derive(0, i) for i in range(len(texts))]
        sampler = replace(self.config.sampler, num_inference_steps=5)
        self.model.trained.eval()
        images = generate_in_batches(self.model, texts, seeds, sampler, BATCH).clamp(0, 1)
        self.model.trained.train()
        rewards = {"redness": ColorReward("red", 1.0), "brightness": BrightnessReward(1.0)}
        return {name: reward(images, texts).mean().item() for name, reward in rewards.items()}


def trained(scales: tuple[int, int], way: Sequence[str], seed: int) -> dict[str, float]:
    """Return both rewards after training."""
    parts = [
        f"reward.parts.red={{kind: color, color: red, scale: {scales[0]}.0}}",
        f"reward.parts.light={{kind: brightness, scale: {scales[1]}.0}}",
    ]
    size = [f"training.{key}_batch_size={BATCH}" for key in ("micro", "global")]
    numbers = [f"training.max_steps={STEPS}", f"training.seed={seed}", f"optimizer.lr={RATE}"]
    trainee = Colors(*COLORS, *parts, *CHEAP, *size, *numbers, *way)
    for _ in range(STEPS):
        trainee.step()
    found = trainee.evaluate()
    trainee.close()
    return found


def run(out: Path) -> None:
    base = out / "base.json"
    if not base.exists():
        base.write_text(json.dumps(Colors(*COLORS, RED, *CHEAP).evaluate()))
    for case, scales in SCALES.items():
        for seed in SEEDS:
            for way, overrides in WAYS.items():
                file = out / f"{scales[0]}-{scales[1]}-{way.replace(' ', '_')}-{seed}.json"
                if file.exists():
                    continue
                started = time.process_time()
                found = {"case": case, "way": way, "after": trained(scales, overrides, seed)}
                file.write_text(json.dumps(found, indent=1))
                seconds = time.process_time() - started
                print(f"{file.name}: {found['after']}, {seconds:.0f} s", flush=True)


def table(out: Path) -> None:
    """Print the change of each reward: mean and range over the seeds, and how many rose."""
    found = [json.loads(file.read_text()) for file in sorted(out.glob("*-*.json"))]
    base = json.loads((out / "base.json").read_text())
    print("| scales | way | redness | brightness | seeds in which both rise |")
    print("|---|---|---|---|---|")
    for case in SCALES:
        for way in WAYS:
            rows = [one for one in found if (one["case"], one["way"]) == (case, way)]
            if rows:
                moves = [{k: row["after"][k] - base[k] for k in base} for row in rows]
                both = sum(all(move > 0 for move in one.values()) for one in moves)
                cells = [shown([one[name] for one in moves]) for name in base]
                print(f"| {case} | {way} | {' | '.join(cells)} | {both} of {len(rows)} |")


def shown(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


def measured(turns: int) -> Iterator[tuple[str, float]]:
    """Yield CPU seconds of a step of recipe=demo_reward with a part of redness, by turns."""
    trainees = {
        way: Colors("objective.truncation_steps=1", RED, *more) for way, more in TIMED.items()
    }
    steps = {way: trainee.step for way, trainee in trainees.items()}
    for way, found in time_turns(steps, 1, turns, "cpu", "cpu").items():
        yield way, statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "table", "time"))
    parser.add_argument("--out", type=Path, default=Path("several"))
    parser.add_argument("--turns", type=int, default=5, help="of `time`")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    match options.action:
        case "run":
            options.out.mkdir(parents=True, exist_ok=True)
            run(options.out)
        case "table":
            table(options.out)
        case _:
            for way, seconds in measured(options.turns):
                print(f"{way}: {seconds:.2f} s a step", flush=True)


if __name__ == "__main__":
    main()
