"""The errors that kvkern raises on purpose: one family, each saying what was given, what is allowed, what to do."""

from __future__ import annotations

from typing import Any


class KvkernError(Exception):
    """Base class of every error that kvkern raises on purpose."""


class IntegrityError(KvkernError):
    """Stored bytes are not the bytes that their digest names."""


class LayoutError(KvkernError):
    """A file, tensor or table does not have the form that FORMAT.md or the call requires."""


class UnsupportedError(KvkernError):
    """The request is well-formed, but outside what kvkern computes."""


class SpecMismatchError(KvkernError):
    """KV was made by something else than what wants to read it.

    Attributes:
        field: dotted name of the first differing field, such as `config.rope_theta`.
        stored: its value in the published document.
        wanted: its value in the reader.
    """

    def __init__(self, field: str, stored: Any, wanted: Any) -> None:
        self.field, self.stored, self.wanted = field, stored, wanted
        super().__init__(
            f"spec field {field!r} differs: the document was published with {stored!r}, the reader has "
            f"{wanted!r}. Open it with the model that published it, or publish it again with this one."
        )
