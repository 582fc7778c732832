"""What is said of prompts that are too long."""

from typing import Any


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
