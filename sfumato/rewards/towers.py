"""What rewards that read prompts and images by a transformer share."""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.clip import clean

if TYPE_CHECKING:
    import transformers


@final
class Tokens:
    """Turns prompts into tokens, and warns once if one has to be cut."""

    def __init__(
        self, tokenizer: "transformers.PreTrainedTokenizerBase", most: int, *, cleans: bool = False
    ) -> None:
        """Cut prompts at `most` tokens, those of start and end included.

        Args:
            cleans: clean prompts before, as OpenCLIP's tokenizer does.
        """
        self.tokenizer = tokenizer
        self.most = most
        self.cleans = cleans
        self._warned = False

    def __call__(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Return input_ids and attention_mask of prompts, as long as the longest."""
        prompts = list(map(clean, prompts)) if self.cleans else list(prompts)
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self.most,
            return_tensors="pt",
        ).to(device)
        if tokens["input_ids"].shape[1] == self.most and not self._warned:
            self._warn(prompts)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _warn(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            length = len(self.tokenizer(prompt, verbose=False)["input_ids"])
            if length > self.most:
                warnings.warn(
                    f"the reward reads {self.most} of the {length} tokens of the prompt "
                    f"{prompt!r}; shorten such prompts if their ends matter (said once)",
                    stacklevel=2,
                )
                self._warned = True
                return


def refuse_unequal(images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse with a ValueError unless there is one prompt per image."""
    if len(prompts) != len(images):
        raise ValueError(
            f"{len(images)} images came with {len(prompts)} prompts; give one prompt per image"
        )


def recompute(layers: Iterable[nn.Module]) -> None:
    """Let layers recompute their activations in the backward pass.

    transformers itself does so in training mode only.
    """
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is: bfloat16 would round scores."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
