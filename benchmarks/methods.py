"""The map of methods: reward, held-out score and diversity against seconds, on the demo.

All methods train the same adapters from the same prompts and seeds, and are evaluated with the same
sampler and noise. The learning rate of each is chosen from one grid on seed 0, by the steps to a
reward at a diversity; the other seeds see no choice. Seconds are steps times the method's own
CPU seconds per step on one thread, which `time` measures in turns: a busy minute does not fall on
one method.

    python benchmarks/methods.py tune --out methods      # learning rates, seed 0
    python benchmarks/methods.py run --out methods       # seeds 1 to 3
    python benchmarks/methods.py time --out methods      # seconds a step, on a quiet machine
    python benchmarks/methods.py table --out methods     # the table and two pictures

`--reward jpeg`, which has no gradient, and `text_image` are for the methods that need none:

    python benchmarks/methods.py tune --out jpeg --reward jpeg      # then run, time and table
    python benchmarks/methods.py run --out text --reward text_image --rates jpeg
    python benchmarks/methods.py table --out text --reward text_image --rates jpeg

Held-out is the text-image model, and with it as the reward the classifier at 160 px.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measure import machine, peak_of_process, quiet, reset_peak
from torch import nn

from sfumato.compose import DEMO_MODELS

RATES = (2.5e-3, 5e-3, 1e-2)
SEEDS = (1, 2, 3)
TUNING_MARKS = (8, 16)
MARKS = (8, 16, 24, 32, 40)  # steps that are evaluated
# Of methods without a gradient: policy gradients, and regressions of images.
POLICY_RATES, POLICY_TUNING, POLICY_MARKS = (1e-3, 2e-3), (5, 10, 15), (10, 20, 30)
IMAGE_RATES, IMAGE_TUNING, IMAGE_MARKS = (1e-3, 2e-3), (4, 8, 12), (5, 10, 20)
BATCH, GROUPED = 5, 16  # images, and queries of the reward, in a step; GROUPED in two groups
IMAGES = 8  # of each prompt
LEVEL, DIVERSITY = -6.5, 0.3  # to reach, and to keep: of the base model -8.7 and .43
FOUR = ("sampler.training_steps=4", "objective.truncation_steps=4")
KL = "objective.kl_coeff=50"
GROUPS = ("objective.images_per_prompt=8", "objective.statistics=group")
# Name: overrides of recipe=demo_reward. They train at 8 steps unless said.
METHODS: dict[str, tuple[str, ...]] = {
    "ddim50": ("method=draft_plus", "objective.kl_coeff=100", "sampler.training_steps=50"),
    "recipe": ("method=draft_plus", "objective.kl_coeff=100", *FOUR),
    "draft": ("method=draft_k", *FOUR),
    "draft_lv": ("method=draft_lv",),
    "alignprop": ("method=alignprop",),
    "refl": ("method=refl",),
    "drtune": ("method=drtune",),
    "leapalign": ("method=leapalign",),
    "flowbp_sparse": ("method=flowbp_sparse",),
    "flowbp_bridge": ("method=flowbp_bridge",),
    "flowbp_lagrange": ("method=flowbp_lagrange",),
    "rsm": ("method=rsm", KL),
    "adjoint_matching": ("method=adjoint_matching",),
    "direct_align": ("method=direct_align",),
    "sparse_kl": ("method=flowbp_sparse", KL, "objective.weights=sigma"),
    **{
        name: (f"method={name}", "sampler.training_steps=5", *own)
        for name, own in {
            "ddpo": ("sampler.eta=0", *GROUPS, "objective.step_weights=std"),
            # With its own noise, eta .5, or with a window, five steps did not move the reward: most
            # of what tells images apart is then the noise that they start from.
            "flow_grpo": (
                "objective.step_weights=std",
                "objective.eta=1",
                "objective.window=null",
                "objective.kl_coeff=5e-4",
            ),
            "nft": ("objective.trained_times=4",),
            "awm": ("objective.trained_times=4",),
        }.items()
    },
}
POLICY, IMAGES_ALONE = ("ddpo", "flow_grpo"), ("nft", "awm")
SAMPLED = (*POLICY, *IMAGES_ALONE)  # they need no gradient of the reward
REWARDS = {  # their parts in place of the recipe's classifier
    "classifier": (),
    "jpeg": ("reward.parts.classifier=null", "reward.parts.own={kind: jpeg}"),
    "text_image": (
        "reward.parts.classifier=null",
        f"reward.parts.own={{kind: clip, pretrained: {DEMO_MODELS / 'text_image'}}}",
    ),
}


Curve = list[dict[str, float]]


def config_of(name: str, rate: float, seed: int, reward: str) -> Any:
    from sfumato.compose import compose_train

    overrides = [
        "recipe=demo_reward",
        "sampler.training_steps=8",
        *METHODS[name],
        *REWARDS[reward],
        *(f"training.{key}_batch_size={batch_of(name)}" for key in ("micro", "global")),
        f"optimizer.lr={rate}",
        f"training.seed={seed}",
        f"training.max_steps={max(plan_of(name)[2])}",
        "training.precision=no",
        f"name={name}",
    ]
    return compose_train(overrides)[0]


def batch_of(name: str) -> int:
    return GROUPED if name in SAMPLED else BATCH


def plan_of(name: str) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]:
    """Return learning rates, and the steps that are evaluated while tuning, and in a run."""
    if name in POLICY:
        return POLICY_RATES, POLICY_TUNING, POLICY_MARKS
    if name in IMAGES_ALONE:
        return IMAGE_RATES, IMAGE_TUNING, IMAGE_MARKS
    return RATES, TUNING_MARKS, MARKS


class Trainee:
    """A method that is trained in this process, step by step, and evaluated between the steps."""

    def __init__(self, config: Any, held_out: str = "text_image") -> None:
        from sfumato.models.registry import load_model
        from sfumato.rewards.build import build_reward
        from sfumato.run.build import build_model, build_objective, build_scorer
        from sfumato.run.open_data import open_stream
        from sfumato.training.distribution import Distribution
        from sfumato.training.module import TrainingModule
        from sfumato.training.state import TrainState

        self.config = config
        self.distribution = Distribution(self.config.training)
        self.reward = build_scorer(self.config)
        self.held_out = build_reward(self.config.validation.rewards[held_out])
        self.queries = 0
        objective = build_objective(self.config, self.reward)
        self.model = build_model(self.config, objective, load_model, self.distribution)
        self.model.trained.train()
        self.module = TrainingModule(self.model, objective)
        stream = open_stream(self.config, None)
        self.state = TrainState(self.config, self.model, objective, stream, self.distribution)
        self.passes: dict[str, int] = {}
        self.model.networks()["policy"].register_forward_hook(self._count)

    def _count(self, network: nn.Module, inputs: Any, output: Any) -> None:
        kind = "gradient" if torch.is_grad_enabled() else "forward"
        self.passes[kind] = self.passes.get(kind, 0) + 1

    def step(self) -> dict[str, float]:
        from sfumato.training.loop import take_step

        self.queries += self.config.training.global_batch_size
        return take_step(self.config, self.module, self.state, self.distribution)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return reward, held-out score and diversity, each a mean over the open prompts."""
        from sfumato.demo.experiment import PROMPTS
        from sfumato.diffusion.randomness import derive
        from sfumato.evaluation.diversity import build_distance
        from sfumato.models.generate import generate_in_batches

        sampler = replace(self.config.sampler, num_inference_steps=8)
        distance = build_distance(str(DEMO_MODELS / "text_image"), self.model.device)
        texts = [prompt for prompt in PROMPTS for _ in range(IMAGES)]
        seeds = [derive(0, i, j) for i in range(len(PROMPTS)) for j in range(IMAGES)]
        self.model.trained.eval()
        images = generate_in_batches(self.model, texts, seeds, sampler, 21)
        self.model.trained.train()

        def mean(reward: Any) -> float:
            parts = [slice(i, i + 21) for i in range(0, len(texts), 21)]
            return statistics.mean(v for p in parts for v in reward(images[p], texts[p]).tolist())

        return {
            "reward": mean(self.reward),
            "held_out": mean(self.held_out),
            "queries": self.queries,
            "diversity": statistics.mean(distance.mean(part) for part in images.split(IMAGES)),
        }

    def close(self) -> None:
        self.distribution.close()


