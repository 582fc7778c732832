"""Settings of the commands around training, under their former name."""

from sfumato.config import *  # noqa: F403
