"""Shards: plain safetensors files that nobody can damage, swap or forge unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from kvkern.errors import IntegrityError, LayoutError, SpecMismatchError
from kvkern.layout import encode_shard, map_shard, pack
from kvkern.layout import shard as shard_module
from kvkern.layout.shard import read_tokens

Make = Callable[..., Any]


def encode(sample: Any, first: int = 0) -> bytes:
    """Encode a sample of at most 256 tokens."""
    return encode_shard(sample.spec, first, sample.ids, *pack(sample.k, sample.v))


def write(folder: Path, data: bytes) -> tuple[Path, str]:
    """Write a file under its own digest, as a hostile publisher would."""
    block_id = hashlib.sha256(data).hexdigest()
    path = folder / f"{block_id}.safetensors"
    path.write_bytes(data)
    return path, block_id


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Take a shard apart into header and payload."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any] | bytes, payload: bytes, align: int = 4096) -> bytes:
    """Put a shard together, padding the header as the format asks."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % align)
    return len(raw).to_bytes(8, "little") + raw + payload


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 256])
def test_shard__anyone_can_read_it_with_safetensors(tmp_path: Path, make: Make, n: int) -> None:
    sample = make(n)
    path, _ = write(tmp_path, encode(sample))
    with safetensors.safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["k", "tokens", "v"]
        meta = json.loads(file.metadata()["kvkern"])
        tokens, k, v = (file.get_tensor(name) for name in ("tokens", "k", "v"))
    assert meta == {
        "count": n,
        "first": 0,
        "format": "kvkern-block-v1",
        "spec": sample.spec.digest,
    }
    assert tokens.reshape(-1)[:n].tolist() == sample.ids.tolist()
    assert (tokens.reshape(-1)[n:] == -1).all()
    for stored, packed in zip((k, v), pack(sample.k, sample.v), strict=True):
        assert torch.equal(stored.view(torch.int16), packed.view(torch.int16))


@pytest.mark.parametrize("n", [1, 100, 256])
@pytest.mark.parametrize("first", [0, 256, 256 * 7_000_000])
def test_shard__payload_starts_on_a_page(make: Make, n: int, first: int) -> None:
    data = encode(make(n), first)
    assert (8 + int.from_bytes(data[:8], "little")) % 4096 == 0


def test_shard__mapped_bits_are_the_published_bits(tmp_path: Path, make: Make, same_bits: Callable[..., bool]) -> None:
    sample = make(130)
    data = encode(sample, 512)
    path, block_id = write(tmp_path, data)
    shard = map_shard(path, block_id, sample.spec)
    assert (shard.first, shard.count, shard.nbytes) == (512, 130, len(data))
    k_tiles, v_tiles = pack(sample.k, sample.v)
    assert same_bits(shard.k, k_tiles) and same_bits(shard.v, v_tiles)
    assert shard.k.data_ptr() - shard.tokens.data_ptr() == shard.tokens.nbytes
    assert torch.equal(read_tokens(path, sample.spec), sample.ids.int())


def test_shard__same_bytes_in_every_process(make: Make, run_python: Callable[..., str]) -> None:
    code = """
import hashlib, torch
from kvkern.layout import encode_shard, pack
from kvkern.spec import KVSpec
spec = KVSpec("a" * 64, "X", 1, 2, 1, 64, {"b": 1, "a": {"d": 2.5, "c": None}})
k = (torch.arange(70 * 64) % 251).bfloat16().view(1, 1, 70, 64)
print(hashlib.sha256(encode_shard(spec, 0, torch.arange(70), *pack(k, k + 1))).hexdigest())
"""
    found = {run_python(code, hash_seed=seed) for seed in ("0", "31337")}
    assert found == {"f091a6f6b7f3e0a1d640dc2a2c1ed0c494dbe71194aa00eae280d4daee062355"}


@pytest.mark.parametrize("where", ["length", "header", "spaces", "tokens", "k", "v", "last"])
@pytest.mark.parametrize("again", [False, True], ids=["first", "remembered"])
def test_shard__a_flipped_bit_is_never_served(tmp_path: Path, make: Make, where: str, again: bool) -> None:
    sample = make(256, seed=["length", "header", "spaces", "tokens", "k", "v", "last"].index(where))
    data = bytearray(encode(sample))
    path, block_id = write(tmp_path, bytes(data))
    if again:
        map_shard(path, block_id, sample.spec)
    k_bytes = 2 * sample.k.numel()
    offset = {
        "length": 0,
        "header": 30,
        "spaces": 4000,
        "tokens": 4096 + 5,
        "k": 4096 + 1024 + 12345,
        "v": 4096 + 1024 + k_bytes + 777,
        "last": len(data) - 1,
    }[where]
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))
    for verify in ("auto", "sha256"):
        with pytest.raises(IntegrityError, match=path.name):
            map_shard(path, block_id, sample.spec, verify=verify)


