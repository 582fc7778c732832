"""Other values of the trained weights: their moving average (EMA), and an old policy's.

The EMA is validated and exported. An old policy is a second set of values for the same network: of
adapters alone, or a copy of all weights where all are trained.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from sfumato.training.distribution import local, placed, share, united, whole
from sfumato.weights import Share


class Shadow:
    """Values beside the weights, which can be put in their place.

    Args:
        parameters: by name; the shadow starts as a copy of this process's share of them.

    Attributes:
        shadow: the values by name; without any, the weights themselves are shown.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self.shadow = {name: w.clone() for name, w in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        # Looked up anew each time: FSDP may exchange the tensor of a parameter.
        return {name: local(parameter.detach()) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the values: decay x value + (1 - decay) x weight."""
        shadows, weights = list(self.shadow.values()), list(self._weights().values())
        torch._foreach_lerp_(shadows, weights, 1 - decay)  # pyright: ignore

    def snapshot(self, *, kept: bool = True) -> dict[str, Tensor]:
        """Return whole values on the CPU, by name; all processes must call it.

        Args:
            kept: whether this process gets them; the others get empty tensors.
        """
        return {
            name: whole(united(shadow, self._parameters[name]), kept=kept)
            for name, shadow in self.shadow.items()
        }

    def shares(self) -> dict[str, Share]:
        """Return copies of this process's shares, on the CPU, by name."""
        return {n: share(each, self._parameters[n]) for n, each in self.shadow.items()}

    def put_back(self, shadows: Mapping[str, Tensor]) -> None:
        """Take the values of a snapshot."""
        for name, shadow in self.shadow.items():
            shadow.copy_(local(placed(shadows, name, self._parameters[name])))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Exchange the values with the weights until the end; there is no third copy."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights().items():
            before = weight.clone()
            weight.copy_(self.shadow[name])
            self.shadow[name].copy_(before)
        torch.clear_autocast_cache()  # it holds casts of the values that stood here before


@final
class Ema(Shadow):
    """Shadow weights: shadow <- d shadow + (1 - d) weight, d = min(decay, (1 + n) / (10 + n)).

    Args:
        parameters: by name; the shadows start as copies of this process's share of them.
        decay: None keeps no shadow; then the weights themselves are shown.
        every: update once per N steps, with the product of the N decays. If the weights had not
            changed in between, the result would equal N single updates.
        on_cpu: keep the shadows in host memory, where a thread updates them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float | None,
        *,
        every: int = 1,
        on_cpu: bool = False,
    ) -> None:
        super().__init__(parameters if decay is not None else {})
        self._decay = decay
        self._every = every
        self._host: HostMover | None = None
        self.updates = 0
        if on_cpu and self.shadow:
            self.shadow = {name: shadow.cpu() for name, shadow in self.shadow.items()}
            self._host = HostMover(list(self._weights().values()))

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadows towards the weights, after an optimiser step."""
        if self._decay is None:
            return
        self.updates += 1
        if self.updates % self._every:
            return
        steps = range(self.updates - self._every, self.updates)
        decay = math.prod(min(self._decay, (1 + n) / (10 + n)) for n in steps)
        if self._host is not None:
            shadows, weights = list(self.shadow.values()), list(self._weights().values())
            self._host.move(shadows, weights, 1 - decay)
        else:
            self.follow(decay)

    def before_change(self) -> None:
        """Let a copy of the weights that is under way end before the weights change."""
        if self._host is not None:
            self._host.before_change()

    def settle(self) -> None:
        """Wait until the last update of the shadows is complete."""
        if self._host is not None:
            self._host.wait()

    def snapshot(self, *, kept: bool = True) -> dict[str, Tensor]:
        """Return whole shadows on the CPU, by name; all processes must call it."""
        self.settle()
        return super().snapshot(kept=kept)

    def shares(self) -> dict[str, Share]:
        """Return copies of this process's shares, on the CPU, by name."""
        self.settle()
        return super().shares()

    def restore(self, shadows: Mapping[str, Tensor], updates: int) -> None:
        """Put a snapshot back."""
        self.settle()
        self.updates = updates
        self.put_back(shadows)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Put the shadows in place of the weights, and the weights back at the end."""
        self.settle()
        with super().shown():
            yield


@final
class HostMover:
    """Updater of shadows in host memory: a thread works on copies that a CUDA stream makes.

    Args:
        weights: of the same shapes, types and device as those that `move` will get.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        on_device = bool(weights) and weights[0].is_cuda
        self._stream = torch.cuda.Stream(weights[0].device) if on_device else None
        self._copies = [
            torch.empty_like(weight, device="cpu", pin_memory=on_device) for weight in weights
        ]
        self._copied: torch.Event | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._moving: Future[None] | None = None

    def move(self, shadows: Sequence[Tensor], weights: Sequence[Tensor], share: float) -> None:
        """Begin to move the shadows by a share of the way to the weights."""
        self.wait()
        if self._stream is None:
            torch._foreach_copy_(self._copies, list(weights))  # pyright: ignore
        else:
            self._stream.wait_stream(torch.cuda.current_stream(weights[0].device))
            with torch.cuda.stream(self._stream):
                for copy, weight in zip(self._copies, weights, strict=True):
                    copy.copy_(weight, non_blocking=True)
            self._copied = self._stream.record_event()
        self._moving = self._pool.submit(self._lerp, list(shadows), share)

    @torch.no_grad()
    def _lerp(self, shadows: list[Tensor], share: float) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        torch._foreach_lerp_(shadows, self._copies, share)  # pyright: ignore

    def before_change(self) -> None:
        """Let the device, but not this process, wait for the copy before weights change."""
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def wait(self) -> None:
        """Wait for the thread."""
        if self._moving is not None:
            self._moving.result()
            self._moving = None
