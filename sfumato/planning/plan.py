"""What a training recipe costs: `sfumato plan`."""

from dataclasses import dataclass
from functools import cache

import torch

from sfumato.check import check_train
from sfumato.config import PlanConfig, SupervisedConfig
from sfumato.planning.blueprint import Blueprint, read_blueprint
from sfumato.planning.encoders import encoding_flops
from sfumato.planning.gpus import GPUS, Gpu, peak_flops
from sfumato.planning.inputs import predictor
from sfumato.planning.memory import USABLE, Held, held, largest_rows
from sfumato.planning.step import StepCost, measure_step
from sfumato.planning.storage import moment_bytes, raw_bytes, text_bytes

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Memory:
    """One GPU's memory with or without gradient checkpointing.

    Attributes:
        rows: of the micro-batch that `cost` is of.
        largest: rows of a micro-batch that fit, with accumulation if that is what they need;
            None where the GPU's memory is unknown.
    """

    checkpointing: bool
    rows: int
    held: Held
    cost: StepCost
    largest: int | None


@dataclass(frozen=True)
class Plan:
    """What a recipe costs; bytes, FLOPs, seconds.

    Attributes:
        parameters: by part; `trained` first.
        step_flops: of one sample: forward and backward of the network.
        executed: of one sample: that, what checkpointing computes again, and the encoders, where
            they run in the step.
        encoding: of one sample: autoencoder and text encoders, forward.
        memory: as the recipe has it, then with gradient checkpointing the other way.
        accumulation: micro-batches per step on a GPU.
        seconds: of all steps at the stated utilisation; None where the peak is unknown.
        raw: bytes of a sample in a tar; `moments` and `text` of a cached one.
        assumed: what the recipe leaves open, in words.
    """

    config: PlanConfig
    gpu: Gpu
    network: str
    size: tuple[int, int]
    parameters: dict[str, int]
    forward_flops: int
    step_flops: int
    executed: int
    encoding: int
    memory: tuple[Memory, Memory]
    accumulation: int
    seconds: float | None
    raw: int
    moments: int
    text: int
    assumed: tuple[str, ...]

    @property
    def seen(self) -> int:
        """Samples that training sees."""
        return self.config.training.max_steps * self.config.training.global_batch_size

    @property
    def samples(self) -> int:
        """Samples that the data holds."""
        return self.seen if self.config.samples is None else self.config.samples

    @property
    def cached(self) -> int:
        """Bytes of a cached sample."""
        return self.moments + self.text


def make_plan(config: PlanConfig) -> Plan:
    """Count what a recipe costs, on networks without memory.

    Raises:
        ValueError: if the settings cannot work, or cannot be planned.
    """
    check_plan(config)
    training, gpu = config.training, GPUS[config.gpu]
    accumulation = training.global_batch_size // (training.micro_batch_size * config.gpus)
    blueprint = read_blueprint(config)
    chosen = config.model.gradient_checkpointing
    memory = memory_of(config, blueprint, chosen), memory_of(config, blueprint, not chosen)
    cost, rows = memory[0].cost, training.micro_batch_size
    encoding = encoding_flops(blueprint.encoders, *blueprint.size)
    in_step = 0 if config.data.shards.cached else encoding
    executed = cost.executed // rows + in_step
    peak = peak_flops(gpu, training.precision, training.peak_tflops)
    seen = training.max_steps * training.global_batch_size
    seconds = seen * executed / (config.gpus * peak * config.utilisation) if peak else None
    return Plan(
        config=config,
        gpu=gpu,
        network=type(blueprint.network).__name__,
        size=blueprint.size,
        parameters=parameters_of(blueprint),
        forward_flops=cost.forward // rows,
        step_flops=cost.flops // rows,
        executed=executed,
        encoding=encoding,
        memory=memory,
        accumulation=accumulation,
        seconds=seconds,
        raw=raw_bytes(config.image_bytes),
        moments=moment_bytes(blueprint, mirrored=config.data.shards.flip),
        text=text_bytes(blueprint),
        assumed=blueprint.assumed,
    )


def check_plan(config: PlanConfig) -> None:
    """Refuse what cannot be planned, and what could not be trained.

    Raises:
        ValueError: naming the setting.
    """
    if not isinstance(config.objective, SupervisedConfig):
        raise ValueError(
            f"objective = {config.objective.kind}: sfumato plan counts supervised steps, as "
            "sampling and rewards cost what their settings say; add objective=supervised, or give "
            "a recipe of supervised training"
        )
    if config.model.parts not in (["network"], ["unet"], ["transformer"]):
        raise ValueError(
            f"model.parts = {config.model.parts}: sfumato plan counts the network alone as "
            "trained; use model.parts=[network]"
        )
    check_train(config, config.gpus)


def memory_of(config: PlanConfig, blueprint: Blueprint, checkpointing: bool) -> Memory:
    """Measure a step of the recipe's micro-batch, and find the largest that fits."""
    training = config.training
    switch_checkpointing(blueprint, checkpointing)

    @cache
    def cost(rows: int) -> StepCost:
        run = predictor(blueprint.network, blueprint.latent, blueprint.conditioning, rows)
        return measure_step(blueprint.network, run, AUTOCAST[training.precision])

    def holding(rows: int) -> Held:
        accumulation = -(-training.global_batch_size // (rows * config.gpus))
        return held(blueprint, training, config.gpus, accumulation, config.model.dtype)

    rows, memory = training.micro_batch_size, GPUS[config.gpu].memory
    largest = None
    if memory is not None:
        largest = largest_rows(lambda n: holding(n).peak(cost(n)), int(USABLE * memory), rows)
    return Memory(checkpointing, rows, holding(rows), cost(rows), largest)


def switch_checkpointing(blueprint: Blueprint, on: bool) -> None:
    """Let the network keep its activations, or compute them again."""
    if on:
        blueprint.network.enable_gradient_checkpointing()
    else:
        blueprint.network.disable_gradient_checkpointing()


def parameters_of(blueprint: Blueprint) -> dict[str, int]:
    """Return the number of parameters by part."""
    own = list(blueprint.network.parameters())
    parts = {"trained": sum(p.numel() for p in own if p.requires_grad)}
    if frozen := sum(p.numel() for p in own if not p.requires_grad):
        parts["frozen, of the network"] = frozen
    modules = {"autoencoder": blueprint.encoders.autoencoder, **blueprint.encoders.texts}
    frozen_parts = {n: sum(p.numel() for p in m.parameters()) for n, m in modules.items()}
    return parts | frozen_parts
