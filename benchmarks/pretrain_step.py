"""Measure a pretraining step of Sfumato, from cached latents and text, against a bare torch loop.

All weights of a U-Net are trained. First the losses, gradients and updates of both are compared,
and the measurement stops where they differ. Time: both loops by turns in one process, the median
of the ratios of pairs. Memory: each loop in a process of its own; both hold autoencoder and text
encoder too, for validation. The cache is held in memory: data.py measures its reading.

    python benchmarks/pretrain_step.py --model 60m --pairs 5 --out pretrain_step.json
    python benchmarks/pretrain_step.py --model 860m --device cuda --dtype bfloat16 --batch 32 \
        --channels-last --compile regional --steps 10
"""

import argparse
import json
import os
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
from sft_step import BATCH, HELD, TOLERANCE, supervised_draws, write_model

from sfumato.data.left_out import SkipReport
from sfumato.data.sample import Encoded, Sample
from sfumato.data.stream import Stream

MODELS = ("demo", "60m", "860m")  # those with a U-Net


@dataclass(frozen=True)
class Pretrain(Step):
    """A pretraining step, and how the network is laid out and run in both loops."""

    channels_last: bool
    compile: str  # none | regional | full


@final
class HeldCache(Stream[Sample]):
    """Give out cached samples that are in memory, round and round."""

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


class BarePretrain:
    """The loop as one writes it by hand with torch and diffusers; it shares no code with Sfumato.

    Args:
        moments: of the cache, (n, 2c, h, w), float16.
        states: likewise, (n, tokens, width).
    """

    def __init__(self, case: Pretrain, pipeline: Path, moments: Any, states: Any) -> None:
        import torch
        from bare_loop import LAYERS, Update, add_lora
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        self.half = torch.bfloat16 if case.dtype == "bfloat16" else None
        self.device, self.batch, self.taken = torch.device(case.device), case.batch, 0
        frozen = self.half or torch.float32
        types = {"default": frozen, "unet": torch.float32 if case.full else frozen}
        parts: Any = DiffusionPipeline.from_pretrained(pipeline, dtype=types, local_files_only=True)
        self.frozen = [part.to(self.device).eval() for part in (parts.vae, parts.text_encoder)]
        self.scheduler, self.network = parts.scheduler, parts.unet.to(self.device).eval()
        self.scaling = parts.vae.config.scaling_factor
        if case.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if not case.full:
            self.network.requires_grad_(False)
            add_lora(self.network, RANK, LAYERS)
        if case.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if case.compile == "regional":
            self.network.compile_repeated_blocks()
        elif case.compile == "full":
            self.network.compile()
        self.update = Update(self.network, LR, CLIP_NORM, EMA)
        self.moments, self.states = moments, states

    @property
    def optimizer(self) -> Any:
        return self.update.optimizer

    @property
    def parameters(self) -> dict[str, Any]:
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def step(self, draws: Any = None) -> float:
        """Take one optimiser step on the next rows of the cache; return the loss."""
        import torch

        rows = [(self.taken + i) % len(self.moments) for i in range(self.batch)]
        self.taken += self.batch
        half = self.half
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            loss = self.loss(rows, draws)
        return self.update.step(loss)

    def loss(self, rows: list[int], draws: Any) -> Any:
        import torch
        import torch.nn.functional as F
        from bare_sft import Draws

        mean, logvar = self.moments[rows].to(self.device).float().chunk(2, dim=1)
        states = self.states[rows].to(self.device)
        if draws is None:
            u = torch.rand(len(rows), device=self.device)
            draws = Draws(torch.randn_like(mean), torch.randn_like(mean), u)
        std = (0.5 * logvar.clamp(-30.0, 20.0)).exp()
        x0 = (mean + std * draws.posterior) * self.scaling
        steps = (draws.u * self.scheduler.config.num_train_timesteps).long()
        x_t = self.scheduler.add_noise(x0, draws.noise, steps)
        target = draws.noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(x0, draws.noise, steps)
        dtype = self.network.dtype
        raw = self.network(x_t.to(dtype), steps, states.to(dtype)).sample
        return F.mse_loss(raw.float(), target)


@dataclass(frozen=True)
class Result:
    """What was found of one step."""

    case: Pretrain
    parity: Parity
    timing: Timing
    peaks: dict[str, float]  # MiB, by loop
    gflops_per_image: float  # of the model, forward and backward


def main() -> None:
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate would take the GPU
    quiet()
    case = case_of(options)
    if options.peak_of:
        loop = {"ours": open_ours, "bare": open_bare}[options.peak_of](case, options.folder)
        print(peak_of_steps(loop.step, options.steps, case.device))
        return
    with tempfile.TemporaryDirectory() as name:
        write_model(case.model, Path(name))
        result = measure(case, Path(name), options)
    print(told(result, options.clock))
    if options.out:
        content = {"machine": machine(case.device), "clock": options.clock, **asdict(result)}
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="60m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", choices=("none", "regional", "full"), default="none")
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