def trained(name: str, rate: float, seed: int, reward: str, marks: Sequence[int]) -> Curve:
    """Train, and return an evaluation at step 0 and at each mark."""
    held_out = "classifier_at_160" if reward == "text_image" else "text_image"
    trainee = Trainee(config_of(name, rate, seed, reward), held_out)
    found: Curve = []
    try:
        for step in range(max(marks) + 1):
            if step:
                trainee.step()
            if step in marks or step == 0:
                found.append({"step": step, **trainee.evaluate()})
    except ValueError as error:  # a loss that is not finite
        print(f"{name}, lr {rate:g}: {error}"[:200], flush=True)
    trainee.close()
    return found


def tune(out: Path, names: Sequence[str], reward: str) -> None:
    for name in names:
        file = out / f"tune-{name}.json"
        if file.exists():
            continue
        rates, marks, _ = plan_of(name)
        curves = {f"{rate:g}": trained(name, rate, 0, reward, marks) for rate in rates}
        best = max(curves, key=lambda rate: merit(curves[rate]))
        file.write_text(json.dumps({"best": float(best), "curves": curves}, indent=1))
        print(f"{name}: best {best}", *(f"\n  {c}" for c in curves.items()), flush=True)


def merit(curve: Curve) -> tuple[float, float]:
    """Order curves: by steps to the level, then by the reward of the last point that is diverse."""
    steps = steps_to(curve, LEVEL, DIVERSITY)
    diverse = [point["reward"] for point in curve if point["diversity"] >= DIVERSITY]
    whole = len(curve) == len(TUNING_MARKS) + 1
    return (-steps if steps is not None else -1e9, diverse[-1] if whole else -1e9)


