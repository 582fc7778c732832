"""Files of weights: networks from outside, which must be whole, and shards of checkpoints."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add, lt
from pathlib import Path
from typing import Any, final

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
SHARD = re.compile(r"shard-(\d{5})-of-(\d{5})\.safetensors")
# Keys of torch.distributed.checkpoint's HuggingFaceStorageReader, which reads these files too.
_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


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
            names.get(name, name): (shape_of(found, name), expected[name].shape)
            for name in expected
            if name in found and shape_of(found, name) != expected[name].shape
        },
    )


@dataclass(frozen=True)
class Share:
    """The part of a tensor that a process holds, on the CPU.

    Attributes:
        offsets: of the part's first number, by dimension of the whole tensor.
        shape: of the whole tensor.
    """

    value: Tensor
    offsets: Sequence[int]
    shape: torch.Size


def shard_names(count: int) -> list[str]:
    """Return the names of the files that `count` processes write."""
    return [f"shard-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def shard_files(folder: Path) -> list[Path]:
    """Return the files of a sharded checkpoint, also one that is missing; none of other folders."""
    matches = (SHARD.fullmatch(path.name) for path in folder.glob("shard-*.safetensors"))
    match = next(filter(None, matches), None)
    return [folder / name for name in shard_names(int(match[2]))] if match else []


def write_shard(file: Path, shares: Mapping[str, Share]) -> None:
    """Write the shares of one process as one safetensors file; no second copy is made of them."""
    from safetensors.torch import save_file

    places = {name: {_OFFSETS: list(share.offsets)} for name, share in shares.items()}
    about = {"format": "pt", "DCP_VERSION": "1.0", _SHARDING: json.dumps(places)}
    save_file({name: share.value for name, share in shares.items()}, file, about)


@final
class Shards(Mapping[str, Tensor]):
    """Tensors of a sharded checkpoint, each read, whole or in part, when it is asked for.

    Args:
        files: of all processes that wrote the checkpoint, however many.
        prefix: of the names in the files; the mapping has what follows it.

    Raises:
        SafetensorError: if a file is damaged.
    """

    def __init__(self, files: Sequence[Path], prefix: str = "") -> None:
        from safetensors import safe_open

        self._prefix = prefix
        self._parts: dict[str, list[tuple[Any, list[int], list[int]]]] = {}
        for path in files:
            file = safe_open(path, framework="pt").__enter__()
            places = json.loads(file.metadata()[_SHARDING])
            for name in file.keys():  # noqa: SIM118 -- no mapping
                part = (file, places[name][_OFFSETS], file.get_slice(name).get_shape())
                self._parts.setdefault(name, []).append(part)

    def under(self, prefix: str) -> "Shards":
        """Return the tensors whose names begin with a prefix, without it."""
        found = Shards([], self._prefix + prefix)
        found._parts = {n: p for n, p in self._parts.items() if n.startswith(found._prefix)}
        return found

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a whole tensor; nothing is read."""
        ends = (map(add, starts, sizes) for _, starts, sizes in self._parts[self._prefix + name])
        return torch.Size(map(max, zip(*ends, strict=True)))

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return a part of a tensor, from `offsets` on; no other part is read."""
        full = self._prefix + name
        parts = self._parts[full]
        nothing = [0] * len(sizes)
        dtype = parts[0][0].get_slice(full)[_box(nothing, nothing, nothing)].dtype
        target = torch.empty(tuple(sizes), dtype=dtype)
        for file, starts, lengths in parts:
            low = list(map(max, starts, offsets))
            high = list(map(min, map(add, starts, lengths), map(add, offsets, sizes)))
            if all(map(lt, low, high)):
                target[_box(offsets, low, high)] = file.get_slice(full)[_box(starts, low, high)]
        return target

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.read(name, [0] * len(shape), shape)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _box(start: Sequence[int], low: Sequence[int], high: Sequence[int]) -> tuple[slice, ...]:
    """Return the slices from `low` to `high`, counted from `start`."""
    return tuple(slice(a - s, b - s) for s, a, b in zip(start, low, high, strict=True))


def shape_of(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    """Return the shape of a tensor, which is not read if it lies in shards."""
    return tensors.shape(name) if isinstance(tensors, Shards) else tensors[name].shape


def under(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    if isinstance(tensors, Shards):
        return tensors.under(prefix)
    return {n.removeprefix(prefix): each for n, each in tensors.items() if n.startswith(prefix)}


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
