"""Processes of a run: accelerate for devices, DDP or FSDP2 for the gradient."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # else DDP does, and its defaults keep the group's threads
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sfumato.config import TrainingConfig
from sfumato.training.module import TrainingModule
from sfumato.training.sharding import copy_size
from sfumato.weights import Shards, Share

T = TypeVar("T")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Group:
    """Processes that work on one thing, of which this is one; by default it is alone."""

    rank = 0
    world = 1
    is_main = True
    device = torch.device("cpu")

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return each value's mean over the processes, which all give the same names."""
        if self.world == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64)
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return dict(zip(values, (tensor / self.world).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Say whether the flag is set on any process."""
        return self.mean({"flag": float(flag)})["flag"] > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error on one process end all of them, so that none waits for ever.

        Raises:
            ValueError: on every process, if one raised a ValueError or an OSError inside.
        """
        error: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        if self.any(error is not None):
            raise error or ValueError("another process failed; it says why")

    def gather(self, items: Sequence[T], *, main_only: bool = False) -> list[T]:
        """Return the items of all processes, by rank; the main process alone may get them."""
        if self.world == 1:
            return list(items)
        gathered: list[list[T]] = [[] for _ in range(self.world)]
        if main_only:
            dist.gather_object(list(items), gathered if self.is_main else None)
        else:
            dist.all_gather_object(gathered, list(items))
        return [item for part in gathered for item in part]


ALONE = Group()


@final
class Distribution(Group):
    """This process among the others: its rank and device, and what they do together.

    Args:
        tf32: let a GPU round factors of products of float32 to 10 bits.

    Raises:
        ValueError: if the processes do not divide into groups of `shard_size`.
    """

    def __init__(self, config: TrainingConfig, *, tf32: bool = True) -> None:
        from accelerate import Accelerator

        self._accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.rank = self._accelerator.process_index
        self.world = self._accelerator.num_processes
        self.device = self._accelerator.device
        self.is_main = self._accelerator.is_main_process
        self.is_sharded = config.strategy != "ddp" and self.world > 1
        per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world)))
        self._copy_size = copy_size(config, self.world, per_machine)
        self._beside: Any = None
        self._precision = AUTOCAST.get(config.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        if tf32 and self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True

    def shard(self, module: TrainingModule) -> None:
        """Split the networks over the processes, in place, under FSDP2; before the optimiser."""
        if not self.is_sharded:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self._mesh()
        # A root that stayed gathered after a forward would not see what the EMA writes into it.
        parts = module.model.shards()
        with recording_kept(parts):
            for part in parts:
                fully_shard(part, mesh=mesh, reshard_after_forward=True)

    def _mesh(self) -> DeviceMesh:
        """Return all processes as one group or, under HSDP, as one group for each copy."""
        if self._copy_size == self.world:
            return init_device_mesh(self.device.type, (self.world,), mesh_dim_names=("shard",))
        shape = (self.world // self._copy_size, self._copy_size)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def wrap(self, module: TrainingModule) -> nn.Module:
        """Return the module whose backward leaves gradients averaged over all processes."""
        if self.world == 1 or self.is_sharded:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def beside(self) -> Any:
        """Return a group of all processes for a thread, beside training; all must call it."""
        if self._beside is None:
            # A slow disk is waited for; a process that dies is noticed at once.
            self._beside = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        return self._beside

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of mixed precision."""
        return torch.autocast(
            self.device.type,
            dtype=self._precision,
            enabled=self._precision is not None,
            # The backward of a cast that is reused from an earlier forward runs after FSDP has
            # exchanged the gradients of the block: they would be left for the next step.
            cache_enabled=not self.is_sharded,
        )

    @contextmanager
    def accumulating(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Exchange gradients only in the last micro-batch of a step."""
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                yield
            return
        if self.is_sharded:
            from torch.distributed.fsdp import FSDPModule

            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.set_requires_gradient_sync(last, recurse=False)
        yield

    def close(self) -> None:
        """Leave the process group, so that a later run in this process may choose another."""
        from accelerate.state import AcceleratorState

        self._accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def recording_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let text encoders still return their hidden states after `fully_shard`.

    transformers 5 looks up what a model can record by its class, which `fully_shard` replaces.
    """
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as REGISTRY
    except ImportError:  # another version, without this table
        yield
        return
    known: list[tuple[Any, Any]] = [(module, REGISTRY.get(module)) for module in modules]  # type: ignore[arg-type]
    yield
    for module, recorded in known:
        if recorded:
            REGISTRY[module] = recorded


def whole(tensor: Tensor, *, kept: bool = True) -> Tensor:
    """Return a copy of a parameter's or state's whole value on the CPU.

    All processes must call it.

    Args:
        kept: whether this process gets it; the others get an empty tensor.
    """
    value = tensor.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    if not kept:
        return torch.empty(0)
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format)


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole value placed, sharded and laid out as `parameter` is."""
    if isinstance(parameter, DTensor):
        placed = value.to(parameter.device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements)
    # Fused AdamW needs moments that lie in memory as the weights do.
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def placed(tensors: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    """Return a saved tensor as `like` does; of shards only this process's share is read."""
    if not (isinstance(tensors, Shards) and isinstance(parameter, DTensor)):
        return like(tensors[name], parameter)
    (chunk,) = parameter.__create_chunk_list__()
    return united(tensors.read(name, chunk.offsets, chunk.sizes), parameter)


def share(value: Tensor, parameter: Tensor) -> Share:
    """Return a copy on the CPU of the part of a tensor that this process holds, sharded or not.

    Args:
        value: the part, sharded as `parameter` is.
    """
    sharded = isinstance(parameter, DTensor)
    offsets = parameter.__create_chunk_list__()[0].offsets if sharded else [0] * value.ndim
    copied = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return Share(copied, offsets, parameter.shape if sharded else value.shape)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, not copied."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def united(share: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor whose shares the processes hold, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return share
    return DTensor.from_local(
        share.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
