"""DecodeState: the running state of decoding as a base state, a ring of the last tokens and a counter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import DTYPES, looks_at_values
from .state_checks import check_append, check_load
from .torch_step import fold_held, fold_tokens, per_token
from .torch_token import Views


@dataclass(eq=False)
class DecodeState:
    """Everything a recurrent layer keeps between decode steps of one batch.

    base `[B, H, K, V]` float32: the state of all tokens but the buffered ones. keys `[B, R, Hk, K]`, values
    `[B, R, Hv, V]` in the model's dtype and log_decays `[B, R, H]` float32: a ring of R = 2 * buffer slots. cursor
    int32 `[3]`: start, count, ticket; slots (start + i) % R, i < count, are the tokens not yet in base (ticket belongs
    to the Triton step and is 0 between calls). With dtype float64 all numbers are float64.

    buffer: the most tokens held, and the most one step may bring. keep: how many of the last tokens can always be taken
    back, as far as that many were ever added and not taken back.

    A state carries no gradient, and may be made under torch.inference_mode and used outside of it.
    """

    base: Tensor
    keys: Tensor
    values: Tensor
    log_decays: Tensor
    cursor: Tensor
    buffer: int
    keep: int = 0

    @classmethod
    @torch.inference_mode(False)
    def allocate(
        cls,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        buffer: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        key_heads: int | None = None,
        value_heads: int | None = None,
        keep: int = 0,
    ) -> DecodeState:
        """An empty state (zero). key_heads and value_heads default to heads and must divide it. Raises ValueError."""
        key_heads, value_heads = (
            heads if key_heads is None else key_heads,
            heads if value_heads is None else value_heads,
        )
        for name, count in (("key_heads", key_heads), ("value_heads", value_heads)):
            if count < 1 or heads % count:
                raise ValueError(f"{name} is {count}, which does not divide heads={heads}; give a divisor of heads")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}, must be one of {', '.join(map(str, DTYPES))}: take that of q, k and v")
        if buffer < 1:
            raise ValueError(f"buffer is {buffer}; it must be at least 1 token")
        if not 0 <= keep <= buffer:
            raise ValueError(
                f"keep is {keep}; it must be from 0 to buffer={buffer}: allocate a larger buffer to keep more"
            )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        slots = 2 * buffer
        return cls(
            base=torch.zeros(batch, heads, key_dim, value_dim, dtype=wide, device=device),
            keys=torch.zeros(batch, slots, key_heads, key_dim, dtype=dtype, device=device),
            values=torch.zeros(batch, slots, value_heads, value_dim, dtype=dtype, device=device),
            log_decays=torch.zeros(batch, slots, heads, dtype=wide, device=device),
            cursor=torch.zeros(3, dtype=torch.int32, device=device),
            buffer=buffer,
            keep=keep,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in (*self._rows(), self.cursor))

    def fold(self) -> Tensor:
        """Take every buffered token into the base state and return it: `[B, H, K, V]`, the live tensor, not a copy."""
        if self.cursor.device.type != "cpu" or not looks_at_values(self.cursor):
            self._fold_oldest(self.cursor[1])
        elif count := int(self.cursor[1]):
            self._fold_held(count)
        return self.base

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> None:
        """Buffer T <= buffer tokens without computing outputs, folding as a step does.

        k `[B, T, Hk, K]`, v `[B, T, Hv, V]`, log_decay None, `[H]` or `[B, T, H]`. Raises ValueError.
        """
        check_append(k, v, log_decay, self)
        tokens = k.shape[1]
        if tokens == 0:
            return
        count = self.cursor[1]
        # On the device, without reading the counter: max(keep, T) tokens stay unless all of them fit.
        spare = (count + (tokens - max(self.keep, tokens))).clamp(min=0).minimum(count)
        self._fold_oldest(torch.where(count + tokens <= self.buffer, 0, spare))
        fresh = (self.cursor[0] + self.cursor[1] + torch.arange(tokens, device=k.device)) % self.keys.shape[1]
        self.keys.index_copy_(1, fresh, k.to(self.keys.dtype))
        self.values.index_copy_(1, fresh, v.to(self.values.dtype))
        self.log_decays.index_copy_(1, fresh, per_token(log_decay, self.log_decays, tokens))
        self.cursor[1].add_(tokens)

    def rewind(self, tokens: int) -> None:
        """Take back the last `tokens` tokens.

        Raises ValueError if fewer are held; on a GPU, where asking would wait, only under LEET_CHECK_VALUES=1.
        """
        if tokens < 0:
            raise ValueError(f"rewind was asked to take back {tokens} tokens; the number must not be negative")
        if looks_at_values(self.cursor) and tokens > int(self.cursor[1]):
            raise ValueError(
                f"rewind was asked to take back {tokens} tokens but the buffer holds {int(self.cursor[1])}; "
                f"allocate the state with keep >= {tokens} (keep={self.keep}, buffer={self.buffer} now)"
            )
        self.cursor[1].sub_(tokens).clamp_(min=0)

    def reset(self) -> None:
        """Back to an empty state, in place."""
        self.base.zero_()
        self.cursor.zero_()

    @torch.no_grad()
    def load(self, state: Tensor) -> None:
        """Become `state` `[B, H, K, V]` with nothing buffered, in place. Raises ValueError if the shape differs."""
        check_load(state, self)
        self.base.copy_(state)
        self.cursor.zero_()

    def reorder(self, index: Tensor) -> None:
        """Row b becomes row index[b], in place; index `[B]`, as beam search gives it. Raises ValueError."""
        if index.dim() != 1 or index.shape[0] != self.base.shape[0]:
            raise ValueError(
                f"index has shape {list(index.shape)}, must be [B] = [{self.base.shape[0]}], one entry per row: "
                "use select to change the batch"
            )
        for x in self._rows():
            x.copy_(x.index_select(0, index.to(x.device)))

    def select(self, index: Tensor) -> None:
        """Keep rows index `[n]`; the batch is n afterwards and the tensors are new."""
        self._replace(lambda x: x.index_select(0, index.to(x.device)))

    def repeat(self, n: int) -> None:
        """Every row n times in a row, as repeat_interleave; the batch is n * B afterwards and the tensors are new."""
        self._replace(lambda x: x.repeat_interleave(n, 0))

    @torch.inference_mode(False)
    def clone(self) -> DecodeState:
        """An independent copy."""
        return copy.deepcopy(self)

    def views(self) -> Views:
        """Views of the tensors this state has now, made once: see `torch_token`."""
        tensors = self.base, self.keys, self.values, self.log_decays, self.cursor
        made: Views | None = self.__dict__.get("_views")
        if made is None or not made.of(*tensors):
            made = self.__dict__["_views"] = Views(*tensors)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_views"}

    def _rows(self) -> tuple[Tensor, ...]:
        return self.base, self.keys, self.values, self.log_decays

    @torch.inference_mode(False)
    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.base, self.keys, self.values, self.log_decays = (change(x) for x in self._rows())
        self.cursor = self.cursor.clone()  # another state may have shared all tensors: it goes on by itself

    def _fold_held(self, count: int) -> None:
        """Take all `count` tokens held into base, where the host knows their number: no others are read."""
        start, slots = int(self.cursor[0]), self.keys.shape[1]
        if start + count <= slots:
            held = [x.narrow(1, start, count) for x in (self.keys, self.values, self.log_decays)]
        else:
            place = (start + torch.arange(count, device=self.base.device)) % slots
            held = [x.index_select(1, place) for x in (self.keys, self.values, self.log_decays)]
        fold_held(self.base, *held)
        self.cursor.zero_()

    def _fold_oldest(self, fold: Tensor) -> None:
        """Take the `fold` oldest tokens (a device scalar) into base: works on every slot, masking the others."""
        steps = torch.arange(self.buffer, device=self.base.device)
        held = (self.cursor[0] + steps) % self.keys.shape[1]
        out = (steps >= fold)[None, :, None]
        keys, values, decays = (x.index_select(1, held) for x in (self.keys, self.values, self.log_decays))
        fold_tokens(
            self.base,
            keys.masked_fill(out[..., None], 0),
            values.masked_fill(out[..., None], 0),
            decays.masked_fill(out, 0),
        )
        self.cursor[0].add_(fold).remainder_(self.keys.shape[1])
        self.cursor[1].sub_(fold)
