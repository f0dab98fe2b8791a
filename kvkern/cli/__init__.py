"""The command line: `kvkern` and `python -m kvkern.cli`."""

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as missing:
    raise SystemExit(f"kvkern: the command line needs {missing.name}: pip install 'kvkern[cli]'") from None

from kvkern.cli.app import app, main

# Importing them adds their commands; --help lists these in this order.
from kvkern.cli import models  # noqa: F401 isort: skip
from kvkern.cli import auditing  # noqa: F401 isort: skip
from kvkern.cli import stores  # noqa: F401 isort: skip
from kvkern.cli import host  # noqa: F401 isort: skip

__all__ = ["app", "main"]
