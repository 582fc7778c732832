"""Open files of one shard of a cache: moments and states of single rows, out of mapped files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sfumato.data.prepared.folder import EMPTY, PreparedFolder
from sfumato.data.prepared.format import PreparedError
from sfumato.data.prepared.tars import check_sum
from sfumato.data.sample import Encoded, Size


class BrokenFileError(Exception):
    """A shard of a cache that cannot be read."""


@final
@dataclass(frozen=True)
class ShardFiles:
    """The open files of a shard; slices of them are read from the disk when they are copied."""

    moments: safe_open
    text: safe_open
    names: tuple[str, ...]
    offsets: Sequence[int]

    def captions(self, row: int) -> int:
        """Return how many captions a row of the states has."""
        return self.offsets[row + 1] - self.offsets[row]

    def read(
        self,
        rows: tuple[int, int],
        caption: int,
        *,
        mirrored: bool,
        empty: Mapping[str, Tensor],
        size: Size,
    ) -> Encoded:
        """Return a sample by its rows among moments and states."""
        moments = self.moments.get_slice("mirrored" if mirrored else "moments")
        first = self.offsets[rows[1]] + caption
        one = slice(first, first + 1)
        return Encoded(
            # A slice is a view of the mapped file until it is copied.
            moments=moments[rows[0]].clone(),
            text={name: self.text.get_slice(name)[one].clone() for name in self.names},
            empty=empty,
            size=size,
        )


def open_shard(
    folder: PreparedFolder,
    sums: Mapping[Path, str],
    stored: tuple[int, int],
    *,
    flip: bool,
    names: Sequence[str],
) -> ShardFiles:
    """Open the two files of a shard, compared with their SHA-256.

    Args:
        sums: of the file of moments, then of the file of states.
        stored: how many rows each holds.
        flip: whether mirrored moments have to be there.
        names: of the states.

    Raises:
        BrokenFileError: a file is missing, cannot be read, or does not fit its record.
        PreparedError: a file is another one than its SHA-256 says.
    """
    try:
        for path, sha256 in sums.items() if folder.store is None else ():  # or it has compared them
            check_sum(path, sha256, folder)
        moments, text = (safe_open(path, framework="pt") for path in sums)
        planes = ["mirrored", "moments"] if flip else ["moments"]
        lengths = {_rows_of(moments, name) for name in planes}
        offsets = text.get_tensor("offsets").tolist()
        found = tuple(sorted(name for name in text.keys() if name != "offsets"))  # noqa: SIM118
        ends = {_rows_of(text, name) for name in found}
    except FileNotFoundError:
        raise BrokenFileError("missing cache shard") from None
    except (SafetensorError, OSError):
        raise BrokenFileError("unreadable or damaged cache shard") from None
    fits = lengths == {stored[0]} and len(offsets) == stored[1] + 1 and ends == {offsets[-1]}
    if not fits or set(found) != set(names):
        raise BrokenFileError("cache shard that does not fit its record")
    return ShardFiles(moments, text, found, offsets)


def read_empty(folder: PreparedFolder, cache: str, sha256: str | None) -> dict[str, Tensor]:
    """Read the states of the empty prompt; an older index has no SHA-256 of them."""
    path = folder.cache(cache) / EMPTY
    file = folder.hold_record(path)
    try:
        if sha256 is not None:
            check_sum(file.path, sha256, folder)
        return load_file(file.path)
    except PreparedError:
        folder.forget_record(path)
        raise
    except (OSError, SafetensorError) as error:
        folder.forget_record(path)
        raise PreparedError(
            f"{folder.shown(path)}, the states of the empty prompt, cannot be read ({error}); "
            f"{folder.again if folder.of_run else 'precache again'}"
        ) from None


def _rows_of(file: safe_open, name: str) -> int:
    return int(file.get_slice(name).get_shape()[0])
