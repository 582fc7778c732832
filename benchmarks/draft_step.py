"""Measure a DRaFT+ step of Sfumato against a bare torch loop that does the same arithmetic.

Time: both loops by turns in one process, the median of the ratios of pairs. Memory: each loop in a
process of its own, at several numbers of sampling steps. Before either, gradients and updates of
both are compared, and the measurement stops where they differ.

    python benchmarks/draft_step.py --model 60m --pairs 5 --out draft_step_60m.json
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROMPTS = ["a red star", "a small blue ring on a yellow background", "a cat", "two green squares"]
SEED, LR, KL_COEFF, GUIDANCE, RANK, CLIP_NORM, EMA = 0, 1e-4, 0.5, 7.5, 32, 10.0, 0.9999
BATCH = {"demo": 16, "60m": 2, "860m": 4}
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}  # of gradients and updates, in their norm
LIMIT = 1.05  # times the bare loop's time


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    device: str
    dtype: str
    full: bool
    reward: str
    batch: int
    gradient_checkpointing: bool
    num_inference_steps: int


@dataclass(frozen=True)
class Parity:
    """How far the two loops are apart, each a difference relative to the norm of the bare one."""

    loss: float
    gradient: float
    update: float


@dataclass(frozen=True)
class Timing:
    """Seconds per optimiser step, medians, and the median of the ratios of pairs."""

    ours: float
    bare: float
    ratio: float


def main() -> None:
    options = parse()
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate would take the GPU
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
        peaks = {
            steps: {
                loop: in_child(case, folder, loop, steps, options.steps)
                for loop in ("ours", "bare")
            }
            for steps in options.memory_steps
        }
        measure(case, folder, peaks, options)


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


def write_models(case: Case, folder: Path) -> None:
    from networks import SIZES, write_pipeline, write_reward

    write_pipeline(folder / "pipeline", SIZES[case.model])
    if case.reward == "clip":
        write_reward(folder / "reward", SIZES[case.model])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


class Ours:
    """Sfumato's own loading code and `take_step`."""

    def __init__(self, case: Case, folder: Path) -> None:
        from sfumato.config import (
            ClipRewardConfig,
            ColorRewardConfig,
            DataConfig,
            DraftConfig,
            LoraConfig,
            ModelConfig,
            OptimizerConfig,
            SamplerConfig,
            TrainConfig,
            TrainingConfig,
        )
        from sfumato.data.prompts import open_prompts
        from sfumato.models.registry import load_model
        from sfumato.objectives.draft import Draft
        from sfumato.rewards.build import build_reward
        from sfumato.training.distribution import Distribution
        from sfumato.training.module import TrainingModule
        from sfumato.training.state import TrainState

        clip = ClipRewardConfig(pretrained=str(folder / "reward"), dtype=case.dtype)
        self.objective = DraftConfig(kl_coeff=KL_COEFF)
        self.config = TrainConfig(
            model=ModelConfig(
                pretrained=str(folder / "pipeline"),
                trainable="full" if case.full else "lora",
                lora=LoraConfig(rank=RANK),
                dtype=case.dtype,
                gradient_checkpointing=case.gradient_checkpointing,
            ),
            sampler=SamplerConfig(
                num_inference_steps=case.num_inference_steps, guidance_scale=GUIDANCE
            ),
            objective=self.objective,
            reward=clip if case.reward == "clip" else ColorRewardConfig(),
            data=DataConfig(prompts=str(folder / "prompts.txt"), shuffle=False),
            optimizer=OptimizerConfig(lr=LR, warmup_steps=0, max_grad_norm=CLIP_NORM),
            training=TrainingConfig(
                micro_batch_size=case.batch,
                global_batch_size=case.batch,
                precision="bf16" if case.dtype == "bfloat16" else "no",
                ema_decay=EMA,
                seed=SEED,
            ),
        )
        self.distribution = Distribution(self.config.training)
        device = self.distribution.device
        reward = build_reward(self.config.reward).to(device)
        self.model = load_model(self.config.model)
        self.model.to(device)
        self.module = TrainingModule(self.model, Draft(self.objective, self.config.sampler, reward))
        stream = open_prompts(self.config.data.prompts, shuffle=False)
        self.state = TrainState(self.config, self.model, stream, self.distribution)

    @property
    def optimizer(self) -> Any:
        return self.state.optimizer

    def noise(self) -> Any:
        """Return the noise that the next step will start from."""
        from sfumato.diffusion.randomness import Rng

        height, width = self.model.image_size()
        rng = Rng.of_step(SEED, self.state.step, range(self.config.training.micro_batch_size))
        shape = self.model.latent_shape(height, width)
        return rng.normal(*shape, device=self.model.device)

    def step(self) -> float:
        from sfumato.training.loop import take_step

        return take_step(self.config, self.module, self.state, self.distribution)["loss"]


