"""One process or many: accelerate for devices and precision, DDP or FSDP2 for the gradient."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sfumato.config import TrainingConfig
from sfumato.models.texts import recording_kept
from sfumato.training.module import TrainingModule

T = TypeVar("T")


@final
class Distribution:
    """Who this process is, and what it does together with the others.

    Raises:
        ValueError: if fp16 is asked for without a CUDA device.
    """

    def __init__(self, config: TrainingConfig) -> None:
        from accelerate import Accelerator

        if config.precision == "fp16" and not torch.cuda.is_available():
            raise ValueError(
                "training.precision = fp16 needs a CUDA device, and there is none; use bf16 or no"
            )
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision=config.precision
        )
        self.rank = self._accelerator.process_index
        self.world = self._accelerator.num_processes
        self.device = self._accelerator.device
        self.is_main = self._accelerator.is_main_process
        self._shard = config.strategy == "fsdp" and self.world > 1
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.precision == "fp16" and self.device.type == "cuda"
        )
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True

    def shard(self, module: TrainingModule) -> None:
        """Split the networks over the processes, in place, under FSDP2; before the optimiser."""
        if not self._shard:
            return
        from torch.distributed.fsdp import fully_shard

        # A root that stayed gathered after a forward would not see what the EMA writes into it.
        parts = module.model.shards()
        with recording_kept(parts):
            for part in parts:
                fully_shard(part, reshard_after_forward=True)

    def wrap(self, module: TrainingModule) -> nn.Module:
        """Return the module whose backward leaves gradients averaged over all processes."""
        if self.world == 1 or self._shard:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of mixed precision."""
        return self._accelerator.autocast()

    @contextmanager
    def accumulating(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Let only the last micro-batch of a step exchange gradients."""
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                yield
            return
        if self._shard:
            from torch.distributed.fsdp import FSDPModule

            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.set_requires_gradient_sync(last, recurse=False)
        yield

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return each value's mean over the processes, which all give the same names."""
        if self.world == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64)
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return dict(zip(values, (tensor / self.world).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Say whether the flag is up on any process."""
        return self.mean({"flag": float(flag)})["flag"] > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a mistake on one process end all of them, so that none waits for it for ever.

        Raises:
            ValueError: on every process, if one raised it or an OSError inside.
        """
        error: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        if self.any(error is not None):
            raise error or ValueError("another process failed; it says why")

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return the items of all processes, by rank."""
        if self.world == 1:
            return list(items)
        gathered: list[list[T]] = [[] for _ in range(self.world)]
        dist.all_gather_object(gathered, list(items))
        return [item for part in gathered for item in part]

    def barrier(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group, so that a next run in this process may choose anew."""
        from accelerate.state import AcceleratorState

        self._accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def whole(tensor: Tensor) -> Tensor:
    """Return a parameter's or state's whole value on the CPU; all processes must call it."""
    value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return value.detach().cpu().clone()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole value placed and sharded as `parameter` is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
