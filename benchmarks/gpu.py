"""Measure training on a GPU in a few minutes, at real size, each part beside a bare torch loop.

No weights are needed: networks of the published sizes are built at random on the GPU. Each part
runs in a process of its own, the most important first; if one fails, the others still report. What
does not fit into the seconds is left out, and the table says so. Before the time, losses and
gradients of the two loops are compared. MFU counts the model's FLOPs as `sfumato train` does.

    python benchmarks/gpu.py --seconds 480 --out gpu.json
    python benchmarks/gpu.py --tiny                        # tiny networks on the CPU
    python benchmarks/gpu.py --parts draft sparse --batch draft=4
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measure import machine, peak_of_steps, quiet, time_pairs, turn

STARTED = time.monotonic()
PAIRS = 5  # turns of each loop at most


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        kind: which loops are opened, of OPENERS.
        steps: optimiser steps per turn.
        least: seconds; a part with less left is not begun.
        most: seconds after which the part is stopped.
        target: images per second.
    """

    title: str
    kind: str
    batch: int
    steps: int
    least: float
    most: float
    target: float | None = None
    sampling_steps: int = 50
    full: bool = False
    compile: str = "none"


PARTS = {
    "draft": Part("SD 1.5 DRaFT+, 512 px, T = 50, K = 1, LoRA", "draft", 8, 1, 45, 120, 4),
    "sparse": Part("SD 1.5 direct, 512 px, T = 50, K = 4, LoRA", "sparse", 8, 1, 45, 120),
    "sft_lora": Part("SD 1.5 supervised, 512 px, LoRA", "sft", 32, 10, 30, 70, 150),
    "sft_full": Part("SD 1.5 supervised, 512 px, full", "sft", 32, 10, 30, 80, 150, full=True),
    "sdxl": Part("SDXL DRaFT+, 1024 px, T = 40, LoRA", "sdxl", 2, 1, 60, 150, sampling_steps=40),
    "sft_compiled": Part(
        "SD 1.5 supervised, 512 px, full, compiled",
        *("sft", 32, 10, 60, 180, 150),
        full=True,
        compile="regional",
    ),
}
TINY_STEPS = 6  # of sampling
IMPORTS = ["torch", "transformers", "diffusers", "peft", "accelerate", "sfumato.run.build"]
HEAD = (
    "part",
    "batch",
    "images/s",
    "bare",
    "ratio of times",
    "MFU",
    "bare",
    "peak GiB",
    "bare",
    "target images/s",
    "gradients apart",
    "remarks",
)


def main() -> None:
    options = parse()
    if options.tiny:  # accelerate would take the GPU; compiling on a CPU takes minutes
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        os.environ["OMP_NUM_THREADS"] = "1"  # threads of tiny networks wait for each other
    multiprocessing.set_forkserver_preload(IMPORTS)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        quiet()
        import torch
        from random_networks import write_settings

        if not options.tiny and not torch.cuda.is_available():
            sys.exit("there is no GPU here; --tiny measures tiny networks on the CPU")
        write_settings(Path(name), "tiny" if options.tiny else "real")
        print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
        for part in options.parts:
            title = f"tiny {part}" if options.tiny else PARTS[part].title
            results[part] = {"title": title, **run(part, options, Path(name))}
            print(row(PARTS[part], results[part]), flush=True)
            if options.out:
                write_json(options.out, results)
    told = next((r["machine"] for r in results.values() if "machine" in r), "nothing was measured")
    print(f"\n{told}; {time.monotonic() - STARTED:.0f} s in all", flush=True)


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument(
        "--batch", nargs="+", type=batch_of, default=[], metavar="PART=N", help="images a step"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    options.batch = dict(options.batch)
    return options


def batch_of(text: str) -> tuple[str, int]:
    """Read PART=N."""
    name, _, number = text.partition("=")
    if name not in PARTS or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not PART=N, such as draft=4; parts are {', '.join(PARTS)}"
        )
    return name, int(number)


# The process that runs the parts


