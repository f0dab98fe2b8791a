"""Commands that run a model: demo, publish, ask."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import kvkern
from kvkern.cli.app import (
    DEFAULT_STORE,
    INTEGRITY_ERROR,
    ISA_VARIABLE,
    DigestArgument,
    FormatOption,
    SaltOption,
    StoreOption,
    app,
    existing,
    fail,
)
from kvkern.cli.loading import Attention, Check, Producer, load, quiet_transformers, read_text
from kvkern.cli.view import Format, counted, demo_view, dialogue, fields, print_result, progress_bar, sized, working

if TYPE_CHECKING:
    from kvkern.model_patch.recompute import Recomputed

# oneDNN orders its sums by instruction set: under AMX not as the contract does.
_CONTRACT_ISA = "AVX512_CORE_BF16"

DemoStoreOption = Annotated[Path | None, typer.Option("--store", help="Directory of the store; temporary if left out.")]


ProducerOption = Annotated[Producer, typer.Option(help="stock: as the model runs; contract: every bit is fixed.")]
LengthOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
AttentionOption = Annotated[Attention, typer.Option(help="What attends; kvkern has the bits of eager.")]
CheckOption = Annotated[Check, typer.Option(help="recompute: compute both ends again; spec: the spec alone.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Append the question as it is.")]
ModelOption = Annotated[str, typer.Option(help="The model that published it.", show_default=False)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id, .gguf file, or smollm2.")]
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="UTF-8 text; - reads stdin.")]
QuestionsArgument = Annotated[list[str], typer.Argument(metavar="QUESTION", help="One reader each.")]


@app.command()
def demo(
    store: DemoStoreOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the document.")] = 900,
    max_new_tokens: LengthOption = 48,
    output: FormatOption = Format.table,
) -> None:
    """Publish a real document, ask about it, and compare every bit with stock Hugging Face eager.

    Takes about a minute on two cores.

    Example: kvkern demo --tokens 2000
    """
    if "torch" not in sys.modules:
        os.environ.setdefault(ISA_VARIABLE, _CONTRACT_ISA)
    quiet_transformers()
    from kvkern.cli.demo import run

    with tempfile.TemporaryDirectory() if store is None else nullcontext(store) as root, working("starting") as say:
        found = run(Path(root), tokens=tokens, max_new_tokens=max_new_tokens, say=say)
    print_result(output, {**dataclasses.asdict(found), "ok": found.ok}, *demo_view(found))
    if not found.ok:
        fail("bits differ from stock's on a host whose stock follows the contract's order", INTEGRITY_ERROR)


@app.command()
def publish(
    model: ModelArgument,
    file: FileArgument,
    store: StoreOption = DEFAULT_STORE,
    salt: SaltOption = "",
    producer: ProducerOption = Producer.stock,
    stock_attention: AttentionOption = Attention.kvkern,
    output: FormatOption = Format.table,
) -> None:
    """Compute a document's KV once and publish it; prints the digest that names it.

    With --producer contract anyone can recompute the document bit for bit: see audit.

    Example: kvkern publish smollm2 book.txt --producer contract
    """
    text = read_text(file)
    network, tokenizer = load(model, stock_attention)
    from kvkern.cli.asking import document_ids

    start = time.perf_counter()
    with progress_bar("publishing") as progress:
        ids = document_ids(tokenizer, text)
        is_as_loaded = producer is Producer.stock and stock_attention is not Attention.kvkern
        attention = "model" if is_as_loaded else "exact"
        done = kvkern.Store(store).publish(
            network, ids, producer=producer.value, attention=attention, salt=salt, progress=progress
        )
    data = {**dataclasses.asdict(done), "seconds": time.perf_counter() - start}
    view = {
        "digest": done.digest,
        "tokens": f"{done.tokens:,}",
        "blocks": f"{done.blocks_new} new, {done.blocks_reused} reused",
        "bytes": f"{done.payload_bytes:,}",
        "seconds": f"{data['seconds']:.2f}",
    }
    print_result(output, data, fields(view))


@app.command()
def ask(
    digest: DigestArgument,
    questions: QuestionsArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    salt: SaltOption = "",
    max_new_tokens: LengthOption = 64,
    raw: RawOption = False,
    check: CheckOption = Check.recompute,
    output: FormatOption = Format.table,
) -> None:
    """Answer questions about a document, greedily: one batch, every question a reader of the same blocks.

    The first and the last 64 tokens are computed again first; exit code 2 if they are not what is stored.

    Example: kvkern ask 3f9a2c71 "What is pdb?" "Who wrote it?" --model smollm2
    """
    existing(store).resolve(digest)
    network, tokenizer = load(model, Attention.kvkern)
    from kvkern.cli.asking import QUESTION
    from kvkern.cli.asking import ask as answer

    start = time.perf_counter()
    with progress_bar("opening") as progress:
        prefix = kvkern.Store(store).open(digest, network, salt=salt, check=check.value, progress=progress)
    open_s = time.perf_counter() - start
    template = "{question}" if raw else QUESTION
    with working("answering"):
        found = answer(prefix, tokenizer, questions, max_new_tokens=max_new_tokens, template=template)
    names = ("question", "answer", "new_tokens")
    triples = zip(questions, found.texts, found.new_tokens, strict=True)
    data = {
        "digest": prefix.digest,
        "tokens": prefix.tokens,
        "open_seconds": open_s,
        "recomputed": prefix.recomputed and dataclasses.asdict(prefix.recomputed),
        "verified_bytes": sum(shard.nbytes for shard in prefix.document.shards),
        "answers": [dict(zip(names, triple, strict=True)) for triple in triples],
        "seconds": found.seconds,
        "tokens_per_second": found.tokens_per_s,
    }
    opened = f"opened {prefix.tokens:,} tokens in {open_s:.3f} s, {sized(data['verified_bytes'])} verified"
    speed = f"{counted(sum(found.new_tokens), 'new token')} in {found.seconds:.2f} s, {found.tokens_per_s:.1f} a second"
    lines = [f"{opened}; {speed}"]
    if prefix.recomputed is not None:
        lines.append(f"checked: {_in_words(prefix.recomputed)}")
    print_result(output, data, dialogue(questions, found.texts), "", *lines)


def _in_words(found: Recomputed) -> str:
    if found.rule == "bits":
        return f"{counted(found.tokens, 'token')} computed again, every bit as stored"
    return (
        f"{counted(found.tokens, 'token')} computed again, at most {found.distance:.4f} apart where {found.limit:.4f} "
        f"is allowed ({found.reason})"
    )
