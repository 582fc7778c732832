"""Plan of a training recipe's costs, for `sfumato plan`."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from sfumato.check import check_train
from sfumato.config import PlanConfig, SupervisedConfig
from sfumato.planning.blueprint import Blueprint, read_blueprint
from sfumato.planning.gpus import GPUS, Gpu, peak_flops
from sfumato.planning.memory import USABLE, Held, count_parameters, held, largest_rows
from sfumato.planning.step import StepCost, measure_step
from sfumato.training.distribution import AUTOCAST

TAR_BLOCK = 512  # bytes: every member has a header of one, and ends at a multiple
CACHE_ITEM = 2  # bytes of a cached number: precache.dtype = float16
WORD = 8  # bytes of an index


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU with or without gradient checkpointing.

    Attributes:
        rows: of the micro-batch that `cost` belongs to.
        largest: rows of the largest micro-batch that fits, with accumulation if it needs that;
            None if the GPU's memory is unknown.
    """

    checkpointing: bool
    rows: int
    held: Held
    cost: StepCost
    largest: int | None


@dataclass(frozen=True)
class Plan:
    """Costs of a recipe, in bytes, FLOPs and seconds.

    Attributes:
        parameters: by part; `trained` first.
        step_flops: of one sample, forward and backward of the network.
        executed: of one sample, `step_flops` with recomputation by checkpointing, and with the
            encoders if they run in the step.
        encoding: of one sample, forward of autoencoder and text encoders.
        memory: with gradient checkpointing as in the recipe, then the opposite.
        accumulation: micro-batches per step on a GPU.
        seconds: of all steps at the stated utilisation; None if the peak is unknown.
        raw: bytes of a sample in a tar; `moments` and `text` are those of a cached sample.
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
    """Count the costs of a recipe on networks without memory.

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
    encoding = blueprint.encoding_flops()
    in_step = 0 if config.data.shards.cached else encoding
    executed = cost.executed // rows + in_step
    peak = peak_flops(gpu, training.precision, training.peak_tflops)
    seen = training.max_steps * training.global_batch_size
    seconds = seen * executed / (config.gpus * peak * config.utilisation) if peak else None
    return Plan(
        config=config,
        gpu=gpu,
        network=type(blueprint.model.network).__name__,
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
    """Refuse a recipe that cannot be planned or trained.

    Raises:
        ValueError: naming the setting.
    """
    if not isinstance(config.objective, SupervisedConfig):
        raise ValueError(
            f"objective = {config.objective.kind}: sfumato plan counts only supervised steps; set "
            "objective=supervised, or give a recipe of supervised training"
        )
    if config.model.parts not in (["network"], ["unet"], ["transformer"]):
        raise ValueError(
            f"model.parts = {config.model.parts}: sfumato plan counts only the network as "
            "trained; use model.parts=[network]"
        )
    check_train(config, config.gpus)


def memory_of(config: PlanConfig, blueprint: Blueprint, checkpointing: bool) -> Memory:
    """Measure a step of the recipe's micro-batch, and find the largest that fits."""
    training = config.training
    network: Any = blueprint.model.network
    if checkpointing:
        network.enable_gradient_checkpointing()
    else:
        network.disable_gradient_checkpointing()

    @cache
    def cost(rows: int) -> StepCost:
        dtype = AUTOCAST.get(training.precision)
        return measure_step(network, blueprint.predictor(rows), dtype)

    def holding(rows: int) -> Held:
        accumulation = -(-training.global_batch_size // (rows * config.gpus))
        return held(blueprint, training, config.gpus, accumulation, config.model.dtype)

    rows, memory = training.micro_batch_size, GPUS[config.gpu].memory
    largest = None
    if memory is not None:
        largest = largest_rows(lambda n: holding(n).peak(cost(n)), int(USABLE * memory), rows)
    return Memory(checkpointing, rows, holding(rows), cost(rows), largest)


def parameters_of(blueprint: Blueprint) -> dict[str, int]:
    """Return the number of parameters by part."""
    network = blueprint.model.network
    parts = {"trained": count_parameters(network, trained=True)}
    if frozen := count_parameters(network, trained=False):
        parts["frozen, of the network"] = frozen
    return parts | {name: count_parameters(each) for name, each in blueprint.encoders.items()}


def raw_bytes(image_bytes: int) -> int:
    """Return the bytes of a sample in a tar: its picture, caption and record, with headers.

    Args:
        image_bytes: of the picture and the caption's text, which has a block of its own.
    """
    picture = -(-image_bytes // TAR_BLOCK) * TAR_BLOCK
    return picture + 5 * TAR_BLOCK  # three headers, and a block each for caption and record


def moment_bytes(blueprint: Blueprint, *, mirrored: bool) -> int:
    """Return the bytes of a sample's mean and log-variance; twice if mirrored ones are cached."""
    channels, height, width = blueprint.latent
    return 2 * channels * height * width * CACHE_ITEM * (2 if mirrored else 1)


def text_bytes(blueprint: Blueprint) -> int:
    """Return the bytes of one caption's states, and of its index among all captions."""
    tensors = blueprint.model.blank_prompts(1).tensors.values()
    return CACHE_ITEM * sum(tensor.numel() for tensor in tensors) + WORD
