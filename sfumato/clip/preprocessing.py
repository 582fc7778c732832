"""Preprocessing of images for an image tower, as transformers and OpenCLIP state it in JSON.

x = (factor * crop(resize(image)) - mean) / std
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.files import read_object
from sfumato.precision import without_autocast

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Pillow's number of a filter -> torch's name.
FILTERS = {2: "bilinear", 3: "bicubic"}
OPEN_CLIP_FILTERS = {"bilinear": "bilinear", "bicubic": "bicubic", "random": "bicubic"}
# Classes of transformers that preprocess alike.
PROCESSORS = (
    *("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    "CLIPFeatureExtractor",
)
# Classes of transformers that resize, crop the centre, scale and normalise, in this order.
IN_ORDER = (
    *("BitImageProcessorPil", "CLIPImageProcessorPil", "DeiTImageProcessorPil"),
    *("MobileNetV1ImageProcessorPil", "MobileNetV2ImageProcessorPil", "PvtImageProcessorPil"),
    *("SiglipImageProcessorPil", "ViTImageProcessorPil"),
)
CONVNEXT = "ConvNextImageProcessorPil"  # crops a share of the image, if it is small
CONVNEXT_SQUASHES = 384  # pixels per side from which on it changes the shape instead
_OWN = "name the model's own `processor`"
WHOLE = "state one whole number of pixels, as published CLIP models do"
_LARGEST = 2**16  # pixels per side


@dataclass(frozen=True)
class ImageSettings:
    """What is done to images before an image tower.

    Attributes:
        size: in pixels: the shorter side, which keeps the shape, or height and width; None does not
            resize.
        crop: side of the square cut from the centre, with zeros around smaller images; None cuts
            nothing.
        mean, std: per channel; the mean is subtracted, then the std divided by.
        factor: by which images in [0, 1] are multiplied before.
        mode: torch's name of the filter.
        antialias: whether the filter widens where an image shrinks.
        rounds: a crop that begins at half a pixel begins at the even one (torchvision, OpenCLIP);
            else at the one before (transformers).
        letterbox: `size` is of the longer side, and black fills up the square of `crop`.
    """

    size: int | tuple[int, int] | None
    crop: int | None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    factor: float = 1.0
    mode: str = "bicubic"
    antialias: bool = True
    rounds: bool = False
    letterbox: bool = False

    def squashed(self) -> "ImageSettings":
        """Return settings that bring all images to the same square without crop or antialias."""
        side = self.crop or self.size
        size = (side, side) if isinstance(side, int) else side
        return replace(self, size=size, crop=None, mode="bicubic", antialias=False)


def preprocess(
    images: Float[Tensor, "b 3 h w"], settings: ImageSettings
) -> Float[Tensor, "b 3 H W"]:
    """Resize, crop the centre, scale and normalise, differentiably.

    Sizes are rounded as transformers' CLIPImageProcessor rounds them; values are neither clamped
    nor quantised. Runs in float32 (float64 stays) under any autocast.

    Args:
        images: values in [0, 1], or beyond.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    with without_autocast(images):
        height, width = images.shape[-2:]
        if (size := settings.size) is not None:
            short = min(height, width)
            if settings.letterbox and isinstance(size, int):
                scale = size / max(height, width)
                size = max(1, round(height * scale)), max(1, round(width * scale))
            elif isinstance(size, int):
                size = int(size * height / short), int(size * width / short)
            images = F.interpolate(images, size, mode=settings.mode, antialias=settings.antialias)
        if settings.crop is not None:
            images = _crop(images, settings.crop, settings)
        if settings.factor != 1:
            images = images * settings.factor
        centre, spread = images.new_tensor(settings.mean), images.new_tensor(settings.std)
        return (images - centre.view(3, 1, 1)) / spread.view(3, 1, 1)


