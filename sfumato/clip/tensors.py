"""Files of a model's weights: one, or the shards that an index names."""

from collections.abc import Sequence
from pathlib import Path

from sfumato.files import read_object


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
