"""Layout of a prepared folder: where its tars, selections, caches and records lie.

shards/000000.tar            uniform WebDataset tars
shards/000000.json           TarRecord: what is in it, and where
selections/NAME/000000.json  KeptRecord: which of its samples a filter keeps
cache/moments-KEY/000000.safetensors (and .json)   latents' moments of the kept samples
cache/moments-KEY/manifest.json     {"format": 1, "kind": "moments", ...identity}
cache/text-KEY/000000.safetensors (and .json)      their captions' states
cache/text-KEY/manifest.json        {"format": 1, "kind": "text", ...identity}
cache/text-KEY/empty.safetensors    the states of the empty prompt, one row
index.json                   Index: what training opens, and every sample's bin

KEY is the first 16 hex digits of the SHA-256 of the identity as sorted, compact JSON.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sfumato.config import ShardDataConfig
from sfumato.data.prepared.format import (
    FORMAT,
    CachedRecord,
    Index,
    IndexedShard,
    KeptRecord,
    PreparedError,
    Shapes,
    TarRecord,
)
from sfumato.data.shard_cache import LocalFile, ShardCache
from sfumato.data.store import AGAIN, Store, home, is_address
from sfumato.records import read_record

Record = TypeVar("Record")
SHARDS, SELECTIONS, CACHE, INDEX = "shards", "selections", "cache", "index.json"
MANIFEST, EMPTY = "manifest.json", "empty.safetensors"
UNFINISHED = ".unfinished"  # in shards/, while they are packed


@dataclass(frozen=True)
class PreparedFolder:
    """Paths and records below a folder; each record is checked when it is read.

    Reading a record raises a PreparedError where the file is missing, damaged or of another format.

    Attributes:
        path: of a folder in a store, its address with one slash: paths below it name objects.
        of_run: whether this is a run folder, which has no more than cache/.
        store: where the folder lies, if that is not a disk.
    """

    path: Path
    of_run: bool = False
    store: Store | None = None

    def __str__(self) -> str:
        return str(self.path) if self.store is None else self.store.address

    @property
    def again(self) -> str:
        """What makes a file that was removed, in words."""
        if self.store is not None:
            return AGAIN
        return f"run the same sfumato {'train' if self.of_run else 'prepare'} again"

    @property
    def shards(self) -> Path:
        """The folder of the tars."""
        return self.path / SHARDS

    def selection(self, name: str) -> Path:
        """Return the folder of a selection."""
        return self.path / SELECTIONS / name

    def cache(self, name: str) -> Path:
        """Return the folder of a cache, moments-KEY or text-KEY."""
        return self.path / CACHE / name

    def tar(self, name: str) -> Path:
        """Return the file of a tar."""
        return self.shards / f"{name}.tar"

    def tensors(self, cache: str, name: str) -> Path:
        """Return the file of one shard of a cache."""
        return self.cache(cache) / f"{name}.safetensors"

    def index(self) -> Index:
        """Read the index."""
        if self.store is None and not (self.path / INDEX).exists():
            raise PreparedError(
                f"{self} has no {INDEX}, so it is no prepared folder, or not prepared to the end; "
                f"run: sfumato prepare out={self} stages=[index]"
            )
        return self._read(self.path / INDEX, Index)

    def hold(self, path: Path, shard: IndexedShard) -> LocalFile:
        """Return the file of a tar or a shard of a cache on this machine.

        Raises:
            StoreError: a store does not give it, or gives another one.
        """
        if self.store is None:
            return LocalFile(path)
        return self.store.hold(self._name(path), shard.bytes, shard.sha256)

    def hold_record(self, path: Path) -> LocalFile:
        """Return a file that the index does not list, on this machine; raises as `hold`."""
        return LocalFile(path) if self.store is None else self.store.hold_record(self._name(path))

    def forget_record(self, path: Path) -> None:
        """Have a file of a store that the index does not list fetched again."""
        if self.store is not None:
            self.store.forget_record(self._name(path))

    def forget_records(self, selection: str, name: str) -> None:
        """Have the records of a tar and of what a selection keeps of it fetched again."""
        self.forget_record(self.shards / f"{name}.json")
        self.forget_record(self.selection(selection) / f"{name}.json")

    def anew(self, stages: str) -> str:
        """What makes stages of the folder again, in words."""
        if self.store is not None:
            return AGAIN
        return f"run: sfumato prepare out={self} stages=[{stages}]"

    def shown(self, path: Path) -> str:
        """Return a path below the folder as messages name it: in a store, its address."""
        return f"{self}/{self._name(path)}"

    def tar_record(self, name: str) -> TarRecord:
        """Read what is in a tar."""
        return self._read(self.shards / f"{name}.json", TarRecord)

    def shapes(self, name: str) -> Shapes:
        """Read height and width of each sample of a tar, and nothing else."""
        return self._read(self.shards / f"{name}.json", Shapes)

    def kept_record(self, selection: str, name: str) -> KeptRecord:
        """Read what a selection keeps of a tar."""
        return self._read(self.selection(selection) / f"{name}.json", KeptRecord)

    def cached_record(self, cache: str, name: str) -> CachedRecord:
        """Read what one shard of a cache holds."""
        return self._read(self.cache(cache) / f"{name}.json", CachedRecord)

    def manifest(self, cache: str) -> tuple[str | None, dict[str, Any]]:
        """Read kind and identity of a cache."""
        fields: dict[str, Any] = self._read(self.cache(cache) / MANIFEST, dict)
        identity = {key: value for key, value in fields.items() if key not in ("format", "kind")}
        return fields.get("kind"), identity

    def tar_names(self) -> list[str]:
        """Return the names of the packed tars, in order.

        Raises:
            PreparedError: there is none, or not all of them.
        """
        if (self.shards / UNFINISHED).exists():
            raise PreparedError(
                f"packing into {self} was not finished; run the same sfumato prepare with its "
                "stage pack, which resumes"
            )
        names = sorted(path.stem for path in self.shards.glob("[!.]*.json"))
        if not names:
            raise PreparedError(
                f"{self} holds no packed tars; run: sfumato prepare out={self} stages=[pack] with "
                "pack.path=FOLDER or after a download"
            )
        return names

    def selection_names(self) -> list[str]:
        """Return the names of the selections, sorted."""
        return sorted(path.name for path in self.selection("").glob("[!.]*") if path.is_dir())

    def cache_names(self) -> list[str]:
        """Return the folders of the caches that have a manifest, sorted."""
        return sorted(path.parent.name for path in self.cache("").glob(f"[!.]*/{MANIFEST}"))

    def _read(self, path: Path, kind: type[Record]) -> Record:
        if self.store is None:
            advice = f"remove it, if it is there, and {self.again}"
            return read_record(path, kind, advice, version=FORMAT, failure=PreparedError)
        held = self.hold_record(path)
        try:
            return read_record(held.path, kind, self.again, version=FORMAT, failure=PreparedError)
        except PreparedError as error:
            self.forget_record(path)
            said = str(error).replace(str(held.path), self.shown(path))
            raise PreparedError(said) from None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()


def open_folder(path: str, config: ShardDataConfig) -> PreparedFolder:
    """Return a prepared folder by its path, or by its address in a store.

    Raises:
        StoreError: the address cannot be opened, or the cache not be made.
    """
    if not is_address(path):
        return PreparedFolder(Path(path).expanduser())
    place = Path(config.cache_dir or home() / "shards").expanduser()
    cache = ShardCache(place, round(config.cache_gb * 10**9))
    return PreparedFolder(Path(path), store=Store(path, cache))