class Bare:
    """The bare loop on the same prompts, in the same order."""

    def __init__(self, case: Case, folder: Path) -> None:
        import torch
        from bare_loop import BareLoop, BareSettings
        from diffusers.utils.logging import disable_progress_bar
        from transformers.utils.logging import disable_progress_bar as disable_bar_of_transformers

        disable_progress_bar()
        disable_bar_of_transformers()
        self.loop = BareLoop(
            BareSettings(
                pipeline=folder / "pipeline",
                reward=folder / "reward" if case.reward == "clip" else None,
                device=torch.device(case.device),
                dtype=torch.bfloat16 if case.dtype == "bfloat16" else torch.float32,
                full=case.full,
                rank=RANK,
                gradient_checkpointing=case.gradient_checkpointing,
                num_inference_steps=case.num_inference_steps,
                guidance_scale=GUIDANCE,
                kl_coeff=KL_COEFF,
                lr=LR,
                max_grad_norm=CLIP_NORM,
                ema_decay=EMA,
            )
        )
        self.batch, self.taken = case.batch, 0
        config = self.loop.unet.config
        self.shape = (case.batch, config.in_channels, config.sample_size, config.sample_size)

    @property
    def optimizer(self) -> Any:
        return self.loop.optimizer

    def step(self, noise: Any = None) -> float:
        import torch

        rows = range(self.taken * self.batch, (self.taken + 1) * self.batch)
        self.taken += 1
        if noise is None:
            noise = torch.randn(self.shape).to(self.loop.settings.device)
        return self.loop.step([PROMPTS[i % len(PROMPTS)] for i in rows], noise)


def measure(
    case: Case, folder: Path, peaks: dict[int, dict[str, float]], options: argparse.Namespace
) -> None:
    """Compare both loops, time them, and write what came of it."""
    import torch

    if case.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    ours, bare = Ours(case, folder), Bare(case, folder)
    parity = compare(ours, bare)
    print(f"parity: {parity}", flush=True)
    worst = max(parity.loss, parity.gradient, parity.update)
    if not worst <= TOLERANCE[case.dtype]:
        sys.exit(f"the loops do not do the same arithmetic: {parity}")
    timing = time_pairs(ours.step, bare.step, options.steps, options.pairs, case.device)
    print(table(case, timing, peaks))
    if timing.ratio > LIMIT:
        for name, step in (("ours", ours.step), ("bare", bare.step)):
            print(f"\n{name}, one step:\n{profile(step, case.device)}")
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


