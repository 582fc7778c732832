"""Measure a DRaFT+ step of Sfumato against a bare torch loop that does the same arithmetic.

First the gradients and updates of both are compared, and the measurement stops where they differ.
Time: both loops by turns in one process, the median of the ratios of pairs. Memory: each loop in a
process of its own, at several numbers of sampling steps.

    python benchmarks/draft_step.py --model 60m --pairs 5 --out draft_step_60m.json
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from loops import RANK, Bare, Case, open_ours, write_models
from measure import (
    Timing,
    explain_slowness,
    machine,
    peak_of_child,
    peak_of_steps,
    quiet,
    time_pairs,
)
from parity import Parity, check_parity, compare

BATCH = {"demo": 16, "60m": 2, "860m": 4}
# Largest differences. AdamW's first updates have the sign of the gradient, which rounding to
# bfloat16 turns where it is small; so updates differ by more than gradients.
TOLERANCE = {
    "float32": {"loss": 1e-4, "gradient": 1e-3, "update": 1e-2},
    "bfloat16": {"loss": 2e-2, "gradient": 5e-2, "update": 0.5},
}


def main() -> None:
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate would take the GPU
    quiet()
    case = Case(
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        full=options.full,
        reward=options.reward,
        batch=options.batch or BATCH[options.model],
        gradient_checkpointing=options.gradient_checkpointing,
        num_inference_steps=options.num_inference_steps,
    )
    if options.peak_of:
        print(json.dumps(peak_memory(case, options.folder, options.peak_of, options.steps)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(case, folder)
        parity, timing = measure_time(case, folder, options.steps, options.pairs)
        peaks = {
            steps: {
                loop: in_child(case, folder, loop, steps, options.steps)
                for loop in ("ours", "bare")
            }
            for steps in options.memory_steps
        }
    print(table(case, timing, peaks))
    if options.out:
        content = {
            "case": asdict(case),
            "machine": machine(case.device),
            "parity": asdict(parity),
            "seconds_per_step": asdict(timing),
            "images_per_second": {
                "ours": case.batch / timing.ours,
                "bare": case.batch / timing.bare,
            },
            "peak_mib": {str(steps): found for steps, found in peaks.items()},
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(BATCH), default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--lora", dest="full", action="store_false", help="the default")
    trained.add_argument("--full", dest="full", action="store_true")
    parser.set_defaults(full=False)
    parser.add_argument("--reward", choices=("clip", "color"), default="clip")
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps per turn")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each loop")
    parser.add_argument(
        "--memory-steps",
        type=int,
        nargs="*",
        default=[5, 20],
        help="numbers of sampling steps to measure memory at",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--peak-of", choices=("ours", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_time(case: Case, folder: Path, steps: int, pairs: int) -> tuple[Parity, Timing]:
    """Compare both loops and time them; print profiles if ours is the slower by too much."""
    ours, bare = open_ours(case, folder), Bare(case, folder)
    parity = compare(ours, bare)
    print(parity, flush=True)
    check_parity(parity, TOLERANCE[case.dtype])
    timing = time_pairs(ours.step, bare.step, steps, pairs, case.device)
    explain_slowness(timing, ours.step, bare.step, case.device)
    return parity, timing


def in_child(case: Case, folder: Path, loop: str, sampling_steps: int, steps: int) -> float:
    """Return the peak memory in MiB of a loop in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", loop, "--folder", str(folder)]
    command += ["--model", case.model, "--device", case.device, "--dtype", case.dtype]
    command += ["--reward", case.reward, "--batch", str(case.batch), "--steps", str(steps)]
    command += ["--num-inference-steps", str(sampling_steps), "--full" if case.full else "--lora"]
    command += ["--gradient-checkpointing"] if case.gradient_checkpointing else []
    peak = peak_of_child(command)
    print(f"peak of {loop} at T = {sampling_steps}: {peak:.0f} MiB", flush=True)
    return peak


def peak_memory(case: Case, folder: Path, loop: str, steps: int) -> float:
    """Return the peak in MiB of a loop in this process."""
    loop_of = {"ours": open_ours, "bare": Bare}[loop]
    return peak_of_steps(loop_of(case, folder).step, steps, case.device)


def table(case: Case, timing: Timing, peaks: dict[int, dict[str, float]]) -> str:
    """Return the result as Markdown."""
    trained = "full" if case.full else f"LoRA {RANK}"
    heads = "".join(f" peak MiB, T = {steps} |" for steps in peaks)
    lines = [
        f"{case.model}, {trained}, {case.dtype}, batch {case.batch}, T = "
        f"{case.num_inference_steps}, {case.reward} reward; {machine(case.device)}",
        "",
        f"| loop | s/step | images/s |{heads}",
        f"|---|---|---|{'---|' * len(peaks)}",
    ]
    for name, seconds in (("ours", timing.ours), ("bare", timing.bare)):
        cells = "".join(f" {found[name]:.0f} |" for found in peaks.values())
        lines.append(f"| {name} | {seconds:.4f} | {case.batch / seconds:.3f} |{cells}")
    cells = "".join(f" {found['ours'] / found['bare']:.3f} |" for found in peaks.values())
    lines.append(f"| ours / bare | {timing.ratio:.3f} | {1 / timing.ratio:.3f} |{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
