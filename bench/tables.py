"""The tables of the report: which columns each group has, and how a cell is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, Any]
Rows = dict[str, Row]
Column = tuple[str, Callable[[Row, Rows], str]]
MISSING = "-"
LABELS = {
    "read": "read bandwidth, beside",
    "kvkern": "kvkern, exact C",
    "kvkern-model": "kvkern, the whole model under the contract",
    "kvkern-public": "kvkern, through prefix_attention()",
    "eager": "stock eager",
    "eager-fresh-pages": "stock eager, malloc returns its pages",
    "sdpa": "stock sdpa",
    "dynamic-cache": "stock DynamicCache, torch.cat",
    "no-op": "no attention, mask or cache",
    "eager-prefill": "stock eager prefill",
    "sdpa-prefill": "stock sdpa prefill",
    "kvkern-prefill": "kvkern prefill",
    "kvkern-publish": "kvkern prefill, packed and written",
    "first-open": "open, first in a process",
    "later-open": "open, later",
    "recompute-open": "open, later, both ends computed again",
    "form-check": "what patch asks of an eager function, once",
    "model-checks": "what of an open is about the model: spec, and what no spec names",
    "next-reader": "one more reader of an open prefix",
    "read-file": "plain read into one buffer",
    "hash": "SHA-256 of the bytes in memory, two threads",
    "first-load": "kvkern, every byte through SHA-256",
    "later-load": "kvkern, every byte through xxh3",
    "safetensors-load": "safetensors, read into memory, unchecked",
    "safetensors-map": "safetensors, mapped, unread and unchecked",
    "torch-load": "torch.load, unchecked",
    "write-file": "plain write of the shards' bytes, fsync",
    "store-put": "kvkern: pack, hash, write, fsync",
    "store-put-again": "kvkern, all blocks there already",
    "safetensors-save": "safetensors save_file, fsync",
    "torch-save": "torch.save, fsync",
    "one-first": "open 1 document, first in a process",
    "one-later": "open 1 document, later",
    "all-first": "open 1,000 documents, first in a process",
    "all-later": "open 1,000 documents, later",
    "linear-c": "kvkern, C",
    "linear-torch": "stock, the row computed as two",
    "linear-stock": "stock, one row (other bits over 1,024 inputs)",
    "contract-stock-path": "contract, stock torch's Linear",
    "contract-c-path": "contract, all in C",
    "contract-publish": "contract, packed and written",
    "audit-all": "audit, the verdict",
    "audit-32": "audit, a spot check of 32 tokens",
    "find": "find the longest beginning among 1,000",
}


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        group: beginning of the groups' names that it shows, a table each.
        title: its heading.
        note: what to know when reading it.
        columns: beside name, median, IQR and rounds.
    """

    group: str
    title: str
    note: str
    columns: tuple[Column, ...]


def label(name: str) -> str:
    """Spell a variant's name; `-B8` at its end means 8 readers."""
    base, _, batch = name.partition("-B")
    text = LABELS.get(base, base)
    if not batch.isdigit():
        return LABELS.get(name, name)
    return f"{text}, {batch} reader{'s' if batch != '1' else ''}"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits, and no exponent."""
    if value is None:
        return MISSING
    whole = len(str(int(abs(value))))
    decimals = digits - whole if abs(value) >= 1 else digits
    return f"{value:,.{max(0, decimals)}f}"


def bits(row: Row, rows: Rows) -> str:
    """Say how many outputs differ from stock eager's, verified before the timing."""
    if "bits_outputs" not in row:
        return MISSING
    if row["variant"].startswith("eager"):
        return "the reference"
    count = f"{row['bits_differing']:,} of {row['bits_outputs']:,} differ"
    return f"{count}; no claim: {row['no_claim']}" if "no_claim" in row else count


def times_speed_of(baseline: str) -> Column:
    """Return the column of the baseline's median over the row's: how many times its speed."""

    def ratio(row: Row, rows: Rows) -> str:
        base = rows.get(baseline)
        is_peer = base is not None and row["variant"] not in ("read", "next-reader", baseline)
        return number(base["median"] / row["median"]) if is_peer else MISSING

    return f"x speed of {label(baseline)}", ratio


def of_one_reader(row: Row, rows: Rows) -> str:
    """Return a batch's time in times of one reader of the same peer."""
    one = rows.get(f"{row['variant'].partition('-B')[0]}-B1")
    return MISSING if one is None or "readers" not in row else f"{number(row['median'] / one['median'])}x"


def ms_per_reader(row: Row, rows: Rows) -> str:
    """Return the median in milliseconds over the readers."""
    return number(1e3 * row["median"] / row["readers"]) if "readers" in row else MISSING


def above_no_op(row: Row, rows: Rows) -> str:
    """Return what attention, mask and cache cost, in milliseconds."""
    return number(1e3 * (row["median"] - rows["no-op"]["median"])) if _takes_a_step(row) else MISSING


def floor_ratio(row: Row, rows: Rows) -> str:
    """Return the most that any attention could gain over this row."""
    return f"{number(row['median'] / rows['no-op']['median'])}x" if _takes_a_step(row) else MISSING


def _takes_a_step(row: Row) -> bool:
    return row["variant"] not in ("no-op", "read")


def _plain(field: str, digits: int = 3) -> Callable[[Row, Rows], str]:
    return lambda row, rows: number(row.get(field), digits)


def of_rate(baseline: str) -> Column:
    """Return the column of the row's rate in percent of another row's."""

    def percent(row: Row, rows: Rows) -> str:
        base = rows.get(baseline)
        return number(100 * base["median"] / row["median"], 2) if base is not None else MISSING

    return f"% of {label(baseline)}", percent


