"""Door of the networks from elsewhere: components, random U-Nets, LDM, NeMo and OpenCLIP files.

Other rooms import from this package only, never from its modules.
"""

from sfumato.models.origins.assembly import assemble_pipeline, write_settings
from sfumato.models.origins.conversion import write_json
from sfumato.models.origins.network_weights import (
    blank_network,
    check_start,
    check_whole,
    start_network,
    without_start,
)
from sfumato.models.origins.original import unlike_original, write_original
from sfumato.models.origins.unets import construct_unet, unet_settings

__all__ = [
    "assemble_pipeline",
    "blank_network",
    "check_start",
    "check_whole",
    "construct_unet",
    "start_network",
    "unet_settings",
    "unlike_original",
    "without_start",
    "write_json",
    "write_original",
    "write_settings",
]
