"""Compare what `sfumato plan` says of a U-Net of 76 M parameters with a step that runs on the CPU.

Supervised training takes all weights and a cache; DRaFT+ takes a LoRA, classifier-free guidance
and a CLIP reward. Counted must agree: parameters, FLOPs (torch's own counter), the bytes of
weights, moments and average. Estimated is the peak beside them: against the allocations that
torch's profiler saw, and against the resident memory of a process of its own.

    python benchmarks/plan.py --batch 4 --out plan.json
    python benchmarks/plan.py --objective draft --batch 1 --out plan_draft.json
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from measure import machine, peak_of_child, peak_of_process, quiet, reset_peak
from networks import MAX_TOKENS, SIZES, write_pipeline, write_reward
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sfumato.compose import compose_command
from sfumato.config import PlanConfig
from sfumato.data.sample import Encoded, Sample
from sfumato.diffusion.randomness import Rng
from sfumato.models.registry import load_model
from sfumato.planning.blueprint import PROMPT
from sfumato.planning.plan import make_plan
from sfumato.run.build import build_objective, build_scorer
from sfumato.training.ema import Ema
from sfumato.training.optimizer import build_optimizer

DECAY = 0.9999
STEPS = ("flops", "allocations", "resident")
CASES = {
    "supervised": {
        f"checkpointing {switch}": [
            *("objective=supervised", "model.trainable=full", "data.shards.cached=true"),
            f"model.gradient_checkpointing={switch == 'on'}",
        ]
        for switch in ("off", "on")
    },
    "draft": {
        f"K = {window}, checkpointing {switch}": [
            *("objective=draft", "reward=clip", "sampler.num_inference_steps=3"),
            f"objective.truncation_steps={window}",
            f"model.gradient_checkpointing={switch == 'on'}",
        ]
        for window in (1, 2)
        for switch in ("off", "on")
    },
}


@final
class Loop:
    """An objective's step on random rows."""

    def __init__(self, config: PlanConfig) -> None:
        self.reward = build_scorer(config)
        self.objective = build_objective(config, self.reward)
        needed = self.objective.needs_reference
        self.model: Any = load_model(replace(config.model, reference=needed))
        self.model.trained.train()
        named = self.model.trainable()
        self.optimizer = build_optimizer(list(named.values()), config.optimizer)
        self.ema = Ema(named, DECAY)
        rows = config.training.micro_batch_size
        is_cached = config.data.shards.cached
        self.batch = [self.sample() if is_cached else PROMPT] * rows

    def sample(self) -> Sample:
        height, width = size = self.model.image_size()
        channels, *sides = self.model.latent_shape(height, width)
        states = torch.randn(1, MAX_TOKENS, self.model.network.config.cross_attention_dim).half()
        moments = torch.randn(2 * channels, *sides).half()
        encoded = Encoded(moments, {"states": states}, {"states": states}, size)
        return Sample(None, "a", size, (0, 0), "random", encoded)

    def loss(self) -> torch.Tensor:
        rng = Rng.of_step(0, 0, range(len(self.batch)))
        return self.objective.loss(self.model, self.batch, rng).value

    def backward(self) -> None:
        self.loss().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    quiet()
    if options.peak_of:
        print(resident_peak(composed(options, options.folder, options.peak_of)))
        return
    # Blocks go back to the system when they are freed: resident is then what is held, not gaps.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pipeline(folder / "pipeline", SIZES["60m"])
        write_reward(folder / "reward", SIZES["60m"])
        found = {}
        for case in CASES[options.objective]:
            found[case] = compare(options, folder, case)
            print(f"\n{options.objective}, {case}, batch {options.batch}")
            print(f"  {'':34}{'plan':>16}{'measured':>16}{'plan / measured':>18}")
            for what, (planned, measured) in found[case].items():
                ratio = f"{planned / measured:>18.4f}"
                print(f"  {what:34}{planned:>16,.0f}{measured:>16,.0f}{ratio}", flush=True)
    if options.out:
        content = {"machine": machine("cpu"), "batch": options.batch, "found": found}
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objective", choices=tuple(CASES), default="supervised")
    parser.add_argument("--steps", nargs="*", default=STEPS, choices=STEPS, help="what to measure")
    parser.add_argument("--batch", type=int, default=4, help="images of the step")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace, folder: Path, case: str) -> dict[str, tuple[float, float]]:
    """Return what the plan says and what was measured, by name; bytes, FLOPs or a count."""
    config = composed(options, folder, case)
    plan, loop = make_plan(config), Loop(config)
    cost, held, rows = plan.memory[0].cost, plan.memory[0].held, options.batch
    found: dict[str, tuple[float, float]] = {}
    if "flops" in options.steps:
        forward, executed = counted_flops(loop)
        found["FLOPs, forward"] = plan.forward_flops * rows + cost.others, forward
        found["FLOPs, executed"] = plan.executed * rows, executed
    if "allocations" in options.steps:
        found["peak beside them, allocations"] = cost.with_gradients, peak_of_allocations(loop)
    if "resident" in options.steps:
        child = [sys.executable, __file__, "--peak-of", case, "--objective", options.objective]
        resident = peak_of_child([*child, "--batch", str(rows), "--folder", str(folder)])
        found["peak beside them, resident"] = cost.with_gradients, resident
    for parameter in loop.model.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()
    moments = [t for state in loop.optimizer.state.values() for t in state.values() if t.ndim]
    trained, networks = loop.model.trained, loop.model.networks()
    frozen = [networks["vae"], networks["text_encoder"], *([loop.reward] if loop.reward else [])]
    return found | {
        "parameters": (plan.parameters["trained"], count(loop.model.trainable().values())),
        "bytes of weights": (held.weights, size_of(held_by(trained))),
        "bytes of frozen weights": (
            held.frozen + held.reward,
            sum(size_of(held_by(each)) for each in frozen),
        ),
        "bytes of moments": (held.optimizer, size_of(moments)),
        "bytes of the average": (held.ema, size_of(loop.ema.shadow.values())),
    }


