"""Readers of tensor files: safetensors, and pickles without running their code."""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PICKLED = (".pt", ".pth", ".ckpt", ".bin")


@final
class Placeholder:
    """Stand-in for a pickled object that is not torch's; stores nothing and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


def read_tensors(
    file: Path, setting: str, *, allow_pickle: bool, strangers: bool = True
) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU; those of `state_dict` if it has one.

    Args:
        setting: key and value that name the file, for messages.
        allow_pickle: read also .pt, .pth, .ckpt and .bin, and take only tensors from them.
        strangers: leave out what a pickle holds beside tensors; else such a pickle is refused.

    Raises:
        ValueError: if the file is missing or damaged, holds no tensors, or is a pickle that is not
            allowed.
    """
    if not file.is_file():
        raise ValueError(f"{setting}: there is no file {file}")
    check_suffix(file, setting, allow_pickle=allow_pickle)
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{setting}: {file} is damaged ({error}); get it again") from error
    tensors = _named_tensors(_unpickle(file, setting, skip=strangers))
    if not tensors:
        raise ValueError(f"{setting}: {file} holds no named tensors; give a file of weights")
    return tensors


def read_files(files: Iterable[Path], setting: str, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors of several files, such as shards, in one dictionary."""
    states = [read_tensors(file, setting, allow_pickle=allow_pickle) for file in files]
    return {key: tensor for state in states for key, tensor in state.items()}


def check_suffix(file: Path, setting: str, *, allow_pickle: bool) -> None:
    """Refuse a file whose name is not that of weights, and pickles unless they are allowed."""
    if file.suffix == ".safetensors":
        return
    if file.suffix not in PICKLED:
        raise ValueError(
            f"{setting}: {file.name} is no file of weights; give a .safetensors file, or one of "
            f"{', '.join(PICKLED)} (a .nemo is a tar: unpack it, and give the .ckpt in it)"
        )
    if not allow_pickle:
        raise ValueError(
            f"{setting}: {file.name} is a pickle, and loading pickles can run code; give a "
            ".safetensors file, or set model.allow_pickle=true (in sample and evaluate "
            "allow_pickle=true; only its tensors are then read)"
        )


def _unpickle(file: Path, setting: str, *, skip: bool) -> Any:
    """Read a pickle with torch's weights-only reader, which calls only functions it knows."""
    try:
        # Lightning and NeMo store callbacks and settings with the weights.
        strangers: list[Any] = []
        if skip and zipfile.is_zipfile(file):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            strangers = [(Placeholder, name) for name in names]
        with torch.serialization.safe_globals(strangers):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        match = re.search(r"WeightsUnpickler error: (.+)", str(error))
        reason = match[1] if match else str(error).partition("\n")[0]
        raise ValueError(
            f"{setting}: {file} cannot be read ({reason}); it is damaged, or holds more than "
            "weights. If you trust it, save only the weights: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        ) from error


def _named_tensors(content: Any) -> dict[str, Tensor]:
    for inner in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(inner), Mapping):
            content = content[inner]
    if not isinstance(content, Mapping):
        return {}
    return {
        name: tensor
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
