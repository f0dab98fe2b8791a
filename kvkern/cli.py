"""The command line. torch and transformers are imported by the commands that need them, not by this file."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import kvkern
from kvkern.errors import IntegrityError, KvkernError, LayoutError

try:
    import typer
    from typer.core import TyperGroup

    from kvkern.cli_view import (
        Format,
        counted,
        demo_view,
        dialogue,
        fields,
        flat,
        print_result,
        progress_bar,
        sized,
        table,
        working,
    )
except ImportError as missing:
    raise SystemExit(f"kvkern: the command line needs {missing.name}: pip install 'kvkern[cli]'") from None

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvkern.layout import BlockStore

USER_ERROR, INTEGRITY_ERROR = 1, 2
_EXTRAS = {"gguf": "demo", "accelerate": "demo", "transformers": "hf"}
# oneDNN orders its sums by instruction set: under AMX not as the contract does.
_CONTRACT_ISA = "AVX512_CORE_BF16"
_ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"
# typer carries its own click, whose exceptions it does not export.
_UsageError: Any = typer.BadParameter.__base__


class Attention(StrEnum):
    """What attends during a publishing prefill."""

    kvkern = "kvkern"
    eager = "eager"
    sdpa = "sdpa"


class _Commands(TyperGroup):
    """Turn errors into one message on stderr and an exit code: 1 for the user's, 2 for damaged bytes."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _exit_codes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _exit_codes(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _complain(f"warning: {message}")
            return super().invoke(ctx)


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.exit_code = USER_ERROR
        raise
    except KvkernError as error:
        _fail(str(error), INTEGRITY_ERROR if isinstance(error, IntegrityError) else USER_ERROR)
    except ImportError as error:
        package = (error.name or "").partition(".")[0] or next((name for name in _EXTRAS if name in str(error)), None)
        if package not in _EXTRAS:
            raise
        _fail(f"this command needs {package}: pip install 'kvkern[{_EXTRAS[package]}]'", USER_ERROR)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), USER_ERROR)


def _fail(message: str, code: int) -> NoReturn:
    _complain(f"error: {message}")
    raise typer.Exit(code) from None


def _complain(text: str) -> None:
    typer.echo(f"kvkern: {text}", err=True)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Compute a document's KV cache once, publish it, and let any number of readers attend to it in place.",
    epilog="Exit codes: 0 fine, 1 your input, 2 damaged bytes or bits that differ.",
)  # fmt: skip

StoreOption = Annotated[Path, typer.Option("--store", help="Directory of the store.")]
DemoStoreOption = Annotated[Path | None, typer.Option("--store", help="Directory of the store; temporary if left out.")]
FormatOption = Annotated[Format, typer.Option("--format", help="A table, or one JSON document.")]
SaltOption = Annotated[str, typer.Option(help="Keeps documents of different owners apart.")]
LengthOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
AttentionOption = Annotated[Attention, typer.Option(help="What attends; kvkern has the bits of eager.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Append the question as it is.")]
ModelOption = Annotated[str, typer.Option(help="The model that published it.", show_default=False)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id, .gguf file, or smollm2.")]
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="UTF-8 text; - reads stdin.")]
DigestArgument = Annotated[str, typer.Argument(metavar="DIGEST", help="8 hex digits of it or more.")]
AnyDigestArgument = Annotated[str | None, typer.Argument(metavar="DIGEST", help="One document; all if left out.")]
ThingArgument = Annotated[str, typer.Argument(metavar="DIGEST|SHARD_FILE", help="A document, or a file of its store.")]
QuestionsArgument = Annotated[list[str], typer.Argument(metavar="QUESTION", help="One reader each.")]
DEFAULT_STORE = Path("kv-store")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(kvkern.__version__)
        raise typer.Exit()


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
        os.environ.setdefault(_ISA_VARIABLE, _CONTRACT_ISA)
    _quiet_transformers()
    from kvkern.demo import run

    with tempfile.TemporaryDirectory() if store is None else nullcontext(store) as root, working("starting") as say:
        found = run(Path(root), tokens=tokens, max_new_tokens=max_new_tokens, say=say)
    print_result(output, {**dataclasses.asdict(found), "ok": found.ok}, *demo_view(found))
    if not found.ok:
        _fail("bits differ from stock's on a host whose stock follows the contract's order", INTEGRITY_ERROR)


