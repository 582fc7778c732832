"""Roles of a network: the policy that is trained, and the frozen reference it started from."""

import abc
import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch
from torch import nn

from sfumato.config import LoraConfig
from sfumato.models.model import Role

MERGE_ERROR = 1e-6  # of a merged layer's norm; float32 rounds by 3e-8


class Roles(abc.ABC):
    """A network in its two roles, with the reference kept as adapters, a copy or the same."""

    policy: nn.Module
    is_trained: bool = True
    has_reference: bool = True
    is_changed: bool = True  # whether its weights differ from the source's files
    _records: bool = False

    @abc.abstractmethod
    def acting(self, role: Role) -> AbstractContextManager[Any]:
        """Return a context that gives the network of this role; contexts may nest.

        The reference has no gradient, but that of its inputs inside `playing`.
        """

    @contextmanager
    def playing(self, role: Role) -> Iterator[None]:
        """Keep the network in a role, where the reference records a graph of its inputs.

        A backward inside runs checkpointed layers again in the same role.
        """
        before, self._records = self._records, True
        try:
            with self.acting(role):
                yield
        finally:
            self._records = before

    def _recording(self, role: Role) -> AbstractContextManager[Any]:
        return nullcontext() if role == "policy" or self._records else torch.no_grad()

    @abc.abstractmethod
    def networks(self) -> tuple[nn.Module, ...]:
        """Return every network that is held in memory, the policy first."""

    @abc.abstractmethod
    def merged(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a copy of the policy as a plain network, adapters merged into its weights.

        Args:
            dtype: of the copy's weights; those of a policy that has it already are not copied.
        """


@final
class FrozenRoles(Roles):
    """One network that is not trained, for both roles.

    Args:
        is_changed: whether a LoRA file was merged into it.
    """

    is_trained = False

    def __init__(self, network: nn.Module, *, is_changed: bool = False) -> None:
        self.policy = network
        self.is_changed = is_changed

    @contextmanager
    def acting(self, role: Role) -> Iterator[Any]:
        with self._recording(role):
            yield self.policy

    def networks(self) -> tuple[nn.Module, ...]:
        return (self.policy,)

    def merged(self, dtype: torch.dtype | None = None) -> nn.Module:
        return _copied(self.policy, dtype)


@final
class LoraRoles(Roles):
    """One network: the reference is the policy with its adapters off.

    Args:
        targets: regular expressions of layers; each must match a whole name.

    Raises:
        ValueError: if a target matches no layer, or a layer that cannot have an adapter.
    """

    def __init__(self, network: nn.Module, lora: LoraConfig, targets: Sequence[str]) -> None:
        from peft import LoraConfig as PeftLora
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        network.requires_grad_(False)
        names = [name for name, _ in network.named_modules()]
        idle = [target for target in targets if not any(re.fullmatch(target, n) for n in names)]
        if idle:
            linear = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)]
            raise ValueError(
                f"model.lora.targets: {', '.join(idle)} match no layer of "
                f"{type(network).__name__}; its linear layers are named like {linear[:3]}"
            )
        pattern = "|".join(f"(?:{target})" for target in targets)
        settings = PeftLora(
            r=lora.rank,
            lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=pattern,
        )
        try:
            inject_adapter_in_model(settings, network)
        except ValueError as error:
            raise ValueError(f"model.lora.targets = {list(targets)}: {error}") from error
        network.train(network.training)  # peft's new dropouts start active
        self.policy = network
        self.settings = settings
        self.layers: list[Any] = [
            module for module in network.modules() if isinstance(module, LoraLayer)
        ]
        # In bf16 AdamW's small updates would round to nothing.
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _switch(self, disabled: bool) -> None:
        # peft's public switch also flips requires_grad, which the graph of the policy, already
        # recorded, and FSDP's sharded parameters must not see.
        for layer in self.layers:
            layer._disable_adapters = disabled

    @contextmanager
    def acting(self, role: Role) -> Iterator[Any]:
        if role == "policy":
            yield self.policy
            return
        before = self.layers[0]._disable_adapters
        self._switch(True)
        try:
            with self._recording(role):
                yield self.policy
        finally:
            self._switch(before)

    def networks(self) -> tuple[nn.Module, ...]:
        return (self.policy,)

    @contextmanager
    def merged_in_place(self) -> Iterator[None]:
        """Hold the policy's adapters merged into the weights, which come back bitwise.

        For predictions without a gradient: a merged layer is one product instead of three.

        Raises:
            ValueError: if the weights' dtype rounds a merged layer by more than MERGE_ERROR.
        """
        weights = [layer.get_base_layer().weight for layer in self.layers]
        kept = [weight.data for weight in weights]
        merged = [self._sum(layer, data) for layer, data in zip(self.layers, kept, strict=True)]
        before = self.layers[0]._disable_adapters
        self._switch(True)
        try:
            for weight, data in zip(weights, merged, strict=True):
                weight.data = data
            yield
        finally:
            for weight, data in zip(weights, kept, strict=True):
                weight.data = data
            self._switch(before)

    @torch.no_grad()
    def _sum(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        exact = weight.float() + layer.get_delta_weight("default").float()
        merged = exact.to(weight.dtype)
        if weight.dtype != torch.float32 and not weight.is_meta:
            error = float((merged.float() - exact).norm() / exact.norm())
            if error > MERGE_ERROR:
                raise ValueError(
                    f"model.lora.merge_rollouts=true rounds merged weights of {weight.dtype} by "
                    f"{error:.1g} of their norm, more than {MERGE_ERROR:g}; set "
                    "model.dtype=float32, or model.lora.merge_rollouts=false"
                )
        return merged

    def merged(self, dtype: torch.dtype | None = None) -> nn.Module:
        from peft.tuners.lora import LoraLayer

        network = copy.deepcopy(self.policy)
        for name, module in list(network.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge(safe_merge=True)
                network.set_submodule(name, module.get_base_layer())
        if dtype is not None:
            for parameter in network.parameters():
                parameter.data = parameter.data.to(dtype)
        return network

    def adapters(self) -> dict[str, Any]:
        """Return peft's layers by their names in the network."""
        names = {module: name for name, module in self.policy.named_modules()}
        return {names[layer]: layer for layer in self.layers}

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return A and B by layer in the names of diffusers' LoRA files, alpha folded into B.

        So alpha = rank in the file, and loaders that read no metadata scale it correctly too.
        """
        state = {}
        for name, layer in self.adapters().items():
            down, up = (
                part["default"].weight.detach().cpu() for part in (layer.lora_A, layer.lora_B)
            )
            state[f"{name}.lora_A.weight"] = down
            state[f"{name}.lora_B.weight"] = up * layer.scaling["default"]
        return state


@final
class CopyRoles(Roles):
    """Two networks: every weight of the policy is trained, and the reference is a frozen copy.

    Args:
        network: becomes the policy, in float32.
        reference: False keeps no copy, for training that never uses it.
    """

    def __init__(self, network: nn.Module, *, reference: bool = True) -> None:
        self.policy = network.float().requires_grad_(True)
        self.reference = copy.deepcopy(network).requires_grad_(False) if reference else None
        self.has_reference = reference

    @contextmanager
    def acting(self, role: Role) -> Iterator[Any]:
        if role == "policy":
            yield self.policy
            return
        assert self.reference is not None, "loaded with model.reference = false"
        with self._recording(role):
            yield self.reference

    def networks(self) -> tuple[nn.Module, ...]:
        return (self.policy,) if self.reference is None else (self.policy, self.reference)

    def merged(self, dtype: torch.dtype | None = None) -> nn.Module:
        return _copied(self.policy, dtype)


def _copied(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of a network; a whole second one is never held only to be cast."""
    parameters = network.parameters() if dtype is not None else ()
    cast: dict[int, Any] = {
        id(p): nn.Parameter(p.data.to(dtype), p.requires_grad) for p in parameters
    }
    return copy.deepcopy(network, cast)
