"""Mixed precision and fused attention for tensors on the meta device.

torch.autocast ignores the meta device. This module casts by CUDA's rules, so that each saved
activation has the size that it has on a GPU.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.training.flops import around_forwards

# The operators of CUDA's autocast, from torch's documentation, that networks call.
LOWERED = {
    *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "einsum"),
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm"),
    "scaled_dot_product_attention",
}
RAISED = {
    *("layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "norm", "softplus"),
    *("pow", "__pow__", "rsqrt", "reciprocal", "exp", "log", "sum", "prod", "cumsum"),
    *("mse_loss", "l1_loss", "smooth_l1_loss"),
}


@final
class MetaPrecision(TorchFunctionMode):
    """Runs networks by the rules of CUDA's autocast, with attention in one fused kernel.

    Args:
        dtype: of products and convolutions; None casts nothing.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype
        self._casts: dict[int, Tensor] = {}  # of weights, each cast once per forward
        self._depth = 0

    def inside(self, network: nn.Module) -> AbstractContextManager[None]:
        """Apply to each forward of a network, also to parts that a backward computes again."""
        return around_forwards(network.modules(), self._enter_module, self._leave_module)

    def _enter_module(self, *_: object) -> None:
        if not self._depth:
            self.__enter__()
        self._depth += 1

    def _leave_module(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._casts.clear()
            self.__exit__(None, None, None)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = func.__name__, dict(kwargs or {})
        if self._dtype is not None and name in LOWERED:
            args, kwargs = self._cast_all(args, kwargs, self._dtype)
        elif self._dtype is not None and name in RAISED:
            args, kwargs = self._cast_all(args, kwargs, torch.float32)
        if name == "scaled_dot_product_attention":
            return fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast_all(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments with floating-point tensors cast to `dtype`, also inside lists."""

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._cast(value, dtype)
            return [cast(each) for each in value] if isinstance(value, list) else value

        return [cast(value) for value in args], {name: cast(v) for name, v in kwargs.items()}

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        lowered = dtype != torch.float32 and tensor.dtype == torch.float32
        if not (self._depth and lowered and tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = tensor.to(dtype)
        return self._casts[id(tensor)]


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return attention by CUDA's kernel, which stores no scores; on the meta device.

    Args:
        query: (b, heads, n, width); key and value have this layout too.
    """
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    if attn_mask is not None:
        shape = (*query.shape[:-1], key.shape[-2])
        attn_mask = torch.empty(shape, dtype=query.dtype, device=query.device)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