@app.command()
def publish(
    model: ModelArgument,
    file: FileArgument,
    store: StoreOption = DEFAULT_STORE,
    salt: SaltOption = "",
    stock_attention: AttentionOption = Attention.kvkern,
    output: FormatOption = Format.table,
) -> None:
    """Compute a document's KV once and publish it; prints the digest that names it.

    Example: kvkern publish smollm2 book.txt
    """
    text = _read_text(file)
    network, tokenizer = _load(model, stock_attention)
    from kvkern.asking import document_ids

    start = time.perf_counter()
    with progress_bar("publishing") as progress:
        done = kvkern.Store(store).publish(network, document_ids(tokenizer, text), salt=salt, progress=progress)
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
def ls(store: StoreOption = DEFAULT_STORE, output: FormatOption = Format.table) -> None:
    """List the published documents.

    Example: kvkern ls --store kv-store
    """
    found = _existing(store).ls()
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
    if Path(what).is_file():
        data = _shard(Path(what))
        headers, rows = ("tensor", "dtype", "shape", "bytes>"), data["tensors"]
        rest = {name: value for name, value in data.items() if name != "tensors"}
    else:
        data = _document(_existing(store), what)
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
            metadata = json.loads((file.metadata() or {})["kvkern"])
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
        **metadata,
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
    blocks = _existing(store)
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
def ask(
    digest: DigestArgument,
    questions: QuestionsArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    salt: SaltOption = "",
    max_new_tokens: LengthOption = 64,
    raw: RawOption = False,
    output: FormatOption = Format.table,
) -> None:
    """Answer questions about a document, greedily: one batch, every question a reader of the same blocks.

    Example: kvkern ask 3f9a2c71 "What is pdb?" "Who wrote it?" --model smollm2
    """
    _existing(store).resolve(digest)
    network, tokenizer = _load(model, Attention.kvkern)
    from kvkern.asking import QUESTION
    from kvkern.asking import ask as answer

    start = time.perf_counter()
    with progress_bar("opening") as progress:
        prefix = kvkern.Store(store).open(digest, network, salt=salt, progress=progress)
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
        "verified_bytes": sum(shard.nbytes for shard in prefix.document.shards),
        "answers": [dict(zip(names, triple, strict=True)) for triple in triples],
        "seconds": found.seconds,
        "tokens_per_second": found.tokens_per_s,
    }
    opened = f"opened {prefix.tokens:,} tokens in {open_s:.3f} s, {sized(data['verified_bytes'])} verified"
    speed = f"{counted(sum(found.new_tokens), 'new token')} in {found.seconds:.2f} s, {found.tokens_per_s:.1f} a second"
    print_result(output, data, dialogue(questions, found.texts), "", f"{opened}; {speed}")


@app.command()
def env(output: FormatOption = Format.table) -> None:
    """Show versions, the CPU, the C library, and which backend runs here.

    Example: kvkern env --format json
    """
    import torch

    from kvkern.contract import CONTRACT_ID
    from kvkern.model_patch.identity import cpu_isa
    from kvkern.model_patch.probe import stock_order

    names = ("torch", "triton", "transformers", "safetensors")
    data = {
        "kvkern": kvkern.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "cpu_isa": cpu_isa(),
        _ISA_VARIABLE: os.environ.get(_ISA_VARIABLE),
        "threads": torch.get_num_threads(),
        "c_library": _c_library(),
        "contract": CONTRACT_ID,
        "plan": _plan(),
        "stock": dataclasses.asdict(stock_order()),
    }
    print_result(output, data, fields({name: "-" if value is None else value for name, value in flat(data)}))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _c_library() -> dict[str, Any]:
    from kvkern.kernels.native import plan_build

    try:
        build = plan_build()
    except KvkernError as error:
        return {"error": str(error)}
    return {
        "compiler": f"{build.compiler} ({build.compiler_version})",
        "flags": " ".join(build.flags),
        "path": str(build.library),
        "is_compiled": build.library.exists(),
    }


def _plan() -> dict[str, str]:
    """Resolve one decode step of one reader."""
    import torch

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def counts(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32)

    tiles, no_blocks = tensor(1, 1, 1, 64, 64), torch.zeros(1, 0, 2, dtype=torch.int64)
    kv = kvkern.KVView(tiles, no_blocks, counts(0), counts(0), tiles, tiles, counts(1), counts(1))
    plan = kvkern.resolve(tensor(1, 1, 1, 64), kv)
    return {"backend": plan.backend, "profile": plan.profile, "reason": plan.reason}


def _existing(root: Path) -> BlockStore:
    """Open a store that is there: reading must not leave an empty directory behind."""
    if not (root / "format").is_file():
        raise LayoutError(f"no store at {root}: publish a document first, or give another directory with --store")
    from kvkern.layout import BlockStore

    return BlockStore(root)


def _read_text(file: str) -> str:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LayoutError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _load(name: str, attention: Attention) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _quiet_transformers()
    from kvkern.model_patch.load import load_model

    is_ours = attention is Attention.kvkern
    with working(f"loading {name}"):
        model, tokenizer = load_model(name, attn_implementation="eager" if is_ours else str(attention))
    if is_ours:
        kvkern.patch(model)
    return model, tokenizer


def main() -> None:
    """Run the command line: the `kvkern` command."""
    app(prog_name="kvkern")


if __name__ == "__main__":
    main()
