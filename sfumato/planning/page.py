"""Page of text that shows a plan: counted numbers, estimates and assumptions."""

import math
from collections.abc import Iterator, Sequence

from sfumato.config import DraftConfig, PackConfig, PlanConfig, RewardedConfig
from sfumato.data.store import RANGE
from sfumato.planning.memory import LARGEST, USABLE
from sfumato.planning.plan import Memory, Plan, make_plan
from sfumato.run.open_data import is_cached

WIDTH = 34  # of the first column
DAY = 86_400  # seconds
PACKED = 199  # pictures of 1 MP a second and core: two workers on two cores (LOG.md)


def plan(config: PlanConfig) -> None:
    """Print the costs of a recipe.

    Raises:
        ValueError: if the settings cannot work, or cannot be planned.
    """
    print(page(make_plan(config)), flush=True)


def page(plan: Plan) -> str:
    """Return the page; lines with ~ are estimates."""
    parts = (heading, parameters, compute, memory, schedule, storage, remarks)
    lines = ("\n".join(part(plan)) for part in parts)
    return "\n\n".join(filter(None, lines))


def row(name: str, *cells: str) -> str:
    """Return one line of a table, its numbers right-aligned."""
    return f"  {name:<{WIDTH}}" + "".join(f"{cell:>14}" for cell in cells)


def heading(plan: Plan) -> Iterator[str]:
    config, (height, width) = plan.config, plan.size
    yield f"{config.name}: {plan.network}, {height} x {width} pixels"
    yield (
        f"on {config.gpus} x {plan.gpu.name}, training.strategy={config.training.strategy}, "
        f"training.precision={config.training.precision}"
    )
    steps, scale = config.sampler.rollout_steps, config.sampler.guidance_scale
    if isinstance(config.objective, DraftConfig):
        window = config.objective.truncation_range or config.objective.truncation_steps
        yield (
            f"objective=draft: {steps} sampling steps at guidance {scale:g}, a gradient through "
            f"the last {window}"
        )
    elif isinstance(config.objective, RewardedConfig):
        yield f"objective={config.objective.kind}: {steps} sampling steps at guidance {scale:g}"


def parameters(plan: Plan) -> Iterator[str]:
    yield "parameters, M"
    for name, count in plan.parameters.items():
        yield row(name, f"{count / 1e6:,.2f}")


def compute(plan: Plan) -> Iterator[str]:
    yield "compute, GFLOP per sample"
    yield row("network, forward", f"{plan.forward_flops / 1e9:,.1f}")
    yield row("network, forward and backward", f"{plan.step_flops / 1e9:,.1f}")
    where = "beforehand" if is_cached(plan.config) else "in each step"
    others = "frozen networks, forward" if _samples(plan) else f"encoders, forward, {where}"
    yield row(others, f"{plan.encoding / 1e9:,.1f}")
    yield row("executed in training", f"{plan.executed / 1e9:,.1f}")


def memory(plan: Plan) -> Iterator[str]:
    first, second = plan.memory
    yield f"memory of one GPU, GiB, micro-batches of {first.rows}"
    yield row(
        "model.gradient_checkpointing", *(str(each.checkpointing).lower() for each in plan.memory)
    )
    for name, sizes in _held(first, second).items():
        yield row(name, *(f"{size / 2**30:,.2f}" for size in sizes))
    if plan.gpu.memory is not None:
        usable = USABLE * plan.gpu.memory / 2**30
        yield row("usable", *[f"{usable:,.2f}"] * 2)
        yield row("~ largest micro-batch that fits", _rows(first), _rows(second))


def _held(first: Memory, second: Memory) -> dict[str, tuple[int, int]]:
    """Return the rows of the memory table, as bytes of both columns."""
    parts = {
        "weights": "weights",
        "reference, frozen": "reference",
        "encoders, frozen": "frozen",
        "reward, frozen": "reward",
        "gathered blocks": "gathered",
        "gradients": "gradients",
        "optimiser's state": "optimizer",
        "moving average": "ema",
        "old policy": "old",
    }
    table = {name: (vars(first.held)[key], vars(second.held)[key]) for name, key in parts.items()}
    shown = {name: sizes for name, sizes in table.items() if any(sizes)}
    merged = "" if first.held.gradients is not None else " and gradients"
    shown[f"~ activations{merged}"] = (
        first.held.activations(first.cost),
        second.held.activations(second.cost),
    )
    return shown | {"~ peak": (first.held.peak(first.cost), second.held.peak(second.cost))}


