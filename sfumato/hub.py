"""Folders of the Hugging Face hub: from the local cache, or downloaded; and uploads."""

from collections.abc import Callable, Mapping, Sequence
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


def upload(repo: str, files: Mapping[str, Path | bytes], *, public: bool, message: str) -> str:
    """Put files into a repository of the hub, in one commit; return the repository's address.

    The token is the library's own: HF_TOKEN, or what `hf auth login` stored.

    Args:
        repo: made if it is not there.
        files: by their paths in the repository.
        public: whether all may see a repository that is made.

    Raises:
        ValueError: if the hub cannot be reached or refuses, saying what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    # The client's own, httpx or httpx2.
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        LocalTokenNotFoundError,
    )

    api = HfApi(library_name="sfumato")
    operations = [CommitOperationAdd(name, path_or_fileobj=file) for name, file in files.items()]
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.create_commit(repo, operations, commit_message=message)
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        code = error.response.status_code if isinstance(error, HfHubHTTPError) else 401
        told = {
            401: "no token is known to it, or an old one: run `hf auth login`, or set HF_TOKEN",
            403: "your token may not write there: check the name, and that it is a write token",
        }
        why = told.get(code, f"it answered {code}; try again later")
        raise ValueError(f"the hub refused the upload to {repo}: {why}") from error
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"the hub cannot be reached ({type(error).__name__}), so {repo} may lack the "
            "upload; check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and push again"
        ) from error
    return str(address)
