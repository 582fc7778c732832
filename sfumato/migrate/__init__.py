"""Door of migration: configs of NeMo-Aligner, NeMo and TRL become recipes.

Other rooms import from this package only, never from its modules.
"""

from sfumato.migrate.recipe import migrate

__all__ = ["migrate"]
