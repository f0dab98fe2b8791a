"""Refuse every access of an interpreted kernel outside of the tensors that it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_rmw")
MASK = {"create_masked_load": 1, "create_masked_store": 2, "create_atomic_rmw": 3}
"""Which argument the mask is; the pointers come first, but for an atomic, second."""


@contextmanager
def within(*tensors: torch.Tensor) -> Iterator[None]:
    """Let kernels read and write the storages of these tensors alone."""
    storages = sorted({(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors})
    starts = np.array([start for start, nbytes in storages if nbytes], dtype=np.uint64)
    ends = np.array([start + nbytes for start, nbytes in storages if nbytes], dtype=np.uint64)
    builder = interpreter.interpreter_builder

    def checked(name: str) -> Callable[..., Any]:
        access = getattr(builder, name)

        def do(*arguments: Any) -> Any:
            pointers, mask = arguments[name == "create_atomic_rmw"], arguments[MASK[name]]
            wanted = np.broadcast_to(mask.data, pointers.data.shape)
            addresses = pointers.data[wanted].astype(np.uint64)
            if addresses.size:
                size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
                nearest = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
                is_in = (nearest >= 0) & (addresses + size <= ends[nearest])
                assert is_in.all(), f"{name} at {int(addresses[~is_in][0]):#x}: outside of all tensors of the call"
            return access(*arguments)

        return do

    with pytest.MonkeyPatch.context() as patch:
        for name in ACCESSES:
            patch.setattr(builder, name, checked(name))
        yield
