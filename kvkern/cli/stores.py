"""Commands that look into a store and look after it; only `why --model` needs a model."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvkern.cli.app import (
    DEFAULT_STORE,
    INTEGRITY_ERROR,
    DigestArgument,
    FormatOption,
    SaltOption,
    StoreOption,
    app,
    existing,
)
from kvkern.cli.view import Format, counted, fields, flat, print_result, progress_bar, sized, table
from kvkern.errors import LayoutError
from kvkern.spec import parse_json

if TYPE_CHECKING:
    from kvkern.layout import BlockStore

TokensArgument = Annotated[
    str, typer.Argument(metavar="TOKENS", help="Token ids, commas or spaces between; a file of them; - reads stdin.")
]
WhyModelOption = Annotated[str | None, typer.Option("--model", help="Compare with what this model would publish.")]
GraceOption = Annotated[float, typer.Option("--grace", min=0, help="Hours that a file must have been left alone.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
AnyDigestArgument = Annotated[str | None, typer.Argument(metavar="DIGEST", help="One document; all if left out.")]
ThingArgument = Annotated[str, typer.Argument(metavar="DIGEST|SHARD_FILE", help="A document, or a file of its store.")]


@app.command()
def ls(store: StoreOption = DEFAULT_STORE, output: FormatOption = Format.table) -> None:
    """List the published documents.

    Example: kvkern ls --store kv-store
    """
    found = existing(store).ls()
    data = {"store": store, "documents": [dataclasses.asdict(line) for line in found]}
    headers = ("digest", "tokens>", "blocks>", "size>", "architecture", "weights")
    rows = [
        (d.digest[:16], d.tokens, d.blocks, sized(d.payload_bytes), d.spec.architecture, d.spec.weights[:8])
        for d in found
    ]
    print_result(output, data, table(headers, rows) if rows else "no documents")


@app.command()
def inspect(
    what: ThingArgument,
    store: StoreOption = DEFAULT_STORE,
    output: FormatOption = Format.table,
) -> None:
    """Show a document's spec and blocks, or what one shard file holds. Checks no payload: that is verify.

    Example: kvkern inspect 3f9a2c71
    """
    if _is_file(what):
        data = _shard(Path(what))
        headers, rows = ("tensor", "dtype", "shape", "bytes>"), data["tensors"]
        rest = {name: value for name, value in data.items() if name != "tensors"}
    else:
        data = _document(existing(store), what)
        headers, rows = ("block", "first>", "tokens>", "bytes>"), data["blocks"]
        rest = {name: value for name, value in data.items() if name != "blocks"}
    cells = [["missing" if cell is None else cell for cell in row.values()] for row in rows]
    print_result(output, data, fields(dict(flat(rest))), table(headers, cells))


def _document(store: BlockStore, digest: str) -> dict[str, Any]:
    manifest = store.manifest(digest)

    def block(i: int, block_id: str) -> dict[str, Any]:
        path = store.block_path(block_id)
        size = path.stat().st_size if path.is_file() else None
        return {"id": block_id, "first": 256 * i, "tokens": manifest.count(i), "bytes": size}

    return {
        "digest": manifest.digest,
        "tokens": manifest.num_tokens,
        "bytes_per_token": manifest.spec.bytes_per_token,
        "payload_bytes": manifest.payload_bytes,
        "spec_digest": manifest.spec.digest,
        "spec": manifest.spec.to_json(),
        "blocks": [block(i, block_id) for i, block_id in enumerate(manifest.blocks)],
    }


def _shard(path: Path) -> dict[str, Any]:
    """Read a shard as any safetensors reader would."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {})["kvkern"].encode(), f"{path}: __metadata__.kvkern")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 a safe_open has no __iter__
            tensors = [(name, s.get_dtype(), s.get_shape(), file.get_tensor(name).nbytes) for name, s in slices.items()]
    except (SafetensorError, KeyError, ValueError) as error:
        raise LayoutError(f"{path}: not a kvkern shard: {type(error).__name__}: {error}") from None
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        file.seek(0)
        block_id = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "path": str(path),
        "sha256": block_id,
        "is_named_by_sha256": path.stem == block_id,
        **{name: metadata.get(name) for name in ("format", "spec", "first", "count")},
        "payload_offset": 8 + header_bytes,
        "tensors": [dict(zip(("name", "dtype", "shape", "bytes"), tensor, strict=True)) for tensor in tensors],
    }


