"""The demo's autoencoder: 3 x 64 x 64 pixels to 4 x 16 x 16 latents."""

import random
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.demo.steps import Update, counted, draw_scenes
from sfumato.demo.world import IMAGE_SIZE, render


def _reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Return absolute plus squared error; pixels of the shape weigh nine times the background.

    A small shape covers 3 % of a picture, and would else be learned last.
    """
    background = images.flatten(2).median(dim=2).values[:, :, None, None]
    weight = 1 + 8 * ((images - background).abs().amax(1, keepdim=True) > 0.1)
    error = (decoded - images).abs()
    return (weight * (error + error.square())).sum() / (3 * weight.sum())


def train_autoencoder(folder: Path, parts: Path, steps: int) -> None:
    """Train an AutoencoderKL, 3 x 64 x 64 to 4 x 16 x 16; the first stage, `parts` is unused."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    rng = random.Random("autoencoder")
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
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.0)
    update = Update(optimizer, steps=steps)
    for _, show in counted("autoencoder", steps):
        images = render(draw_scenes(rng, 16), rng) * 2 - 1
        posterior = vae.encode(images).latent_dist
        loss = _reconstruction_loss(vae.decode(posterior.sample()).sample, images)
        loss = loss + 1e-6 * posterior.kl().mean()
        update(loss)
        show(loss=loss.item())
    with torch.no_grad():
        latents = vae.encode(render(draw_scenes(rng, 512), rng) * 2 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(folder)


def train_decoder(folder: Path, parts: Path, steps: int) -> None:
    """Sharpen the decoder alone: the latents, and what is trained on them, stay as they are."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(4)
    rng = random.Random("decoder")
    vae: Any = AutoencoderKL.from_pretrained(parts / "autoencoder")
    vae.to(memory_format=torch.channels_last)
    trained = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    update = Update(optimizer, steps=steps)
    for _, show in counted("decoder", steps):
        images = render(draw_scenes(rng, 16), rng) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample()
        loss = _reconstruction_loss(vae.decode(latents).sample, images)
        update(loss)
        show(loss=loss.item())
    vae.save_pretrained(folder)
