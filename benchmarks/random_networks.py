"""Model folders without weights, whose networks come out random, made on the device."""

import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from loops import PROMPTS

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # settings of published models

from real_sizes import TABLE, write_pickscore, write_sd15, write_sdxl
from tiny_clip import write_tiny_clip
from tiny_sd import write_tiny_sd
from tiny_sdxl import write_tiny_sdxl

WRITERS = {
    "sd15": {"real": write_sd15, "tiny": write_tiny_sd},
    "sdxl": {"real": write_sdxl, "tiny": write_tiny_sdxl},
}
DDIM = {**TABLE, "set_alpha_to_one": False, "clip_sample": False}


def write_settings(folder: Path, size: str) -> None:
    """Write NAME/pipeline, NAME/reward and NAME/prompts.txt of each model.

    Args:
        size: `real` or `tiny`.
    """
    (write_tiny_clip if size == "tiny" else write_pickscore)(folder / "clip")
    (folder / "clip" / "model.safetensors").touch()
    for name, writers in WRITERS.items():
        place = folder / name
        writers[size](place / "pipeline")
        shutil.copytree(folder / "clip", place / "reward")
        (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        _write(place / "pipeline" / "scheduler" / "scheduler_config.json", DDIM)
        index = json.loads((place / "pipeline" / "model_index.json").read_text())
        _write(
            place / "pipeline" / "model_index.json",
            {**index, "scheduler": ["diffusers", "DDIMScheduler"]},
        )


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2))


def make_random(device: str) -> None:
    """Let `from_pretrained` of the networks build them from their settings, and read no weight.

    The same settings give the same weights.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

    def build(kind: Any, folder: Any, **options: Any) -> Any:
        place = Path(folder)
        torch.manual_seed(zlib.crc32((place / "config.json").read_bytes()))
        with torch.device(device):
            if hasattr(kind, "from_config"):
                network = kind.from_config(kind.load_config(place))
            else:
                network = kind(kind.config_class.from_pretrained(place))
        dtype = options.get("dtype") or options.get("torch_dtype") or torch.float32
        torch.nn.Module.to(network.eval(), dtype)
        report = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
        return (network, report) if options.get("output_loading_info") else network

    kinds: list[Any] = [UNet2DConditionModel, AutoencoderKL]
    kinds += [CLIPModel, CLIPTextModel, CLIPTextModelWithProjection]
    for kind in kinds:
        kind.from_pretrained = classmethod(build)
