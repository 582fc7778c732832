"""Trackers of metrics and images: metrics.jsonl, TensorBoard and, on request, Weights & Biases."""

import importlib.util
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from sfumato.config import TrainingConfig
from sfumato.files import write_text
from sfumato.training.folder import RunFolder, json_lines, read_rows


def check_trackers(config: TrainingConfig) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ValueError: naming the package.
    """
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"training.wandb_project = {config.wandb_project!r} needs the wandb package: pip "
            "install 'sfumato[wandb]', or leave it null"
        )


@final
class Trackers:
    """Writer of metrics and images on the main process; on the others every call does nothing.

    Args:
        first_step: the first that will be logged; later rows of a killed run are removed.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: TrainingConfig,
        settings: Mapping[str, Any],
        *,
        first_step: int,
        active: bool,
    ) -> None:
        self._active = active
        self._file: Any = None
        self._board: Any = None
        self._wandb: Any = None
        if not active:
            return
        if folder.metrics.exists():
            earlier = (row for row in read_metrics(folder) if row["step"] < first_step)
            write_text(folder.metrics, json_lines(earlier))
        self._file = folder.metrics.open("a", encoding="utf-8")
        if config.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(folder.tensorboard), purge_step=first_step)
        if config.wandb_project:
            self._wandb = _start_wandb(config.wandb_project, folder, settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalars of one optimiser step; a norm that overflowed under fp16 is left out."""
        if not self._active:
            return
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._file.write(json_lines([{"step": step, **metrics}]))
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def images(
        self,
        step: int,
        name: str,
        images: Float[Tensor, "b 3 H W"],
        captions: Sequence[str],
    ) -> None:
        """Record images in [0, 1] with their captions, in every tracker that can show them."""
        if not self._active:
            return
        if self._board is not None:
            self._board.add_images(name, images.numpy(), step)
            lines = "\n".join(f"{i}. {caption}" for i, caption in enumerate(captions))
            self._board.add_text(f"{name}/captions", lines, step)
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            pictures = [
                wandb.Image(image.permute(1, 2, 0).numpy(), caption=caption)
                for image, caption in zip(images, captions, strict=True)
            ]
            self._wandb.log({name: pictures}, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: RunFolder) -> list[dict[str, int | float]]:
    """Return the rows of metrics.jsonl that have a step."""
    return [row for row in read_rows(folder.metrics) if isinstance(row.get("step"), int)]


def _start_wandb(project: str, folder: RunFolder, settings: Mapping[str, Any]) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    note = folder.path / "wandb_id"  # two folders may have one name
    if not note.exists():
        write_text(note, secrets.token_hex(8))
    return wandb.init(
        project=project,
        name=folder.path.name,
        id=note.read_text(),
        dir=str(folder.path),
        config=dict(settings),
        resume="allow",
    )
