"""An exponential moving average of what is trained: what gets validated and exported."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn


@final
class Ema:
    """Shadow weights: shadow <- d shadow + (1 - d) weight, d = min(decay, (1 + n) / (10 + n)).

    Args:
        parameters: by name; the shadows start as copies.
        decay: None keeps no shadow, and everything here shows the weights themselves.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float | None) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self.updates = 0
        self.shadow: dict[str, Tensor] = {}
        if decay is not None:
            self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadows towards the weights, after an optimiser step."""
        if self._decay is None:
            return
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = [parameter.detach() for parameter in self._parameters.values()]
        shadows = list(self.shadow.values())
        torch._foreach_lerp_(shadows, weights, 1 - decay)  # pyright: ignore

    @contextmanager
    @torch.no_grad()
    def shown(self) -> Iterator[None]:
        """Put the shadows in place of the weights, and the weights back at the end."""
        if self._decay is None:
            yield
            return
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(kept)

    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(values[name])