def run(name: str, options: Namespace, folder: Path) -> dict[str, Any]:
    """Measure a part in a process of its own, and say what went wrong if something did."""
    part, left = PARTS[name], options.seconds - (time.monotonic() - STARTED)
    if left < part.least:
        return {"error": f"left out: {max(left, 0):.0f} s of --seconds are left"}
    seconds, out = min(left, part.most), folder / f"{name}.json"
    given = {"part": name, "folder": folder, "seconds": seconds, "out": out}
    # A process that has used a GPU must not be copied; without one that saves the imports.
    context: Any = get_context("forkserver" if options.tiny else "spawn")
    process = context.Process(target=work, args=(Namespace(**{**vars(options), **given}),))
    process.start()
    process.join(seconds)
    found: dict[str, Any] = {}
    if process.is_alive():
        process.kill()
        process.join()
        found["error"] = f"stopped after {seconds:.0f} s"
    elif process.exitcode:
        found["error"] = f"its process ended with {process.exitcode}"
    return (json.loads(out.read_text()) if out.exists() else {}) | found


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write the whole file or nothing: the process may be stopped at any time."""
    begun = file.with_name(f"{file.name}.part")
    begun.write_text(json.dumps(content, indent=2) + "\n")
    begun.replace(file)


def row(part: Part, result: dict[str, Any]) -> str:
    """Return a part's line of the table."""

    def cell(name: str, form: str) -> list[str]:
        return [
            format(result[key], form) if key in result else "-" for key in (name, f"bare_{name}")
        ]

    remarks = [result[key] for key in ("error", "bare_error") if key in result]
    if "float32_share" in result:
        remarks.append(f"float32 divergence: {result['float32_share']:.0%} of the time")
    ratio, apart = (cell(name, ".3g")[0] for name in ("ratio", "gradient"))
    cells = [
        *(result["title"], str(result.get("batch", part.batch))),
        *(*cell("images_per_second", ".4g"), ratio),
        *(*cell("mfu", ".3f"), *cell("peak_gib", ".3g")),
        *("-" if part.target is None else f"{part.target:g}", apart, "; ".join(remarks)),
    ]
    return f"| {' | '.join(cells)} |"


# The process of one part


def work(options: Namespace) -> None:
    """Measure `options.part` and write what was found; the table alone goes to stdout."""
    os.dup2(2, 1)
    write_json(options.out, measured(options))


def measured(options: Namespace) -> dict[str, Any]:
    """Measure one part; what was found before a failure is kept."""
    found: dict[str, Any] = {}
    try:
        quiet()
        for step in measure(options, found):
            write_json(options.out, found)
            print(f"{options.part}: {step}, {time.monotonic() - STARTED:.0f} s", flush=True)
    except Exception as error:  # noqa: BLE001 -- whatever it is, the other parts go on
        found["error"] = in_a_line(error)
    return found


def in_a_line(error: Exception) -> str:
    """Return an error's kind and the first line of what it says."""
    text = str(error).strip().partition("\n")[0].replace("|", "/")
    return f"{type(error).__name__}: {text[:160]}"


def measure(options: Namespace, found: dict[str, Any]) -> Iterator[str]:
    """Fill in what is found of a part, and say after each stage which it was."""
    from parity import compare
    from random_networks import make_random

    part, device = PARTS[options.part], "cpu" if options.tiny else "cuda"
    make_random(device)
    batch = options.batch.get(options.part, 4 if options.tiny else part.batch)
    found |= {"batch": batch, "machine": machine(device)}
    ours, open_bare = OPENERS[part.kind](part, options, batch, device)
    yield "built"
    bare = None
    try:
        bare = open_bare()
        found |= asdict(compare(ours, bare))
    except Exception as error:  # noqa: BLE001 -- ours is measured all the same
        bare, found["bare_error"] = None, f"bare loop: {in_a_line(error)}"
    yield "compared"
    one = turn(ours.step, 1, device, "wall")
    found |= rates(ours, one, batch)
    if bare is None:
        found["peak_gib"] = peak_of_steps(ours.step, 1, device) / 1024
        return
    yield "one step"
    steps = 1 if options.tiny else part.steps
    # Single steps come before and after the pairs, to warm up and for share and peaks.
    left = options.seconds - (time.monotonic() - STARTED) - 10 * one
    pairs = 1 if options.tiny else max(1, min(PAIRS, int(left / (2.5 * steps * one))))
    timing = time_pairs(ours.step, bare.step, steps, pairs, device)
    found["ratio"] = timing.ratio
    found |= rates(ours, timing.ours, batch)
    found |= {f"bare_{name}": v for name, v in rates(ours, timing.bare, batch).items()}
    yield "timed"
    share = float32_share(ours, device)
    found |= {"float32_share": share} if share else {}
    held, peak = allocated(device), peak_of_steps(ours.step, 1, device)
    bare_peak = peak_of_steps(bare.step, 1, device)
    del ours
    gc.collect()
    of_bare = allocated(device)
    found["peak_gib"] = (peak - of_bare) / 1024
    found["bare_peak_gib"] = (bare_peak - (held - of_bare)) / 1024
    yield "done"


