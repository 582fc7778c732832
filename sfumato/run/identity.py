"""Identity by content: SHA-256 of the files that settings name, remembered by size and time."""

import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sfumato.conditions import ANY, STARTS, is_own, named_files
from sfumato.config import RewardConfig, RewardedConfig, TrainConfig, WeightedRewardConfig
from sfumato.data.copies import copy_of, copy_of_folder, is_folder_address
from sfumato.data.paths import addresses_of, expand_pattern
from sfumato.data.store import is_address
from sfumato.files import digest, sha256_of, write_text
from sfumato.records import read_record
from sfumato.rewards.code import find_code

MEMORY = "contents.json"  # in a run folder
MODEL_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin", ".ckpt", ".pt", ".pth")
# State how a file's weights are meant.
BESIDE = ("adapter_config.json", "open_clip_config.json", "med_config.json")
# What a tokenizer or an image processor reads of a folder, which may get weights later.
PROCESSOR = re.compile(
    r"(.*token.*|vocab|.*processor_config|open_clip_config)\.json|(vocab|merges)\.txt|.+\.model"
)
DATA = ("data.", "validation.")  # settings of pictures and prompts
# What is measured stays the same.
SCALING = ("scale", "score", "dtype", "gradient_checkpointing", "timeout", "cache", "crop")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "preprocessor_config.json")
THREADS = 4
READ_WHOLE = 64 * 2**30  # bytes of data; of more, only names and sizes are compared


def contents_of(
    config: TrainConfig,
    run: Path,
    *,
    started: bool = False,
    sections: Collection[str] = ("model", "reward", "data", "validation", "optimizer"),
) -> dict[str, str]:
    """Return a digest of what lies at each path that the settings name.

    Equal content at another path has the same digest. A hub id stands for its local copy; what
    does not exist has no digest. Prepared folders are left out, as their index has SHA-256 sums.

    Args:
        run: the run folder, which remembers the SHA-256 of unchanged files.
        started: leave out the weights that a run needs only to begin.
        sections: of the settings; the files of other sections are not looked at.
    """
    rooms = tuple(f"{section}." for section in sections)
    named = {k: v for k, v in named_files(config).items() if k.startswith(rooms)}
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
        write_text(run / MEMORY, json.dumps(asdict(notes)) + "\n", shared=True)


@dataclass(frozen=True)
class Notes:
    """contents.json of a run folder."""

    files: dict[str, tuple[int, int, int, str]] = field(default_factory=dict)  # _state and SHA-256
    began: dict[str, str] = field(default_factory=dict)  # digests by their settings
    started: str | None = None  # the folder from which relative paths lead


def typed(key: str) -> str:
    """Return the key that a user types for a setting; parts of a reward are nested once more."""
    return key.replace(".reward.", ".") if key.startswith("reward.parts.") else key


def digests(named: Mapping[str, str], run: Path) -> dict[str, str]:
    """Return the digest of each path that exists, by its key; a run folder remembers the sums."""
    notes = read_notes(run)
    sums: dict[str, Any] = dict(notes.files)
    contents = {key: _digest_of(value, key, sums) for key, value in named.items()}
    if sums != notes.files:
        _write(run, replace(notes, files=sums))
    return {key: value for key, value in contents.items() if value is not None}


def repeated_pictures(config: TrainConfig, run: Path) -> tuple[int, int]:
    """Return how many validation pictures are of the same bytes as training's, and of how many."""
    known, named, rooms = read_notes(run).files, named_files(config), []
    for room in ("validation.images", "data.images"):
        own = ((key, value) for key, value in named.items() if key.startswith(room))
        paths = [path for k, v in own for path in _paths_of(v, k) if not path.endswith(".txt")]
        rooms.append({known[path][-1] for path in paths if path in known})
    return len(rooms[0] & rooms[1]), len(rooms[0])


def trained_rewards(config: TrainConfig, contents: Mapping[str, str]) -> list[str]:
    """Return the names of held-out rewards that training learns from too, also at other paths."""
    reward = config.reward
    trained: dict[str, RewardConfig] = {"reward": reward}
    if isinstance(reward, WeightedRewardConfig):
        parts = reward.parts.items()
        trained = {f"reward.parts.{name}": part.reward for name, part in parts if part.weight}
    if not isinstance(config.objective, RewardedConfig):
        trained = {}
    known = [_measure(each, key, contents) for key, each in trained.items()]
    held_out = config.validation.rewards.items()
    measures = {n: _measure(each, f"validation.rewards.{n}", contents) for n, each in held_out}
    return [name for name, measure in measures.items() if measure in known]


