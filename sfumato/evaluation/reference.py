"""Pictures that a model is compared with: a folder of them, or what `sfumato prepare` wrote."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import ShardDataConfig
from sfumato.data.decode import SUFFIXES, Bounds, RefusedImageError, read_rgb, read_size
from sfumato.data.entries import FileBlob
from sfumato.data.epochs import RowPick
from sfumato.data.order import PoolOrder
from sfumato.data.paths import is_tar
from sfumato.data.prepared.folder import INDEX
from sfumato.data.prepared.open import open_shards
from sfumato.data.sample import Sample
from sfumato.data.stream import OrderedStream

RESIZED = "shorter side, centre crop"
AS_THEY_ARE = "none"


@dataclass(frozen=True)
class Reference:
    """Pictures of one size.

    Attributes:
        files: in the order of their names; () for a prepared folder.
        resize: what is done to its pictures.
    """

    path: Path
    size: tuple[int, int]
    count: int
    resize: str
    files: tuple[Path, ...] = ()

    def batches(
        self, size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Float[Tensor, "b 3 H W"]]]:
        """Yield numbers of batches and their pictures in [0, 1]: every `world`-th, from `rank`.

        Raises:
            ValueError: naming a picture that cannot be read.
        """
        stream = None if self.files else _open(self.path, self.size)
        for number, start in enumerate(range(0, self.count, size)):
            mine, count = number % world == rank, min(size, self.count - start)
            if stream is not None:
                samples = stream.next(count, 0, count if mine else 0)
                if mine:
                    yield number, torch.stack([one.pixels for one in samples]) / 2 + 0.5
            elif mine:
                arrays = [_read(file) for file in self.files[start : start + size]]
                yield number, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def find_reference(path: str, size: tuple[int, int]) -> Reference:
    """Return the pictures at a path.

    A folder's own pictures must have the images' size, since the resize would decide the number
    (arXiv 2104.11222). Prepared ones are brought to it as in training.

    Args:
        size: height and width of the images that are compared with them.

    Raises:
        ValueError: if there are none, some have another size, or something else lies among them.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"reference = {path!r} is no folder; give one of pictures")
    if (folder / INDEX).is_file():
        return Reference(folder, size, _count(folder, size), RESIZED)
    inside = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    files = [file for file in inside if not _is_hidden(file.relative_to(folder))]
    if tar := next((file for file in files if is_tar(file)), None):
        raise ValueError(
            f"reference = {path!r} holds tars such as {tar.name}; name the folder that sfumato "
            "prepare made of them"
        )
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not files:
        raise ValueError(
            f"reference = {path!r} holds no picture ({', '.join(SUFFIXES)}); give a folder of them"
        )
    for file in files:
        _refuse_other_size(file, size, path)
    return Reference(folder, size, len(files), AS_THEY_ARE, tuple(files))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _refuse_other_size(file: Path, size: tuple[int, int], path: str) -> None:
    try:
        height, width = read_size(FileBlob(file), Bounds())
    except RefusedImageError as error:
        raise ValueError(
            f"reference = {path!r}: {file.name} cannot be read ({error}); remove it"
        ) from error
    if (height, width) != size:
        raise ValueError(
            f"reference = {path!r}: {file.name} has {width} x {height} pixels, and the images have "
            f"{size[1]} x {size[0]}; bring all pictures to this size, or pack the folder (sfumato "
            "prepare stages=[pack]): packed pictures are resized and cropped as in training"
        )


def _read(file: Path) -> np.ndarray:
    try:
        return np.array(read_rgb(FileBlob(file), Bounds()))
    except RefusedImageError as error:
        raise ValueError(f"reference: {file} cannot be read ({error}); remove it") from error


def _open(folder: Path, size: tuple[int, int]) -> OrderedStream[RowPick, Sample]:
    config = ShardDataConfig(path=str(folder), shuffle=False, workers=0)
    return open_shards(config, height=size[0], width=size[1], seed=0)


def _count(folder: Path, size: tuple[int, int]) -> int:
    order = _open(folder, size).order
    assert isinstance(order, PoolOrder)
    return order.samples
