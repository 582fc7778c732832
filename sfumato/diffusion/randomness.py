"""Random numbers as a function of position: an image's noise depends on its own seed alone."""

import hashlib
from collections.abc import Sequence
from copy import copy

import torch
from jaxtyping import Float
from torch import Tensor


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part, the same on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class Rng:
    """A stream per row, and one stream that all rows of an optimiser step share.

    Args:
        seeds: one per row. Numbers are drawn on the CPU, so that every device sees the same.
        shared: seed of what is drawn once for the whole batch, on all processes alike.

    Attributes:
        shared: the generator that all rows and processes share.
        groups: a stream per row that all rows of its group have alike, where rows have groups.
    """

    groups: "Rng | None" = None

    def __init__(self, seeds: Sequence[int], shared: int = 0) -> None:
        self._rows = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shared = torch.Generator().manual_seed(shared)

    @staticmethod
    def of_step(seed: int, step: int, rows: Sequence[int]) -> "Rng":
        """Return the randomness of rows (positions in the global batch) of one step."""
        return Rng([derive(seed, step, row) for row in rows], derive(seed, step, "shared"))

    @property
    def generators(self) -> list[torch.Generator]:
        """The stream of each row."""
        return self._rows

    def rows(self, start: int, stop: int) -> "Rng":
        """Return the randomness of rows start to stop - 1; their streams go on where they are."""
        part = copy(self)
        part._rows = self._rows[start:stop]
        part.groups = self.groups and self.groups.rows(start, stop)
        return part

    def normal(self, *shape: int, device: torch.device | str = "cpu") -> Float[Tensor, "b *d"]:
        """Return standard normal float32 noise of shape (rows, *shape)."""
        draws = [torch.randn(shape, generator=generator) for generator in self._rows]
        return torch.stack(draws).to(device)

    def uniform(self, device: torch.device | str = "cpu") -> Float[Tensor, " b"]:
        """Return one number per row, uniform in [0, 1)."""
        return torch.cat([torch.rand(1, generator=g) for g in self._rows]).to(device)

    def shared_integer(self, low: int, high: int) -> int:
        """Return one integer of low..high, both included: the same for all rows and processes."""
        return int(torch.randint(low, high + 1, (1,), generator=self.shared))