@pytest.mark.parametrize("cut", [0, 7, 4000, 4096, 5000, -1, -4096])
def test_shard__truncated_file_is_never_served(tmp_path: Path, make: Make, cut: int) -> None:
    sample = make(256)
    data = encode(sample)
    path, block_id = write(tmp_path, data)
    path.write_bytes(data[:cut])
    with pytest.raises(IntegrityError, match=path.name):
        map_shard(path, block_id, sample.spec)


@pytest.mark.parametrize("extra", [1, 4096])
def test_shard__grown_file_is_never_served(tmp_path: Path, make: Make, extra: int) -> None:
    sample = make(64)
    data = encode(sample)
    path, block_id = write(tmp_path, data)
    path.write_bytes(data + bytes(extra))
    with pytest.raises(IntegrityError, match=path.name):
        map_shard(path, block_id, sample.spec)


def test_shard__links_pipes_and_folders_are_refused(tmp_path: Path, make: Make) -> None:
    sample = make(64)
    path, block_id = write(tmp_path, encode(sample))
    link, pipe, folder = tmp_path / "link", tmp_path / "pipe", tmp_path / "folder"
    link.symlink_to(path)
    os.mkfifo(pipe)
    folder.mkdir()
    for other in (link, pipe, folder):
        with pytest.raises(LayoutError, match=other.name):
            map_shard(other, block_id, sample.spec)
    with pytest.raises(IntegrityError, match="missing"):
        map_shard(tmp_path / "none", block_id, sample.spec)


