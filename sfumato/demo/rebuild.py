"""The recipes that make the shipped demo models: autoencoder, text-image, base, preference reward.

Each stage writes one folder and is skipped where that folder is complete, so a stopped rebuild goes
on where it was. Two CPU cores need about the times that `STAGES` states.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.demo.world import (
    IMAGE_SIZE,
    PALETTE,
    PLACES,
    RADII,
    SHAPES,
    Scene,
    partial,
    random_scene,
    render,
)

TEXT_LENGTH = 20  # tokens; the longest caption of the world has 15


@dataclass(frozen=True)
class Progress:
    """Prints a line now and then, so that a long stage is seen to be alive."""

    stage: str
    steps: int
    started: float

    def show(self, step: int, **figures: float) -> None:
        if step % 50 == 0 or step == self.steps:
            seconds = time.monotonic() - self.started
            text = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
            print(f"{self.stage} {step}/{self.steps} {text} {seconds:.0f}s", flush=True)


def _steps(stage: str, steps: int) -> Iterator[tuple[int, Callable[..., None]]]:
    progress = Progress(stage, steps, time.monotonic())
    for step in range(1, steps + 1):
        yield step, lambda step=step, **figures: progress.show(step, **figures)


def _cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100):
    def factor(step: int) -> float:
        ramp = min(1.0, (step + 1) / warmup)
        return ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _scenes(rng: random.Random, count: int) -> list[Scene]:
    return [random_scene(rng) for _ in range(count)]


def prompt_of(scene: Scene, rng: random.Random) -> Scene:
    """Leave attributes open: half the captions are complete, the others keep each with p = 1/2."""
    return scene if rng.random() < 0.5 else partial(scene, rng)


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer that knows each word of the world as one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = {"a", "an", "on", "in", "at", "the", "background"}
    words |= {*SHAPES, *PALETTE, *RADII} | {word for place in PLACES for word in place.split()}
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    corpus = [*sorted(words), ",", *sorted(alphabet)]
    bpe.train_from_iterator([word for word in corpus for _ in range(3)], trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = {token: i for i, token in enumerate(sorted(state["vocab"], key=state["vocab"].get))}
    for char in sorted(alphabet):
        for token in (char, f"{char}</w>"):
            vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    # The two files that every CLIP release carries, for readers older than tokenizer.json.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_autoencoder(folder: Path, steps: int) -> None:
    """Train an AutoencoderKL, 3 x 64 x 64 to 4 x 16 x 16, by absolute and squared error.

    Pixels of the shape weigh nine times as much as the background: a small one covers 3 % of it.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    rng = random.Random("autoencoder")
    vae = AutoencoderKL(
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
    schedule = _cosine(optimizer, steps)
    for _, show in _steps("autoencoder", steps):
        images = render(_scenes(rng, 16), rng) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        background = images.flatten(2).median(dim=2).values[:, :, None, None]
        weight = 1 + 8 * ((images - background).abs().amax(1, keepdim=True) > 0.1)
        error = (decoded - images).abs()
        loss = (weight * (error + error.square())).sum() / (3 * weight.sum())
        loss = loss + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        show(loss=loss.item(), error=error.mean().item(), kl=posterior.kl().mean().item())
    with torch.no_grad():
        latents = vae.encode(render(_scenes(rng, 512), rng) * 2 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(folder)


def _clip_config():
    from transformers import CLIPConfig

    shared = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 96,
        "hidden_act": "gelu",
    }
    text = {**shared, "max_position_embeddings": TEXT_LENGTH, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**shared, "image_size": IMAGE_SIZE, "patch_size": 8}
    return lambda vocab: CLIPConfig(
        text_config={**text, "vocab_size": vocab}, vision_config=vision, projection_dim=96
    )


def train_text_image(folder: Path, tokenizer_folder: Path, steps: int) -> None:
    """Train a CLIPModel by CLIP's symmetric contrastive loss on pictures and complete captions."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    torch.manual_seed(1)
    rng = random.Random("text-image")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    clip = CLIPModel(_clip_config()(len(tokenizer)))
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = _cosine(optimizer, steps)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    for _, show in _steps("text-image", steps):
        scenes = _scenes(rng, 96)
        pixels = (render(scenes, rng) - mean) / std
        captions = [prompt_of(scene, rng).caption() for scene in scenes]
        tokens = tokenizer(
            captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
        )
        loss = clip(**tokens, pixel_values=pixels, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        clip.logit_scale.data.clamp_(max=math.log(100))
        show(loss=loss.item(), scale=clip.logit_scale.exp().item())
    clip.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _cached_latents(vae: nn.Module, scenes: list[Scene], rng: random.Random) -> Tensor:
    rows = []
    with torch.no_grad():
        for start in range(0, len(scenes), 256):
            images = render(scenes[start : start + 256], rng) * 2 - 1
            rows.append(vae.encode(images).latent_dist.parameters)
    return torch.cat(rows)


def train_base(folder: Path, parts: Path, steps: int, scenes: int = 24_000) -> None:
    """Train the UNet2DConditionModel on epsilon and write the whole StableDiffusionPipeline."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(2)
    rng = random.Random("base")
    vae = AutoencoderKL.from_pretrained(parts / "autoencoder")
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(parts / "text_image").eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
    )
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    pictures = _scenes(rng, scenes)
    moments = _cached_latents(vae, pictures, rng)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = _cosine(optimizer, steps)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    resume, first = parts / "base.partial.pt", 0
    if resume.exists():
        state = torch.load(resume, weights_only=False)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
    for step, show in _steps("base", steps):
        if step <= first:
            continue
        rng = random.Random(f"base {step}")
        torch.manual_seed(step)
        rows = [rng.randrange(scenes) for _ in range(64)]
        captions = [
            "" if rng.random() < 0.1 else prompt_of(pictures[i], rng).caption() for i in rows
        ]
        tokens = tokenizer(
            captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
        )
        with torch.no_grad():
            states = text_encoder(tokens.input_ids).last_hidden_state
        latents = DiagonalGaussianDistribution(moments[rows]).sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (len(rows),))
        noisy = scheduler.add_noise(latents, noise, t)
        loss = F.mse_loss(unet(noisy, t, states).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(unet.parameters())
        show(loss=loss.item())
        if step % 500 == 0:
            state = {
                "unet": unet.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "ema": ema.state_dict(),
                "step": step,
            }
            torch.save(state, resume.with_suffix(".tmp"))
            resume.with_suffix(".tmp").replace(resume)
    ema.copy_to(unet.parameters())
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
