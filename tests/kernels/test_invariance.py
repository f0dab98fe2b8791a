"""The same keys give the same bits, however they are stored, split, ordered or shared; and odd inputs are contained."""

from __future__ import annotations

import copy
import ctypes
import math
from dataclasses import replace

import pytest
import torch

import kvkern
from kvkern import contract
from kvkern.kernels import native, triton_door
from kvkern.view import KVView
from tests.support.bits import differing
from tests.support.views import int32, paged_view, random_qkv, shared_view

PREFIX_LENS = [0, 1, 15, 16, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1023, 1024, 1087]


def attend(q: torch.Tensor, kv: KVView, **options) -> torch.Tensor:
    """Attend into a poisoned output between guard rows that must stay untouched."""
    batch, heads, rows, head_dim = q.shape
    guarded = torch.full((batch + 2, rows, heads, head_dim), float("nan"), dtype=torch.bfloat16)
    kvkern.prefix_attention(q, kv, out=guarded[1:-1], **options)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all(), "wrote outside of out"
    return guarded[1:-1].clone()


def cancelling(batch: int, rows: int, columns: int, *, group: int = 4, head_dim: int = 128, seed: int = 0):
    """Flat scores, and values of which many cancel: outputs hang on the order of the sums."""
    q, k, v = random_qkv(batch, group, 2, rows, columns, head_dim, spread=0.5, seed=seed)
    v[:, :, 2::4] = -v[:, :, : columns - 2 : 4]
    k[1:, :, : columns - rows - 5] = k[:1, :, : columns - rows - 5]
    v[1:, :, : columns - rows - 5] = v[:1, :, : columns - rows - 5]
    return q, k, v


@pytest.mark.parametrize("key_run", ["stock", 512, 1024])
@pytest.mark.parametrize("rows", [1, 5], ids=["Tq1", "Tq5"])
def test_bits_boundary__any_prefix_length(rows: int, key_run) -> None:
    q, k, v = cancelling(2, rows, 1100)
    expected = attend(q, KVView.from_dense(k, v, query_len=rows), key_run=key_run)
    for prefix_len in PREFIX_LENS:
        kv = shared_view(k, v, prefix_len, [rows] * 2, seed=prefix_len, layers=3, layer=1, spare_tiles=1)
        assert differing(attend(q, kv, key_run=key_run), expected) == 0, f"prefix of {prefix_len}"


def test_bits_boundary__a_wrong_position_fails() -> None:
    q, k, v = cancelling(1, 1, 1100)
    kv = shared_view(k, v, 1000, [1])
    expected = attend(q, kv)
    swapped = kv.block_table.clone()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    wrong = replace(kv, block_table=swapped)
    assert differing(attend(q, wrong), expected) > 0


def test_bits_view__lengths_change_in_place_and_copies_have_their_own_tiles() -> None:
    q, k, v = random_qkv(1, 2, 1, 1, 300, 64)
    kv = KVView.from_dense(k, v)
    whole = attend(q, kv)
    kv.suffix_len.fill_(200)
    short = attend(q, kv)
    assert differing(short, attend(q, KVView.from_dense(k[:, :, :200], v[:, :, :200]))) == 0
    twin = copy.deepcopy(kv)
    kv.suffix_k.zero_()
    assert differing(attend(q, twin), short) == 0
    assert differing(attend(q, kv), short) > 0 and differing(whole, short) > 0


def test_bits_boundary__one_flipped_bit_in_k_or_v_shows() -> None:
    q, k, v = cancelling(1, 1, 300)
    expected = attend(q, KVView.from_dense(k, v))
    for tensor in (k, v):
        flipped = tensor.clone()
        flipped.view(torch.int16)[0, 0, 77, 5] ^= 1 << 6
        kv = KVView.from_dense(flipped if tensor is k else k, flipped if tensor is v else v)
        assert differing(attend(q, kv), expected) > 0


def test_bits_table__any_placement_of_blocks() -> None:
    q, k, v = cancelling(2, 3, 1100)
    outs = [attend(q, shared_view(k, v, 1000, [3, 3], seed=seed)) for seed in range(5)]
    assert [differing(out, outs[0]) for out in outs] == [0] * 5


