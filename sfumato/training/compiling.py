"""Memory layout and compilation of networks: channels last; blocks or whole networks compiled."""

import torch
from torch import nn

from sfumato.config import TrainConfig
from sfumato.models.model import TextToImageModel

# Widths and image sizes, times training or not, gradients or not, adapters on or off.
VARIANTS = 128


def arrange(model: TextToImageModel, config: TrainConfig) -> None:
    """Lay out and compile a model's networks as configured, before they are sharded.

    Neither changes the names of weights or the files that are written.

    Raises:
        ValueError: if the model names no repeated blocks to compile.
    """
    if config.model.channels_last:
        for network in model.networks().values():
            lay_channels_last(network)
    if config.training.compile != "none":
        compile_networks(model, whole=config.training.compile == "full")


@torch.no_grad()
def lay_channels_last(network: nn.Module) -> None:
    """Put the weights of two-dimensional convolutions in the order that tensor cores read."""
    for parameter in network.parameters():
        # A 1 x 1 kernel lies alike in both orders; other strides would only mislead optimisers.
        last = torch.channels_last
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=last):
            parameter.data = parameter.data.contiguous(memory_format=last)


def compile_networks(model: TextToImageModel, *, whole: bool) -> None:
    """Compile the predicting networks, or their repeated blocks, in place.

    The work is done at their first call.

    Raises:
        ValueError: if the model names no repeated blocks of a network.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    networks = model.networks()
    for network in (networks[role] for role in ("policy", "reference") if role in networks):
        parts = [network] if whole else repeated_blocks(network, model.repeated)
        if not parts:
            raise ValueError(
                f"training.compile = regional knows no repeated blocks of "
                f"{type(network).__name__}; use training.compile=full, or none"
            )
        for part in parts:
            # A width that differs between blocks must not be taken for one that varies.
            part.compile(dynamic=False)


def repeated_blocks(network: nn.Module, names: frozenset[str]) -> list[nn.Module]:
    """Return the modules of a network whose classes have these names."""
    return [module for module in network.modules() if type(module).__name__ in names]