def composed(options: argparse.Namespace, folder: Path, case: str) -> PlanConfig:
    """Return the settings of a case."""
    settings = [
        *("gpu=cpu", f"model.pretrained={folder / 'pipeline'}", *CASES[options.objective][case]),
        f"training.micro_batch_size={options.batch}",
        f"training.global_batch_size={options.batch}",
    ]
    if options.objective == "draft":
        settings.append(f"reward.pretrained={folder / 'reward'}")
    config, _ = compose_command("plan", settings)
    assert isinstance(config, PlanConfig)
    return config


def held_by(network: Any) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def count(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def size_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def counted_flops(loop: Loop) -> tuple[int, int]:
    """Return torch's count of a forward, and of forward and backward.

    Attention runs as two products: torch's counter knows no CPU kernel of it.
    """
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = loop.loss()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    loop.optimizer.zero_grad(set_to_none=True)
    counted = forward.get_total_flops()
    return counted, counted + backward.get_total_flops()


def peak_of_allocations(loop: Loop) -> int:
    """Return the peak of what torch allocates in a backward, in bytes above what was there."""
    with kept_clean(loop):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            loop.backward()
        results: Any = found.profiler
        events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda each: each.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def resident_peak(config: PlanConfig) -> int:
    """Return the peak of a step's resident memory, in bytes above what was there before."""
    loop = Loop(config)
    loop.step()  # the moments come into being, and kernels are chosen
    with kept_clean(loop):
        reset_peak()
        before = peak_of_process()
        loop.backward()
    return (peak_of_process() - before) * 2**10


@contextmanager
def kept_clean(loop: Loop) -> Iterator[None]:
    gc.collect()
    trim()
    yield
    loop.optimizer.zero_grad(set_to_none=True)


def trim() -> None:
    """Give free memory back to the system, where its allocator can (glibc)."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    main()
