"""The application: its errors and exit codes, and what its commands share. They import torch when they run."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import kvkern
from kvkern.cli.view import Format, printable
from kvkern.errors import IntegrityError, KvkernError, KVMismatchError, LayoutError

if TYPE_CHECKING:
    from kvkern.layout import BlockStore

USER_ERROR, INTEGRITY_ERROR, NO_VERDICT = 1, 2, 3
ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"
_EXTRAS = {"gguf": "demo", "accelerate": "demo", "transformers": "hf"}
# typer carries its own click, whose exceptions it does not export.
_UsageError: Any = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """Turn errors into one message on stderr and an exit code: 1 for the user's, 2 for damaged bytes or bits."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _exit_codes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _exit_codes(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
            return super().invoke(ctx)


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.exit_code = USER_ERROR
        raise
    except KvkernError as error:
        is_damage = isinstance(error, (IntegrityError, KVMismatchError))
        fail(str(error), INTEGRITY_ERROR if is_damage else USER_ERROR)
    except ImportError as error:
        package = (error.name or "").partition(".")[0] or next((name for name in _EXTRAS if name in str(error)), None)
        if package not in _EXTRAS:
            raise
        fail(f"this command needs {package}: pip install 'kvkern[{_EXTRAS[package]}]'", USER_ERROR)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), USER_ERROR)


def fail(message: str, code: int) -> NoReturn:
    """End the command with a message on stderr."""
    complain(f"error: {message}")
    raise typer.Exit(code) from None


def complain(text: str) -> None:
    """Say something on stderr."""
    typer.echo(f"kvkern: {printable(text)}", err=True)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Compute a document's KV cache once, publish it, and let any number of readers attend to it in place.",
    epilog="Exit codes: 0 fine, 1 your input, 2 damaged bytes or bits that differ, 3 no verdict (audit of a document "
    "that promises no bits).",
)  # fmt: skip

StoreOption = Annotated[Path, typer.Option("--store", help="Directory of the store.")]
FormatOption = Annotated[Format, typer.Option("--format", help="A table, or one JSON document.")]
SaltOption = Annotated[str, typer.Option(help="Keeps documents of different owners apart.")]
DigestArgument = Annotated[str, typer.Argument(metavar="DIGEST", help="8 hex digits of it or more.")]
DEFAULT_STORE = Path("kv-store")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(kvkern.__version__)
        raise typer.Exit()


def existing(root: Path) -> BlockStore:
    """Open a store that is there: reading must not leave an empty directory behind."""
    if not (root / "format").exists() and not (root / "manifests").is_dir():
        raise LayoutError(f"no store at {root}: publish a document first, or give another directory with --store")
    from kvkern.layout import BlockStore

    return BlockStore(root)


def main() -> None:
    """Run the command line: the `kvkern` command."""
    app(prog_name="kvkern")