def several_prefixes(query_len: list[int]):
    """Five readers of three prefixes, ragged in prefix, suffix and queries, on both sides of 1,024 keys."""
    _, k, v = random_qkv(8, 4, 2, 1, 1500, 64, spread=0.5, seed=9)
    prefixes = [(k[i, :, :n], v[i, :, :n]) for i, n in enumerate((700, 1023, 130))]
    suffixes = [(k[3 + b, :, :n], v[3 + b, :, :n]) for b, n in enumerate((9, 400, 1, 700, 33))]
    reader_prefix = [1, 0, 1, 2, 0]
    q = random_qkv(5, 4, 2, max(query_len), 1, 64, spread=0.5, seed=11)[0]
    return q, prefixes, reader_prefix, suffixes, query_len


@pytest.mark.parametrize("key_run", ["stock", 512])
@pytest.mark.parametrize("query_len", [[1, 1, 1, 1, 1], [9, 3, 1, 2, 5]], ids=["Tq1", "ragged"])
def test_bits_readers__each_as_if_alone(query_len: list[int], key_run) -> None:
    q, prefixes, reader_prefix, suffixes, _ = several_prefixes(query_len)
    together = attend(q, paged_view(prefixes, reader_prefix, suffixes, query_len), key_run=key_run)
    rows = q.shape[2]
    for b, p in enumerate(reader_prefix):
        own = rows - query_len[b]
        k, v = (torch.cat([x, y], dim=1)[None] for x, y in zip(prefixes[p], suffixes[b], strict=True))
        alone = attend(q[b : b + 1, :, own:], KVView.from_dense(k, v, query_len=query_len[b]), key_run=key_run)
        assert differing(together[b : b + 1, own:], alone) == 0
        assert differing(together[b, :own], torch.zeros_like(together[b, :own])) == 0, "padding rows are +0"


def test_bits_readers__any_order() -> None:
    q, prefixes, reader_prefix, suffixes, query_len = several_prefixes([9, 3, 1, 2, 5])
    expected = attend(q, paged_view(prefixes, reader_prefix, suffixes, query_len))
    order = [3, 0, 4, 2, 1]
    kv = paged_view(
        prefixes, [reader_prefix[b] for b in order], [suffixes[b] for b in order], [query_len[b] for b in order]
    )
    assert differing(attend(q[order], kv), expected[order]) == 0


def test_bits_split__threads_and_scratch() -> None:
    q, prefixes, reader_prefix, suffixes, query_len = several_prefixes([9, 3, 1, 2, 5])
    kv = paged_view(prefixes, reader_prefix, suffixes, query_len)
    expected = attend(q, kv)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for bound in (1, 1 << 20, 3 << 20, 64 << 20):
                assert differing(attend(q, kv, scratch_bound_bytes=bound), expected) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("query_len", [[1, 200], [200, 1], [3, 200, 90]], ids=str)
def test_bits_split__a_reader_may_end_before_a_slice(query_len: list[int]) -> None:
    """Slices that a prefix's first reader sees less of than the others, or nothing: tiles go by each one's place."""
    q, k, v = random_qkv(len(query_len), 2, 1, 200, 900, 64, spread=3.0, seed=4)
    own = [(k[b, :, 500 : 505 + n], v[b, :, 500 : 505 + n]) for b, n in enumerate(query_len)]
    kv = paged_view([(k[0, :, :500], v[0, :, :500])], [0] * len(query_len), own, query_len)
    expected = attend(q, kv, scratch_bound_bytes=1 << 40)
    for bound in (1, 1 << 19, 1 << 20):
        assert differing(attend(q, kv, scratch_bound_bytes=bound), expected) == 0


def test_bits_view__tensors_that_move_to_shared_memory() -> None:
    q, k, v = random_qkv(1, 2, 1, 1, 300, 64)
    kv = KVView.from_dense(k, v)
    attend(q, kv)
    kv.suffix_len.share_memory_()
    kv.suffix_len.fill_(100)
    assert differing(attend(q, kv), attend(q, KVView.from_dense(k[:, :, :100], v[:, :, :100]))) == 0


