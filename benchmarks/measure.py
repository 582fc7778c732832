"""How loops are measured: time by turns, and peak memory in a process of their own."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT = 1.05  # times the bare loop's time
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Timing:
    """Seconds per optimiser step, medians, and the median of the ratios of pairs."""

    ours: float
    bare: float
    ratio: float


def quiet() -> None:
    """Keep diffusers and transformers from drawing progress bars and from advice."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def time_pairs(
    ours: Callable[[], float],
    bare: Callable[[], float],
    steps: int,
    pairs: int,
    device: str,
    clock: str = "wall",
) -> Timing:
    """Time both by turns, who begins changing from pair to pair.

    Args:
        clock: `cpu` counts this process's own time, for machines that others use too; with more
            than one thread it counts their waiting as well.
    """
    seconds = time_turns({"ours": ours, "bare": bare}, steps, pairs, device, clock)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
    return Timing(
        statistics.median(seconds["ours"]),
        statistics.median(seconds["bare"]),
        statistics.median(ratios),
    )


def time_turns(
    loops: Mapping[str, Callable[[], object]], steps: int, turns: int, device: str, clock: str
) -> dict[str, list[float]]:
    """Return each loop's seconds per step of all turns; every other turn is backwards."""
    for step in loops.values():
        turn(step, 1, device, clock)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for i in range(turns):
        for name in loops if i % 2 else reversed(list(loops)):
            seconds[name].append(turn(loops[name], steps, device, clock))
            print(f"turn {i + 1}/{turns} {name}: {seconds[name][-1]:.4f} s/step", flush=True)
    return seconds


def turn(step: Callable[[], object], steps: int, device: str, clock: str) -> float:
    """Return the seconds per step; every step ends by reading its loss, which waits for a GPU."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    now = CLOCKS[clock]
    started = now()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (now() - started) / steps


def explain_slowness(
    timing: Timing, ours: Callable[[], float], bare: Callable[[], float], device: str
) -> None:
    """Print where the time goes if ours is the slower by too much."""
    if timing.ratio > LIMIT:
        for name, step in (("ours", ours), ("bare", bare)):
            print(f"\n{name}, one step:\n{profile(step, device)}", flush=True)


def peak_of_child(command: Sequence[str]) -> float:
    """Run a command and return the number on its last line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def peak_of_steps(step: Callable[[], float], steps: int, device: str) -> float:
    """Return the peak in MiB while steps are taken: of the GPU's memory, or of this process's."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    for _ in range(steps):
        step()
    if device == "cuda":
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
