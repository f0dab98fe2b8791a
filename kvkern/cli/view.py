"""How the command line looks: tables, fields, progress, and numbers in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvkern.cli.demo import Comparison, Demo, Times


class Format(StrEnum):
    """How a command prints its result."""

    table = "table"
    json = "json"


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Spin on a terminal; yields a function that changes the text."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with Console(stderr=True).status(text) as status:
        yield status.update


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar of bytes on a terminal; yields what the library calls with (done, total)."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def token_bar(text: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar of tokens on a terminal; yields what the library calls with (done, total)."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_result(output: Format, data: Any, *view: Any) -> None:
    """Print `data` as one JSON document, or the view."""
    if output is Format.json:
        typer.echo(json.dumps(data, indent=2, default=str))
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    with console.capture() as captured:
        for part in view:
            console.print(part)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Lay out rows; a header that ends in `>` is right-justified."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        grid.add_column(header.rstrip(">"), justify="right" if header.endswith(">") else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(f"{cell:,}" if type(cell) is int else printable(str(cell))) for cell in row))
    return grid


def printable(text: str) -> str:
    """Escape what a terminal would obey or could not encode: names in a store are other people's."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def fields(values: Mapping[str, Any]) -> Table:
    """Lay out names and values, one pair a line."""
    grid = table(("", ""), values.items())
    grid.show_header = False
    return grid


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings under dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def sized(count: int) -> str:
    """Say a number of bytes in decimal units."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def counted(count: int, noun: str) -> str:
    """Say how many there are of a noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def dialogue(questions: Iterable[str], answers: Iterable[str]) -> str:
    """Set questions and answers below each other."""
    pairs = zip(questions, answers, strict=True)
    return "\n\n".join(f"Q: {question}\nA: {answer}" for question, answer in pairs)


def demo_view(found: Demo) -> list[Any]:
    """Return the parts of what `kvkern demo` prints."""
    size = f"{counted(found.blocks, 'block')} of {sized(found.payload_bytes)} in the store"
    about = {
        "host": found.host,
        "document": f"{found.tokens:,} tokens of Python's own help, {size}",
        "digest": found.digest,
    }
    hashes = {"SHA-256 of stock's logits": found.stock_sha256, "SHA-256 of kvkern's logits": found.kvkern_sha256}
    headers = ("kvkern against stock eager, as 16-bit words", "compared>", "differ>", "Bits")
    rows = [(c.what, c.count, c.differ, _bits(found, c)) for c in found.comparisons]
    bits = [table(headers, rows), fields(hashes)]
    said = dialogue(found.questions, (" ".join(text.split()) for text in found.answers.texts))
    return [fields(about), "", said, "", *bits, "", _times(found.times), "", *_in_words(found)]


def _bits(found: Demo, comparison: Comparison) -> str:
    if comparison.differ == 0:
        return "equal"
    return "DIFFER" if found.follows or not comparison.is_computed else "not comparable on this host"


def _times(t: Times) -> Table:
    pairs = [
        ("get the document: stock reads it, kvkern opens it", t.stock_prefill, t.first_open),
        ("get it again: stock reads it, kvkern opens it", t.stock_prefill, t.later_open),
        ("read the document (prefill)", t.stock_prefill, t.kvkern_prefill),
        ("decode one token, one reader", t.stock_step, t.kvkern_step),
    ]
    rows = [(what, f"{a * 1e3:,.1f} ms", f"{b * 1e3:,.1f} ms", f"{a / b:,.1f}x") for what, a, b in pairs]
    return table(("time", "stock eager>", "kvkern>", "ratio>"), rows)


def _in_words(found: Demo) -> list[str]:
    t, logits = found.times, [c for c in found.comparisons if c.what.startswith("logits")]
    differ, count = sum(c.differ for c in logits), sum(c.count for c in logits)
    lines = [
        f"Stock read the document in {t.stock_prefill:.2f} s. kvkern opened it in {t.first_open:.2f} s the first time, "
        f"with every byte and the weights through SHA-256, and in {t.later_open:.3f} s after that.",
        f"{count:,} logits of {found.steps} greedy steps: {differ:,} differ from stock eager.",
    ]
    if not found.follows:
        lines.append(f"Logits are not comparable on this host: {found.reason}.")
    return lines
