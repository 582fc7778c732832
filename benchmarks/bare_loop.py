"""DRaFT+ as one writes it by hand with torch, diffusers and peft: what Sfumato is measured against.

It shares no code with Sfumato, and does the same arithmetic: DDIM without gradient but in the last
step (K = 1), classifier-free guidance, the reward's gradient through the decoder, the KL term
against the frozen network (its difference in float32), AdamW, EMA.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from bare_rewards import load_clip, redness
from torch import Tensor
from torch.func import functional_call

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


@dataclass(frozen=True)
class BareSettings:
    """What the loop needs to know."""

    pipeline: Path
    reward: Callable[[Tensor, list[str]], Tensor] | Path | None  # a CLIP folder; None is redness
    device: torch.device
    dtype: torch.dtype  # of frozen weights, and of autocast if it is not float32
    full: bool  # all weights; else LoRA
    rank: int
    gradient_checkpointing: bool
    num_inference_steps: int
    guidance_scale: float
    kl_coeff: float
    lr: float
    max_grad_norm: float
    ema_decay: float


class Update:
    """AdamW with clipped gradients, and the moving average of what is trained."""

    def __init__(self, network: Any, lr: float, max_grad_norm: float, ema_decay: float) -> None:
        self.trained: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0, fused=True)
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.shadow = [parameter.detach().clone() for parameter in self.trained]
        self.updates = 0

    def step(self, loss: Tensor) -> float:
        """Take one optimiser step; return the loss."""
        loss.backward()
        self.apply()
        return loss.item()

    def apply(self) -> None:
        """Take the step of the gradients that are there."""
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.shadow, self.trained, 1 - decay)  # pyright: ignore


def add_lora(network: Any, rank: int, layers: list[str]) -> None:
    """Add adapters, in float32, to the layers whose names end so."""
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def without_tf32() -> Iterator[None]:
    """Take products of float32 with all their bits."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class BareLoop:
    """The networks, the optimiser, and a step."""

    dtypes: ClassVar[Mapping[str, torch.dtype]] = MappingProxyType({})  # of parts that differ

    def __init__(self, settings: BareSettings) -> None:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        self.settings = settings
        trained = torch.float32 if settings.full else settings.dtype
        pipeline: Any = DiffusionPipeline.from_pretrained(
            settings.pipeline,
            dtype={"default": settings.dtype, "unet": trained, **self.dtypes},
            local_files_only=True,
        )
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False).to(settings.device)
        if settings.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
            pipeline.vae.enable_gradient_checkpointing()
        self.parts, self.vae, self.unet = pipeline, pipeline.vae, pipeline.unet
        self.reference: Any = None
        if settings.full:
            self.reference = copy.deepcopy(self.unet).to(settings.device)
            self.unet.requires_grad_(True)
        else:
            add_lora(self.unet, settings.rank, LAYERS)
        self.unet.to(settings.device)
        self.update = Update(self.unet, settings.lr, settings.max_grad_norm, settings.ema_decay)
        pipeline.scheduler.set_timesteps(settings.num_inference_steps)
        self.timesteps: Tensor = pipeline.scheduler.timesteps.to(settings.device)
        self.predicts_v = pipeline.scheduler.config.prediction_type == "v_prediction"
        indices = pipeline.scheduler.timesteps.tolist()
        self.alphas = [pipeline.scheduler.alphas_cumprod[i].item() for i in [*indices, 0]]
        self.uncond = self._encode([""])
        reward = settings.reward
        if isinstance(reward, Path):
            reward = load_clip(reward).to(settings.device, settings.dtype)
        self.reward = reward or redness

    def draws(self, shape: tuple[int, ...]) -> Any:
        """Return the random numbers of a step: what sampling starts from."""
        return torch.randn(shape).to(self.settings.device)

    def step(self, prompts: list[str], draws: Any) -> float:
        """Take one optimiser step on a batch; return the loss."""
        with self._autocast():
            loss = self.loss(prompts, draws)
        return self.update.step(loss)

    def loss(self, prompts: list[str], noise: Tensor) -> Tensor:
        """Return -reward + kl_coeff kl of a batch; `noise` is what sampling starts from."""
        cond, last = self._condition(prompts), len(self.timesteps) - 1
        x = self._roll_out(noise, cond)[-1]
        x0, noise = self._predict(self.unet, x, last, cond)
        reward = self.reward(self._decode(x0), prompts).mean()
        return -reward + self.settings.kl_coeff * self._kl(noise, x, last, cond)

    @torch.no_grad()
    def _roll_out(self, x: Tensor, cond: dict[str, Tensor]) -> list[Tensor]:
        """Return the states that the network sees, from noise to the last step."""
        states = [x]
        for i in range(len(self.timesteps) - 1):
            x0, noise = self._predict(self.unet, states[-1], i, cond)
            after = self.alphas[i + 1]
            states.append(after**0.5 * x0 + (1 - after) ** 0.5 * noise)
        return states

    def _decode(self, x0: Tensor) -> Tensor:
        """Return images in [0, 1]; an autoencoder in float32 computes in float32."""
        latents = (x0 / self.vae.config.scaling_factor).to(self.vae.dtype)
        with self._autocast(self.vae.dtype):
            return ((self.vae.decode(latents).sample.float() + 1) / 2).clamp(0, 1)

    def _kl(self, noise: Tensor, x: Tensor, i: int, cond: dict[str, Tensor]) -> Tensor:
        """Return the mean square distance of a prediction from the reference's.

        In half precision its value is that of float32, and its gradient goes through `noise`.
        """
        if self.settings.dtype == torch.float32:
            return (noise - self._predict_reference(x, i, cond)[1]).square().mean()
        with torch.no_grad(), self._autocast(torch.float32), without_tf32():
            cond = {name: rows.float() for name, rows in cond.items()}
            policy = self._predict(self.unet, x, i, cond, exact=True)[1]
            difference = policy - self._predict_reference(x, i, cond, exact=True)[1]
        return (difference.square() + 2 * difference * (noise - noise.detach())).mean()

    def _autocast(self, dtype: torch.dtype | None = None) -> torch.autocast:
        half = dtype or self.settings.dtype
        return torch.autocast(self.settings.device.type, dtype=half, enabled=half != torch.float32)

    def _condition(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return rows for the empty prompt, then for the prompts, by the network's inputs."""
        given = self._encode(prompts)
        return {n: torch.cat([self.uncond[n].expand_as(rows), rows]) for n, rows in given.items()}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        tokens = self._tokens(self.parts.tokenizer, prompts)
        return {"encoder_hidden_states": self.parts.text_encoder(tokens)[0]}

    def _tokens(self, tokenizer: Any, prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.settings.device)

    def _inputs(self, x: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Return the network's inputs beside x_t and t."""
        return cond

    def _predict(
        self, unet: Any, x: Tensor, i: int, cond: dict[str, Tensor], *, exact: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return x0 and noise; `exact` takes the weights in float32."""
        rows, t = torch.cat([x, x]), self.timesteps[i]
        inputs = self._inputs(x, cond)
        if exact:
            weights = {name: parameter.float() for name, parameter in unet.named_parameters()}
            raw = functional_call(unet, weights, (rows, t), inputs).sample
        else:
            raw = unet(rows.to(self.settings.dtype), t, **inputs).sample.float()
        without, given = raw.chunk(2)
        raw = without + self.settings.guidance_scale * (given - without)
        alpha, sigma = self.alphas[i] ** 0.5, (1 - self.alphas[i]) ** 0.5
        if self.predicts_v:
            return alpha * x - sigma * raw, sigma * x + alpha * raw
        return (x - sigma * raw) / alpha, raw

    @torch.no_grad()
    def _predict_reference(
        self, x: Tensor, i: int, cond: dict[str, Tensor], *, exact: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.reference is not None:
            return self._predict(self.reference, x, i, cond, exact=exact)
        self.unet.disable_adapters()
        predicted = self._predict(self.unet, x, i, cond, exact=exact)
        self.unet.enable_adapters()
        return predicted