def run(out: Path, names: Sequence[str], reward: str, rates: Path) -> None:
    for seed in SEEDS:
        for name in names:
            file, tuned = out / f"run-{name}-{seed}.json", rates / f"tune-{name}.json"
            if file.exists() or not tuned.exists():
                continue
            best = json.loads(tuned.read_text())["best"]
            curve = trained(name, best, seed, reward, plan_of(name)[2])
            file.write_text(json.dumps(curve, indent=1))
            last = curve[-1]
            print(f"{name} seed {seed}: " + json.dumps(last), flush=True)


def measure(out: Path, names: Sequence[str], turns: int) -> None:
    """Time one step of each method by turns; count passes, and the peak of memory."""
    trainees = {}
    for name in names:
        trainee = trainees[name] = Trainee(config_of(name, 1e-4, 0, "classifier"))
        trainee.step()
        trainee.passes.clear()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(turns):
        for name, trainee in trainees.items():
            started = time.process_time()  # of one thread: a busy neighbour counts little
            trainee.step()
            seconds[name].append(time.process_time() - started)
    found = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "peak_mib": peak_of(name),
            **{kind: n / turns for kind, n in trainees[name].passes.items()},
        }
        for name in names
    }
    (out / "time.json").write_text(
        json.dumps({"machine": machine("cpu"), "steps": found}, indent=1)
    )
    print(json.dumps(found, indent=1))


