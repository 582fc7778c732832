"""Contexts that choose the precision of arithmetic, beside autocast's own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def without_autocast(weights: Any) -> AbstractContextManager[object]:
    """Return a context without autocast for weights in float32: a network's, or one tensor."""
    if weights.dtype != torch.float32:
        return nullcontext()
    return torch.autocast(_kind(weights.device), enabled=False)


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
def in_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32; weights in half precision stay, and are cast where a layer needs them."""
    with torch.autocast(_kind(device), enabled=False), without_tf32(), _Raised():
        yield


def is_rounded(network: nn.Module) -> bool:
    """Say whether a network predicts in half precision here: by its weights, or by autocast."""
    parameters = list(network.parameters())
    if torch.is_autocast_enabled(_kind(parameters[0].device)):
        return True
    return any(parameter.dtype in HALVES for parameter in parameters)


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the type of a network's weights: of the first, as diffusers' `dtype` says too.

    That walks through all modules at every call, which took 3 % of a small U-Net's time.
    """
    return next(network.parameters()).dtype


def _kind(device: torch.device) -> str:
    """Return the device whose autocast counts: a plan on the meta device follows the CPU's."""
    return "cpu" if device.type == "meta" else device.type


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
