"""Autoencoder of the demo: 3 x 64 x 64 pixels to 4 x 16 x 16 latents."""

import random
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.demo.steps import Update, counted, draw_scenes
from sfumato.demo.world import IMAGE_SIZE, render


def _reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Return absolute plus squared error; pixels of the shape weigh nine times the background.

    A small shape covers 3 % of a picture, and would otherwise be learned last.
    """
    background = images.flatten(2).median(dim=2).values[:, :, None, None]
    weight = 1 + 8 * ((images - background).abs().amax(1, keepdim=True) > 0.1)
    error = (decoded - images).abs()
    return (weight * (error + error.square())).sum() / (3 * weight.sum())


def _train(stage: str, vae: Any, lr: float, steps: int, *, encoder: bool) -> random.Random:
    """Train the autoencoder, or its decoder only; return the stream of its scenes."""
    rng = random.Random(stage)
    parts = [vae] if encoder else [vae.post_quant_conv, vae.decoder]
    trained = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    update = Update(optimizer, steps=steps)
    for show in counted(stage, steps):
        images = render(draw_scenes(rng, 16), rng) * 2 - 1
        with torch.set_grad_enabled(encoder):
            posterior = vae.encode(images).latent_dist
            latents = posterior.sample()
        loss = _reconstruction_loss(vae.decode(latents).sample, images)
        if encoder:
            loss = loss + 1e-6 * posterior.kl().mean()
        update(loss)
        show(loss=loss.item())
    return rng


def train_autoencoder(folder: Path, parts: Path, steps: int) -> None:
    """Train an AutoencoderKL, 3 x 64 x 64 to 4 x 16 x 16; the first stage, `parts` is unused."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    vae = cast(Any, AutoencoderKL)(
        sample_size=IMAGE_SIZE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    rng = _train("autoencoder", vae, 1.5e-3, steps, encoder=True)
    with torch.no_grad():
        latents = vae.encode(render(draw_scenes(rng, 512), rng) * 2 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(folder)


def train_decoder(folder: Path, parts: Path, steps: int) -> None:
    """Sharpen the decoder only: the latents, and the models trained on them, stay valid."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(4)
    vae: Any = AutoencoderKL.from_pretrained(parts / "autoencoder")
    vae.to(memory_format=torch.channels_last)
    _train("decoder", vae, 1e-3, steps, encoder=False)
    vae.save_pretrained(folder)