def case_of(options: argparse.Namespace) -> Pretrain:
    return Pretrain(
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        full=True,
        batch=options.batch or BATCH[options.model],
        gradient_checkpointing=options.checkpointing,
        channels_last=options.channels_last,
        compile=options.compile,
    )


def held_cache(folder: Path, count: int) -> tuple[Any, Any]:
    """Return random moments and text states of the model's shapes: the same at every call."""
    import torch

    def settings(part: str) -> dict[str, Any]:
        return json.loads((folder / "pipeline" / part / "config.json").read_text())

    unet, text = settings("unet"), settings("text_encoder")
    rng, side = torch.Generator().manual_seed(0), unet["sample_size"]
    mean = torch.randn(count, unet.get("in_channels", 4), side, side, generator=rng)
    tokens, width = text["max_position_embeddings"], unet["cross_attention_dim"]
    states = torch.randn(count, tokens, width, generator=rng)
    return torch.cat([mean, torch.full_like(mean, -4.0)], 1).half(), states.half()


def open_ours(case: Pretrain, folder: Path) -> Ours:
    """Return our pretraining step."""
    from sfumato.config import ModelConfig, NoRewardConfig, SupervisedConfig
    from sfumato.models.registry import find_family
    from sfumato.training.compiling import arrange

    family, place = find_family(ModelConfig(pretrained=str(folder / "pipeline")))
    size = family.read_limits(place).size
    assert size is not None
    moments, states = held_cache(folder, HELD * case.batch)
    samples = [
        Sample(
            None,
            PROMPTS[i % len(PROMPTS)],
            original=size,
            crop=(0, 0),
            name=str(i),
            encoded=Encoded(
                moments[i], {"states": states[i : i + 1]}, {"states": states[:1]}, size
            ),
        )
        for i in range(len(moments))
    ]
    config = train_config(case, folder)
    config.objective, config.reward = SupervisedConfig(), NoRewardConfig()
    config.model.reference = False
    config.model.channels_last, config.training.compile = case.channels_last, case.compile
    ours = Ours(config, HeldCache(samples), supervised_draws)
    arrange(ours.model, config)
    return ours


def open_bare(case: Pretrain, folder: Path) -> BarePretrain:
    return BarePretrain(case, folder / "pipeline", *held_cache(folder, HELD * case.batch))


def measure(case: Pretrain, folder: Path, options: argparse.Namespace) -> Result:
    """Compare both loops, time them, and let a process each measure its memory."""
    ours, bare = open_ours(case, folder), open_bare(case, folder)
    parity = compare(ours, bare)
    print(parity, flush=True)
    check_parity(parity, TOLERANCE[case.dtype])
    flops = ours.state.meter.flops
    assert flops is not None, "counted in the first step"
    timing = time_pairs(
        ours.step, bare.step, options.steps, options.pairs, case.device, options.clock
    )
    explain_slowness(timing, ours.step, bare.step, case.device)
    del ours, bare
    peaks = {loop: in_child(loop, folder, options) for loop in ("ours", "bare")}
    return Result(case, parity, timing, peaks, flops / 1e9)


def in_child(loop: str, folder: Path, options: argparse.Namespace) -> float:
    """Return the peak memory in MiB of a loop in a process of its own."""
    # Of options given twice the last holds.
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", loop, "--folder", str(folder)]
    return peak_of_child([*command, "--steps", str(max(2, options.steps))])


def told(result: Result, clock: str) -> str:
    """Return the result in words, ours / bare."""
    case, timing, peaks = result.case, result.timing, result.peaks
    rate = result.gflops_per_image * case.batch / timing.ours / 1e3
    return "\n".join(
        [
            f"{case.model}, {case.dtype}, batch {case.batch}, compile {case.compile}"
            f"{', channels last' if case.channels_last else ''}"
            f"{', checkpointing' if case.gradient_checkpointing else ''}; {clock} time; "
            f"{machine(case.device)}",
            f"s/step {timing.ours:.4f} / {timing.bare:.4f}, ratio of pairs {timing.ratio:.3f}",
            f"images/s {case.batch / timing.ours:.3f} / {case.batch / timing.bare:.3f}",
            f"peak MiB {peaks['ours']:.0f} / {peaks['bare']:.0f}, ratio "
            f"{peaks['ours'] / peaks['bare']:.3f}",
            f"{result.gflops_per_image:.2f} GFLOP an image, {rate:.3f} TFLOP/s",
        ]
    )


if __name__ == "__main__":
    main()
