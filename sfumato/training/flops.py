"""Count what a step computes: matrix products, convolutions and attention, two FLOPs a pair.

Counted are the forward of the trained networks and the backward, each once: what checkpointed
activations or attention compute again is work, but none of the model's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

KINDS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
ATTENTION = {f"aten::_scaled_dot_product_{kind}" for kind in KINDS}
ATTENTION_BACKWARD = {f"{name}_backward" for name in ATTENTION}


@final
class FlopCounter(TorchDispatchMode):
    """Sums the FLOPs of what is dispatched while it is entered; `flops` is the sum so far.

    Args:
        networks: whose forward counts; a backward counts all through.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.flops = 0
        self._networks = networks
        self._inside = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # Inside a backward only what is computed again records a graph.
        in_backward = torch._C._current_graph_task_id() != -1
        if not torch.is_grad_enabled() if in_backward else self._inside:
            self.flops += flops_of(func, args, kwargs or {}, out)
        return out

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs inside."""
        handles = []
        for network in self._networks:
            handles.append(network.register_forward_pre_hook(self._enter))
            handles.append(network.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_: object) -> None:
        self._inside += 1

    def _leave(self, *_: object) -> None:
        self._inside -= 1


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
