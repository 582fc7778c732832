"""Printer of docs/coming_from_NAME.md: `python -m sfumato.migrate NAME`."""

import sys

from sfumato.migrate.table import markdown

print(markdown(sys.argv[1]), end="")