def _measure(reward: RewardConfig, key: str, contents: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that say what a reward measures, up to a scale."""
    settings = {k: contents.get(f"{key}.{k}", v) for k, v in asdict(reward).items()}
    return {k: v for k, v in settings.items() if k not in SCALING}


def _is_data(key: str) -> bool:
    return key.startswith(DATA) and not key.startswith("validation.rewards.")


def _digest_of(value: str, key: str, sums: dict[str, Any]) -> str | None:
    """Return the digest of a path; a file as `sums` has it (size, time, inode) is not read.

    Code is its file and the name in it; a scorer is its address.
    """
    if is_own(key) and key.endswith(".url"):
        return digest(value)
    files = {path: state for path in _paths_of(value, key) if (state := _state(path))}
    if not files:
        return None
    if _is_code(key):
        ((file, state),) = files.items()
        if sums.get(file, ())[:-1] != state:
            sums[file] = (*state, sha256_of(Path(file)))
        return digest([(value.rpartition(":")[2], sums[file][-1])])
    top = _local(value, key).absolute()
    names = [path[len(str(top)) + 1 :] if top.is_dir() else Path(path).name for path in files]
    names = names if top.is_dir() or len(names) > 1 else [""]
    if _is_data(key) and sum(size for size, *_ in files.values()) > READ_WHOLE:
        return digest([(name, state[0]) for name, state in zip(names, files.values(), strict=True)])
    others = [path for path, state in files.items() if sums.get(path, ())[:-1] != state]
    with ThreadPoolExecutor(THREADS) as pool:
        for path, found in zip(others, pool.map(sha256_of, map(Path, others)), strict=True):
            sums[path] = (*files[path], found)
    return digest([(name, sums[path][-1]) for name, path in zip(names, files, strict=True)])


def _paths_of(value: str, key: str) -> list[str]:
    """Return what lies at the path of a setting, hidden files left out, as nothing reads them."""
    if _is_code(key):
        with suppress(ValueError):
            return [str(find_code(value)[0].absolute())]
        return []
    top, is_data = _local(value, key).absolute(), _is_data(key)
    if is_address(value) and not top.is_dir():
        named = addresses_of(value, key) if is_data else []
        return [str(copy_of(each, key)) for each in named]
    if top.is_dir():
        paths: list[str] = []
        real: set[str] = set()  # a link may lead back
        for folder, inner, names in os.walk(top, followlinks=not is_data):
            is_new = os.path.realpath(folder) not in real
            real.add(os.path.realpath(folder))
            inner[:] = [name for name in inner if is_new and not name.startswith(".")]
            shown = (name for name in names if not name.startswith("."))
            paths += [f"{folder}/{n}" for n in shown if is_data or _counts(n, key)]
        return sorted(paths, key=lambda path: path.split("/"))
    with suppress(ValueError, OSError):  # whoever reads them refuses what is missing
        found = [top] if top.is_file() else list(expand_pattern(str(top), "the path"))
        beside = [] if is_data else [top.parent / name for name in BESIDE]
        return [str(path.absolute()) for path in [*found, *(b for b in beside if b.is_file())]]
    return []


def _counts(name: str, key: str) -> bool:
    """Say whether a file in the folder of a model is read by who reads the setting."""
    if key.endswith(".processor"):
        return PROCESSOR.fullmatch(name) is not None
    return name.endswith(MODEL_SUFFIXES)


def _is_code(key: str) -> bool:
    return is_own(key) and key.endswith(".path")


def _state(path: str) -> tuple[int, int, int] | None:
    """Return size, time and inode of a file; None if it is none, such as a link to nothing."""
    with suppress(OSError):
        about = os.stat(path)  # noqa: PTH116, quicker by the million
        if stat.S_ISREG(about.st_mode):
            return about.st_size, about.st_mtime_ns, about.st_ino
    return None


def _local(value: str, key: str) -> Path:
    """Return a path, or the local copy of a folder in a store, a hub id, or HUB_ID/NAME.*."""
    if _is_data(key) and is_folder_address(value):
        return copy_of_folder(value, key)
    path, parts = Path(value).expanduser(), value.split("/")
    is_pattern = parts[-1].endswith(ANY)
    if (path.parent if is_pattern else path).exists() or len(parts) != 2 + is_pattern:
        return path
    from huggingface_hub import try_to_load_from_cache

    names = ["model_index.json", "config.json", "open_clip_config.json", *TOKENIZERS]
    if is_pattern:
        names = [parts[2].replace(ANY, suffix) for suffix in MODEL_SUFFIXES]
    with suppress(ValueError):  # no hub has such an id
        for name in names:
            file = try_to_load_from_cache("/".join(parts[:2]), name)
            if isinstance(file, str):
                return Path(file).parent.joinpath(*parts[2:])
    return path