def schedule(plan: Plan) -> Iterator[str]:
    config, training = plan.config, plan.config.training
    yield "schedule"
    yield row("optimiser steps", f"{training.max_steps:,}")
    yield row("samples per step", f"{training.global_batch_size:,}")
    yield row("  micro-batches per GPU and step", f"{plan.accumulation:,}")
    yield row("  samples per micro-batch", f"{training.micro_batch_size:,}")
    yield row("samples seen, M", f"{plan.seen / 1e6:,.1f}")
    yield row("epochs", f"{plan.seen / plan.samples:,.2f}")
    if plan.seconds is None:
        yield "  ~ time: unknown without a peak; give training.peak_tflops, of one device"
        return
    rate = plan.seen / plan.seconds
    yield row("~ images per second", f"{rate:,.0f}")
    yield row("~ images per second and GPU", f"{rate / config.gpus:,.1f}")
    yield row("~ seconds per step", f"{plan.seconds / training.max_steps:,.2f}")
    yield row("~ days", f"{plan.seconds / DAY:,.2f}")
    yield row("~ GPU hours", f"{plan.seconds / 3600 * config.gpus:,.0f}")


def storage(plan: Plan) -> Iterator[str]:
    if _samples(plan):
        return  # prompts take no room, and pairs lie in tables of their own
    yield f"data, {plan.samples / 1e6:,.1f} M samples"
    yield row("", "KB a sample", "TB in all", "MB/s and GPU", "~ requests/s")
    kinds = {
        "~ pictures and captions, tars": [plan.raw],
        "cached moments": [plan.moments],
        "cached text states": [plan.text],
        "cached in all": [plan.moments, plan.text],
    }
    for name, files in kinds.items():
        size = sum(files)
        sizes = f"{size / 1e3:,.2f}", f"{size * plan.samples / 1e12:,.2f}"
        yield row(name, *sizes, _feed(plan, size), _requests(plan, files))
    per_tar = PackConfig().samples_per_shard
    tars = math.ceil(plan.samples / per_tar)
    yield row(f"tars of {per_tar:,} samples", f"{tars:,}")
    yield row("shards of the cache", f"{2 * tars:,}")
    yield row("~ core hours to pack", f"{plan.samples / PACKED / 3600:,.0f}")
    if plan.precaching is not None:
        hours = plan.samples * plan.precaching / 3600
        yield row("~ GPU hours to precache", f"{hours:,.0f}")


def _feed(plan: Plan, size: int) -> str:
    if plan.seconds is None:
        return "unknown"
    return f"{size * plan.seen / plan.seconds / plan.config.gpus / 1e6:,.2f}"


def _requests(plan: Plan, files: Sequence[int]) -> str:
    """Return how many requests a second all GPUs send to an object store.

    Args:
        files: bytes of a sample in each file that holds it.
    """
    if plan.seconds is None:
        return "unknown"
    per_tar = PackConfig().samples_per_shard
    each = sum(math.ceil(size * per_tar / RANGE) for size in files)
    return f"{each * plan.seen / plan.seconds / per_tar:,.1f}"


def remarks(plan: Plan) -> Iterator[str]:
    config = plan.config
    yield "Lines with ~ are estimates, the others are counted."
    yield (
        f"* Time: {config.utilisation:.0%} of the peak (utilisation={config.utilisation:g}) at all "
        "times; no pauses for checkpoints, validation or data."
    )
    yield (
        f"* Memory: of a training step in eager mode; {1 - USABLE:.0%} of the GPU is left to CUDA, "
        "NCCL and the allocator."
    )
    yield "* training.compile and validation are not planned."
    if isinstance(config.objective, DraftConfig) and config.objective.truncation_range:
        yield "* Each step has the longest window of objective.truncation_range."
    if not _samples(plan):
        yield f"* Tars: pictures of {config.image_bytes:,} bytes (image_bytes=...)."
        yield (
            f"* Requests: of {RANGE // 2**20} MiB, all GPUs together, from an object store; small "
            "records beside the shards are not counted."
        )
        stated = plan.config.training.peak_tflops
        speed = "in TF32" if stated is None else "at the stated peak"
        yield f"* Packing: {PACKED} pictures of 1 MP a second and core. Precaching: {speed}."
    if config.samples is None:
        yield "* The data is seen once; samples=N says how much there is."
    for each in plan.assumed:
        yield f"* Assumed: {each}."


def _samples(plan: Plan) -> bool:
    """Say whether training makes its images itself, or reads pairs."""
    return not plan.config.objective.reads_images


def _rows(memory: Memory) -> str:
    return f"{memory.largest:,}" + (" or more" if memory.largest == LARGEST else "")
