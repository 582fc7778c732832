"""Runs networks in float32, whatever precision their training and their weights have."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HALVES = (torch.bfloat16, torch.float16)
CASTS = {"to", "type", "type_as", "half", "bfloat16"}
COMPUTES = {  # the operators that want one type of all their tensors
    *("linear", "conv1d", "conv2d", "conv3d", "group_norm", "layer_norm", "rms_norm"),
    *("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
}


def is_rounded(network: nn.Module) -> bool:
    """Say whether a network predicts in half precision here: by its weights, or by autocast."""
    first = next(network.parameters())
    if first.device.type != "meta" and torch.is_autocast_enabled(first.device.type):
        return True
    return any(parameter.dtype in HALVES for parameter in network.parameters())


@contextmanager
def without_tf32() -> Iterator[None]:
    """Leave out TF32, whose products have ten bits."""
    matmul: Any = torch.backends.cuda.matmul
    convolution: Any = torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32; weights in half precision are cast layer by layer, and stay as they are.

    Compiled blocks run uncompiled.
    """
    with ExitStack() as stack:
        if device.type != "meta":  # which autocast does not know
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(without_tf32())
        stack.enter_context(_Raised())
        yield


@final
class _Raised(TorchFunctionMode):
    """Gives operators float32 in the place of half precision, and skips casts to half precision."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in COMPUTES:
            return func(*map(_raise, args), **{name: _raise(v) for name, v in kwargs.items()})
        result = func(*args, **kwargs)
        if func.__name__ in CASTS and result.dtype in HALVES:
            return args[0].to(result.device, torch.float32)
        return result


def _raise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value
