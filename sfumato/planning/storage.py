"""Size of one sample in bytes: as a picture in a tar, and as cached tensors."""

from sfumato.planning.blueprint import Blueprint

TAR_BLOCK = 512  # bytes: every member has a header of one, and ends at a multiple
CACHE_ITEM = 2  # bytes of a cached number: precache.dtype = float16
WORD = 8  # bytes of an index


def raw_bytes(image_bytes: int) -> int:
    """Return the bytes of a sample in a tar: its picture, caption and record, with headers.

    Args:
        image_bytes: of the picture and the caption's text, which has a block of its own.
    """
    picture = -(-image_bytes // TAR_BLOCK) * TAR_BLOCK
    return picture + 5 * TAR_BLOCK  # three headers, and a block each for caption and record


def moment_bytes(blueprint: Blueprint, *, mirrored: bool) -> int:
    """Return the bytes of a sample's mean and log-variance; twice if mirrored ones are cached."""
    channels, height, width = blueprint.latent
    return 2 * channels * height * width * CACHE_ITEM * (2 if mirrored else 1)


def text_bytes(blueprint: Blueprint) -> int:
    """Return the bytes of one caption's states, and of its index among all captions."""
    tensors = blueprint.model.blank_prompts(1).tensors.values()
    return CACHE_ITEM * sum(tensor.numel() for tensor in tensors) + WORD
