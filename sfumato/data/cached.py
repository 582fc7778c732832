"""What a cache holds, and the names of its folders: made of what its tensors depend on.

cache/moments-KEY/manifest.json     {"format": 1, "kind": "moments", ...identity}
cache/text-KEY/manifest.json        {"format": 1, "kind": "text", ...identity}
cache/text-KEY/empty.safetensors    the states of the empty prompt, one row

KEY is the first 16 hex digits of the SHA-256 of the identity as sorted, compact JSON.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from sfumato.data.frame import Placement, Size, covering

MANIFEST, EMPTY = "manifest.json", "empty.safetensors"
_KEY_DIGITS = 16
_SHOWN = 80  # characters of a caption in messages


@dataclass(frozen=True)
class CachedSample:
    """One training example, encoded beforehand.

    Attributes:
        moments: of the latents' posterior, in the dtype of the cache.
        text: states of the caption by the family's names, each with a leading axis of 1.
        empty: states of the empty prompt, likewise.
        caption: what it shows; never blank.
        size: height and width of the picture that was encoded, in pixels.
        original: height and width of the file's picture, upright, before resizing.
        crop: top and left of the central crop inside the resized picture.
        name: where it came from, for messages.
    """

    moments: Shaped[Tensor, "m h w"]
    text: Mapping[str, Shaped[Tensor, "1 ..."]]
    empty: Mapping[str, Shaped[Tensor, "1 ..."]]
    caption: str
    size: Size
    original: Size
    crop: tuple[int, int]
    name: str

    def __str__(self) -> str:
        cut = self.caption if len(self.caption) <= _SHOWN else f"{self.caption[: _SHOWN - 1]}…"
        return f"{self.name} ({cut})"


@dataclass(frozen=True)
class CacheIdentity:
    """What the tensors of a cache depend on: of one identity, of one content.

    Attributes:
        moments: autoencoder, height, width, crop, resize, flip, dtype; fit for JSON.
        text: text encoders, tokenizers, dtype; fit for JSON.
    """

    moments: Mapping[str, Any]
    text: Mapping[str, Any]

    @property
    def moments_folder(self) -> str:
        """The name of the folder of moments, below cache/."""
        return f"moments-{cache_key(self.moments)}"

    @property
    def text_folder(self) -> str:
        """The name of the folder of captions' states, below cache/."""
        return f"text-{cache_key(self.text)}"


def cache_key(identity: Mapping[str, Any]) -> str:
    """Return the hash that a cache's folder is named after."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


def central_crop(original: Size, size: Size) -> tuple[int, int]:
    """Return top and left of the crop that `frame` takes without chance, mirrored or not."""
    centre = Placement()
    resized = covering(original, size)
    top, left = resized[0] - size[0], resized[1] - size[1]
    return int(centre.top * (top + 1)), int(centre.left * (left + 1))
