"""What the layers of a model look like to a cache."""

from __future__ import annotations

from typing import NamedTuple


class RecurrentShape(NamedTuple):
    """What a recurrent layer's state is made of: state heads, heads of k and of v, dims of k and of v."""

    heads: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


class SoftmaxShape(NamedTuple):
    """What a softmax layer caches: heads and head dim of its keys and values."""

    key_value_heads: int
    head_dim: int


# One entry per decoder layer of a base model: all that a cache has to know about it.
CacheSpec = tuple[RecurrentShape | SoftmaxShape, ...]
