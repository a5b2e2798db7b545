"""Which errors mean that there was no memory left."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's: the accelerator's, Python's, or torch's for main memory.

    The last is a plain RuntimeError, known by its text alone.
    """
    texts = ("can't allocate memory", "not enough memory")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(text in str(error) for text in texts)
