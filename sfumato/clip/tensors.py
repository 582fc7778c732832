"""Files of a model's weights: one, or the shards that an index names."""

from collections.abc import Sequence
from pathlib import Path

from sfumato.clip.tensor_files import PICKLED
from sfumato.files import read_object
from sfumato.hub import fetch

FORMS = (".safetensors", ".pt")  # of a published file; the first is preferred


def weight_files(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Return the files of the first of some names that a folder has; none if it has none.

    Args:
        names: of files, such as model.safetensors; its shards are in model.safetensors.index.json.

    Raises:
        ValueError: an index is damaged, or names a file that is missing.
    """
    for name in names:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        shards = read_object(index, "download the model again").get("weight_map")
        named = set(shards.values()) if isinstance(shards, dict) else set()
        files = [folder / str(each) for each in sorted(map(str, named))]
        if not files or not all(file.parent == folder and file.is_file() for file in files):
            raise ValueError(f"{index} names files that are not there; download the model again")
        return tuple(files)
    return ()


def published_file(name: str, stem: str, beside: Sequence[str] = ()) -> Path:
    """Return the published file of a reward's weights, downloaded if need be.

    Args:
        name: the file, its folder or its hub id, as reward.pretrained gives it.
        stem: of the file's name in a folder or on the hub.
        beside: other files that are needed from there.

    Raises:
        ValueError: the folder lacks the file, or the hub cannot be read.
    """
    path, names = Path(name).expanduser(), [f"{stem}{form}" for form in FORMS]
    if path.is_file() or path.suffix in (*PICKLED, FORMS[0]):
        return path

    def found(folder: Path) -> list[Path]:
        return [folder / each for each in names if (folder / each).is_file()]

    if not path.is_dir():
        path = fetch(
            name, "reward.pretrained", [*names, *beside], complete=lambda each: bool(found(each))
        )
    if not found(path):
        raise ValueError(
            f"reward.pretrained = {name!r} has no {' or '.join(names)}; give the file, or the "
            "folder or hub id that has it"
        )
    return found(path)[0]
