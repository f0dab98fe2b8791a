"""Search for an input that ends in anything but a refusal, guided by coverage: `python -m ... NAME RUNS FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvkern", "json"]):
    from kvkern.errors import KvkernError
    from tests.support.parsers import PARSERS


def main(name: str, runs: int, corpus: Path) -> None:
    """Fuzz one parser, starting from its valid input."""
    parse, valid = PARSERS[name]

    def once(data: bytes) -> None:
        try:
            parse(data)
        except KvkernError:
            return

    (corpus / "valid").write_bytes(valid)
    options = [f"-runs={runs}", "-max_len=40000", "-rss_limit_mb=4096", str(corpus)]
    atheris.Setup([sys.argv[0], *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
