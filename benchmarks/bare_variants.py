"""Two more loops by hand, beside DRaFT+'s: sparse direct gradients, and Stable Diffusion XL.

Sparse: a rollout without gradient, the reward's gradient g at x0, then for each active step the
gradient of <g, w n> + kl_coeff kl alone, with w = -sigma.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from bare_loop import BareLoop
from torch import Tensor

ACTIVE = 4  # steps with a gradient


class BareSparse(BareLoop):
    """Direct gradients in a few steps; more of them near the image."""

    def draws(self, shape: tuple[int, ...]) -> tuple[Tensor, list[int]]:
        """Return what sampling starts from, and the active steps: i has probability i + 1."""
        steps = len(self.timesteps)
        chosen = torch.multinomial(torch.arange(1.0, steps + 1), min(ACTIVE, steps))
        return super().draws(shape), chosen.tolist()

    def step(self, prompts: list[str], draws: Any) -> float:
        start, active = draws
        assert not self.predicts_v, "the weights are those of noise"
        with self._autocast():
            cond = self._condition(prompts)
            visits = self._roll_out(start, cond)
            with torch.no_grad():
                x0, _ = self._predict(self.unet, visits[-1], len(visits) - 1, cond)
            x0.requires_grad_()
            reward = self.reward(self._decode(x0), prompts)
            (gradient,) = torch.autograd.grad(reward.mean(), x0)
        total = -reward.mean().item()
        for i in sorted(active, reverse=True):
            sigma = (1 - self.alphas[i]) ** 0.5
            with self._autocast():
                _, noise = self._predict(self.unet, visits[i], i, cond)
                kl = self.settings.kl_coeff / len(active) * self._kl(noise, visits[i], i, cond)
                loss = sigma * (gradient * noise).sum() + kl
            loss.backward()
            total += kl.item()
        self.update.apply()
        return total


class BareXl(BareLoop):
    """DRaFT+ of Stable Diffusion XL, whose autoencoder stays in float32."""

    dtypes: ClassVar[Mapping[str, torch.dtype]] = MappingProxyType({"vae": torch.float32})

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        parts = self.parts
        found = [
            encoder(self._tokens(tokenizer, prompts), output_hidden_states=True)
            for tokenizer, encoder in (
                (parts.tokenizer, parts.text_encoder),
                (parts.tokenizer_2, parts.text_encoder_2),
            )
        ]
        states = torch.cat([out.hidden_states[-2] for out in found], dim=-1)
        blank = torch.tensor([not prompt for prompt in prompts], device=states.device)
        return {
            "states": states.masked_fill(blank[:, None, None], 0.0),
            "pooled": found[1].text_embeds.masked_fill(blank[:, None], 0.0),
        }

    def _inputs(self, x: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = (side * factor for side in x.shape[2:])
        sides = torch.tensor([[height, width, 0, 0, height, width]], device=x.device)
        added = {
            "text_embeds": cond["pooled"],
            "time_ids": sides.expand(2 * len(x), -1).float(),
        }
        return {"encoder_hidden_states": cond["states"], "added_cond_kwargs": added}
