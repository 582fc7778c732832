"""Text encoders: what is said of prompts that are too long, and what FSDP must leave as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def recording_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let sharded text encoders still return their hidden states.

    transformers 5 looks up what a model can record by the name of its class, which `fully_shard`
    changes.
    """
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as REGISTRY
    except ImportError:  # of another version, which looks elsewhere
        yield
        return
    known: list[tuple[Any, Any]] = [(module, REGISTRY.get(module)) for module in modules]  # type: ignore[arg-type]
    yield
    for module, recorded in known:
        if recorded:
            REGISTRY[module] = recorded


def cut_prompt(tokenizer: Any, prompts: list[str], limit: int) -> str | None:
    """Return what to say of the longest prompt if it has more tokens than are read."""
    counts = [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids]
    if max(counts) <= limit:
        return None
    long = prompts[counts.index(max(counts))]
    return (
        f"prompts are cut at {limit} tokens; the first one cut has {max(counts)}: {long[:80]!r} "
        "(said once)"
    )
