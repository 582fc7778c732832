"""Identity by content: SHA-256 of the files that settings name, remembered by size and time."""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sfumato.config import TrainConfig
from sfumato.config.saved import flatten
from sfumato.data.paths import expand_pattern
from sfumato.files import digest, sha256_of, write_text
from sfumato.records import read_record

MEMORY = "contents.json"  # in a run folder
MODEL_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin", ".ckpt", ".pt", ".pth")
MODELS = ("pretrained", "processor", "autoencoder", "text_encoder", "tokenizer", "scheduler")
STARTS = ("model.lora.start", "model.network.from_pretrained")  # read before the first step
READ_WHOLE = 64 * 2**30  # bytes of data; of more, only names and sizes are compared


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
    rooms = {name: value for name, value in asdict(config).items() if name in sections}
    named = {typed(key): value for key, value in flatten(rooms).items() if is_path(key, value)}
    return digests({k: v for k, v in named.items() if not (started and k in STARTS)}, run)


def read_notes(run: Path) -> "Notes":
    """Return what is noted of a run's files; nothing for runs of earlier versions."""
    advice = "remove it; the files that the run reads are then taken as they are"
    file = run / MEMORY
    return read_record(file, Notes, advice) if file.is_file() else Notes()


def write_began(run: Path, contents: Mapping[str, str]) -> None:
    """Note what a run began with, and the folder from which its relative paths lead."""
    notes = read_notes(run)
    new = replace(notes, began={**notes.began, **contents}, started=str(Path.cwd()))
    if notes != new:
        _write(run, new)


def changed(run: Path, contents: Mapping[str, str]) -> list[str]:
    """Return the settings at whose paths other files lie than those that the run began with."""
    began = read_notes(run).began
    return [key for key, content in contents.items() if began.get(key, content) != content]


def _write(run: Path, notes: "Notes") -> None:
    if os.access(run, os.W_OK):  # a run of somebody else may be read alone
        write_text(run / MEMORY, json.dumps(asdict(notes)) + "\n")


@dataclass(frozen=True)
class Notes:
    """contents.json of a run folder."""

    files: dict[str, tuple[int, int, int, str]] = field(default_factory=dict)  # see _Sums, by path
    began: dict[str, str] = field(default_factory=dict)  # digests by their settings
    started: str | None = None  # the folder from which relative paths lead


def typed(key: str) -> str:
    """Return the key that a user types for a setting; parts of a reward are nested once more."""
    return key.replace(".reward.", ".") if key.startswith("reward.parts.") else key


def is_path(key: str, value: object) -> bool:
    """Say whether a setting names files whose content counts."""
    room, _, name = key.rpartition(".")
    if not (isinstance(value, str) and value) or key.startswith("data.shards"):
        return False
    if key in STARTS or key in ("data.prompts", "validation.prompts"):
        return True
    if room.startswith(("model", "reward")):
        return name in MODELS or (room.startswith("model.merge.") and name == "path")
    return name == "path" and room.startswith(("data.images", "validation.images"))


def digests(named: Mapping[str, str], run: Path) -> dict[str, str]:
    """Return the digest of each path that exists, by its key; a run folder remembers the sums."""
    notes = read_notes(run)
    sums = _Sums(notes.files)
    contents = {key: sums.digest_of(value, key) for key, value in named.items()}
    if sums.seen.items() - sums.known.items():
        _write(run, replace(notes, files=sums.known | sums.seen))
    return {key: value for key, value in contents.items() if value is not None}


class _Sums:
    """SHA-256 sums of files; a file of the same size, time and inode is not read again."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = dict(known)
        self.seen: dict[str, Any] = {}

    def digest_of(self, value: str, key: str) -> str | None:
        top = _local(value)
        is_data = key.startswith(("data.", "validation."))
        if top.is_dir():
            files = [
                path
                for path in sorted(top.rglob("*"))
                if path.is_file() and (is_data or path.suffix in MODEL_SUFFIXES)
            ]
            names: Sequence[str] = [path.relative_to(top).as_posix() for path in files]
        else:
            files = list(_expanded(top))
            names = [path.name for path in files] if len(files) > 1 else [""]
        if not files:
            return None
        if is_data and sum(path.stat().st_size for path in files) > READ_WHOLE:
            sizes = [path.stat().st_size for path in files]
            return digest(list(zip(names, sizes, strict=True)))
        with ThreadPoolExecutor(4) as pool:
            return digest(list(zip(names, pool.map(self._sum, files), strict=True)))

    def _sum(self, path: Path) -> str:
        about = path.stat()
        state, name = (about.st_size, about.st_mtime_ns, about.st_ino), str(path.absolute())
        known = self.known.get(name)
        content = known[-1] if known and known[:-1] == state else sha256_of(path)
        self.seen[name] = (*state, content)
        return content


def _local(value: str) -> Path:
    """Return a path, or the local copy of a hub id."""
    path = Path(value).expanduser()
    if path.exists() or value.count("/") != 1:
        return path
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "config.json"):
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
