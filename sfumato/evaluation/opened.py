"""Settings of a run that others may have made, with paths to where its files lie now."""

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from sfumato.compose import load_settings
from sfumato.conditions import check_allowed, is_own, is_path
from sfumato.config import EvaluateConfig, RewardFiles, SampleConfig, TrainConfig
from sfumato.config.saved import flatten
from sfumato.run.identity import changed, contents_of, read_notes, typed
from sfumato.training.folder import RunFolder

ROOMS = ("model", "reward", "validation")  # whose files a run needs after its training


@dataclass(frozen=True)
class OpenedRun:
    """A run and its settings.

    Attributes:
        settings: of the run; relative paths lead from the folder where the run was started.
        named: the paths that the user gave in place of the run's, by their settings.
        allowed: settings whose files need not be those that the run began with.
        unnamed: code and scorers of the run's reward, by their settings, which the user did not
            name: they are not taken from a run folder.
    """

    folder: RunFolder
    settings: TrainConfig
    named: Mapping[str, str]
    allowed: Collection[str]
    unnamed: Mapping[str, str]

    def contents(self, *sections: str) -> dict[str, str]:
        """Return the digests of the files in sections of the settings: model, reward.

        Files that the run did not begin with are said; where the user named them, refused.

        Raises:
            ValueError: naming those that the user named and did not allow.
        """
        path = self.folder.path
        contents = contents_of(self.settings, path, started=True, sections=sections)
        others = [key for key in changed(path, contents) if key not in self.allowed]
        if refused := [key for key in others if key in self.named]:
            shown = ", ".join(f"{key} = {self.named[key]!r}" for key in refused)
            raise ValueError(
                f"{shown}: {path} began with other files than those that lie there; name the same "
                f"files, or go on with these: allow_changed=[{','.join(refused)}]"
            )
        if others:
            print(
                f"{path} began with other files than those that lie now at {', '.join(others)}",
                file=sys.stderr,
            )
        return contents


def open_run(request: SampleConfig | EvaluateConfig) -> OpenedRun:
    """Read the settings of a run; paths that the request names replace the run's.

    Raises:
        ValueError: the run cannot be read, or named no such files.
    """
    folder = RunFolder(Path(str(request.run)))
    settings = load_settings(folder.config)
    if settings.objective.trains == "autoencoder":
        raise ValueError(
            f"{folder.path} trained an autoencoder, which makes no images from prompts; another "
            f"run can train a model on its latents: model.autoencoder={folder.export}/autoencoder"
        )
    if settings.objective.trains == "reward":
        raise ValueError(
            f"{folder.path} trained a reward, which makes no images; another run can learn "
            f"from it: reward=clip reward.pretrained={folder.export}/reward"
        )
    check_allowed(request.allow_changed, settings)
    # A run may come from a stranger: whether to trust pickles is for the user to say.
    settings.model.allow_pickle = request.allow_pickle
    settings.model.variant = request.model.variant or settings.model.variant
    named, started = named_paths(request), read_notes(folder.path).started
    unused, unnamed = dict(named), {}
    texts = [*_texts(settings.model, "model"), *_texts(settings.reward, "reward")]
    for name, reward in settings.validation.rewards.items():
        texts += _texts(reward, f"validation.rewards.{name}")
    for key, owner, name in texts:
        if key in named:
            owner[name] = unused.pop(key)
        elif is_own(key):
            unnamed[key] = owner[name]
        elif is_path(key, owner[name]) or key == "model.network.config":
            owner[name] = _from(started, owner[name])
    for key, value in unused.items():
        raise ValueError(
            f"{key}={value!r} says where files lie now, but the settings of {folder.path} name no "
            f"files by {key}; leave it out"
        )
    return OpenedRun(folder, settings, named, request.allow_changed, unnamed)


def named_paths(request: SampleConfig | EvaluateConfig) -> dict[str, str]:
    """Return the paths of model and reward that the user gave, by their settings."""
    rooms = {key: value for key, value in asdict(request).items() if key in ROOMS}
    if isinstance(request, EvaluateConfig) and not isinstance(request.reward, RewardFiles):
        del rooms["reward"]  # another reward, and not where the run's lies
    given, others = flatten(rooms), ("model.variant", "reward.kind")
    return {key: text for key, text in given.items() if text and key not in others}


def _texts(settings: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield key, owner and name of each text below some settings."""
    for name, value in vars(settings).items():
        entries = value if isinstance(value, dict) else {"": value}
        for entry, inner in entries.items():
            key = ".".join(part for part in (prefix, name, entry) if part)
            if is_dataclass(inner):
                yield from _texts(inner, key)
            elif isinstance(value, str):
                yield typed(key), vars(settings), name


def _from(started: str | None, value: str) -> str:
    """Return a path from the folder where a run was started, if something lies there."""
    path = Path(started or ".", value)
    return str(path) if started and path.exists() else value
