"""Random numbers keyed by what they are for, instead of drawn from one global stream.

A draw depends on its key alone, never on what was drawn before it. That makes a resumed run, a
run on two processes and a reordered run equal to the plain one.
"""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key such as (seed, step, sample, "noise"); equal keys give equal draws."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