def rates(ours: Any, seconds: float, batch: int) -> dict[str, float]:
    """Return images per second and, where the device's peak is known, the MFU."""
    return {"images_per_second": batch / seconds, **ours.state.meter.rates(seconds)}


def allocated(device: str) -> float:
    """Return what tensors hold on a GPU, in MiB; on a CPU 0, as peaks are of the process there."""
    import torch

    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else 0.0


def float32_share(ours: Any, device: str) -> float:
    """Return the share of a step that the divergence takes once more in float32."""
    import torch

    kl: Any = import_module("sfumato.objectives.kl")
    plain, seconds = kl.in_float32, 0.0

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def timed(place: torch.device) -> Iterator[None]:
        nonlocal seconds
        started = now()
        with plain(place):
            yield
        seconds += now() - started

    kl.in_float32 = timed
    whole = turn(ours.step, 1, device, "wall")
    kl.in_float32 = plain
    return seconds / whole


def open_draft(part: Part, options: Namespace, batch: int, device: str) -> Any:
    """Open DRaFT+ or direct gradients; return our loop, and a call that opens the bare one."""
    from bare_loop import BareLoop
    from bare_variants import ACTIVE, BareSparse, BareXl
    from loops import KL_COEFF, Bare, Case, open_ours, starting_noise

    from sfumato.config import DirectConfig
    from sfumato.objectives.surrogates import choose

    steps = TINY_STEPS if options.tiny else part.sampling_steps
    common = {"device": device, "dtype": options.dtype, "full": False, "batch": batch}
    case = Case(
        model=options.part,
        **common,
        gradient_checkpointing=part.kind == "sdxl",
        reward="clip",
        num_inference_steps=steps,
    )
    folder = options.folder / ("sdxl" if part.kind == "sdxl" else "sd15")
    if part.kind != "sparse":
        kind = BareXl if part.kind == "sdxl" else BareLoop
        return open_ours(case, folder), lambda: Bare(case, folder, kind)
    objective = DirectConfig(steps="late", active_steps=ACTIVE, weights="sigma", kl_coeff=KL_COEFF)

    def draw(model: Any, rng: Any) -> Any:
        noise = starting_noise(model, rng)
        return noise, choose(objective, range(steps), ACTIVE, rng.shared)

    return open_ours(case, folder, objective, draw), lambda: Bare(case, folder, BareSparse)


def open_sft(part: Part, options: Namespace, batch: int, device: str) -> Any:
    """Open supervised training from a cache in memory, as `open_draft` does."""
    from pretrain_step import Pretrain, open_bare, open_ours

    case = Pretrain(
        model=options.part,
        device=device,
        dtype=options.dtype,
        full=part.full,
        batch=batch,
        gradient_checkpointing=False,
        channels_last=True,
        compile=part.compile,
    )
    folder = options.folder / "sd15"
    return open_ours(case, folder), lambda: open_bare(case, folder)


OPENERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("draft", "sparse", "sdxl"), open_draft),
    "sft": open_sft,
}

if __name__ == "__main__":
    main()
