"""One training step of a network without memory: its FLOPs, and the bytes that it holds.

Tensors on the meta device have shapes and storages, but no bytes; what is computed is followed
operator by operator, and what is alive at any time is summed, each storage once.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfumato.planning.precision import MetaPrecision
from sfumato.training.flops import flops_of


@dataclass(frozen=True)
class StepCost:
    """What one micro-batch's forward and backward takes.

    Attributes:
        forward: FLOPs of the forward.
        flops: of forward and backward, without what is computed again.
        executed: with what gradient checkpointing computes again.
        activations: bytes at the peak beside weights, inputs and gradients.
        with_gradients: bytes at the peak, where gradients come into being as activations go.
    """

    forward: int
    flops: int
    executed: int
    activations: int
    with_gradients: int


@final
class Ledger(TorchDispatchMode):
    """Follows what is computed and what is alive; the peaks so far are its attributes.

    Args:
        known: tensors that were there before, which do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.model_flops = self.executed_flops = 0
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
        flops = flops_of(func, args, kwargs or {}, out)
        self.executed_flops += flops
        # Inside a backward only what is computed again records a graph.
        if torch._C._current_graph_task_id() == -1 or not torch.is_grad_enabled():
            self.model_flops += flops
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
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
        """Count a parameter's gradient, which has just come into being, among the gradients."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, self._sizes[key] = self._sizes.get(key, 0), 0
        self._live -= size
        self._gradients += size


def measure_step(
    network: nn.Module, predict: Callable[[], Tensor], dtype: torch.dtype | None
) -> StepCost:
    """Follow the forward of a network on the meta device, and the backward of its mean square.

    Args:
        predict: calls the network with a micro-batch, and returns its prediction.
        dtype: of autocast; None is none.
    """
    parameters = list(network.parameters())
    ledger = Ledger([*parameters, *network.buffers()])
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    hooks = [each.register_post_accumulate_grad_hook(ledger.gained) for each in trained]
    try:
        with ledger, MetaPrecision(dtype).inside(network):
            loss = predict().float().square().mean()
            forward = ledger.model_flops
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    return StepCost(
        forward=forward,
        flops=ledger.model_flops,
        executed=ledger.executed_flops,
        activations=ledger.activations,
        with_gradients=ledger.with_gradients,
    )


@torch.no_grad()
def forward_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of a forward on the meta device."""
    ledger = Ledger([])
    with ledger, MetaPrecision(None):
        run()
    return ledger.model_flops
