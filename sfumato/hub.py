"""Folders of the Hugging Face hub: from the local cache, or downloaded."""

from collections.abc import Callable, Sequence
from pathlib import Path


def fetch(
    name: str,
    setting: str,
    patterns: Sequence[str],
    *,
    unwanted: Sequence[str] = (),
    kind: str = "model",
    complete: Callable[[Path], bool] = Path.is_dir,
) -> Path:
    """Return the folder of a Hugging Face hub id: from the local cache, or downloaded.

    Args:
        name: the hub id.
        setting: whose value it is, for messages.
        patterns: of the files that are needed; `unwanted` of those not to download.
        kind: model or dataset.
        complete: whether a folder of the cache has all that is needed.

    Raises:
        ValueError: neither the cache nor the hub has it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    request = {"repo_type": kind, "allow_patterns": list(patterns)}
    try:
        try:
            cached = Path(snapshot_download(name, local_files_only=True, **request))
            if complete(cached):
                return cached
        except LocalEntryNotFoundError:
            pass
        return Path(snapshot_download(name, ignore_patterns=list(unwanted), **request))
    except (OSError, ValueError) as error:  # the hub's own errors are of both kinds
        raise ValueError(
            f"{setting} = {name!r} is no folder here and not in the hub's local cache, and it "
            f"could not be downloaded ({type(error).__name__}); give a folder, or check the id "
            "and the network"
        ) from error
