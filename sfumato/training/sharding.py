"""Sharding rules: how many processes share one copy of the weights, and what that excludes."""

from sfumato.config import TrainConfig, TrainingConfig

SHARDED_BYTES = 32 * 10**9  # of trained state, from which checkpoints are sharded by default
ELEMENTWISE = ("adamw", "sgd")  # optimisers that move each number by itself


def copy_size(training: TrainingConfig, processes: int, per_machine: int) -> int:
    """Return how many processes share one copy of the trained weights; 1 if each has its own.

    Args:
        per_machine: processes of one machine, the size under hsdp if none is stated.

    Raises:
        ValueError: if the processes do not divide into groups of that size.
    """
    if training.strategy == "ddp" or processes == 1:
        return 1
    if training.strategy == "fsdp":
        return processes
    size = training.shard_size or per_machine
    if processes % size:
        raise ValueError(
            f"training.shard_size={size} does not divide {processes} processes; choose one of "
            "its divisors"
        )
    return size


def writes_shards(training: TrainingConfig, nbytes: int) -> bool:
    """Say whether each process writes its share of a checkpoint, if the weights are sharded.

    Args:
        nbytes: of all tensors of the trained state.
    """
    chosen = training.sharded_checkpoints
    return nbytes > SHARDED_BYTES if chosen is None else chosen


def check_sharding(config: TrainConfig, processes: int) -> None:
    """Refuse settings that need whole weights if the strategy shards the weights.

    Raises:
        ValueError: naming the key, its value, and what to do.
    """
    training = config.training
    if training.strategy == "ddp" or processes == 1:
        return
    copy_size(training, processes, per_machine=1)
    if (kind := config.optimizer.kind) not in ELEMENTWISE:
        raise ValueError(
            f"optimizer.kind={kind} does not work with training.strategy={training.strategy}: it "
            "reads whole matrices, blocks or sums of all weights, and a process holds a shard; set "
            "optimizer.kind=adamw, or training.strategy=ddp"
        )
    if config.model.channels_last:
        raise ValueError(
            f"model.channels_last=true does not work with training.strategy={training.strategy}, "
            "which shards contiguous weights only; set model.channels_last=false, or "
            "training.strategy=ddp"
        )
    if training.compile == "full":
        raise ValueError(
            f"training.compile=full does not work with training.strategy={training.strategy}, "
            "which gathers weights block by block; set training.compile=regional, or "
            "training.strategy=ddp"
        )
