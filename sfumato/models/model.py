"""Contract of a text-to-image model: all that training, sampling and exports know of one."""

import abc
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from sfumato.config import SamplerConfig
from sfumato.diffusion.guidance import CfgGradient
from sfumato.diffusion.process import DiffusionProcess, PredictionType
from sfumato.diffusion.sampling import Denoiser
from sfumato.models.limits import check_spacing
from sfumato.models.scheduled import Scheduled

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Role: TypeAlias = Literal["policy", "reference"]
Images: TypeAlias = Float[Tensor, "b 3 H W"]
Latents: TypeAlias = Float[Tensor, "b c h w"]
Moments: TypeAlias = Float[Tensor, "b m h w"]  # mean and log-variance of an autoencoder, m = 2 c


@dataclass(frozen=True)
class Framing:
    """Crop of a training image, which SDXL reads beside the prompt."""

    original: tuple[int, int]  # height and width of the stored picture, in pixels
    crop: tuple[int, int]  # top and left of the crop in the resized picture


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: named tensors with one row per prompt. The family chooses the names."""

    tensors: Mapping[str, Shaped[Tensor, "b ..."]]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, start: int, stop: int) -> "Conditioning":
        """Return rows start to stop - 1."""
        return Conditioning({name: tensor[start:stop] for name, tensor in self.tensors.items()})

    def framed(self, framing: Sequence[Framing]) -> "Conditioning":
        """Fill the tensor `framing` (b, 4), if there is one: original height, width, crop y, x."""
        if "framing" not in self.tensors:
            return self
        assert len(framing) == len(self), f"{len(self)} prompts have {len(framing)} framings"
        numbers = torch.tensor([(*each.original, *each.crop) for each in framing]).float()
        return Conditioning({**self.tensors, "framing": numbers.to(self.tensors["framing"].device)})

    def repeat(self, times: int) -> "Conditioning":
        """Return the whole batch stacked `times` times, one after another."""
        return Conditioning(
            {n: t.repeat(times, *(1,) * (t.ndim - 1)) for n, t in self.tensors.items()}
        )

    @staticmethod
    def stack(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Join the rows of all parts; shorter token sequences and their masks are zero-padded."""
        names = parts[0].tensors
        return Conditioning({name: _join([part.tensors[name] for part in parts]) for name in names})


def _join(tensors: Sequence[Shaped[Tensor, "_ ..."]]) -> Shaped[Tensor, "b ..."]:
    if tensors[0].ndim > 1:
        length = max(tensor.shape[1] for tensor in tensors)
        ends = [(0, 0) * (t.ndim - 2) + (0, length - t.shape[1]) for t in tensors]
        tensors = [nn.functional.pad(t, end) for t, end in zip(tensors, ends, strict=True)]
    return torch.cat(list(tensors))


