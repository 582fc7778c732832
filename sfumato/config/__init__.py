"""Settings of every command: each default, choice and bound stands here, once.

conf/ is checked against these classes. `???` marks what the user must state.
"""

from sfumato.config.commands import *  # noqa: F403
from sfumato.config.fields import *  # noqa: F403
from sfumato.config.objectives import *  # noqa: F403
from sfumato.config.rewards import *  # noqa: F403
from sfumato.config.train import *  # noqa: F403