def _crop(images: Tensor, side: int, settings: ImageSettings) -> Tensor:
    """Cut a square from the centre; a negative margin is filled with zeros."""
    height, width = images.shape[-2:]
    margins = height - side, width - side
    if settings.letterbox:
        top, left = (-(-rest // 2) for rest in margins)
    else:
        top, left = (round(rest / 2) if settings.rounds else rest // 2 for rest in margins)
    return F.pad(images, (-left, left + side - width, -top, top + side - height))


def processor_settings(path: Path, raw: Mapping[str, Any], image_size: int) -> ImageSettings:
    """Return the settings in a preprocessor_config.json, with transformers' meaning and defaults.

    Args:
        path: of the file, for messages.
        raw: its content; a crop that is not stated is that of the image tower.
        image_size: pixels that the image tower takes.

    Raises:
        ValueError: naming the key that cannot be computed as stated.
    """
    return _settings(path, raw, _with_defaults(path, raw, image_size), image_size)


def read_processor(folder: Path, image_size: int | None = None) -> ImageSettings:
    """Return the settings of a folder's image processor, of any class that is computed here.

    Args:
        image_size: pixels that the image tower takes; None for any square.

    Raises:
        ValueError: naming the class, or the key, that cannot be computed as stated.
    """
    from transformers import AutoImageProcessor

    path = folder / "preprocessor_config.json"
    raw = read_object(path, "copy or download it again")
    try:
        # Another package's class, or another backend, may round otherwise.
        stated: Any = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except (OSError, TypeError, ValueError, LookupError, AttributeError, ImportError) as error:
        raise ValueError(
            f"{path} cannot be read by transformers ({first_sentence(error)}); {_OWN}"
        ) from error
    if (kind := type(stated).__name__) not in (*IN_ORDER, CONVNEXT):
        known = ", ".join(name.removesuffix("Pil") for name in (*IN_ORDER, CONVNEXT))
        raise ValueError(
            f"{path} states {kind.removesuffix('Pil')}, and only {known} are computed; choose a "
            "model that has one of these"
        )
    if kind == CONVNEXT and stated.do_resize:
        _crop_share(path, stated)
    return _settings(path, raw, stated, image_size)


def first_sentence(error: BaseException) -> str:
    """Return the beginning of a message of transformers, which may have pages."""
    return " ".join(str(error).split()).partition(". ")[0]


def _crop_share(path: Path, stated: Any) -> None:
    """State ConvNext's resize as others do: by its size, and a crop if it is small."""
    side, share = stated.size.shortest_edge, stated.crop_pct
    if not isinstance(side, int) or stated.do_center_crop:
        raise ValueError(
            f"{path} states size = {dict(stated.size)} and do_center_crop = "
            f"{stated.do_center_crop}, and only a shortest_edge without another crop is computed; "
            f"{_OWN}"
        )
    (share,) = _numbers(path, "crop_pct", share, 1, nonzero=True)
    square = {"height": side, "width": side}
    small = side < CONVNEXT_SQUASHES
    stated.size = {"shortest_edge": int(side / share)} if small else square
    stated.do_center_crop, stated.crop_size = small, square


def _settings(
    path: Path, raw: Mapping[str, Any], stated: Any, image_size: int | None
) -> ImageSettings:
    if stated.do_pad:
        raise ValueError(
            f"{path} states do_pad = {raw.get('do_pad')}, which is not computed; {_OWN}"
        )
    resample, mean, std, factor = stated.resample, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1.0
    if stated.do_resize and resample not in FILTERS:
        raise ValueError(
            f"{path} states resample = {resample!r}, and only 2 (bilinear) and 3 (bicubic) are "
            f"computed; {_OWN}"
        )
    if stated.do_rescale:
        (factor,) = _numbers(path, "rescale_factor", stated.rescale_factor, 1, nonzero=True)
    if stated.do_normalize:
        mean = _triple(path, "image_mean", stated.image_mean)
        std = _triple(path, "image_std", stated.image_std, nonzero=True)
    size, crop = None, None
    if stated.do_resize:
        size = _sides(stated.size, f"size in {path} is {raw.get('size')}")
    if stated.do_center_crop:
        what = f"crop_size in {path} is {raw.get('crop_size')}"
        sides = _sides(stated.crop_size, what)
        if isinstance(sides, int) or sides[0] != sides[1]:
            raise ValueError(f"{what}; {WHOLE}")
        crop = sides[0]
    settings = ImageSettings(size, crop, mean, std, 255 * factor, FILTERS.get(resample, "bicubic"))
    _check_sides(path, settings, image_size)
    return settings


def save_processor(settings: ImageSettings, folder: Path) -> None:
    """Write a preprocessor_config.json with these settings, as transformers' CLIP has it.

    transformers crops odd margins at the pixel before the middle, whatever `rounds` says.
    """
    from transformers import CLIPImageProcessorPil

    filters = {name: number for number, name in FILTERS.items()}
    size = settings.size
    processor: Any = CLIPImageProcessorPil(
        do_resize=size is not None,
        size={"height": size[0], "width": size[1]} if isinstance(size, tuple) else size,
        resample=filters[settings.mode],
        do_center_crop=settings.crop is not None,
        crop_size=settings.crop,
        do_rescale=True,
        rescale_factor=settings.factor / 255,
        do_normalize=True,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )
    processor.save_pretrained(folder)


def open_clip_settings(path: Path, raw: Mapping[str, Any], image_size: int) -> ImageSettings:
    """Return the settings in `preprocess_cfg` of an open_clip_config.json, with OpenCLIP's meaning.

    Args:
        path: of the file, for messages.
        raw: the content of the key.
        image_size: pixels that the image tower takes.

    Raises:
        ValueError: naming the key that cannot be computed as stated.
    """
    raw = {key: value for key, value in raw.items() if value is not None}
    filters, modes = tuple(OPEN_CLIP_FILTERS), ("shortest", "squash")
    sizes = (image_size, [image_size], [image_size, image_size])
    known = {"size": sizes, "mode": ("RGB",), "interpolation": filters, "resize_mode": modes}
    for key, values in known.items():
        if raw.get(key, values[0]) not in values:
            raise ValueError(
                f"{path} states preprocess_cfg.{key} = {raw[key]!r}, and only "
                f"{' or '.join(map(repr, values))} is computed; {_OWN}"
            )
    squash = raw.get("resize_mode") == "squash"
    return ImageSettings(
        size=(image_size, image_size) if squash else image_size,
        crop=image_size,
        mean=_triple(path, "preprocess_cfg.mean", raw.get("mean") or CLIP_MEAN),
        std=_triple(path, "preprocess_cfg.std", raw.get("std") or CLIP_STD, nonzero=True),
        mode=OPEN_CLIP_FILTERS[raw.get("interpolation", "bicubic")],
        rounds=True,
    )


def _with_defaults(path: Path, raw: Mapping[str, Any], image_size: int) -> Any:
    """Return transformers' own reading of the file."""
    from transformers import CLIPImageProcessorPil

    kind = raw.get("image_processor_type") or raw.get("feature_extractor_type") or PROCESSORS[0]
    if kind not in PROCESSORS:
        raise ValueError(
            f"{path} states image_processor_type = {kind!r}, and only {PROCESSORS[0]} is computed; "
            f"{_OWN}"
        )
    keys = {*CLIPImageProcessorPil.valid_kwargs.__annotations__, "use_square_size"}
    stated = {key: value for key, value in raw.items() if key in keys}
    if "crop_size" not in stated:
        stated = {"size": image_size, "crop_size": image_size, **stated}
    try:
        settings: Any = CLIPImageProcessorPil(**stated)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read by transformers ({error}); {_OWN}") from error
    return settings


def _sides(sizes: Any, what: str) -> int | tuple[int, int]:
    """Return the shorter side, or height and width."""
    sides = {key: value for key, value in dict(sizes or {}).items() if value is not None}
    if all(type(value) is int and 0 < value <= _LARGEST for value in sides.values()):
        if set(sides) == {"shortest_edge"}:
            return sides["shortest_edge"]
        if set(sides) == {"height", "width"}:
            return sides["height"], sides["width"]
    raise ValueError(f"{what}; {WHOLE}")


def _triple(
    path: Path, key: str, value: Any, *, nonzero: bool = False
) -> tuple[float, float, float]:
    red, green, blue = _numbers(path, key, value, 3, nonzero=nonzero)
    return red, green, blue


def _numbers(path: Path, key: str, value: Any, count: int, *, nonzero: bool = False) -> list[float]:
    """Return finite numbers, one of which stands for all.

    Args:
        nonzero: refuse 0, which would leave nothing of an image.
    """
    value = list(value) if isinstance(value, tuple) else value
    numbers = value if isinstance(value, list) else (value,) * count
    plain = all(type(each) in (int, float) and math.isfinite(each) for each in numbers)
    if len(numbers) != count or not plain or (nonzero and not all(numbers)):
        what = "a number" if count == 1 else f"{count} numbers, or one for all"
        raise ValueError(
            f"{path} states {key} = {value!r}; give {what}{', not 0' if nonzero else ''}, or {_OWN}"
        )
    return list(map(float, numbers))


def _check_sides(path: Path, settings: ImageSettings, image_size: int | None) -> None:
    """Refuse settings by which some image would not have the size that the tower takes."""
    size, crop = settings.size, settings.crop
    taken = f"the {image_size} x {image_size} px of the image tower" if image_size else "one size"
    square = size if image_size is None else (image_size, image_size)
    if crop is None and (not isinstance(size, tuple) or size != square):
        resize = "do_resize = False" if size is None else f"size = {size}"
        raise ValueError(
            f"{path} states do_center_crop = False and {resize}, so that images would not have "
            f"{taken}; {_OWN}"
        )
    image_size = image_size or crop
    shortest = min(size) if isinstance(size, tuple) else size
    if crop is not None and (crop != image_size or (shortest is not None and shortest < crop)):
        raise ValueError(
            f"{path} resizes to {size} px and crops {crop} px, but the image tower takes "
            f"{image_size} px; {_OWN}"
        )
