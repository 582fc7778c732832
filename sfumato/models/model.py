"""What a text-to-image model is to the rest of the system."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.diffusion.guidance import CfgGradient
from sfumato.diffusion.process import DiffusionProcess
from sfumato.diffusion.sampling import Denoiser

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Role: TypeAlias = Literal["policy", "reference"]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, one per row, by the names that the family gives them."""

    tensors: Mapping[str, Float[Tensor, "b ..."]]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, start: int, stop: int) -> "Conditioning":
        """Return rows start to stop - 1."""
        return Conditioning({name: tensor[start:stop] for name, tensor in self.tensors.items()})

    def repeat(self, times: int) -> "Conditioning":
        """Return the whole batch stacked `times` times, one after another."""
        return Conditioning(
            {n: t.repeat(times, *(1,) * (t.ndim - 1)) for n, t in self.tensors.items()}
        )

    @staticmethod
    def stack(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Return the rows of all parts, one after another."""
        return Conditioning(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )


class TextToImageModel(abc.ABC):
    """A network, its text encoders, its autoencoder and its process, behind (b, c, h, w) and t.

    Attributes:
        process: alpha and sigma of t in [0, 1].
        network: what is trained (with its adapters, under LoRA).
    """

    process: DiffusionProcess
    network: nn.Module

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where networks and latents live."""

    @abc.abstractmethod
    def to(self, device: torch.device) -> None:
        """Move every network."""

    @abc.abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Return the height and width in pixels that the network was trained for."""

    @abc.abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (c, h, w) of the latents of an image.

        Raises:
            ValueError: if the model cannot divide the size.
        """

    @abc.abstractmethod
    def times(self, num_inference_steps: int, height: int, width: int) -> Sequence[float]:
        """Return the T + 1 times of a sampling run, from noise to data."""

    @abc.abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the frozen text encoders."""

    @abc.abstractmethod
    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Encode images in [-1, 1] to latents: the mean of the autoencoder's posterior."""

    @abc.abstractmethod
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Decode latents to images in [0, 1], differentiable and not clamped, float32."""

    @abc.abstractmethod
    def denoiser(
        self,
        cond: Conditioning,
        *,
        uncond: Conditioning | None = None,
        guidance_scale: float = 1.0,
        role: Role = "policy",
        cfg_gradient: CfgGradient = "full",
    ) -> Denoiser:
        """Return the denoiser of these prompts, guided if `uncond` is given and the scale above 1.

        Args:
            role: `policy` is what is trained; `reference` its frozen self, under no_grad.
        """

    @abc.abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by their names in `network`."""

    @abc.abstractmethod
    def shards(self) -> Sequence[nn.Module]:
        """Return the modules to shard one by one under FSDP, inner ones first."""

    @abc.abstractmethod
    def save_pipeline(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the policy, adapters merged, as a diffusers folder; the network in `dtype`."""

    @abc.abstractmethod
    def open_elsewhere(self, exported: Path, name: str) -> Any:
        """Return the diffusers pipeline of an export, built from files alone.

        Args:
            name: `pipeline` or `lora`.
            exported: holds `pipeline`, what `save_pipeline` wrote, and `lora`, likewise.
        """

    @abc.abstractmethod
    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as diffusers' `load_lora_weights` takes it.

        Raises:
            ValueError: if there is no adapter.
        """
