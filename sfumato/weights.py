"""Loader of weights from outside: files must hold all weights of a network, and no others."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LISTED = 3  # names in a message
ADVICE = "download or export the model again"
# Prefixes that wrappers of training put before every name.
WRAPPERS = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "model_ema.": "an average of the weights",
    "ema_model.": "an average of the weights",
    "ema.": "an average of the weights",
    "model.": "a trainer's module",
}
# Published files hold these beside the weights of the class, and the class does not read them.
UNREAD = {
    "SiglipVisionModel": r"text_model\..+|logit_(scale|bias)",
    "CLIPTextModel": r"vision_model\..+|(visual|text)_projection\..+|logit_scale",
    "CLIPTextModelWithProjection": r"vision_model\..+|visual_projection\..+|logit_scale",
    "T5EncoderModel": r"decoder\..+|lm_head\..+",
    "UMT5EncoderModel": r"decoder\..+|lm_head\..+",
}
POSITIONS = r"(.+\.)?position_ids"  # buffers of old releases; each class counts positions itself


@dataclass(frozen=True)
class Differences:
    """Names by which a file's weights differ from a network's.

    Attributes:
        missing: weights of the network that the file lacks.
        unexpected: names in the file that the network lacks.
        shapes: names with the shape in the file and the shape in the network.
    """

    missing: Sequence[str]
    unexpected: Sequence[str]
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]

    def refuse(self, source: str, advice: str, failure: type[ValueError] = ValueError) -> None:
        """Raise an error that names the differences, if there are any.

        Args:
            source: what the weights are and where they lie.
            advice: what the user can do.
        """
        shapes = [
            f"{name}: {tuple(found)} in the file, {tuple(expected)} in the network"
            for name, (found, expected) in self.shapes.items()
        ]
        faults = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": shapes,
        }
        complaints = [
            f"{len(names)} weights are {fault} ({_listed(names)})"
            for fault, names in faults.items()
            if names
        ]
        if complaints:
            reason = self._reason()
            raise failure(
                f"{source} does not fit the network: {'; '.join(complaints)}. "
                f"{reason}{advice[0].upper()}{advice[1:]}"
            )

    def _reason(self) -> str:
        """Name the likely cause as a sentence, or return no text."""
        for prefix, wrapper in WRAPPERS.items():
            if self.unexpected and all(name.startswith(prefix) for name in self.unexpected):
                return f"Its names begin with {prefix!r}, as {wrapper} writes them. "
        if self.shapes and not self.missing and not self.unexpected:
            return "Its settings are of a network of another width or a LoRA of another rank. "
        if self.missing and not self.unexpected:
            return "The file is incomplete. "
        return ""


def differences(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Mapping[str, str]
) -> Differences:
    """Compare the weights of a file with the weights of a network.

    Args:
        names: of the network's weights in messages; a weight without one has its own name.
    """
    return Differences(
        [names.get(name, name) for name in expected if name not in found],
        [name for name in found if name not in expected],
        {
            names.get(name, name): (found[name].shape, expected[name].shape)
            for name in expected
            if name in found and found[name].shape != expected[name].shape
        },
    )


def load_whole(kind: Any, folder: Path, component: str, **options: Any) -> Any:
    """Load a network of diffusers or transformers from its folder, whole and finite.

    Args:
        kind: class of the network; it reads its own config.json and knows its old names.
        component: name of the network in messages.
        options: further arguments of `from_pretrained`, such as variant. The dtype is float32 by
            default: transformers' own would round all weights as config.json, or one of them, says.

    Raises:
        ValueError: if the files cannot be read, or lack weights, or hold weights that the class
            does not have, of other shapes, or not finite.
    """
    from safetensors import SafetensorError

    source = f"{component}: {folder}"
    hide_progress_bars()
    try:
        network, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            **{"dtype": torch.float32, **options},
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source} could not be read ({reason}); {ADVICE}") from error
    unread = "|".join(filter(None, (POSITIONS, UNREAD.get(kind.__name__))))
    Differences(
        sorted(report["missing_keys"]),
        sorted(name for name in report["unexpected_keys"] if not re.fullmatch(unread, name)),
        {name: (found, expected) for name, found, expected in report["mismatched_keys"]},
    ).refuse(source, ADVICE)
    refuse_non_finite(network.state_dict().items(), source)
    return network


def hide_progress_bars() -> None:
    """Switch off the progress bars of diffusers and transformers."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def refuse_non_finite(weights: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raise a ValueError that names the weights with NaN or infinity, if there are any.

    Args:
        source: what the weights are and where they lie.
    """
    names = [name for name, tensor in weights if not _is_finite(tensor)]
    if names:
        raise ValueError(
            f"{source} has {len(names)} weights with NaN or infinity ({_listed(names)}); "
            "give an earlier checkpoint, or get the files again"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:LISTED], *(["..."] if len(names) > LISTED else [])])


@torch.no_grad()
def _is_finite(tensor: Tensor) -> bool:
    """Say whether all numbers are finite, in one pass that makes no copy of the tensor."""
    if tensor.numel() == 0 or not tensor.is_floating_point() or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))
