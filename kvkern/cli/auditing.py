"""The command that checks what was bought: audit."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kvkern
from kvkern.cli.app import (
    DEFAULT_STORE,
    INTEGRITY_ERROR,
    NO_VERDICT,
    DigestArgument,
    FormatOption,
    SaltOption,
    StoreOption,
    app,
    complain,
    existing,
    fail,
)
from kvkern.cli.loading import Attention, Producer, load
from kvkern.cli.view import Format, counted, fields, print_result, table, token_bar
from kvkern.errors import LayoutError

if TYPE_CHECKING:
    from kvkern.auditing import Audit

AuditModelOption = Annotated[str, typer.Option("--model", help="The model that published it.", show_default=False)]
InsistOption = Annotated[Producer | None, typer.Option("--producer", help="Refuse a document of any other.")]
AllOption = Annotated[bool, typer.Option("--all", help="The verdict: recompute every token (the default).")]
TokensOption = Annotated[int | None, typer.Option("--tokens", min=1, help="A spot check of so many random tokens.")]


@app.command()
def audit(
    digest: DigestArgument,
    model: AuditModelOption,
    everything: AllOption = False,
    tokens: TokensOption = None,
    store: StoreOption = DEFAULT_STORE,
    salt: SaltOption = "",
    producer: InsistOption = None,
    output: FormatOption = Format.table,
) -> None:
    """Recompute a document under the numeric contract and compare bits; exit code 2 if any differs.

    --all is the verdict: one prefill of the stored tokens. --tokens N is a spot check: it can miss a forgery, and says
    how likely. A document of producer stock promises no bits: it gets a report, no verdict, and exit code 3.

    Example: kvkern audit 3f9a2c71 --model smollm2
    """
    if everything and tokens is not None:
        raise LayoutError("--all and --tokens exclude each other: the verdict, or a spot check")
    existing(store).resolve(digest)
    network, _ = load(model, Attention.eager)
    from kvkern.auditing import audit as check
    from kvkern.model_patch.store import take_table

    opened = kvkern.Store(store)
    prefix = opened.open(digest, network, producer=producer and producer.value, salt=salt)
    if prefix.spec.producer == "contract":
        take_table(opened, prefix)
    start = time.perf_counter()
    with token_bar("recomputing") as progress:
        found = check(prefix, network, tokens, progress=progress)
    seconds = time.perf_counter() - start
    made_by = prefix.spec.producer
    data = {
        "digest": prefix.digest,
        "producer": made_by,
        **dataclasses.asdict(found),
        "miss_probability": found.miss_probability(),
        "seconds": seconds,
    }
    headers = ("token>", "layer>", "head>", "part", "channel>", "ulps>", "elements>")
    rows = [dataclasses.astuple(difference) for difference in found.differences]
    parts: list[Any] = [fields(_view(found, prefix.digest, made_by, seconds))]
    print_result(output, data, *parts, *([table(headers, rows)] if rows else []))
    if found.ok is None:
        complain(
            f"no verdict: producer {made_by!r} promises no bits; {found.differing:,} of {found.elements:,} elements "
            "differ from what the contract computes. Publish with --producer contract what an audit is to prove."
        )
        raise typer.Exit(NO_VERDICT)
    if not found.ok:
        first = found.differences[0]
        fail(
            f"{prefix.digest[:16]}: the stored KV is not what this model computes from the stored tokens: first at "
            f"token {first.token}, layer {first.layer}, head {first.head}, {first.part}, "
            f"{counted(first.ulps, 'ulp')} off",
            INTEGRITY_ERROR,
        )


def _view(found: Audit, digest: str, producer: str, seconds: float) -> dict[str, str]:
    if found.ok is None:
        verdict = f"no verdict: producer {producer!r} promises no bits; this is a report"
    elif not found.ok:
        verdict = "DIFFERENT"
    else:
        verdict = "the same bits" if found.is_verdict else "no difference among the checked tokens: a spot check"
    view = {
        "digest": digest,
        "checked": f"{found.checked:,} of {found.tokens:,} tokens, {found.elements:,} elements in {seconds:.2f} s",
        "differ": f"{found.differing:,}",
        "verdict": verdict,
    }
    if not found.is_verdict:
        view["missed"] = (
            f"{found.miss_probability():.1%} of forgeries with one inconsistent token, "
            f"{found.miss_probability(10):.1%} of those with ten; a forger needs only one"
        )
    return view
