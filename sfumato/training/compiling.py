"""How networks lie in memory and run: channels last, and compiled, block by block or whole."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from sfumato.config import TrainConfig
from sfumato.models.model import TextToImageModel
from sfumato.models.pipeline_model import PipelineModel
from sfumato.training.sharding import check_sharding

# Classes of diffusers that a network has many of, each compiled once for all of one shape.
REPEATED = frozenset(
    {
        "BasicTransformerBlock",
        "ResnetBlock2D",
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "QwenImageTransformerBlock",
    }
)
# Widths and image sizes, times training or not, gradients or not, adapters on or off.
VARIANTS = 128


def arrange(model: TextToImageModel, config: TrainConfig, world: int) -> None:
    """Lay out and compile a model's networks as configured, before they are sharded.

    Neither changes the names of weights, nor what is written.

    Raises:
        ValueError: if that cannot be done to this model or in this strategy.
    """
    check_sharding(config, world)
    if config.model.channels_last:
        for network in (*predictors(model), *autoencoders(model)):
            lay_channels_last(network)
    match config.training.compile:
        case "regional":
            compile_networks(model, "regional")
        case "full":
            compile_networks(model, "full")
        case _:
            pass


def predictors(model: TextToImageModel) -> Sequence[nn.Module]:
    """Return the network that predicts, and its frozen copy where there is one."""
    return model.roles.networks() if isinstance(model, PipelineModel) else (model.trained,)


def autoencoders(model: TextToImageModel) -> Sequence[nn.Module]:
    return (model.pipeline.vae,) if isinstance(model, PipelineModel) else ()


@torch.no_grad()
def lay_channels_last(network: nn.Module) -> None:
    """Put the weights of two-dimensional convolutions in the order that tensor cores read."""
    for parameter in network.parameters():
        # Of 1 x 1 kernels both orders are the same; other strides would only mislead optimisers.
        last = torch.channels_last
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=last):
            parameter.data = parameter.data.contiguous(memory_format=last)


def compile_networks(model: TextToImageModel, how: Literal["regional", "full"]) -> None:
    """Compile what predicts, in place, at its first call.

    Raises:
        ValueError: if a network has no blocks that are known to repeat.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for network in predictors(model):
        parts = [network] if how == "full" else list(repeated_blocks(network))
        if not parts:
            raise ValueError(
                f"training.compile = regional knows no repeated blocks of "
                f"{type(network).__name__}; use training.compile=full, or none"
            )
        for part in parts:
            # A width that differs between blocks must not be taken for one that varies.
            part.compile(dynamic=False)


def repeated_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks that a network repeats."""
    yield from (module for module in network.modules() if type(module).__name__ in REPEATED)
