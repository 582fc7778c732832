"""Identity by content: SHA-256 of the files that settings name, remembered by size and time."""

import json
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfumato.config import TrainConfig
from sfumato.config.saved import flatten
from sfumato.data.paths import expand_pattern
from sfumato.files import digest, sha256_of, write_text
from sfumato.records import read_record

# In a run folder: `files` has the size, time, inode and SHA-256 of each file by its path, `began`
# the digests of what the run began with by their settings.
MEMORY = "contents.json"
MODEL_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin", ".ckpt", ".pt", ".pth")
MODELS = ("pretrained", "processor", "autoencoder", "text_encoder", "tokenizer", "scheduler")
BESIDE = ("adapter_config.json", "open_clip_config.json")  # state how a file's weights are meant
STARTS = ("model.lora.start", "model.network.from_pretrained")  # read before the first step
DATA = ("data.", "validation.")  # settings of pictures and prompts
READ_WHOLE = 64 * 2**30  # bytes of data; of more, only names and sizes are compared
THREADS = 4


def contents_of(
    config: TrainConfig,
    run: Path,
    *,
    started: bool = False,
    sections: Collection[str] = ("model", "reward", "data", "validation"),
) -> dict[str, str]:
    """Return a digest of what lies at each path that the settings name.

    Equal content at another path has the same digest. A hub id stands for its local copy; what
    does not exist has no digest. Prepared folders are left out, as their index has SHA-256 sums.

    Args:
        run: the run folder, which remembers the SHA-256 of unchanged files.
        started: leave out the weights that a run needs only to begin.
        sections: of the settings; the files of other sections are not looked at.
    """
    flat = {typed(key): value for key, value in flatten(asdict(config)).items() if value}
    flat = {key: value for key, value in flat.items() if key.split(".")[0] in sections}
    named = {key: str(value) for key, value in flat.items() if _is_path(key, value)}
    if started:
        named = {key: value for key, value in named.items() if key not in STARTS}
    return digests(named, run)


def read_began(run: Path) -> dict[str, Any]:
    """Return the digests that `write_began` noted; empty for runs of earlier versions."""
    return _read(run).get("began", {})


def write_began(run: Path, contents: Mapping[str, str]) -> None:
    """Note what a run began with, unless it is noted."""
    noted = read_began(run)
    if noted != {**noted, **contents}:
        _write(run, {**_read(run), "began": {**noted, **contents}})


def _read(run: Path) -> dict[str, dict[str, Any]]:
    advice = "remove it; the files that the run reads are then taken as they are"
    file = run / MEMORY
    return vars(read_record(file, _Memory, advice)) if file.is_file() else {}


def _write(run: Path, memory: Mapping[str, Any]) -> None:
    if run.is_dir():
        write_text(run / MEMORY, json.dumps(memory) + "\n")


@dataclass(frozen=True)
class _Memory:
    files: dict[str, tuple[int, int, int, str]] = field(default_factory=dict)
    began: dict[str, str] = field(default_factory=dict)


def typed(key: str) -> str:
    """Return the key that a user types for a setting; parts of a reward are nested once more."""
    return key.replace(".reward.", ".") if key.startswith("reward.parts.") else key


def _is_path(key: str, value: object) -> bool:
    room, _, name = key.rpartition(".")
    if not isinstance(value, str) or key.startswith("data.shards"):
        return False
    if key in STARTS or key in ("data.prompts", "validation.prompts"):
        return True
    if room.startswith(("model", "reward")):
        return name in MODELS or (room.startswith("model.merge.") and name == "path")
    return name == "path" and room.startswith(("data.images", "validation.images"))


def digests(named: Mapping[str, str], run: Path) -> dict[str, str]:
    """Return the digest of each path that exists, by its key; a run folder remembers the sums."""
    memory = _read(run)
    sums = _Sums(memory.get("files", {}))
    contents = {key: sums.digest_of(value, key) for key, value in named.items()}
    if sums.seen.items() - sums.known.items():
        _write(run, {**memory, "files": sums.known | sums.seen})
    return {key: value for key, value in contents.items() if value is not None}


def repeated_pictures(config: TrainConfig, run: Path) -> tuple[int, int]:
    """Return how many validation pictures are of the same bytes as training's, and of how many."""
    known, flat, rooms = _read(run).get("files", {}), flatten(asdict(config)), []
    for room in ("validation.images", "data.images"):
        named = ((k, str(v)) for k, v in flat.items() if k.startswith(room) and _is_path(k, v))
        paths = [str(f.absolute()) for k, v in named for f in files_of(v, k) if f.suffix != ".txt"]
        rooms.append({known[path][-1] for path in paths if path in known})
    return len(rooms[0] & rooms[1]), len(rooms[0])


class _Sums:
    """SHA-256 sums of files; a file of the same size, time and inode is not read again."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = dict(known)
        self.seen: dict[str, Any] = {}

    def digest_of(self, value: str, key: str) -> str | None:
        top, files = _local(value), files_of(value, key)
        names = [path.relative_to(top).as_posix() if top.is_dir() else path.name for path in files]
        if len(files) == 1 and not top.is_dir():
            names = [""]
        if not files:
            return None
        if key.startswith(DATA) and sum(path.stat().st_size for path in files) > READ_WHOLE:
            sizes = [path.stat().st_size for path in files]
            return digest(list(zip(names, sizes, strict=True)))
        with ThreadPoolExecutor(THREADS) as pool:
            return digest(list(zip(names, pool.map(self._sum, files), strict=True)))

    def _sum(self, path: Path) -> str:
        about = path.stat()
        state, name = (about.st_size, about.st_mtime_ns, about.st_ino), str(path.absolute())
        known = self.known.get(name)
        content = known[-1] if known and known[:-1] == state else sha256_of(path)
        self.seen[name] = (*state, content)
        return content


def files_of(value: str, key: str) -> list[Path]:
    """Return the files that lie at the path of a setting."""
    top = _local(value)
    if not top.is_dir():
        return list(_expanded(top))
    files = sorted(path for path in top.rglob("*") if path.is_file())
    return [path for path in files if key.startswith(DATA) or path.suffix in MODEL_SUFFIXES]


def _local(value: str) -> Path:
    """Return a path, or the local copy of a hub id."""
    path = Path(value).expanduser()
    if path.exists() or value.count("/") != 1:
        return path
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "config.json", "open_clip_config.json"):
        file = try_to_load_from_cache(value, name)
        if isinstance(file, str):
            return Path(file).parent
    return path


def _expanded(path: Path) -> Iterator[Path]:
    """Yield a file, or the files of a pattern; whoever reads them refuses what is missing."""
    try:
        yield from [path] if path.is_file() else list(expand_pattern(str(path), "the path"))
    except (ValueError, OSError):
        return