def ms_per_document(row: Row, rows: Rows) -> str:
    """Return the median in milliseconds over the documents."""
    return number(1e3 * row["median"] / row["documents"])


RATES: tuple[Column, ...] = (("GB/s", _plain("gbps")), ("% of read", _plain("percent_of_read", 2)))
FAULTS: Column = ("page faults", lambda row, rows: f"{row['page_faults']:,}")
BITS: Column = ("Bits", bits)
SECTIONS = (
    Section(
        "bandwidth",
        "Read bandwidth",
        "Sums over one large buffer, all threads and one; the fastest runs as `read` inside the rotations below.",
        RATES[:1],
    ),
    Section(
        "decode-attention",
        "Decode attention, one layer, one reader",
        "One query token. GB/s counts K, V, q and out once each. Stock eager appears in both states of glibc's malloc.",
        (times_speed_of("eager"), times_speed_of("sdpa"), *RATES, FAULTS, BITS),
    ),
    Section(
        "cache-append",
        "Cache append, one layer, one token",
        "What a cache pays per step and layer before attention starts.",
        (times_speed_of("dynamic-cache"), FAULTS, BITS),
    ),
    Section(
        "readers",
        "Readers of one prefix, one layer",
        "kvkern reads the prefix in place for all of them; stock needs it repeated for each.",
        (("of one reader's time", of_one_reader), ("ms a reader", ms_per_reader), *RATES, FAULTS, BITS),
    ),
    Section(
        "attach-vs-prefill",
        "Attach against prefill",
        "Bits are those of all K and V. Files are in the page cache. An open verifies every byte (SHA-256 the first "
        "time, xxh3 later), and the first one hashes the weights too. One more reader costs nothing until it asks: no "
        "ratio there. Stock eager runs ahead of the rotation, once where it is slow.",
        (times_speed_of("eager-prefill"), times_speed_of("sdpa-prefill"), FAULTS, BITS),
    ),
    Section(
        "load",
        "Load of one document from the store",
        "Random KV; files are in the page cache. The peers keep the same tensors in one file and check nothing.",
        (RATES[0], of_rate("hash"), of_rate("read-file"), BITS),
    ),
    Section(
        "save",
        "Publish one document",
        "To the disk: every way ends with an fsync of what it wrote.",
        (RATES[0], of_rate("write-file")),
    ),
    Section(
        "open",
        "Open one document of many",
        "300 tokens each, two blocks, one of them shared by all; every byte verified.",
        (("ms a document", ms_per_document),),
    ),
    Section(
        "linear",
        "Linear of one row",
        "What decode pays for a weight. Under the contract every row has the bits that it has among others.",
        (times_speed_of("linear-torch"), *RATES, BITS),
    ),
    Section(
        "contract-prefill",
        "Prefill under the contract",
        "Bits are those of K and V against the contract's own, by the stock path: stock's eager and sdpa differ "
        "from it past 1,024 tokens.",
        (times_speed_of("eager-prefill"), times_speed_of("sdpa-prefill"), BITS),
    ),
    Section(
        "decode-step",
        "Decode step of the whole model",
        "Bits are those of the logits. The last two columns: what attention, mask and cache cost, and the most that "
        "any attention could gain. GB/s counts weights, K and V once.",
        (
            times_speed_of("eager"),
            times_speed_of("sdpa"),
            *RATES,
            BITS,
            ("ms above no attention", above_no_op),
            ("at most", floor_ratio),
        ),
    ),
)


def write_page(source: Path, name: str, page: Callable[[dict[str, Any], str], str]) -> None:
    """Write the page of a JSON file beside it, and print it."""
    text = page(json.loads(source.read_text()), source.name)
    source.with_name(name).write_text(text)
    print(text)


def markdown(header: list[str], body: list[list[str]]) -> str:
    """Lay out a table that reads well as plain text too: first column left, the others right."""
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    pad = [str.ljust] + [str.rjust] * (len(header) - 1)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    rows = [[p(text, w) for p, text, w in zip(pad, row, widths, strict=True)] for row in (header, *body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def section_table(section: Section, rows: Rows) -> str:
    """Return one group's table."""
    header = ["", "median ms", "IQR ms", "rounds", *(name for name, _ in section.columns)]
    body = [
        [
            label(row["variant"]),
            number(1e3 * row["median"]),
            number(1e3 * row["iqr"]) if row["rounds"] > 1 else MISSING,
            str(row["rounds"]),
            *(write(row, rows) for _, write in section.columns),
        ]
        for row in rows.values()
    ]
    return markdown(header, body)


def memory_table(rows: Rows) -> str:
    """Return the table of resident memory, in MB of 10^6 bytes, above the loaded model."""
    ways = {"kvkern": "kvkern", "eager": "stock DynamicCache, repeated to 8"}
    header = [
        "MB above the loaded model",
        "opened",
        "1 reader",
        "8 readers",
        "a further reader",
        "in prefixes",
    ]
    body = []
    for way, row in rows.items():
        loaded = row["memory"]["loaded"]["rss_bytes"]
        moments = ("opened", "readers_1", "readers_8")
        opened, one, eight = ((row["memory"][when]["rss_bytes"] - loaded) / 1e6 for when in moments)
        in_prefixes = f"{number(1e6 * eight / row['prefix_bytes'])}x"
        body.append([ways[way], *map(number, (opened, one, eight, (eight - one) / 7)), in_prefixes])
    return markdown(header, body)
