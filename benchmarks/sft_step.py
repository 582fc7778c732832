"""Measure a supervised step of Sfumato against a bare torch loop that does the same arithmetic.

First the losses, gradients and updates of both are compared, and the measurement stops where they
differ. Time: both loops by turns in one process, the median of the ratios of pairs. Memory: each
loop in a process of its own. The images are held in memory: image_data.py measures their loading.

    python benchmarks/sft_step.py --models 60m mmdit --pairs 5 --out sft_step.json
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from loops import CLIP_NORM, EMA, LR, PROMPTS, RANK, Ours, Step, train_config
from measure import (
    CLOCKS,
    Timing,
    explain_slowness,
    machine,
    peak_of_child,
    peak_of_steps,
    quiet,
    time_pairs,
)
from parity import Parity, check_parity, compare

from sfumato.data.left_out import SkipReport
from sfumato.data.sample import Sample
from sfumato.data.stream import Stream

BATCH = {"demo": 16, "60m": 2, "mmdit": 2, "860m": 8}
HELD = 4  # batches of images in memory
# Largest differences. AdamW's first updates have the sign of the gradient, which rounding turns
# where it is small; so updates differ by more than gradients.
TOLERANCE = {
    "float32": {"loss": 1e-5, "gradient": 1e-4, "update": 1e-2},
    "bfloat16": {"loss": 2e-2, "gradient": 5e-2, "update": 0.5},
}


@dataclass(frozen=True)
class Result:
    """What was found of one step."""

    case: Step
    parity: Parity
    timing: Timing
    peaks: dict[str, float]  # MiB, by loop


@final
class HeldImages(Stream[Sample]):
    """Give out images that are in memory, round and round."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.taken = samples, 0

    def next(self, global_batch_size: int, start: int, stop: int) -> list[Sample]:
        first = self.taken
        self.taken += global_batch_size
        return [self.samples[(first + i) % len(self.samples)] for i in range(start, stop)]

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]

    @property
    def skipped(self) -> SkipReport:
        return SkipReport()


