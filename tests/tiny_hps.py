"""HPSv2's published file with a small random network, beside a tokenizer."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_open_clip import WEIGHTS, OpenClipText, OpenClipVision, write_tiny_open_clip
from torch import Tensor

FILE, OLDER = "HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt"


def write_tiny_hps(folder: Path) -> tuple[OpenClipText, OpenClipVision]:
    """Write the pickle of version 2.1, settings and tokenizer; return OpenCLIP's two towers."""
    towers = write_tiny_open_clip(folder)
    save(load_file(folder / WEIGHTS), folder / FILE)
    (folder / WEIGHTS).unlink()
    return towers


def save(state: dict[str, Tensor], file: Path) -> None:
    torch.save({"epoch": 3, "name": "hps", "state_dict": state}, file)