def test_shard__too_large_file_is_not_even_read(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make(64)
    path, block_id = write(tmp_path, encode(sample))
    monkeypatch.setattr(shard_module, "MAX_SHARD_BYTES", 5000)
    with pytest.raises(IntegrityError, match="over the limit"):
        map_shard(path, block_id, sample.spec)


def test_shard__block_of_another_spec_is_refused(tmp_path: Path, make: Make) -> None:
    sample = make(64)
    path, block_id = write(tmp_path, encode(sample))
    with pytest.raises(SpecMismatchError, match=path.name) as caught:
        map_shard(path, block_id, replace(sample.spec, num_layers=1))
    assert caught.value.field == "digest" and caught.value.stored == sample.spec.digest


def metadata(header: dict[str, Any], **change: Any) -> dict[str, Any]:
    """Return the header with its metadata changed."""
    meta = {**json.loads(header["__metadata__"]["kvkern"]), **change}
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    return {**header, "__metadata__": {"kvkern": text}}


def entry(header: dict[str, Any], name: str, **change: Any) -> dict[str, Any]:
    """Return the header with one tensor's entry changed."""
    return {**header, name: {**header[name], **change}}


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "duplicate key": (lambda h: json.dumps(h).replace('"k"', '"v"').encode(), "duplicate key 'v'"),
    "not json": (lambda h: b"{not json", "not strict JSON"),
    "not an object": (lambda h: b" {}", "first byte"),
    "deep": (lambda h: b'{"a":' * 9000, "not strict JSON"),
    "no metadata": (lambda h: {n: e for n, e in h.items() if n != "__metadata__"}, "__metadata__"),
    "two metadata keys": (
        lambda h: {**h, "__metadata__": {**h["__metadata__"], "x": "y"}},
        "__metadata__",
    ),
    "metadata no string": (lambda h: {**h, "__metadata__": {"kvkern": 1}}, "a string"),
    "metadata field": (lambda h: metadata(h, zz=1), "keys count, first, format, spec"),
    "metadata spaced": (
        lambda h: {
            **h,
            "__metadata__": {"kvkern": h["__metadata__"]["kvkern"].replace(":64", ": 64")},
        },
        "canonical JSON",
    ),
    "format": (lambda h: metadata(h, format="kvkern-block-v2"), "format"),
    "count 0": (lambda h: metadata(h, count=0), "count"),
    "count 257": (lambda h: metadata(h, count=257), "count"),
    "count true": (lambda h: metadata(h, count=True), "count"),
    "count too small": (lambda h: metadata(h, count=63), "tokens"),
    "count too large": (lambda h: metadata(h, count=65), "tokens"),
    "first": (lambda h: metadata(h, first=1), "first"),
    "first negative": (lambda h: metadata(h, first=-256), "first"),
    "first huge": (lambda h: metadata(h, first=1 << 40), "first"),
    "extra tensor": (lambda h: {**h, "w": h["k"]}, "tensors"),
    "missing tensor": (lambda h: {n: e for n, e in h.items() if n != "v"}, "tensors"),
    "dtype": (lambda h: entry(h, "k", dtype="F16"), "k: got"),
    "shape": (lambda h: entry(h, "v", shape=[1, 3, 2, 64, 64]), "v: got"),
    "offset hole": (lambda h: entry(h, "k", data_offsets=[258, 258]), "k: got"),
    "offset overflow": (lambda h: entry(h, "v", data_offsets=[0, 1 << 63]), "v: got"),
    "offset float": (lambda h: entry(h, "tokens", data_offsets=[0, 256.0]), "tokens: got"),
    "entry field": (lambda h: entry(h, "k", comment=1), "k: got"),
    "entry type": (lambda h: {**h, "k": []}, "k: got"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_shard__well_digested_but_ill_formed_is_refused(tmp_path: Path, make: Make, name: str) -> None:
    sample = make(64)
    header, payload = split(encode(sample))
    path, block_id = write(tmp_path, join(header, payload))
    map_shard(path, block_id, sample.spec)  # the untouched twin passes
    damage, message = HOSTILE[name]
    path, block_id = write(tmp_path, join(damage(header), payload))
    with pytest.raises(LayoutError, match=message) as caught:
        map_shard(path, block_id, sample.spec)
    assert path.name in str(caught.value)


def test_shard__unaligned_oversized_or_overlong_header_is_refused(tmp_path: Path, make: Make) -> None:
    sample = make(64)
    header, payload = split(encode(sample))
    raw = json.dumps(header).encode()
    files = {
        "payload offset": join(header, payload, align=8),
        "header length": join(raw + b" " * 70000, payload),
        "file size": join(header, payload + bytes(4096)),
    }
    beyond = bytearray(encode(sample))
    beyond[:8] = (len(beyond)).to_bytes(8, "little")
    for field, data in [*files.items(), ("header length", bytes(beyond))]:
        path, block_id = write(tmp_path, data)
        with pytest.raises(LayoutError, match=field):
            map_shard(path, block_id, sample.spec)


@pytest.mark.parametrize(
    ("name", "offset", "value"),
    [("tokens", 3, 0x80), ("tokens", 70 * 4, 0), ("k", 512 + 2 * 127, 1), ("v", -1, 0x80)],
)
def test_shard__bad_token_or_padding_is_refused(tmp_path: Path, make: Make, name: str, offset: int, value: int) -> None:
    sample = make(70)
    header, payload = split(encode(sample))
    body = bytearray(payload)
    if name == "k":  # the last column of the second tile's first channel lies behind token 70
        offset = 512 + sample.spec.bytes_per_token // 2 * 64 + 2 * 63
    body[offset] = value
    path, block_id = write(tmp_path, join(header, bytes(body)))
    with pytest.raises(LayoutError, match=f"{name}: "):
        map_shard(path, block_id, sample.spec)


def test_raises_encode_shard__form(make: Make) -> None:
    s = make(70)
    k, v = pack(s.k, s.v)
    with pytest.raises(LayoutError, match="token_ids"):
        encode_shard(s.spec, 0, s.ids[:0], k, v)
    with pytest.raises(LayoutError, match="first"):
        encode_shard(s.spec, 1, s.ids, k, v)
    with pytest.raises(LayoutError, match="k must be"):
        encode_shard(s.spec, 0, s.ids, k[:1], v)
    with pytest.raises(LayoutError, match=r"v must be torch\.bfloat16"):
        encode_shard(s.spec, 0, s.ids, k, v.half())
    with pytest.raises(LayoutError, match="verify"):
        map_shard(Path("x"), "0" * 64, s.spec, verify="no")
    assert encode_shard(s.spec, 0, s.ids, k, k.view(v.shape))  # k and v in one memory


def test_shard__recipe_in_the_format_document_works(tmp_path: Path, make: Make, same_bits: Callable[..., bool]) -> None:
    sample = make(200)
    path, _ = write(tmp_path, encode(sample))
    text = (Path(shard_module.__file__).parent / "FORMAT.md").read_text()
    found: dict[str, Any] = {"path": path}
    exec(text.split("```python\n")[1].split("```")[0], found)
    assert torch.equal(found["ids"], sample.ids.int())
    assert same_bits(found["k"], sample.k) and same_bits(found["v"], sample.v)
