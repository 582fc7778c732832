"""FLOPs of a training step, and the speed that follows from them.

Matrix products, convolutions and attention count, two FLOPs for a multiplication with its addition.
The model's FLOPs are those of one forward of the trained networks and of the backward. Work that
checkpointing or fused attention repeats in the backward is executed, but none of the model's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sfumato.config import TrainingConfig
from sfumato.training.distribution import Distribution
from sfumato.training.module import Trainee

# Dense bf16 TFLOP/s from NVIDIA's data sheets; the first name that a device's name contains holds.
PEAKS = {"H100 PCIe": 756.0, "A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
KINDS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
ATTENTION = {f"aten::_scaled_dot_product_{kind}" for kind in KINDS}
ATTENTION_BACKWARD = {f"{name}_backward" for name in ATTENTION}


@final
class FlopCounter(TorchDispatchMode):
    """Sums the FLOPs of what is dispatched while the counter is entered.

    Args:
        networks: whose forwards count, beside every backward; without any, all forwards count.

    Attributes:
        flops: of the model so far; `backward` is the backwards' part.
        executed: with what is computed again.
        others: of forwards outside of the networks.
    """

    def __init__(self, networks: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.flops = self.backward = self.executed = self.others = 0
        self._networks = networks
        self._inside = 0 if networks else 1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        in_backward = torch._C._current_graph_task_id() != -1
        flops = flops_of(func, args, kwargs or {}, out)
        if in_backward or self._inside:
            self.executed += flops
            # In a backward, only what is computed again records a graph.
            if not (in_backward and torch.is_grad_enabled()):
                self.flops += flops
                self.backward += flops * in_backward
        else:
            self.others += flops
        return out

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs inside."""
        with around_forwards(self._networks, self._enter, self._leave), self:
            yield

    def _enter(self, *_: object) -> None:
        self._inside += 1

    def _leave(self, *_: object) -> None:
        self._inside -= 1


@contextmanager
def around_forwards(
    modules: Iterable[nn.Module], enter: Callable[..., None], leave: Callable[..., None]
) -> Iterator[None]:
    """Call `enter` before and `leave` after each forward of the modules, even if one fails."""
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def flops_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the FLOPs of one operator; 0 for those that are neither product nor convolution."""
    name = func._schema.name
    if name in ATTENTION:
        return attention_flops(*args[:3])
    if name in ATTENTION_BACKWARD:
        return 2 * attention_flops(*args[1:4])
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula is not None else 0


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Return the FLOPs of query key^T and of its product with value, of (b, heads, n, width)."""
    rows, heads, n, width = query.shape
    return 2 * rows * heads * n * key.shape[-2] * (width + value.shape[-1])


@final
class Meter:
    """Speed meter: counts the FLOPs of the first micro-batch, and divides by the seconds of each.

    Attributes:
        flops: of the model for one image, forward and backward; None before the count.
    """

    def __init__(self, model: Trainee, config: TrainingConfig, distribution: Distribution) -> None:
        self.flops: float | None = None
        self._beside = 0.0
        self._networks = [model.trained, *model.trained.children()]
        self._rows = config.micro_batch_size
        self._images = config.global_batch_size
        self._world = distribution.world
        self._peak = config.peak_tflops or peak_by_name(distribution.device)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the micro-batch that runs inside, forward and backward, if none was counted yet.

        Compiled networks run eagerly meanwhile, because their kernels cannot be counted.
        """
        if self.flops is not None:
            yield
            return
        with self._counted() as counter:
            yield
        self.flops = counter.flops / self._rows + self._beside

    @contextmanager
    def counting_beside(self, rows: int) -> Iterator[None]:
        """Count what runs inside for later micro-batches, if no micro-batch was counted yet.

        Args:
            rows: of these micro-batches, over all inner epochs.
        """
        if self.flops is not None:
            yield
            return
        with self._counted() as counter:
            yield
        self._beside = counter.flops / rows

    @contextmanager
    def _counted(self) -> Iterator[FlopCounter]:
        counter = FlopCounter(self._networks)
        with torch.compiler.set_stance("force_eager"), counter.counting():
            yield counter

    def rates(self, seconds: float) -> dict[str, float]:
        """Return the metrics of a step of so many seconds; FLOPs are of one device."""
        rates = {"images_per_second": self._images / seconds, "seconds_per_step": seconds}
        if self.flops:
            tflops = self.flops * self._images / self._world / seconds / 1e12
            rates["tflops_per_second"] = tflops
            if self._peak:
                rates["mfu"] = tflops / self._peak
        return rates


def peak_by_name(device: torch.device) -> float | None:
    """Return a device's bf16 peak in TFLOP/s; None if it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)
