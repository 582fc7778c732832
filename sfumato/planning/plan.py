"""Plan of a training recipe's costs, for `sfumato plan`."""

from dataclasses import astuple, dataclass, replace
from functools import cache

from sfumato.check import check_train
from sfumato.config import OwnConfig, PlanConfig, TrainConfig
from sfumato.planning.blueprint import Blueprint, read_blueprint, steps_alike, with_steps
from sfumato.planning.gpus import GPUS, Gpu, peak_flops
from sfumato.planning.memory import USABLE, Held, count_parameters, held, largest_rows
from sfumato.planning.step import StepCost, measure_pieces
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
        forward_flops: of one sample, all forwards of the trained networks.
        step_flops: of one sample, `forward_flops` with the whole backward.
        executed: of one sample, `step_flops` with recomputation by checkpointing, and with the
            other networks' forwards in the step.
        encoding: of one sample, forward of the networks that are not trained, in the step or
            beforehand.
        memory: with gradient checkpointing as in the recipe, then the opposite.
        accumulation: micro-batches per step on a GPU.
        seconds: of all steps at the stated utilisation; None if the peak is unknown.
        raw: bytes of a sample in a tar; `moments` and `text` are those of a cached sample.
        precaching: seconds of one GPU to encode a sample at the stated utilisation, in float32
            with TF32; None if the peak is unknown.
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
    precaching: float | None
    assumed: tuple[str, ...]

    @property
    def seen(self) -> int:
        """Samples that training sees."""
        return self.config.training.max_steps * self.config.training.global_batch_size

    @property
    def samples(self) -> int:
        """Samples that the data holds."""
        return self.seen if self.config.samples is None else self.config.samples


def make_plan(config: PlanConfig) -> Plan:
    """Count the costs of a recipe on networks without memory.

    Raises:
        ValueError: if the settings cannot work, or cannot be planned.
    """
    check_plan(config)
    training, gpu = config.training, GPUS[config.gpu]
    accumulation = training.global_batch_size // (training.micro_batch_size * config.gpus)
    short, left_out = steps_alike(config)
    blueprint, other = read_blueprint(short), read_blueprint(with_other_checkpointing(short))
    memory = memory_of(config, blueprint), memory_of(config, other)
    cost, rows = memory[0].cost, training.micro_batch_size
    if left_out:
        longer = with_steps(short, short.sampler.rollout_steps + 1)
        cost = extended(cost, cost_of(longer, blueprint.sampling(longer), rows), left_out)
    encoding = cost.others // rows or blueprint.encoding_flops()
    executed = cost.executed // rows
    peak = peak_flops(gpu, training.precision, training.peak_tflops)
    seen = training.max_steps * training.global_batch_size
    seconds = seen * executed / (config.gpus * peak * config.utilisation) if peak else None
    encoders = peak_flops(gpu, "no", training.peak_tflops)
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
        precaching=encoding / (encoders * config.utilisation) if encoders else None,
        assumed=blueprint.assumed,
    )


def check_plan(config: PlanConfig) -> None:
    """Refuse a recipe that cannot be planned or trained.

    Raises:
        ValueError: naming the setting.
    """
    if isinstance(config.objective, OwnConfig):
        raise ValueError(
            "objective = own: a script brings this objective, and sfumato plan runs no script; set "
            "objective=draft or objective=supervised"
        )
    if config.objective.trains != "model":
        raise ValueError(
            f"objective={config.objective.kind} trains {config.objective.trains}s, and sfumato "
            "plan counts the costs of text-to-image models alone"
        )
    if config.optimizer.kind == "own":
        raise ValueError(
            f"optimizer.path={config.optimizer.path!r} is code of your own, which sfumato "
            "plan does not run: it cannot tell the bytes of its state; set optimizer.kind=adamw"
        )
    check_train(config, config.gpus)


def with_other_checkpointing(config: TrainConfig) -> TrainConfig:
    """Return a recipe with gradient checkpointing switched."""
    checkpointing = not config.model.gradient_checkpointing
    return replace(config, model=replace(config.model, gradient_checkpointing=checkpointing))


def cost_of(config: TrainConfig, blueprint: Blueprint, rows: int) -> StepCost:
    """Measure a step of a micro-batch of `rows`."""
    dtype, frozen = AUTOCAST.get(config.training.precision), blueprint.frozen.values()
    return measure_pieces(blueprint.model.trained, blueprint.pieces(rows), dtype, frozen)


def extended(short: StepCost, longer: StepCost, times: int) -> StepCost:
    """Add what a longer step takes more, so many times; activations are the shorter step's."""
    counts = zip(astuple(short), astuple(longer), strict=True)
    more = StepCost(*(a + times * (b - a) for a, b in counts))
    return replace(more, activations=short.activations, with_gradients=short.with_gradients)


def memory_of(config: PlanConfig, blueprint: Blueprint) -> Memory:
    """Measure a step of the recipe's micro-batch, and find the largest that fits."""
    training = config.training

    @cache
    def cost(rows: int) -> StepCost:
        return cost_of(config, blueprint, rows)

    def holding(rows: int) -> Held:
        accumulation = -(-training.global_batch_size // (rows * config.gpus))
        return held(blueprint, training, config.gpus, accumulation, config.optimizer)

    rows, memory = training.micro_batch_size, GPUS[config.gpu].memory
    largest = None
    if memory is not None:
        largest = largest_rows(lambda n: holding(n).peak(cost(n)), int(USABLE * memory), rows)
    checkpointing = blueprint.model.config.gradient_checkpointing
    return Memory(checkpointing, rows, holding(rows), cost(rows), largest)


def parameters_of(blueprint: Blueprint) -> dict[str, int]:
    """Return the number of parameters by part."""
    trained = blueprint.model.trained
    parts = {"trained": count_parameters(trained, trained=True)}
    if frozen := count_parameters(trained, trained=False):
        where = "the network" if len([*trained.children()]) == 1 else "trained networks"
        parts[f"frozen, of {where}"] = frozen
    others = {name: count_parameters(each) for name, each in blueprint.frozen.items()}
    return parts | {name: count for name, count in others.items() if count}


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