def peak_of(name: str) -> float:
    """Return by how many MiB the first step of a method raises the memory of a new process."""
    command = [sys.executable, __file__, "peak", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak(names: Sequence[str]) -> None:
    for name in names:
        trainee = Trainee(config_of(name, 1e-4, 0, "classifier"))
        reset_peak()
        before = peak_of_process()
        trainee.step()
        print((peak_of_process() - before) / 1024)


def curves_of(
    out: Path, names: Sequence[str]
) -> Iterator[tuple[str, list[list[dict[str, float]]]]]:
    for name in names:
        files = sorted(out.glob(f"run-{name}-*.json"))
        if files:
            yield name, [json.loads(file.read_text()) for file in files]


def table(out: Path, names: Sequence[str], level: float, diversity: float, tuned: Path) -> None:
    """Print the table, and write the two pictures; `tuned` has the rates and the times."""
    times = json.loads((tuned / "time.json").read_text())["steps"]
    means: dict[str, list[dict[str, float]]] = {}
    for name, curves in curves_of(out, names):
        means[name] = [
            {key: statistics.mean(point[key] for point in points) for key in points[0]}
            for points in zip(*curves, strict=False)  # a curve ends where a loss is not finite
        ]
    reach = f"seconds (queries) to {level:g} at diversity {diversity:g} or more"
    last_step = "last step: reward, held-out, diversity"
    print(f"| method | lr | s/step | gradient passes | peak MiB | {last_step} | {reach} |")
    print("|---|---|---|---|---|---|---|")
    for name, curve in means.items():
        cost, last = times[name], curve[-1]
        rate = json.loads((tuned / f"tune-{name}.json").read_text())["best"]
        steps = steps_to(curve, level, diversity)
        reached = None if steps is None else (cost["seconds"] * steps, batch_of(name) * steps)
        print(
            f"| {name} | {rate:g} | {cost['seconds']:.2f} | {cost.get('gradient', 0):.0f} "
            f"| {cost['peak_mib']:.0f} "
            f"| {last['step']:.0f}: {last['reward']:.2f}, {last['held_out']:.2f}, "
            f"{last['diversity']:.3f} "
            f"| {'not reached' if reached is None else '{:.0f} ({:.0f})'.format(*reached)} |"
        )
    draw(out, means, times)


def steps_to(curve: Sequence[dict[str, float]], level: float, diversity: float) -> float | None:
    """Return after how many steps the curve has the reward, by lines between the evaluations."""
    for before, after in pairwise(curve):
        if before["reward"] < level <= after["reward"]:
            share = (level - before["reward"]) / (after["reward"] - before["reward"])
            there = before["diversity"] + share * (after["diversity"] - before["diversity"])
            step = before["step"] + share * (after["step"] - before["step"])
            return step if there >= diversity else None
    return None


def draw(out: Path, means: dict[str, list[dict[str, float]]], times: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for file, key, label in (
        ("reward_diversity.png", "diversity", "diversity (CLIP distance)"),
        ("reward_seconds.png", "seconds", "seconds of training"),
    ):
        figure, axes = plt.subplots(figsize=(8, 5))
        for i, (name, curve) in enumerate(means.items()):
            x = [p["step"] * times[name]["seconds"] if key == "seconds" else p[key] for p in curve]
            style = ("-", "--", ":")[i // 10 % 3]
            axes.plot(x, [p["reward"] for p in curve], style, marker=".", label=name)
        axes.set_xlabel(label)
        axes.set_ylabel("reward")
        axes.legend(fontsize=7, ncols=2, handlelength=4)
        figure.tight_layout()
        figure.savefig(out / file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("tune", "run", "time", "peak", "table"))
    parser.add_argument("--out", type=Path, default=Path("methods"))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--reward", choices=REWARDS, default="classifier")
    parser.add_argument("--rates", type=Path, help="folder of `tune` and `time`; by default --out")
    parser.add_argument("--turns", type=int, default=3, help="of `time`")
    parser.add_argument("--level", type=float, default=LEVEL, help="reward of the table")
    parser.add_argument("--diversity", type=float, default=DIVERSITY)
    options = parser.parse_args()
    if options.reward != "classifier" and options.only == list(METHODS):
        options.only = list(SAMPLED)
    options.out.mkdir(parents=True, exist_ok=True)
    quiet()
    torch.set_num_threads(1)
    match options.action:
        case "tune":
            tune(options.out, options.only, options.reward)
        case "run":
            run(options.out, options.only, options.reward, options.rates or options.out)
        case "peak":
            peak(options.only)
        case "time":
            measure(options.out, options.only, options.turns)
        case _:
            tuned = options.rates or options.out
            table(options.out, options.only, options.level, options.diversity, tuned)


if __name__ == "__main__":
    main()
