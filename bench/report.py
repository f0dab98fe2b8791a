"""From pytest-benchmark's JSON alone: results, tables, a figure, the README's numbers. `bench/report.py FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from plot import draw
from readme import fill
from roofline import draw_cpu
from tables import SECTIONS, memory_table, section_table

RESULTS = Path(__file__).parent / "results"
KEPT = ("median", "min", "iqr", "rounds")
MEMORY_NOTE = (
    "One process each: SmolLM2 loaded, the document opened, then the first question of one reader and of eight. A "
    "reader of kvkern owns the tiles of its question, the prefix's last tokens and room to grow; the prefix is mapped "
    "once."
)


def main(source: str) -> None:
    """Write the results, and print the tables."""
    raw = json.loads(Path(source).read_text())
    results = trimmed(raw)
    date = raw["datetime"][:10]
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"{date}-cpu.json"
    kept.write_text(json.dumps(results, indent=1) + "\n")
    draw(results["groups"], RESULTS / "cpu.png")
    draw_cpu(results)
    fill(results["groups"])
    tables = report(results, kept.name)
    (RESULTS / "README.md").write_text(tables)
    print(tables)


def trimmed(raw: dict[str, Any]) -> dict[str, Any]:
    """Keep the machine, the versions, and of each cell the summary and what is known of it."""
    groups: dict[str, dict[str, Any]] = {}
    for cell in raw["benchmarks"]:
        row = {**cell["extra_info"], **{name: cell["stats"][name] for name in KEPT}}
        groups.setdefault(cell["group"], {})[row["variant"]] = row
    return {"date": raw["datetime"][:10], "machine": raw["machine_info"], "groups": groups}


def report(results: dict[str, Any], source: str) -> str:
    """Return the Markdown page."""
    machine, versions = results["machine"], results["machine"]["versions"]
    parts = [
        "# Results on a CPU",
        f"Written by `make bench` from [{source}]({source}) on {results['date']}; [how it measures](../README.md). "
        "Bits are the outputs that differ from stock eager's, counted before the timing.",
        f"{machine['cpu']}, {machine['torch_threads']} threads, {machine['last_level_cache_bytes'] >> 20} MiB of "
        f"last-level cache; {machine['stock_order']}; {machine['allocator']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f", {machine['compiler']}.",
        "![decode attention over readers, a decode step, attach against prefill](cpu.png)",
        "![operations per byte against operations a second, under the measured bandwidth](roofline.png)",
    ]
    for section in SECTIONS:
        parts.append(f"## {section.title}\n\n{section.note}")
        for group, rows in results["groups"].items():
            if group.partition("/")[0] == section.group:
                parts += [f"`{_shape(rows) or group}`", section_table(section, rows)]
    parts += [f"## Memory of eight readers\n\n{MEMORY_NOTE}", memory_table(results["groups"]["memory"])]
    return "\n\n".join(parts) + "\n"


def _shape(rows: dict[str, Any]) -> str:
    return next((row["shape"] for row in rows.values() if "shape" in row), "")


if __name__ == "__main__":
    main(sys.argv[1])
