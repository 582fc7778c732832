"""`python -m sfumato`, as torchrun needs it."""

from sfumato.cli import main

main()
