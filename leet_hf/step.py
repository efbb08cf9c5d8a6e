"""One decode step of a base model on tensors that stay where they are: what is recorded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from leet_linear_attention import step_asks_the_device
from leet_linear_attention.triton.launcher import overlapping

from .arena import Arena, StepRecurrent, StepSoftmax
from .cache import lasting_tensors
from .experts import experts_set_to, recordable_experts
from .fused.joined import MOST_ROWS
from .fused.learned import Learned
from .fused.router import routers_in_one_launch
from .fused.spared import Spared
from .layer import LayerBinding
from .recording import Recorded
from .versions import CACHE


class Step:
    """A forward of `tokens` tokens on an arena's tensors, reading its other inputs from buffers of its own.

    window: how many slots the softmax layers look at, 0 where there are none. padded: whether slots of the arena's
    `padding` are hidden from them. position_rows: 1 or the batch size. run() is what is recorded.
    """

    def __init__(
        self, arena: Arena, base: Any, forward: Callable[..., Any],
        tokens: int, window: int, padded: bool, position_rows: int,
    ) -> None:  # fmt: skip
        self.arena, self._forward, self.window, self.padded = arena, forward, window, padded
        self._experts, self.refused = recordable_experts(base, arena.rows * tokens)
        self.refused = self.refused or _state_obstacle(arena, base, tokens)
        # Launches that begin early gain up to a seventh where they are short, and lose where experts have many rows.
        rows = arena.rows * tokens
        self._overlaps = rows <= (1 if self._experts else MOST_ROWS)
        self.proven = False  # whether it has run
        self.troubles: list[str] = []  # why recordings of it failed
        self._learned = Learned()
        self.recorded: Recorded | None = None
        self._output_type: Any = None
        with lasting_tensors():
            self.ids = torch.zeros(arena.rows, tokens, dtype=torch.int64, device=arena.device)
            self.positions = torch.zeros(position_rows, tokens, dtype=torch.int64, device=arena.device)

    def fill(self, ids: Tensor, positions: Tensor, mask: Tensor | None, length: int) -> None:
        """Put the inputs of the next run where it reads them. mask: [B, length + T], 0 at pads."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        if self.window:
            self.arena.length.fill_(length)
            if self.padded:
                assert mask is not None
                self.arena.padding[:, : mask.shape[1]].copy_(mask)

    def fill_next(self, ids: Tensor, length: int) -> None:
        """Put the inputs of the run after the last one where it reads them: tokens at the positions that follow."""
        self.ids.copy_(ids)
        self.positions.add_(1)
        if self.window:
            self.arena.length.fill_(length)
            if self.padded:
                self.arena.padding[:, length].fill_(True)

    @property
    def experts(self) -> str | None:
        """The experts implementation it runs with; None: as the config says."""
        return self._experts[0] if self._experts else None

    def use_other_experts(self) -> bool:
        """Go on with the next implementation of experts, after one did not run; False if there is no other."""
        if len(self._experts) > 1:
            del self._experts[0]
            return True
        return False

    @torch.no_grad()
    def run(self, base: Any) -> Tensor:
        """Last hidden states [B, T, hidden] of the tokens, which are added to the arena's tensors. Asks no device."""
        masks: dict[str, Tensor | None] = {"linear_attention": None}
        if self.window:
            slots = self.arena.length + torch.arange(self.ids.shape[1], device=self.ids.device)
            for layer in self.arena.layers:
                if isinstance(layer, StepSoftmax):
                    layer.slots, layer.window = slots, self.window
            masks["full_attention"] = self._mask(base, slots)
        # The first run compiles what a recording launches, in the form it launches it.
        overlap = overlapping(self.arena.device) if self._overlaps else nullcontext()
        with overlap, experts_set_to(base, self.experts), routers_in_one_launch(base), Spared(), self._learned:
            output = self._forward(
                base,
                input_ids=self.ids,
                attention_mask=masks,
                position_ids=self.positions,
                use_cache=True,
                **{CACHE: self.arena.cache},
            )
        self._output_type = type(output)
        return output.last_hidden_state

    def output(self, hidden_states: Tensor, cache: Any) -> Any:
        """What the base model's forward returns for these hidden states."""
        return self._output_type(last_hidden_state=hidden_states, **{CACHE: cache})

    def _mask(self, base: Any, slots: Tensor) -> Tensor:
        """Which of `window` slots each token sees, [B or 1, 1, T, window]: True, or 0 and -inf elsewhere."""
        there = torch.arange(self.window, device=slots.device)
        seen = there <= slots[:, None]
        sliding = getattr(base.config, "sliding_window", None)
        if sliding is not None:
            seen &= there > slots[:, None] - sliding
        seen = seen[None, None]
        if self.padded:
            seen = seen & self.arena.padding[:, None, None, : self.window]
        if base.config._attn_implementation == "eager":
            dtype = next(base.parameters()).dtype
            return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
        return seen


def _state_obstacle(arena: Arena, base: Any, tokens: int) -> str | None:
    """Why a step of the states can not be recorded on a GPU: it would wait for the device."""
    if arena.device.type != "cuda":
        return None
    bindings = (module.__dict__.get("_leet") for module in base.modules())
    methods = {binding.method for binding in bindings if isinstance(binding, LayerBinding)}
    for layer in arena.layers:
        if isinstance(layer, StepRecurrent):
            for method in sorted(methods):
                if step_asks_the_device(layer.state, tokens, method):
                    held = f"{layer.state.buffer} buffered tokens and heads of {layer.shape.key_dim}"
                    return f"a step of {tokens} tokens by method {method!r} with {held} waits for the device"
    return None
