"""How far two loops are apart that are to do the same arithmetic."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Loop(Protocol):
    """A loop whose trained parameters go by their names in the network."""

    @property
    def optimizer(self) -> Any: ...

    @property
    def parameters(self) -> dict[str, Any]: ...


class Leader(Loop, Protocol):
    """Says what it will draw, and draws it."""

    def draws(self) -> Any: ...

    def step(self) -> float: ...


class Follower(Loop, Protocol):
    """Takes what was drawn; left alone it draws on its own."""

    def step(self, draws: Any, /) -> float: ...


@dataclass(frozen=True)
class Parity:
    """How far the two loops are apart: the loss absolutely, tensors relative to the bare norm."""

    loss: float
    gradient: float
    update: float


def compare(ours: Leader, bare: Follower) -> Parity:
    """Take two steps of each from the same weights and draws; return the largest differences.

    The first gradient is compared; B of LoRA is set off from 0, so that A has a gradient and
    what differs from the frozen network a value. Updates are compared after both steps.
    """
    import torch

    parameters, copied = ours.parameters, bare.parameters
    assert parameters.keys() == copied.keys(), "the loops train other parameters"
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn_like(parameter))
            copied[name].copy_(parameter)
    before = [parameter.detach().clone() for parameter in parameters.values()]
    pairs = [(parameter, copied[name]) for name, parameter in parameters.items()]
    found: list[list[Any]] = [[], []]
    hooks = [
        loop.optimizer.register_step_pre_hook(
            lambda *_, side=side: found[side].extend(gradients(pairs, side))
        )
        for side, loop in enumerate((ours, bare))
    ]
    losses = []
    for _ in range(2):
        draws = ours.draws()
        losses.append((ours.step(), bare.step(draws)))
    for hook in hooks:
        hook.remove()
    moved = [
        [pair[side].detach() - old for pair, old in zip(pairs, before, strict=True)]
        for side in (0, 1)
    ]
    first = [kept[: len(pairs)] for kept in found]
    return Parity(
        loss=max(abs(a - b) for a, b in losses),
        gradient=distance(*first),
        update=distance(*moved),
    )


def check_parity(parity: Parity, allowed: Mapping[str, float]) -> None:
    """Stop where the loops are further apart than allowed, by the names of Parity."""
    if not all(value <= allowed[name] for name, value in asdict(parity).items()):
        sys.exit(f"the loops do not do the same arithmetic; allowed are {allowed}")


def gradients(pairs: Sequence[tuple[Any, Any]], side: int) -> list[Any]:
    """Return copies of the gradients of one side's parameters."""
    return [pair[side].grad.clone() for pair in pairs]


def distance(left: Sequence[Any], right: Sequence[Any]) -> float:
    """Return ||left - right|| / ||right|| over lists of tensors."""
    import torch

    apart = torch.stack([(a - b).norm() for a, b in zip(left, right, strict=True)]).norm()
    return (apart / torch.stack([b.norm() for b in right]).norm()).item()
