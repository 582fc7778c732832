"""Compare what `sfumato plan` says of a U-Net of 76 M parameters with a step that runs on the CPU.

Counted must agree: parameters, FLOPs (torch's own counter), the bytes of weights, gradients,
moments and average. Estimated is the peak beside them: against the allocations that torch's
profiler saw, and against the resident memory of a process of its own.

    python benchmarks/plan.py --batch 4 --out plan.json
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from measure import machine, peak_of_child, peak_of_process, quiet, reset_peak
from networks import SIZES, write_pipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sfumato.compose import compose_command
from sfumato.config import ModelConfig, OptimizerConfig
from sfumato.models.registry import load_model
from sfumato.planning.plan import Plan, make_plan
from sfumato.training.ema import Ema
from sfumato.training.optimizer import build_optimizer

TOKENS, DECAY = 77, 0.9999


@final
class Loop:
    """A network that is trained in full on random latents."""

    def __init__(self, folder: Path, batch: int, *, checkpointing: bool) -> None:
        config = ModelConfig(
            pretrained=str(folder),
            trainable="full",
            reference=False,
            gradient_checkpointing=checkpointing,
        )
        model: Any = load_model(config)
        self.network: Any = model.network.train()
        named = dict(self.network.named_parameters())
        self.optimizer = build_optimizer(list(named.values()), OptimizerConfig())
        self.ema = Ema(named, DECAY)
        side = self.network.config.sample_size
        self.x, self.t = torch.randn(batch, 4, side, side), torch.full((batch,), 500.0)
        self.states = torch.randn(batch, TOKENS, self.network.config.cross_attention_dim)

    def backward(self) -> None:
        self.network(self.x, self.t, self.states).sample.square().mean().backward()

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
        print(resident_peak(options.folder, options.batch, options.peak_of == "on"))
        return
    # Blocks go back to the system when they are freed: resident is then what is held, not gaps.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pipeline"
        write_pipeline(folder, SIZES["60m"])
        found = {case: compare(folder, options.batch, case) for case in ("off", "on")}
    for case, rows in found.items():
        print(f"\ngradient checkpointing {case}, batch {options.batch}")
        print(f"  {'':34}{'plan':>16}{'measured':>16}{'plan / measured':>18}")
        for what, (planned, measured) in rows.items():
            print(f"  {what:34}{planned:>16,.0f}{measured:>16,.0f}{planned / measured:>18.4f}")
    if options.out:
        content = {"machine": machine("cpu"), "batch": options.batch, "found": found}
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="images of the step")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--peak-of", choices=("off", "on"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(folder: Path, batch: int, case: str) -> dict[str, tuple[float, float]]:
    """Return what the plan says and what was measured, by name; bytes, FLOPs or a count."""
    plan, loop = planned(folder, batch, case), Loop(folder, batch, checkpointing=case == "on")
    cost, held = plan.memory[0].cost, plan.memory[0].held
    forward, executed = counted_flops(loop)
    allocated = peak_of_allocations(loop)
    loop.step()
    child = [sys.executable, __file__, "--peak-of", case, "--batch", str(batch)]
    resident = peak_of_child([*child, "--folder", str(folder)])
    moments = [t for state in loop.optimizer.state.values() for t in state.values() if t.ndim]
    return {
        "parameters": (plan.parameters["trained"], sum(p.numel() for p in weights(loop.network))),
        "FLOPs, forward": (cost.forward, forward),
        "FLOPs, executed": (cost.executed, executed),
        "bytes of weights": (held.weights, size_of(weights(loop.network))),
        "bytes of moments": (held.optimizer, size_of(moments)),
        "bytes of the average": (held.ema, size_of(loop.ema.shadow.values())),
        "peak beside them, allocations": (cost.with_gradients, allocated),
        "peak beside them, resident": (cost.with_gradients, resident),
    }


def planned(folder: Path, batch: int, case: str) -> Plan:
    config, _ = compose_command(
        "plan",
        [
            *("objective=supervised", "gpu=cpu", f"model.pretrained={folder}"),
            *("model.trainable=full", f"model.gradient_checkpointing={case == 'on'}"),
            f"training.micro_batch_size={batch}",
            f"training.global_batch_size={batch}",
        ],
    )
    return make_plan(config)


def weights(network: nn.Module) -> list[nn.Parameter]:
    return list(network.parameters())


def size_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def counted_flops(loop: Loop) -> tuple[int, int]:
    """Return torch's count of a forward, and of forward and backward.

    Attention runs as two products: torch's counter knows no CPU kernel of it.
    """
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            loop.network(loop.x, loop.t, loop.states)
        with FlopCounterMode(display=False) as both:
            loop.backward()
    loop.optimizer.zero_grad(set_to_none=True)
    return forward.get_total_flops(), both.get_total_flops()


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


def resident_peak(folder: Path, batch: int, checkpointing: bool) -> int:
    """Return the peak of a step's resident memory, in bytes above what was there before."""
    loop = Loop(folder, batch, checkpointing=checkpointing)
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