def test_bits_split__scratch_stays_under_its_bound() -> None:
    q, k, v = random_qkv(1, 4, 1, 600, 600, 64)
    kv = KVView.from_dense(k, v, query_len=600)
    call = native.attention_call(kv.native_keys, q, torch.empty(1, 600, 4, 64), None)
    sizes = []
    for bound in (1, 1 << 20, 1 << 40):
        call.scratch_bound_bytes = bound
        sizes.append(native.library().kv_attend_scratch_bytes(ctypes.byref(call)))
    assert sizes[0] < sizes[1] <= 1 << 20 < sizes[2]


def test_budget_lse__natural_log() -> None:
    q, k, v = random_qkv(2, 4, 2, 3, 500, 128, spread=2.0)
    _, lse = kvkern.prefix_attention(q, KVView.from_dense(k, v, query_len=3), return_lse=True)
    scores = q.double().unflatten(1, (2, 4)) @ k.double().mT[:, :, None] * 128**-0.5
    visible = torch.ones(3, 500, dtype=torch.bool).tril(497)
    oracle = scores.masked_fill(~visible, -math.inf).logsumexp(-1).flatten(1, 2)
    plain = (scores.bfloat16().float().masked_fill(~visible, -math.inf)).logsumexp(-1).flatten(1, 2)
    assert (lse - oracle).abs().max() <= 2 * (plain - oracle).abs().max()


def test_bits_visibility__a_key_not_seen_contributes_nothing() -> None:
    q, k, v = random_qkv(1, 1, 1, 6, 70, 64)
    expected = attend(q, KVView.from_dense(k, v, query_len=6))
    k[:, :, 67:], v[:, :, 67:] = float("nan"), float("inf")
    out = attend(q, KVView.from_dense(k, v, query_len=6))
    assert differing(out[:, :3], expected[:, :3]) == 0, "rows before the odd keys"
    assert (out[:, 3:].view(torch.int16) == contract.BF16_NAN).all(), "rows that see them"


def test_bits_odd__minus_infinity_scores() -> None:
    q, k, v = random_qkv(1, 2, 1, 1, 40, 64)
    q = q.abs()
    k[:, :, 3] = float("-inf")
    without = [j for j in range(40) if j != 3]
    out = attend(q, KVView.from_dense(k, v))
    v_other = v.clone()
    v_other[:, :, 3] = 7.0
    assert differing(out, attend(q, KVView.from_dense(k, v_other))) == 0, "e = 0"
    assert torch.isfinite(out).all()
    k[:, :, without] = float("-inf")
    assert (attend(q, KVView.from_dense(k, v)).view(torch.int16) == contract.BF16_NAN).all(), "only -inf scores"


def test_bits_rounding__every_bf16_neighbour() -> None:
    """RNE16 by integers equals torch's conversion on every tie and next to it."""
    high = torch.arange(1 << 16, dtype=torch.int64)
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = ((high << 16) | low).to(torch.int32)
        x = bits.view(torch.float32)
        x = x[~x.isnan()].contiguous()
        y = torch.empty(len(x), dtype=torch.int16)
        native.library().kv_round16(x.data_ptr(), y.data_ptr(), len(x))
        assert differing(y, x.bfloat16().view(torch.int16)) == 0


def test_bits_contract__c_and_python_hold_one_set_of_constants() -> None:
    text = (native.source_dir() / "contract.h").read_text()
    defines = dict(
        line.split()[1:3] for line in text.splitlines() if line.startswith("#define ") and len(line.split()) > 2
    )
    assert (
        defines.pop("CONTRACT_ID") == f'"{contract.CONTRACT_ID}"' == f'"{native.library().kv_contract_id().decode()}"'
    )
    for name, given in defines.items():
        is_float = given.endswith("f") and ("." in given or "p" in given)
        value = (
            float.fromhex(given[:-1])
            if is_float and given.startswith("0x")
            else float(given.rstrip("f"))
            if is_float
            else int(given, 0)
        )
        assert getattr(contract, name) == value, name


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (5, 80), (8, 128), (4, 256)])
def test_bits_boundary__group_and_head_dim(group: int, head_dim: int) -> None:
    q, k, v = cancelling(3, 2, 600, group=group, head_dim=head_dim)
    expected = attend(q, KVView.from_dense(k, v, query_len=2))
    assert differing(attend(q, shared_view(k, v, 500, [2, 2, 2])), expected) == 0


