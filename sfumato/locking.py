"""A folder is written by one process at a time."""

import fcntl
import sys
from pathlib import Path
from typing import IO


def lock(
    folder: Path, *, busy: str, unmade: str, failure: type[ValueError] = ValueError
) -> IO[str]:
    """Make a folder and hold it for this process alone, until what is returned is closed.

    A child that inherits the descriptor holds the folder for as long as it lives. Where the file
    system cannot lock, this is said on stderr and nothing is held.

    Args:
        busy: what to say if another process holds it.
        unmade: what to do if it cannot be made.

    Raises:
        failure: if another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise failure(f"the folder {folder} cannot be made ({error.strerror}); {unmade}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise failure(busy) from error
    except OSError as error:
        print(
            f"{folder}: this file system cannot lock ({error.strerror}), so two processes in one "
            "folder would not be noticed",
            file=sys.stderr,
        )
    return file
