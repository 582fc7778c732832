"""What each family's network is called with, as shapes: tensors on the meta device."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.models.stable_diffusion_3 import T5_TOKENS

Shape = tuple[int, ...]


KINDS = (
    *("UNet2DConditionModel", "SD3Transformer2DModel"),
    *("FluxTransformer2DModel", "QwenImageTransformer2DModel"),
)


def conditioning_shapes(network: Any, read: Mapping[str, int]) -> dict[str, Shape]:
    """Return the shape of one prompt's states, by the names that the family gives them.

    Args:
        read: the tokens that each text encoder reads.

    Raises:
        ValueError: if the network is of an unknown class.
    """
    kind, settings = type(network).__name__, network.config
    if kind not in KINDS:
        raise ValueError(f"sfumato plan does not know a {kind}; it counts {', '.join(KINDS)}")
    tokens = read["text_encoder"]
    match kind:
        case "UNet2DConditionModel" if settings["addition_embed_type"] == "text_time":
            pooled = (
                settings["projection_class_embeddings_input_dim"]
                - 6 * settings["addition_time_embed_dim"]
            )
            states = (tokens, settings["cross_attention_dim"])
            return {"states": states, "pooled": (pooled,), "framing": (4,)}
        case "UNet2DConditionModel":
            return {"states": (tokens, settings["cross_attention_dim"])}
        case "SD3Transformer2DModel" | "FluxTransformer2DModel":
            # CLIP's tokens and then T5's, or places for them; Flux has CLIP's sum alone.
            flux = kind == "FluxTransformer2DModel"
            states = read["text_encoder_2"] if flux else tokens + T5_TOKENS
            return {
                "states": (states, settings["joint_attention_dim"]),
                "pooled": (settings["pooled_projection_dim"],),
            }
        case _:
            return {"states": (tokens, settings["joint_attention_dim"]), "mask": (tokens,)}


def predictor(
    network: Any, latent: Shape, conditioning: Mapping[str, Shape], rows: int
) -> Callable[[], Tensor]:
    """Return a call of the network on the meta device with a micro-batch of `rows`.

    Args:
        latent: (c, h, w) of one sample.
    """

    def some(*shape: int) -> Tensor:
        return torch.empty(rows, *shape, device="meta")

    channels, height, width = latent
    told = {name: some(*shape) for name, shape in conditioning.items()}
    match type(network).__name__:
        case "UNet2DConditionModel":
            added = None
            if "pooled" in told:
                added = {"text_embeds": told["pooled"], "time_ids": some(6)}
            return lambda: (
                network(some(*latent), some(), told["states"], added_cond_kwargs=added).sample
            )
        case "SD3Transformer2DModel":
            return lambda: network(some(*latent), told["states"], told["pooled"], some()).sample
        case "FluxTransformer2DModel":
            patches = height * width // 4
            return lambda: (
                network(
                    some(patches, 4 * channels),
                    encoder_hidden_states=told["states"],
                    pooled_projections=told["pooled"],
                    timestep=some(),
                    guidance=some() if network.config["guidance_embeds"] else None,
                    img_ids=torch.empty(patches, 3, device="meta"),
                    txt_ids=torch.empty(told["states"].shape[1], 3, device="meta"),
                ).sample
            )
        case _:
            return lambda: (
                network(
                    some(height * width // 4, 4 * channels),
                    encoder_hidden_states=told["states"],
                    encoder_hidden_states_mask=None,
                    timestep=some(),
                    img_shapes=[[(1, height // 2, width // 2)]] * rows,
                ).sample
            )