def test_bits_empty__no_reader_and_no_key() -> None:
    q, k, v = random_qkv(1, 4, 2, 2, 5, 64)
    assert kvkern.prefix_attention(q[:0], KVView.from_dense(k[:0], v[:0])).shape == (0, 2, 8, 64)
    out = attend(q, KVView.from_dense(k, v, lens=int32(0), query_len=int32(0)))
    assert differing(out, torch.zeros_like(out)) == 0


FAULTS = {
    "q": lambda q, kv: (q.float(), kv),
    "head_dim": lambda q, kv: (q[..., :24], kv),
    "num_q_heads": lambda q, kv: (q[:, :7], kv),
    "suffix_v": lambda q, kv: (q, replace(kv, suffix_v=kv.suffix_v[:, :, :0])),
    "suffix_k": lambda q, kv: (q, replace(kv, suffix_len=kv.suffix_len + 64)),
    "reader_prefix": lambda q, kv: (q, replace(kv, reader_prefix=kv.reader_prefix + 1)),
    "prefix_len": lambda q, kv: (q, replace(kv, prefix_len=kv.prefix_len + 512)),
    "prefix_len ": lambda q, kv: (
        q,
        replace(kv, prefix_len=int32(256, 0, 256, 0)[::2], block_table=kv.block_table.repeat(2, 1, 1)),
    ),
    "block_table": lambda q, kv: (q, replace(kv, block_table=kv.block_table.int())),
    "query_len": lambda q, kv: (q, replace(kv, query_len=kv.query_len + 3)),
    "suffix_len": lambda q, kv: (q, replace(kv, suffix_len=kv.suffix_len.long())),
    "layer": lambda q, kv: (q, replace(kv, layer=1)),
    "pool": lambda q, kv: (q, replace(kv, pool=kv.pool.float())),
    "block_table ": lambda q, kv: (q, replace(kv, block_table=kv.block_table.to("meta"))),
}


@pytest.mark.parametrize("field", FAULTS)
def test_raises_layout__names_the_field(field: str) -> None:
    q, k, v = random_qkv(2, 4, 2, 2, 300, 64)
    k[1], v[1] = k[0], v[0]
    q, kv = FAULTS[field](q, shared_view(k, v, 256, [2, 2]))
    with pytest.raises(kvkern.LayoutError, match=rf"^{field.strip()} is"):
        kvkern.prefix_attention(q, kv)


def test_raises_unsupported__profile_backend_device_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(1, 4, 2, 1, 30, 64)
    kv = KVView.from_dense(k, v)
    with monkeypatch.context() as patch:
        patch.setattr(triton_door, "is_interpreted", lambda: False)
        with pytest.raises(kvkern.UnsupportedError, match="fast"):
            kvkern.prefix_attention(q, kv, profile="fast")
    with pytest.raises(kvkern.UnsupportedError, match="meta"):
        kvkern.prefix_attention(q.to("meta"), kv, backend="c")
    with pytest.raises(kvkern.LayoutError, match="key_run"):
        kvkern.prefix_attention(q, kv, key_run=256)
    with pytest.raises(kvkern.LayoutError, match="out must be"):
        kvkern.prefix_attention(q, kv, out=torch.empty(1, 1, 8, 32, dtype=torch.bfloat16))


def test_resolve__counts_a_shared_prefix_once() -> None:
    _, k, v = random_qkv(4, 4, 2, 1, 1000, 64)
    k[1:], v[1:] = k[:1], v[:1]
    q = random_qkv(4, 4, 2, 1, 1, 64)[0]
    plan = kvkern.resolve(q, shared_view(k, v, 900, [1] * 4))
    assert (plan.backend, plan.profile, plan.launches) == ("c", "exact", 1)
    assert plan.bytes_moved == (900 + 4 * 100) * 2 * 2 * 64 * 2 + 2 * q.numel() * 2
