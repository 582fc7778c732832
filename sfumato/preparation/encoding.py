"""Encoder of one shard: from pictures and captions to moments and text states.

moments, mirrored (rows, m, h, w)    offsets (rows + 1)    each state (captions in all, ...)
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sfumato.config import PrecacheConfig
from sfumato.data.ahead import ahead
from sfumato.data.decode import Bounds, RefusedImageError, read_rgb
from sfumato.data.entries import Blob
from sfumato.data.prepared.format import PreparedError
from sfumato.data.sample import Placement, Size, resize_and_crop, to_tensor
from sfumato.models.model import DTYPES, Conditioning, TextToImageModel

_AHEAD = 2  # batches that are decoded while one is encoded


@dataclass(frozen=True)
class Picture:
    """What becomes one sample.

    Attributes:
        name: for messages.
        sha256: of its bytes, compared when they are read; None is unknown.
    """

    name: str
    blob: Blob
    captions: tuple[str, ...]
    sha256: str | None = None


@dataclass(frozen=True)
class Shard:
    """The tensors of one shard, the samples in them, and how many were dropped, by reason."""

    tensors: Mapping[str, Shaped[Tensor, "_ ..."]]
    rows: tuple[int, ...]
    dropped: Mapping[str, int]


@final
class Encoder:
    """Encoder of the samples of a shard; the same samples give the same bits on every process."""

    def __init__(
        self,
        model: TextToImageModel,
        settings: PrecacheConfig,
        size: Size,
        *,
        bounds: Bounds | None = None,
        otherwise: str = "set precache.dtype=bfloat16 or float32",
    ) -> None:
        """Encode the empty prompt.

        Args:
            size: height and width in pixels that pictures are cropped to.
            bounds: of pictures that are taken.
            otherwise: what to do where the dtype cannot hold a value, for the message.
        """
        self._model, self._settings, self._size = model, settings, size
        self._bounds, self._otherwise = bounds or Bounds(), otherwise
        self.empty = self._states([""], ["the empty prompt"]).tensors

    def moments(self, samples: Mapping[int, Picture], progress: Callable[[int], object]) -> Shard:
        """Encode the pictures of some samples of a shard.

        Args:
            samples: by index, ascending.
            progress: called with the number of pictures after each batch.

        Raises:
            ValueError: if a picture's bytes have changed, or its moments are not finite.
        """
        size = self._settings.batch_size
        rows: list[int] = []
        parts: dict[str, list[Tensor]] = {name: [] for name in self._placements}
        dropped: Counter[str] = Counter()
        workers = self._settings.workers
        with closing(ahead(self._views, samples.values(), workers, _AHEAD * size)) as decoded:
            pairs = zip(samples.items(), decoded, strict=True)
            while batch := list(islice(pairs, size)):
                good = [(*item, views) for item, views in batch if not isinstance(views, str)]
                dropped.update(reason for _, reason in batch if isinstance(reason, str))
                names = [picture.name for _, picture, _ in good]
                for number, name in enumerate(parts if good else ()):
                    images = torch.stack([views[number] for _, _, views in good])
                    parts[name].append(self._encode(images, names))
                rows += [index for index, _, _ in good]
                progress(len(batch))
        if not rows:  # the moments of no picture
            grey = self._encode(torch.zeros(1, 3, *self._size), ["a grey picture"])
            parts = {name: [grey[:0]] for name in parts}
        tensors = {name: torch.cat(part) for name, part in parts.items()}
        return Shard(tensors, tuple(rows), dict(dropped))

    def text(self, samples: Mapping[int, Picture]) -> Shard:
        """Encode all captions of some samples of a shard.

        Raises:
            ValueError: if a state is not finite.
        """
        counts = [len(picture.captions) for picture in samples.values()]
        captions = [
            (text, f"{picture.name} ({text[:80]!r})")
            for picture in samples.values()
            for text in picture.captions
        ]
        parts = [Conditioning(self.empty).rows(0, 0)]
        size = self._settings.batch_size
        for first in range(0, len(captions), size):
            texts, names = zip(*captions[first : first + size], strict=True)
            parts.append(self._states(texts, names))
        states = Conditioning.stack(parts[1:] or parts).tensors
        offsets = torch.tensor([0, *counts]).cumsum(0)
        return Shard({**states, "offsets": offsets}, tuple(samples), {})

    @property
    def _placements(self) -> dict[str, Placement]:
        mirrored = {"mirrored": Placement(mirrored=True)} if self._settings.flip else {}
        return {"moments": Placement(), **mirrored}

    def _views(self, picture: Picture) -> list[Float[Tensor, "3 H W"]] | str:
        """Return one picture, decoded and cut for each placement; or the reason to drop it.

        Raises:
            PreparedError: if its bytes have changed since they were packed.
        """
        if picture.sha256 is not None:
            with picture.blob.open() as file:
                if hashlib.sha256(file.read()).hexdigest() != picture.sha256:
                    raise PreparedError(
                        f"{picture.name} is not the picture that was packed; put the old tar back, "
                        "or remove the tar with its record and prepare again"
                    )
        try:
            image = read_rgb(picture.blob, self._bounds)
        except RefusedImageError as error:
            return str(error)
        return [
            to_tensor(resize_and_crop(image, self._size, placement)[0])
            for placement in self._placements.values()
        ]

    def _encode(
        self, images: Float[Tensor, "b 3 H W"], names: Sequence[str]
    ) -> Shaped[Tensor, "b m h w"]:
        with _deterministic():
            moments = self._model.encode_moments(images.to(self._model.device))
        return self._stored(moments, names)

    def _states(self, prompts: Sequence[str], names: Sequence[str]) -> Conditioning:
        with _deterministic():
            states = self._model.encode_prompts(prompts)
        return Conditioning(
            {name: self._stored(tensor, names) for name, tensor in states.tensors.items()}
        )

    def _stored(
        self, tensor: Shaped[Tensor, "b ..."], names: Sequence[str]
    ) -> Shaped[Tensor, "b ..."]:
        """Return a tensor in the stored dtype, on the CPU; integers keep theirs.

        Raises:
            ValueError: naming the first row that is not finite.
        """
        if not tensor.is_floating_point():
            return tensor.cpu()
        stored = tensor.to(DTYPES[self._settings.dtype]).cpu()
        finite = stored.reshape(len(stored), -1).isfinite().all(1).tolist()
        if not all(finite):
            row = finite.index(False)
            if not tensor[row].isfinite().all():
                raise ValueError(
                    f"{names[row]}: the encoder gives values that are not finite; check its "
                    "weights, or filter out the sample"
                )
            raise ValueError(
                f"{names[row]}: its encoded values reach {tensor[row].abs().max():.3g}, which "
                f"{self._settings.dtype} cannot hold; {self._otherwise}"
            )
        return stored


@contextmanager
def _deterministic() -> Iterator[None]:
    """Fix cuDNN's algorithms and the number of CPU threads, and record no gradient.

    One CPU thread encodes: threads split sums, and processes under torchrun have fewer threads.
    """
    cudnn = torch.backends.cudnn
    before, threads = (cudnn.deterministic, cudnn.benchmark), torch.get_num_threads()
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        torch.set_num_threads(threads)