def main() -> None:
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate would take the GPU
    quiet()
    if options.peak_of:
        case = case_of(options, options.models[0], options.checkpointing[0])
        loop = {"ours": open_ours, "bare": open_bare}[options.peak_of](case, options.folder)
        print(peak_of_steps(loop.step, options.steps, case.device))
        return
    results = []
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            write_model(model, Path(name))
            for checkpointing in options.checkpointing:
                case = case_of(options, model, checkpointing)
                results.append(measure(case, Path(name), options))
    print(table(results, options.clock))
    if options.out:
        content = {
            "machine": machine(options.device),
            "clock": options.clock,
            "results": [asdict(result) for result in results],
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", choices=sorted(BATCH), nargs="+", default=["60m", "mmdit"])
    parser.add_argument("--checkpointing", choices=("off", "on"), nargs="+", default=["off", "on"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    parser.add_argument("--full", action="store_true", help="train all weights, not LoRA")
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps per turn")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each loop")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu where others use the machine"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--peak-of", choices=("ours", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def case_of(options: argparse.Namespace, model: str, checkpointing: str) -> Step:
    return Step(
        model=model,
        device=options.device,
        dtype=options.dtype,
        full=options.full,
        batch=options.batch or BATCH[model],
        gradient_checkpointing=checkpointing == "on",
    )


def write_model(model: str, folder: Path) -> None:
    from networks import MMDIT_SIZES, SIZES, write_mmdit, write_pipeline

    from sfumato.compose import DEMO_MODELS

    if model == "demo":
        shutil.copytree(DEMO_MODELS / "base", folder / "pipeline")
    elif model in MMDIT_SIZES:
        write_mmdit(folder / "pipeline", MMDIT_SIZES[model])
    else:
        write_pipeline(folder / "pipeline", SIZES[model])


def held_samples(folder: Path, count: int) -> list[Sample]:
    """Return random images of the model's size with captions: the same at every call."""
    import torch

    from sfumato.config import ModelConfig
    from sfumato.models.registry import find_family

    family, place = find_family(ModelConfig(pretrained=str(folder / "pipeline")))
    size = family.read_limits(place).size
    assert size is not None
    images = 2 * torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0)) - 1
    return [
        Sample(image, PROMPTS[i % len(PROMPTS)], size, (0, 0), str(i))
        for i, image in enumerate(images)
    ]


def open_ours(case: Step, folder: Path) -> Ours:
    """Return our supervised step."""
    from sfumato.config import NoRewardConfig, SupervisedConfig

    config = train_config(case, folder)
    config.objective, config.reward = SupervisedConfig(), NoRewardConfig()
    return Ours(config, HeldImages(held_samples(folder, HELD * case.batch)), supervised_draws)


def supervised_draws(model: Any, rng: Any) -> Any:
    from bare_sft import Draws

    shape = model.latent_shape(*model.image_size())
    posterior, noise = (rng.normal(*shape).to(model.device) for _ in range(2))
    return Draws(posterior, noise, rng.uniform().to(model.device))


def open_bare(case: Step, folder: Path) -> Any:
    import torch
    from bare_sft import BareSft, SftSettings

    samples = held_samples(folder, HELD * case.batch)
    settings = SftSettings(
        pipeline=folder / "pipeline",
        device=torch.device(case.device),
        dtype=torch.bfloat16 if case.dtype == "bfloat16" else torch.float32,
        full=case.full,
        rank=RANK,
        gradient_checkpointing=case.gradient_checkpointing,
        lr=LR,
        max_grad_norm=CLIP_NORM,
        ema_decay=EMA,
    )
    images = torch.stack([sample.pixels for sample in samples])
    return BareSft(settings, images, [sample.caption for sample in samples], case.batch)


def measure(case: Step, folder: Path, options: argparse.Namespace) -> Result:
    """Compare both loops, time them, and let a process each measure its memory."""
    print(f"\n{describe(case)}", flush=True)
    ours, bare = open_ours(case, folder), open_bare(case, folder)
    parity = compare(ours, bare)
    print(parity, flush=True)
    check_parity(parity, TOLERANCE[case.dtype])
    timing = time_pairs(
        ours.step, bare.step, options.steps, options.pairs, case.device, options.clock
    )
    explain_slowness(timing, ours.step, bare.step, case.device)
    del ours, bare
    peaks = {loop: in_child(case, folder, loop, options.steps) for loop in ("ours", "bare")}
    print(f"peaks in MiB: {peaks}", flush=True)
    return Result(case, parity, timing, peaks)


def in_child(case: Step, folder: Path, loop: str, steps: int) -> float:
    """Return the peak memory in MiB of a loop in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", loop, "--folder", str(folder)]
    command += ["--models", case.model, "--device", case.device, "--dtype", case.dtype]
    command += ["--batch", str(case.batch), "--steps", str(steps)]
    command += ["--checkpointing", "on" if case.gradient_checkpointing else "off"]
    return peak_of_child([*command, *(["--full"] if case.full else [])])


def describe(case: Step) -> str:
    trained = "full" if case.full else f"LoRA {RANK}"
    checkpointing = ", checkpointing" if case.gradient_checkpointing else ""
    return f"{case.model}, {trained}, {case.dtype}, batch {case.batch}{checkpointing}"


def table(results: list[Result], clock: str) -> str:
    """Return the results as Markdown, ours / bare in each cell."""
    lines = [
        f"ours / bare; {clock} time; {machine(results[0].case.device)}",
        "",
        "| case | s/step | ratio of pairs | images/s | peak MiB | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        timing, peaks, batch = result.timing, result.peaks, result.case.batch
        lines.append(
            f"| {describe(result.case)} | {timing.ours:.4f} / {timing.bare:.4f} "
            f"| {timing.ratio:.3f} | {batch / timing.ours:.3f} / {batch / timing.bare:.3f} "
            f"| {peaks['ours']:.0f} / {peaks['bare']:.0f} | {peaks['ours'] / peaks['bare']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
