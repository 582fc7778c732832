"""Cost of one training step of networks on the meta device: FLOPs, and bytes of memory.

Tensors on the meta device have shapes and storages, but no bytes. The step runs operator by
operator on such tensors, and the sizes of the storages that live at the same time are summed.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfumato.planning.precision import MetaPrecision
from sfumato.training.flops import FlopCounter

T = TypeVar("T")


@dataclass(frozen=True)
class StepCost:
    """Cost of one micro-batch's forward and backward.

    Attributes:
        forward: FLOPs of the forwards of what is trained.
        flops: FLOPs of `forward` and of the whole backward, without recomputation.
        others: FLOPs of the other networks' forwards.
        executed: all FLOPs, with what gradient checkpointing computes again.
        activations: peak bytes beside weights, inputs and gradients.
        with_gradients: peak bytes including gradients, when gradients are allocated while
            activations are freed (no accumulation).
    """

    forward: int
    flops: int
    others: int
    executed: int
    activations: int
    with_gradients: int


@final
class Ledger(TorchDispatchMode):
    """Sums the storages that are alive; its attributes are the peaks so far.

    Args:
        known: tensors that existed before and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.activations = self.with_gradients = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._live = self._gradients = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:  # others are not on the GPU
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._lose, key)
        self._live += storage.nbytes()
        self.activations = max(self.activations, self._live)
        self.with_gradients = max(self.with_gradients, self._live + self._gradients)

    def _lose(self, key: int) -> None:
        self._live -= self._sizes.pop(key)

    def gained(self, parameter: nn.Parameter) -> None:
        """Count a parameter's gradient, which was just allocated, among the gradients."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, self._sizes[key] = self._sizes.get(key, 0), 0
        self._live -= size
        self._gradients += size


@final
class MetaValues(TorchFunctionMode):
    """Answers where code asks for values: noise has none, and every mask is true throughout."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.randn:
            return torch.empty(*args, device="meta")
        if func is Tensor.to and args[0].is_meta and "cpu" in map(str, args[1:]):
            return args[0]
        if func in (Tensor.item, Tensor.__bool__) and args[0].is_meta:
            assert args[0].dtype == torch.bool, "only masks have a value"
            return True
        return func(*args, **(kwargs or {}))


def measure_step(
    trained: nn.Module,
    loss: Callable[[], Tensor],
    dtype: torch.dtype | None,
    frozen: Iterable[nn.Module] = (),
) -> StepCost:
    """Follow a loss on the meta device, and its backward; see `measure_pieces`."""
    return measure_pieces(trained, lambda: [loss], dtype, frozen)


def measure_pieces(
    trained: nn.Module,
    pieces: Callable[[], Sequence[Callable[[], Tensor]]],
    dtype: torch.dtype | None,
    frozen: Iterable[nn.Module] = (),
) -> StepCost:
    """Follow the pieces of a loss on the meta device, each with its backward.

    Args:
        trained: a network, or a ModuleDict of networks.
        pieces: of an objective: calls that run networks on a micro-batch, and return a scalar.
        dtype: of autocast; None for no autocast.
        frozen: the other networks that the loss runs.
    """
    networks = nn.ModuleList([trained, *frozen])
    parameters = list(networks.parameters())
    counter = FlopCounter([trained, *trained.children()])
    ledger, precision = Ledger([*parameters, *networks.buffers()]), MetaPrecision()
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    hooks = [each.register_post_accumulate_grad_hook(ledger.gained) for each in learning]

    def run(part: Callable[[], T]) -> T:
        with precision.autocast(dtype), MetaValues():
            return part()

    try:
        with ledger, counter.counting(), precision.inside(networks):
            for piece in run(pieces):
                run(piece).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in learning:
            parameter.grad = None
    return StepCost(
        forward=counter.flops - counter.backward,
        flops=counter.flops,
        others=counter.others,
        executed=counter.executed + counter.others,
        activations=ledger.activations,
        with_gradients=ledger.with_gradients,
    )


@torch.no_grad()
def forward_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of a forward on the meta device."""
    with FlopCounter() as counter, MetaPrecision():
        run()
    return counter.flops
