"""An AutoencoderKL whose weights are trained, and its folder for diffusers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.files import read_object
from sfumato.models.autoencoder_kl import downsampling, moments_kl, posterior
from sfumato.models.formats import find_model
from sfumato.weights import load_whole

KEY = "objective.start"


@final
class LearningAutoencoder:
    """Encoder and decoder, or the decoder alone, are trained in float32.

    Attributes:
        trained: holds the parameters; its forward is `reconstruct`.
    """

    def __init__(self, vae: Any, *, decoder_only: bool = False) -> None:
        self.vae = vae.train()
        vae.requires_grad_(not decoder_only)
        if decoder_only:
            for part in (vae.decoder, vae.post_quant_conv):
                part.requires_grad_(True)
        self.trained: nn.Module = _Reconstruction(vae, decoder_only=decoder_only)

    @property
    def device(self) -> torch.device:
        return next(self.trained.parameters()).device

    def to(self, device: torch.device) -> None:
        """Move the network, in place."""
        self.trained.to(device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by their names in `trained`."""
        named = self.trained.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def shards(self) -> Sequence[nn.Module]:
        """Return the modules that FSDP shards one by one: blocks first, then what calls them."""
        return [*self.vae.encoder.down_blocks, *self.vae.decoder.up_blocks, self.trained]

    def reconstruct(
        self,
        images: Float[Tensor, "b 3 h w"],
        noise: Float[Tensor, "b c y x"] | None,
        error: Float[Tensor, "b c y x"] | None = None,
    ) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b m y x"]]:
        """Encode and decode images in [-1, 1].

        Args:
            noise: standard normal, for a draw of the latents; None is their mean.
            error: what is added to the latents, which have a deviation of about 1 here.

        Returns:
            The images that come back, float32, and the moments of their latents.
        """
        return self.trained(images, noise, error)

    def latent_shape(self, images: Float[Tensor, "b 3 h w"]) -> tuple[int, int, int]:
        """Return channels, height and width of the latents of images."""
        factor = downsampling(self.vae.config)
        height, width = images.shape[-2:]
        return self.vae.config.latent_channels, height // factor, width // factor

    def save(self, folder: Path, latents: Float[Tensor, "n c y x"]) -> None:
        """Write the folder that diffusers loads; its scaling gives `latents` a deviation of 1.

        The scaling of an encoder that was not trained stays, as models were trained on it.
        """
        if next(self.vae.encoder.parameters()).requires_grad:
            self.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        self.vae.save_pretrained(folder)


@final
class _Reconstruction(nn.Module):
    """Encoder and decoder as one forward: FSDP gathers weights around it."""

    def __init__(self, vae: Any, *, decoder_only: bool) -> None:
        super().__init__()
        self.vae, self.decoder_only = vae, decoder_only

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        noise: Float[Tensor, "b c y x"] | None,
        error: Float[Tensor, "b c y x"] | None,
    ) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b m y x"]]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            moments = moments_kl(self.vae, images)
            latents = posterior(moments, noise)
            if error is not None:
                latents = latents + error / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample.float(), moments


def load_autoencoder(start: str) -> Any:
    """Return the AutoencoderKL that training starts from, in float32.

    Args:
        start: a config.json, to begin at random by torch's global seed; or a folder or hub id of an
            autoencoder, or of a pipeline that has one.

    Raises:
        ValueError: if it is missing, or of another class.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    kind: Any = AutoencoderKL
    file = Path(start).expanduser()
    if file.suffix == ".json":
        settings = read_object(file, f"give the config.json of an AutoencoderKL as {KEY}")
        _check_class(settings, file)
        return kind.from_config(settings)
    folder = find_model(start, setting=KEY)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    file = folder / "config.json"
    _check_class(read_object(file, f"give the folder of an AutoencoderKL as {KEY}"), file)
    return load_whole(kind, folder, f"the autoencoder of {KEY}", use_safetensors=True)


def _check_class(settings: dict[str, Any], file: Path) -> None:
    found = settings.get("_class_name")
    if found != "AutoencoderKL":
        raise ValueError(
            f"{KEY}: {file} is of {found or 'no class'}; give an AutoencoderKL, whose config.json "
            "has _class_name"
        )
