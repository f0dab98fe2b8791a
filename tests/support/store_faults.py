"""Injected faults: what disks, systems and strangers do to a store, one at a time, and what a load made of it."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvkern.errors import AccessError, IntegrityError, LayoutError, SpecMismatchError
from kvkern.layout import BlockStore, shard, unpack
from kvkern.layout.index import chain_keys, encode_index
from kvkern.spec import KVSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

SPEC = KVSpec("5" * 64, "TinyForCausalLM", 1, 2, 1, 64, config={"rope_theta": 10000.0})
REFUSALS = (IntegrityError, LayoutError, SpecMismatchError)
FIELDS = (
    "SHA-256", "size", "file", "file type", "blocks[", "manifest", "format", "open", "read", "map", "list", "header",
    "payload offset", "digest", "create", "lock",
)  # fmt: skip
"""What a refusal must name beside the file."""

_TRANSIENT = (errno.EMFILE, errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES)
_CALLS = (
    "open", "read", "pread", "write", "fsync", "replace", "rename", "mkdir", "listdir", "unlink", "utime", "lstat",
    "fstat", "ftruncate",
)  # fmt: skip


@dataclass(frozen=True)
class Original:
    """A published document as its owner knows it."""

    digest: str
    ids: Tensor
    k: Tensor
    v: Tensor


class FaultyStore:
    """A store of three documents with a shared beginning, harmed before each load and mended after it.

    Args:
        root: where to make it.
        seed: of every choice.
    """

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.random = root, random.Random(seed)
        self.documents = [self._publish(n, seed) for n, seed in ((600, 1), (520, 2), (300, 3))]
        self.good = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
        self.blocks = [path for path in self.good if path.parent.parent.name == "blocks"]
        self.manifests = [path for path in self.good if path.parent.name == "manifests"]
        self.indexes = [path for path in self.good if path.parent.name == "index"]
        self.outcomes: Counter[str] = Counter()
        self._stamps = {path: _stamp(path) for path in self.good}
        self.faults: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "bit flip": self._flip,
            "bit flip in what is read": lambda: self._flip(self.blocks + self.manifests),
            "truncation": self._truncate,
            "growth": self._grow,
            "torn write": self._tear,
            "two valid blocks swapped": lambda: self._exchange(self.blocks),
            "manifest of another document": lambda: self._exchange(self.manifests),
            "index of another document": lambda: self._exchange(self.indexes),
            "stale index": self._stale_index,
            "file gone": self._lose,
            "link": self._link,
            "call fails": self._refuse,
            "every call fails that writes": lambda: self._refuse(("write", "fsync", "mkdir", "rename"), always=True),
        }

    def load(self, fault: str) -> None:
        """Harm the store, load, check what came of it, and mend the store.

        Raises:
            AssertionError: a wrong byte was delivered, a good file was lost, or a refusal was not a clear one.
        """
        fresh = self.random.random() < 0.5  # half of the loads know the blocks from an earlier one
        if fresh:
            shard._VERIFIED.clear()
        harm = self.faults[fault]()
        harmed = harm if isinstance(harm, list) else []
        wrong = self._wrong(harmed)
        (action,) = self.random.choices((self._get, self._match, self._verify, self._put), (8, 8, 1, 1))
        publishing = ", publishing" if action == self._put else ""
        refusing = harm if isinstance(harm, contextlib.AbstractContextManager) else contextlib.nullcontext()
        try:
            with warnings.catch_warnings(), refusing:
                warnings.simplefilter("ignore")
                action()
        except REFUSALS as error:
            self._check_refusal(error)
            self.outcomes[f"{fault}: {type(error).__name__}{publishing}"] += 1
        else:
            self.outcomes[f"{fault}: delivered{publishing}"] += 1
        self._check_files(harmed, wrong)
        self._mend()

    def refused(self, fault: str) -> int:
        """Count the loads that a fault made fail."""
        found = (n for key, n in self.outcomes.items() if key.startswith(f"{fault}: ") and key.endswith("Error"))
        return sum(found)

    def _get(self) -> None:
        original = self.random.choice(self.documents)
        document = BlockStore(self.root).get(original.digest, verify=self.random.choice(("auto", "sha256")))
        self._check_delivered(document, original)

    def _match(self) -> None:
        original = self.random.choice(self.documents)
        cut = self.random.randrange(1, original.ids.numel() + 1)
        query = torch.cat([original.ids[:cut], torch.tensor([49999])])
        found = BlockStore(self.root).match(SPEC.digest, query)
        if found is None:
            self.outcomes["no match"] += 1
            return
        document, shared = found
        by_digest = {d.digest: d for d in self.documents}
        self._check_delivered(document, by_digest[document.manifest.digest])
        theirs = by_digest[document.manifest.digest].ids
        assert torch.equal(theirs[:shared], query[:shared]), "a match names tokens that are not there"

    def _verify(self) -> None:
        report = BlockStore(self.root).verify()
        for defect in report.defects:
            assert str(self.root) in defect.problem, defect

    def _put(self) -> None:
        original = self.random.choice(self.documents)
        done = BlockStore(self.root).put(SPEC, original.ids, original.k, original.v)
        assert done.digest == original.digest
        self._check_delivered(BlockStore(self.root).get(done.digest), original)

    def _check_delivered(self, document: Any, original: Original) -> None:
        assert torch.equal(document.token_ids(), original.ids), "wrong tokens delivered"
        k, v = (torch.cat([getattr(s, name) for s in document.shards]) for name in "kv")
        k, v = unpack(k, v, original.ids.numel())
        for ours, theirs in ((k, original.k), (v, original.v)):
            assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16)), "wrong KV delivered"

    def _check_refusal(self, error: Exception) -> None:
        text = str(error)
        assert str(self.root) in text, f"the refusal names no file: {text}"
        named = any(f": {field}" in f": {text}" for field in FIELDS)
        assert named or isinstance(error, AccessError), f"the refusal names no field: {text}"

    def _check_files(self, harmed: list[Path], wrong: dict[Path, bytes]) -> None:
        """Every file that was not harmed is where it was, untouched; a harmed one is there or in quarantine."""
        quarantine = [path.read_bytes() for path in self.root.glob("quarantine/*")]
        if not harmed:
            assert not quarantine, "a good file was quarantined"
        for path, stamp in self._stamps.items():
            if path not in harmed:
                assert _stamp(path) == stamp or path.read_bytes() == self.good[path], f"a good file was lost: {path}"
        assert len(quarantine) <= len(harmed)
        for path, data in wrong.items():  # set aside, or not yet met: never deleted
            assert data in quarantine or (path.is_file() and path.read_bytes() == data), f"deleted: {path}"
        temporary = list(self.root.rglob(".tmp-*"))
        assert not temporary, f"temporary files are left: {temporary}"

    def _wrong(self, harmed: list[Path]) -> dict[Path, bytes]:
        """Blocks and manifests that now hold other bytes than they should."""
        files = [path for path in harmed if path in (*self.blocks, *self.manifests) and not path.is_symlink()]
        found = {path: path.read_bytes() for path in files if path.is_file()}
        return {path: data for path, data in found.items() if data != self.good[path]}

    def _mend(self) -> None:
        for path, data in self.good.items():
            if not path.is_symlink() and _stamp(path) == self._stamps[path]:
                continue
            path.unlink(missing_ok=True)
            path.write_bytes(data)
            self._stamps[path] = _stamp(path)
        for path in self.root.glob("quarantine/*"):
            path.unlink()

    def _publish(self, n: int, seed: int) -> Original:
        shared, own = (torch.Generator().manual_seed(s) for s in (0, seed))

        def start(*shape: int) -> Tensor:
            return torch.cat([torch.randn(1, 1, 256, 64, generator=shared), torch.randn(*shape, generator=own)], 2)

        ids = torch.arange(n)
        ids[256:] += 1000 * seed
        k, v = (start(1, 1, n - 256, 64).bfloat16() for _ in "kv")
        done = BlockStore(self.root).put(SPEC, ids, k, v)
        return Original(done.digest, ids, k, v)

    def _any(self, paths: list[Path] | None = None) -> Path:
        return self.random.choice(paths or [path for path in self.good if self.good[path]])

    def _write(self, path: Path, data: bytes) -> list[Path]:
        path.write_bytes(data)
        return [path]

    def _flip(self, paths: list[Path] | None = None) -> list[Path]:
        path = self._any(paths)
        data = bytearray(self.good[path])
        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return self._write(path, bytes(data))

    def _truncate(self) -> list[Path]:
        path = self._any()
        return self._write(path, self.good[path][: self.random.randrange(len(self.good[path]))])

    def _grow(self) -> list[Path]:
        path = self._any()
        return self._write(path, self.good[path] + self.random.randbytes(self.random.choice((1, 7, 4096))))

    def _tear(self) -> list[Path]:
        path = self._any()
        data = self.good[path]
        half = self.random.randrange(len(data))
        return self._write(path, data[:half] + bytes(len(data) - half) + b"\0")

    def _exchange(self, paths: list[Path]) -> list[Path]:
        a, b = self.random.sample(paths, 2)
        self._write(a, self.good[b])
        self._write(b, self.good[a])
        return [a, b]

    def _stale_index(self) -> list[Path]:
        """Let the index, with a check that fits, promise other tokens than the document has."""
        a, b = self.random.sample(self.documents, 2)
        blocks = -(-a.ids.numel() // 256)
        keys = (chain_keys(SPEC.digest, b.ids) + ("0" * 64,) * blocks)[:blocks]
        return self._write(self.root / "index" / f"{a.digest}.json", encode_index(a.digest, keys))

    def _lose(self) -> list[Path]:
        path = self._any()
        path.unlink()
        return [path]

    def _link(self) -> list[Path]:
        path, other = self.random.sample([path for path in self.good if self.good[path]], 2)
        path.unlink()
        path.symlink_to(other)
        return [path]

    def _refuse(self, calls: tuple[str, ...] | None = None, *, always: bool = False) -> Any:
        code = self.random.choice((errno.ENOSPC, errno.EROFS) if always else _TRANSIENT)
        if not always and self.random.random() < 0.2:
            return _unreadable_page()
        calls = calls or (self.random.choice(_CALLS),)
        return refusing(calls, code, after=0 if always else self.random.randrange(6), always=always, under=self.root)


@contextlib.contextmanager
def refusing(
    calls: tuple[str, ...], code: int, *, after: int, always: bool = False, under: Path
) -> Iterator[list[str]]:
    """Let a call of the os module fail: the one that follows `after` others, or all of them; yields what failed."""
    real = {name: getattr(os, name) for name in calls}
    seen, failed = 0, []

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            is_relative = kwargs.keys() & {"dir_fd", "src_dir_fd"}
            inside = isinstance(args[0], int) or bool(is_relative) or str(args[0]).startswith(str(under))
            seen += inside
            if inside and (always or seen == after + 1):
                failed.append(name)
                raise OSError(code, os.strerror(code))
            return real[name](*args, **kwargs)

        return call

    try:
        for name in calls:
            setattr(os, name, wrap(name))
        yield failed
    finally:
        for name in calls:
            setattr(os, name, real[name])


@contextlib.contextmanager
def _unreadable_page() -> Iterator[None]:
    """Let the next mapping meet a page that the device does not give."""
    real, done = shard.map_file, []

    def call(*args: Any, **kwargs: Any) -> Any:
        if done:
            return real(*args, **kwargs)
        done.append(True)
        raise OSError(errno.EIO, "a page cannot be read")

    shard.map_file = call
    try:
        yield
    finally:
        shard.map_file = real


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