class TextToImageModel(abc.ABC):
    """A diffusion model with its text encoders and autoencoder; latents are (b, c, h, w).

    Attributes:
        process: alpha and sigma of t in [0, 1].
        prediction_type: what the network predicts, and supervised training regresses.
        trained: holds every parameter that is trained (with its adapters, under LoRA).
        trains_text: whether a text encoder is trained, so that each role encodes its own prompts.
        has_reference: whether the frozen self is kept; without it no role may ask for it.
        has_cfg: True if guidance is classifier-free (two predictions); False if the network takes
            the scale as an input, or has no guidance.
        repeated: class names of the blocks that the network repeats, which
            `training.compile=regional` compiles one by one.
    """

    process: DiffusionProcess
    prediction_type: PredictionType
    trained: nn.Module
    trains_text: bool
    has_cfg: bool
    has_reference: bool = True
    repeated: frozenset[str] = frozenset()
    _kept: OrderedDict[tuple[str, torch.device, bool], Conditioning] | None = None

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where networks and latents live."""

    @abc.abstractmethod
    def to(self, device: torch.device) -> None:
        """Move every network, in place."""

    @abc.abstractmethod
    def networks(self) -> Mapping[str, nn.Module]:
        """Return the networks by name.

        `policy` predicts; `reference` is its frozen copy, if one is kept. The other names, such as
        `vae`, are free: these networks encode and decode.
        """

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

    def spaced_times(
        self, steps: int, height: int, width: int, spacing: str | None
    ) -> Sequence[float]:
        """Return `times`, or those of another spacing of a table: leading, trailing.

        Raises:
            ValueError: if the model has no table of steps.
        """
        check_spacing(spacing)
        return self.times(steps, height, width)

    def scheduled(self, name: str, steps: int, height: int, width: int) -> Scheduled:
        """Return the steps of a sampling run by a scheduler class of diffusers.

        Raises:
            ValueError: if the model is none of diffusers', or the class does not fit.
        """
        raise ValueError(
            f"sampler.scheduler={name} steps models of diffusers' pipelines, and "
            f"{type(self).__name__} is none; leave it out"
        )

    @abc.abstractmethod
    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        role: Role = "policy",
        framing: Sequence[Framing] | None = None,
    ) -> Conditioning:
        """Encode prompts; with a gradient only if the policy's text encoders are trained.

        Args:
            framing: of each training image, for families that learn from it.
        """

    def encode_alone(self, prompts: Sequence[str], keep: int) -> Conditioning:
        """Encode prompts one by one, and keep the states of the `keep` that were used last.

        A state depends on nothing but its prompt: neither on the prompts beside it, as in a batch,
        nor on those before it. So a resumed run, which has kept none, goes on bitwise.

        Raises:
            ValueError: if a text encoder is trained, so that states change.
        """
        if self.trains_text:
            raise ValueError(
                f"sampler.prompt_cache={keep} keeps the states of a frozen text encoder, and this "
                "model trains it; set sampler.prompt_cache=0"
            )
        kept = self._kept = self._kept or OrderedDict()
        found: list[Conditioning] = []
        for prompt in prompts:
            key = prompt, self.device, torch.is_autocast_enabled(self.device.type)
            if key not in kept:
                kept[key] = self.encode_prompts([prompt])
            kept.move_to_end(key)
            found.append(kept[key])
            while len(kept) > keep:
                kept.popitem(last=False)
        return Conditioning.stack(found)

    def encode_images(self, images: Images, noise: Latents | None = None) -> Latents:
        """Encode images in [-1, 1] to latents, float32.

        Args:
            noise: standard normal, for a draw from the autoencoder's posterior; None is its mean.
        """
        return self.draw_latents(self.encode_moments(images), noise)

    @abc.abstractmethod
    def encode_moments(self, images: Images) -> Moments:
        """Encode images in [-1, 1] to the input of `draw_latents`, float32.

        An autoencoder with a posterior gives its mean and log-variance, m = 2 c.
        """

    @abc.abstractmethod
    def draw_latents(self, moments: Moments, noise: Latents | None) -> Latents:
        """Return latents in the network's normalisation, float32; without noise, the mean."""

    @abc.abstractmethod
    def decode(self, latents: Latents) -> Images:
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
            guidance_scale: of classifier-free guidance, or an input of the network (`has_cfg`).
        """

    def rolling_out(self) -> AbstractContextManager[object]:
        """Return a context for predictions of the policy without a gradient; it may be faster."""
        return nullcontext()

    def playing(self, role: Role) -> AbstractContextManager[object]:
        """Return a context in which the network keeps a role, also in a backward.

        Inside, the reference records a graph of x_t, which adjoint matching needs.

        Raises:
            ValueError: if the model cannot do so.
        """
        raise ValueError(
            f"{type(self).__name__} gives no gradient of its reference; override `playing`, or use "
            "another objective (objective=direct)"
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by their names in `trained`."""
        return {n: p for n, p in self.trained.named_parameters() if p.requires_grad}

    @abc.abstractmethod
    def shards(self) -> Sequence[nn.Module]:
        """Return the modules that FSDP shards one by one: blocks first, then whole networks."""

    @abc.abstractmethod
    def save_pipeline(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the policy as a diffusers folder, adapters merged, the network in `dtype`."""

    @abc.abstractmethod
    def save_adapter(self, folder: Path) -> None:
        """Write the adapter for diffusers' `load_lora_weights`.

        Raises:
            ValueError: if the model has no adapter.
        """

    @abc.abstractmethod
    def image_elsewhere(
        self, exported: Path, name: str, prompt: str, noise: Latents, sampler: SamplerConfig
    ) -> Images:
        """Let another program load an export from its files, and return the image that it makes.

        Args:
            exported: holds `pipeline`, written by `save_pipeline`, and `lora`, by `save_adapter`.
            name: `pipeline` or `lora`.
            noise: the starting noise of one image.
        """
