"""Door of the LoRA files: reading, merging, continuing and writing them.

Other rooms import from this package only, never from its modules.
"""

from sfumato.models.lora.apply import (
    check_lora_files,
    fuse_elsewhere,
    merge_files,
    save_adapters,
    start_adapters,
)
from sfumato.models.lora.kohya import KohyaLayout, by_block
from sfumato.models.lora.read import find_lora

__all__ = [
    "KohyaLayout",
    "by_block",
    "check_lora_files",
    "find_lora",
    "fuse_elsewhere",
    "merge_files",
    "save_adapters",
    "start_adapters",
]
