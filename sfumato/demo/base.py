"""The demo's base model: a UNet2DConditionModel in a whole StableDiffusionPipeline.

The text encoder is trained with the network, as latent diffusion's first text encoder was (arXiv
2112.10752): a contrastive loss alone hardly needs shapes and places, and leaves these words too
alike to be read. The network reads its text twice, as DeepFloyd IF does: token by token in cross
attention, and pooled beside the time step, which reaches every layer.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.demo.steps import Update, counted, draw_scenes, muon_and_adamw, prompt_of
from sfumato.demo.text_image import build_clip
from sfumato.demo.tokenizer import tokenize
from sfumato.demo.world import IMAGE_SIZE, Scene, render

NUM_SCENES = 12_000
BATCH = 48
LAYOUT_STEPS = 400  # first, from pure noise and complete captions alone: what goes where
NOISY = 0.1  # then half of each batch at t = u^0.1: a picture is laid out near pure noise
CAPTION_DROPOUT = 0.1  # by the empty prompt, as guidance uses it


def noise_schedule() -> Any:
    """Return Stable Diffusion's schedule, rescaled to end in pure noise (arXiv 2305.08891).

    Unscaled, its last step keeps 7 % of the picture. That is enough to see the background and the
    place of the shape in 256 latent pixels, so the network would read both off the noise, and not
    off the prompt; and epsilon would hardly weigh the error.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def build_unet() -> Any:
    """Return the untrained network, 5.3 M parameters."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


@torch.no_grad()
def encode_scenes(vae: Any, pictures: Sequence[Scene], rng: random.Random) -> Tensor:
    """Return the autoencoder's moments (mean and log variance) of each picture."""
    rows = []
    for start in range(0, len(pictures), 256):
        images = render(pictures[start : start + 256], rng) * 2 - 1
        rows.append(vae.encode(images).latent_dist.parameters)
    return torch.cat(rows)


def train_base(folder: Path, parts: Path, steps: int) -> None:
    """Train network and text encoder on v, into folder/unet and folder/text_encoder.

    Every 250 steps all is saved, and a second call goes on from there.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(2)
    vae: Any = AutoencoderKL.from_pretrained(parts / "autoencoder")
    text_encoder: Any = CLIPTextModel(
        build_clip(len(CLIPTokenizer.from_pretrained(parts / "tokenizer"))).config.text_config
    )
    scheduler, unet = noise_schedule(), build_unet()
    rng = random.Random("base")
    pictures = draw_scenes(rng, NUM_SCENES)
    moments = encode_scenes(vae, pictures, rng)
    trained = [*unet.parameters(), *text_encoder.parameters()]
    update = Update(*muon_and_adamw([unet, text_encoder], lr=1e-3), steps=steps)
    ema = EMAModel(trained, decay=0.999, use_ema_warmup=True, power=0.75)
    saved = parts / "base.partial.pt"
    stateful = {"unet": unet, "text_encoder": text_encoder, "update": update, "ema": ema}
    first = restore(saved, stateful)
    for step, show in counted("base", steps, first):
        rng = random.Random(f"base {step}")
        torch.manual_seed(step)
        rows = [rng.randrange(NUM_SCENES) for _ in range(BATCH)]
        layout = step <= LAYOUT_STEPS
        asked = [pictures[i] if layout else prompt_of(pictures[i], rng) for i in rows]
        captions = ["" if rng.random() < CAPTION_DROPOUT else one.caption() for one in asked]
        states = text_encoder(tokenize(parts, captions)["input_ids"]).last_hidden_state
        latents = DiagonalGaussianDistribution(moments[rows]).sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = draw_times(layout)
        predicted = unet(scheduler.add_noise(latents, noise, t), t, states).sample
        loss = F.mse_loss(predicted, scheduler.get_velocity(latents, noise, t))
        update(loss)
        ema.step(trained)
        show(loss=loss.item())
        if step % 250 == 0:
            state = {name: part.state_dict() for name, part in stateful.items()}
            torch.save({"step": step, **state}, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").replace(saved)
    ema.copy_to(trained)
    unet.save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder")


def draw_times(layout: bool) -> Tensor:
    """Return the training steps of a batch, 0 to 999; shape (BATCH,)."""
    t = torch.rand(BATCH)
    t[: BATCH // 2] **= NOISY
    return torch.full((BATCH,), 999) if layout else (1000 * t).long().clamp(max=999)


def restore(saved: Path, stateful: dict[str, Any]) -> int:
    """Take up what an interrupted call saved; return the steps it had taken."""
    if not saved.exists():
        return 0
    state = torch.load(saved, weights_only=True)
    for name, part in stateful.items():
        part.load_state_dict(state[name])
    return state["step"]


def assemble(folder: Path, parts: Path) -> None:
    """Write the StableDiffusionPipeline of the trained parts."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    text_encoder: nn.Module = CLIPTextModel.from_pretrained(parts / "base" / "text_encoder")
    pipeline: Any = StableDiffusionPipeline
    pipeline(
        vae=AutoencoderKL.from_pretrained(parts / "decoder"),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(parts / "base" / "unet"),
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    # transformers 4 looks for these names, and goes on with random weights without them.
    state = {f"text_model.{name}": value for name, value in text_encoder.state_dict().items()}
    save_file(state, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
