"""`python -m kvkern.cli`."""

from kvkern.cli import main

main()
