"""Mixed precision and fused attention for tensors on the meta device.

torch.autocast ignores the meta device. This module casts where the CPU's autocast is on, by CUDA's
rules, so that each saved activation has the size that it has on a GPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
    """Runs networks by the rules of CUDA's autocast, with attention in one fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[int, Tensor] = {}  # of weights, each cast once while autocast is on
        self._depth = 0

    def inside(self, networks: nn.Module) -> AbstractContextManager[None]:
        """Apply to each forward of networks, also to parts that a backward computes again."""
        return around_forwards(networks.modules(), self._enter_forward, self._leave_forward)

    @contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Apply, with autocast for products and convolutions in `dtype`; None casts nothing."""
        self._enter_forward()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            yield
        self._leave_forward()

    def _enter_forward(self, *_: object) -> None:
        if not self._depth:
            self.__enter__()
        self._depth += 1

    def _leave_forward(self, *_: object) -> None:
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
        if func is torch.autograd.grad:  # forwards inside a backward enter by themselves
            depth, self._depth = self._depth, 0
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self._depth = depth
        name, kwargs = func.__name__, dict(kwargs or {})
        casts = torch.is_autocast_enabled("cpu")
        if casts and name in LOWERED:
            args, kwargs = self._cast_all(args, kwargs, torch.get_autocast_dtype("cpu"))
        elif casts and name in RAISED:
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
        is_weight = lowered and tensor.is_leaf and tensor.requires_grad
        if not (self._depth and is_weight and torch.is_grad_enabled()):
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
