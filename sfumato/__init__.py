"""Train, fine-tune and align text-to-image diffusion models.

`train`, `load`, `sample`, `score` and `evaluate` are for Python (docs/python.md). They are imported
when they are first used, so that `import sfumato` stays quick and imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.api import Opened, RunFolder, evaluate, load, sample, score, train

__version__ = "0.1.0"
__all__ = ["Opened", "RunFolder", "evaluate", "load", "sample", "score", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return vars(import_module("sfumato.api"))[name]
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