def compare(ours: Ours, bare: Bare) -> Parity:
    """Take two steps of each from the same weights and noise; return the largest differences.

    The first gradient is compared; B of LoRA is set off from 0, so that A has a gradient and the
    KL term a value. Updates are compared after both steps.
    """
    import torch

    parameters = ours.state.parameters
    copied = dict(bare.loop.unet.named_parameters())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn_like(parameter))
            copied[name].copy_(parameter)
    before = [parameter.detach().clone() for parameter in parameters.values()]
    pairs = [(parameter, copied[name]) for name, parameter in parameters.items()]
    assert len(pairs) == len(bare.loop.trained), "the loops train other parameters"
    found: list[list[Any]] = [[], []]
    hooks = [
        loop.optimizer.register_step_pre_hook(
            lambda *_, side=side: found[side].extend(gradients(pairs, side))
        )
        for side, loop in enumerate((ours, bare))
    ]
    losses = []
    for _ in range(2):
        noise = ours.noise()
        losses.append((ours.step(), bare.step(noise)))
    for hook in hooks:
        hook.remove()
    moved = [
        [pair[side].detach() - old for pair, old in zip(pairs, before, strict=True)]
        for side in (0, 1)
    ]
    first = [kept[: len(pairs)] for kept in found]
    return Parity(
        loss=max(abs(a - b) / max(abs(b), 1e-3) for a, b in losses),
        gradient=distance(*first),
        update=distance(*moved),
    )


def gradients(pairs: Sequence[tuple[Any, Any]], side: int) -> list[Any]:
    """Return copies of the gradients of one side's parameters."""
    return [pair[side].grad.clone() for pair in pairs]


def distance(left: Sequence[Any], right: Sequence[Any]) -> float:
    """Return ||left - right|| / ||right|| over lists of tensors."""
    import torch

    apart = torch.stack([(a - b).norm() for a, b in zip(left, right, strict=True)]).norm()
    return (apart / torch.stack([b.norm() for b in right]).norm()).item()


def time_pairs(
    ours: Callable[[], float], bare: Callable[[], float], steps: int, pairs: int, device: str
) -> Timing:
    """Time both by turns, who begins changing from pair to pair."""
    for step in (ours, bare):
        turn(step, 1, device)
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for pair in range(pairs):
        order = [("ours", ours), ("bare", bare)]
        for name, step in order if pair % 2 else reversed(order):
            seconds[name].append(turn(step, steps, device))
            print(f"pair {pair + 1}/{pairs} {name}: {seconds[name][-1]:.4f} s/step", flush=True)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
    return Timing(
        statistics.median(seconds["ours"]),
        statistics.median(seconds["bare"]),
        statistics.median(ratios),
    )


def turn(step: Callable[[], float], steps: int, device: str) -> float:
    """Return the seconds per step; every step ends by reading its loss, which waits for a GPU."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def in_child(case: Case, folder: Path, loop: str, sampling_steps: int, steps: int) -> float:
    """Return the peak memory in MiB of a loop in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", loop, "--folder", str(folder)]
    command += ["--model", case.model, "--device", case.device, "--dtype", case.dtype]
    command += ["--reward", case.reward, "--batch", str(case.batch), "--steps", str(steps)]
    command += ["--num-inference-steps", str(sampling_steps), "--full" if case.full else "--lora"]
    command += ["--gradient-checkpointing"] if case.gradient_checkpointing else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak = float(done.stdout.splitlines()[-1])
    print(f"peak of {loop} at T = {sampling_steps}: {peak:.0f} MiB", flush=True)
    return peak


def peak_memory(case: Case, folder: Path, loop: str, steps: int) -> float:
    """Return the peak in MiB while steps are taken: of the GPU's memory, or of this process's."""
    import torch

    step = (Ours(case, folder) if loop == "ours" else Bare(case, folder)).step
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    for _ in range(steps):
        step()
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_of_process() / 2**10


def reset_peak() -> None:
    """Forget the peak of loading, where the system can (Linux)."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_of_process() -> int:
    """Return the peak resident memory in KiB since `reset_peak`.

    Linux tells it in VmHWM; getrusage's figure begins at the size of the parent process.
    """
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def profile(step: Callable[[], float], device: str) -> str:
    """Return where the time of one step goes."""
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as found:
        step()
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=kind, row_limit=15, max_name_column_width=40)


def machine(device: str) -> str:
    import torch

    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}"


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
