"""Code of the user's, FILE.py:NAME or package.module:NAME, and addresses of scorers.

They are named on the command line. No run folder's word is taken for them.
"""

import importlib
import re
import string
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, urlsplit

from sfumato.files import digest, read_bytes, sha256_of

LONGEST = 300  # characters of another's message


def find_code(place: str) -> tuple[Path, str]:
    """Return the file and the name of a place; nothing of it is run.

    Raises:
        ValueError: if the place is no FILE.py:NAME or package.module:NAME, or is not there.
    """
    where, _, name = place.rpartition(":")
    if not (where and name.isidentifier()):
        raise ValueError(
            f"{place!r} does not name a function; write FILE.py:NAME, or package.module:NAME"
        )
    if _is_file(where):
        file = Path(where).expanduser()
        if not file.is_file():
            raise ValueError(f"{place!r}: there is no file {where}; give FILE.py:NAME")
        return file, name
    file = _module_file(where)
    if file is None:
        raise ValueError(
            f"{place!r}: no module {where} can be imported; install it, set PYTHONPATH, or give a "
            "file (FILE.py:NAME)"
        )
    return file, name


def load_code(place: str) -> object:
    """Run the file of a place, once in a process, and return what has the name there.

    Raises:
        ValueError: naming the line, if the file cannot be run, or has no such name.
    """
    file, name = find_code(place)
    where = place.rpartition(":")[0]
    try:
        module = _run(file) if _is_file(where) else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{place!r} cannot be loaded: {told(error, file)}") from error
    if name not in vars(module):
        names = [key for key, each in vars(module).items() if callable(each) and key[0] != "_"]
        raise ValueError(f"{file} has no {name}; it has {', '.join(names) or 'no function'}")
    return vars(module)[name]


def told(error: BaseException, file: Path) -> str:
    """Return what was raised, and the last line of the user's file that led there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(file)]
    line = own[-1].lineno if own else None
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError) and error.filename == str(file):
        line, text = error.lineno, error.msg
    at = f"{file} line {line}" if line else str(file)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}..."
    return f"{at} raised {type(error).__name__}{': ' if text else ''}{text}"


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where


def _run(file: Path) -> ModuleType:
    """Return the module of a file. What is run is what is read: no bytecode is, or is written."""
    name = f"_own_{digest([str(file.resolve()), sha256_of(file)])[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # last: a module beside it stands for no installed one
    module = ModuleType(name)
    module.__file__ = str(file)
    code = compile(read_bytes(file, "give another file"), str(file), "exec")
    sys.modules[name] = module
    try:
        exec(code, vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_file(module: str) -> Path | None:
    """Return the file of a module; `importlib.util.find_spec` would run the packages above it."""
    inside, spec = None, None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        if count > 1 and inside is None:
            return None
        name = ".".join(parts[:count])
        found = (finder.find_spec(name, inside) for finder in sys.meta_path)
        spec = next((each for each in found if each is not None), None)
        if spec is None:
            return None
        inside = spec.submodule_search_locations
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


@dataclass(frozen=True)
class Address:
    """Parts of a URL, as a connection takes them.

    Attributes:
        path: with the query, percent-encoded.
    """

    host: str
    port: int | None
    path: str
    is_secure: bool


def read_address(url: str, key: str) -> Address:
    """Return the parts of a URL.

    Args:
        key: of the setting, for messages.

    Raises:
        ValueError: if it is none of http or https, or has a name or a password.
    """
    if not any(letter.isspace() or not letter.isprintable() for letter in url):
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            host.encode("idna")
        except ValueError:  # no such port, brackets or host
            host, port, parts = "", None, urlsplit("")
        if host and parts.scheme in ("http", "https") and parts.username is None:
            path = f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}"
            return Address(host, port, quote(path, string.punctuation), parts.scheme == "https")
    shown = re.sub(r"^(\w+://)?.*@", r"\1***@", url, flags=re.DOTALL)
    raise ValueError(
        f"{key}={shown!r} is no address of a scorer; give http://HOST:PORT/PATH, or https://, "
        "without a name or a password"
    )