@app.command()
def verify(
    digest: AnyDigestArgument = None,
    store: StoreOption = DEFAULT_STORE,
    output: FormatOption = Format.table,
) -> None:
    """Read every byte through SHA-256 and list what is damaged; exit code 2 if anything is.

    Example: kvkern verify --store kv-store
    """
    blocks = existing(store)
    start = time.perf_counter()
    with progress_bar("verifying") as progress:
        report = blocks.verify(digest, progress)
    seconds = time.perf_counter() - start
    verdict = f"{len(report.defects)} DAMAGED" if report.defects else "every byte as published"
    read = f"{counted(report.documents, 'document')}, {counted(report.blocks, 'block')}, {sized(report.payload_bytes)}"
    problems = [f"{defect.digest[:16]}: {defect.problem}" for defect in report.defects]
    data = {"ok": report.ok, **dataclasses.asdict(report), "seconds": seconds}
    print_result(output, data, f"{read} in {seconds:.2f} s: {verdict}", *problems)
    if not report.ok:
        raise typer.Exit(INTEGRITY_ERROR)


@app.command()
def remove(digest: DigestArgument, store: StoreOption = DEFAULT_STORE, output: FormatOption = Format.table) -> None:
    """Take a document out of the list; readers that have it open read on. gc takes its blocks later.

    Example: kvkern remove 3f9a2c71
    """
    full = existing(store).remove(digest)
    print_result(output, {"removed": full}, f"removed {full}; kvkern gc takes its blocks when nobody needs them")


@app.command()
def gc(
    store: StoreOption = DEFAULT_STORE,
    grace: GraceOption = 1.0,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.table,
) -> None:
    """Take back the space of blocks that no document needs.

    A block is first set aside, and deleted by a later run when another grace period has gone by.

    Example: kvkern gc --dry-run
    """
    done = existing(store).gc(grace_s=3600 * grace, dry_run=dry_run)
    would = "would be " if dry_run else ""
    view = {
        "documents": f"{done.documents:,}, and {done.removed_but_held:,} removed that readers hold",
        "blocks needed": f"{done.blocks_needed:,}",
        f"blocks {would}set aside": f"{done.blocks_condemned:,}",
        f"blocks {would}restored": f"{done.blocks_restored:,}",
        f"blocks {would}deleted": f"{done.blocks_deleted:,}, {sized(done.bytes_freed)}",
        f"other files {would}deleted": f"{done.others_deleted:,}",
    }
    print_result(output, dataclasses.asdict(done), fields(view))


@app.command()
def why(
    tokens: TokensArgument,
    store: StoreOption = DEFAULT_STORE,
    model: WhyModelOption = None,
    salt: SaltOption = "",
    output: FormatOption = Format.table,
) -> None:
    """Say for every document how many of the tokens it begins with, and what keeps a reader from more.

    Example: kvkern why prompt-ids.txt --model smollm2
    """
    ids, blocks = _token_ids(tokens), existing(store)
    spec = None
    if model is not None:
        from kvkern.cli.loading import Attention, load
        from kvkern.model_patch.identity import spec_of

        spec = spec_of(load(model, Attention.eager)[0], salt=salt)
    found = blocks.why(ids, spec)
    data = {"tokens": len(ids), "documents": [{**dataclasses.asdict(e), "usable": e.is_usable} for e in found]}
    rows = [(e.digest[:16], e.num_tokens, e.matched, "yes" if e.is_usable else "no", e.reason) for e in found]
    headers = ("digest", "tokens>", "matched>", "usable", "what differs: in the document, in the request")
    print_result(output, data, table(headers, rows) if rows else "no documents")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or not one
        return False


def _token_ids(text: str) -> list[int]:
    """Read ids from the argument itself, from the file of that name, or from stdin."""

    def parsed(words: str) -> list[int]:
        return [int(word) for word in words.replace(",", " ").replace("[", " ").replace("]", " ").split()]

    try:
        is_inline = text != "-" and not _is_file(text)
        if not is_inline:
            from kvkern.cli.loading import read_text

            text = read_text(text)
        return parsed(text)
    except ValueError as error:
        raise LayoutError(f"TOKENS: {error}; give integers with commas or spaces between, or a file of them") from None
