"""Rows of prepared shards, and those that are pictures out of tars.

Records are read when a shard is first met, and kept as long as its window lasts.
"""

import abc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

from sfumato.data.cached import CachedSample
from sfumato.data.decode import Bounds
from sfumato.data.entries import Entry, SpanBlob
from sfumato.data.frame import Placement, Sample, Size
from sfumato.data.image_stream import make_sample
from sfumato.data.prepared import (
    SHARDS,
    IndexedShard,
    Member,
    PreparedError,
    read_kept_record,
    read_tar_record,
)
from sfumato.data.recent import Recent
from sfumato.diffusion.randomness import derive

Row = Sample | CachedSample


@dataclass(frozen=True)
class Choices:
    """What is made of a row: its size in pixels, and what is left to chance."""

    size: Size
    random_crop: bool
    flip: bool
    random_caption: bool

    def caption_of(self, member: Member, seed: int) -> int:
        """Return which of the captions is taken."""
        if not self.random_caption:
            return 0
        return int(random.Random(derive(seed, "caption")).random() * len(member.captions))

    def placement(self, seed: int) -> Placement:
        """Draw crop and mirror."""
        return Placement.drawn(seed, random_crop=self.random_crop, flip=self.flip)


@dataclass(frozen=True)
class Selected:
    """The shards of a prepared folder, and what a selection keeps of them.

    Attributes:
        folder: that was prepared.
        selection: its name.
        tars: as the index lists them.
        counts: samples of each that are read.
    """

    folder: Path
    selection: str
    tars: Sequence[IndexedShard]
    counts: Sequence[int]

    def tar(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / SHARDS / f"{self.tars[shard].name}.tar"

    def members(self, shard: int, rows: Sequence[int]) -> tuple[Member, ...]:
        """Read what is in a tar; return its samples of these indices.

        Raises:
            PreparedError: the records are not those that were indexed.
        """
        tar = self.tars[shard]
        record = read_tar_record(self.folder, tar.name)
        inside = all(0 <= row < len(record.samples) for row in rows)
        if record.sha256 != tar.sha256 or len(rows) != self.counts[shard] or not inside:
            raise PreparedError(
                f"shard {tar.name} of {self.folder} is not the one that was indexed: "
                f"{len(rows)} of its {len(record.samples)} samples can be read, not "
                f"{self.counts[shard]}, or its records were written again; run: sfumato prepare "
                f"out={self.folder} stages=[index], and start a new run"
            )
        return tuple(record.samples[row] for row in rows)


class ShardReader(abc.ABC):
    """Make rows, in any thread."""

    @abc.abstractmethod
    def prepare(self, shard: int, row: int, seed: int) -> tuple[Entry, Callable[[], Row]]:
        """Return where a row lies, and what makes it.

        What makes it raises RefusedImageError where it cannot be used.

        Args:
            shard: index of the shard.
            row: which of its samples that are read.
            seed: decides what is left to chance.

        Raises:
            PreparedError: the shard's records are missing, damaged, or not those of the index.
        """


@final
class TarReader(ShardReader):
    """Read pictures by their place in the tars, whatever lies around them."""

    def __init__(self, selected: Selected, choices: Choices, *, keep: int) -> None:
        """Keep the records of shards with `keep` samples."""
        self._selected = selected
        self._choices = choices
        self._members = Recent(self._load, len, keep)

    def prepare(self, shard: int, row: int, seed: int) -> tuple[Entry, Callable[[], Row]]:
        """Return the place of a picture, and what decodes it; see `ShardReader.prepare`."""
        member = self._members.get(shard)[row]
        tar = self._selected.tar(shard)
        entry = Entry(
            tar,
            f"{member.key}.{member.suffix}",
            (member.captions[self._choices.caption_of(member, seed)],),
            SpanBlob(tar, member.offset, member.size),
        )
        choices = self._choices
        return entry, partial(make_sample, entry, choices.size, choices.placement(seed), Bounds())

    def _load(self, shard: int) -> tuple[Member, ...]:
        selected = self._selected
        name = selected.tars[shard].name
        kept = read_kept_record(selected.folder, selected.selection, name).kept
        return selected.members(shard, kept)
