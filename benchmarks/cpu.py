"""The operator on a CPU: forward against the block loop of stock MiniMax, and one decode step against stock's.

    python benchmarks/cpu.py [--quick] [--output FOLDER]

Stock is what `MiniMaxLightningAttention` of Transformers does between its projections, written out: blocks of 256 with
masks made beforehand, and for a token `S <- decay * S + k v^T`, `o = q S`. Both read q, k and v as it has them,
views of one packed projection, and are timed in turns; results are compared first.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from common import cpu_name, one_thread, options, table, timed_in_turns, write

from leet_linear_attention import DecodeState, linear_attention, linear_attention_step

FORWARD = [(1, 4096, 8, 64), (1, 512, 8, 64), (4, 1024, 8, 64), (1, 4096, 8, 128), (1, 2048, 32, 32)]
STEP = [(1, 8, 32), (1, 8, 64), (4, 8, 64), (1, 32, 128)]
BLOCK = 256
BUFFER = 16


class Stock:
    """Stock's masks and its two loops. slope `[H]`; q, k, v `[B, H, T, D]`."""

    def __init__(self, slope: torch.Tensor) -> None:
        self.slope = slope[:, None, None]
        place = torch.arange(BLOCK) + 1
        self.query_decay = torch.exp(-self.slope * place[:, None])
        self.key_decay = torch.exp(-self.slope * (BLOCK - place[:, None]))
        apart = self.slope * (place[:, None] - place)[None, None]
        self.diagonal = torch.exp(torch.where(apart >= 0, -apart, float("-inf")))
        self.ratio = torch.exp(-self.slope)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`[B, T, H * D]`."""
        batch, heads, tokens, width = v.shape
        state = torch.zeros(batch, heads, width, width)
        outputs = []
        for start in range(0, tokens, BLOCK):
            here = slice(start, min(start + BLOCK, tokens))
            size = here.stop - start
            q_block, k_block, v_block = q[:, :, here], k[:, :, here], v[:, :, here]
            scores = torch.matmul(q_block, k_block.transpose(-1, -2))
            inside = torch.matmul(scores * self.diagonal[:, :, :size, :size], v_block)
            before = torch.matmul(q_block * self.query_decay[:, :size], state)
            outputs.append(before + inside)
            update = torch.matmul((k_block * self.key_decay[:, -size:]).transpose(-1, -2), v_block)
            state = state * torch.exp(-self.slope * size) + update
        return torch.cat(outputs, -2).transpose(1, 2).reshape(batch, tokens, heads * width)

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`[B, 1, H * D]` and the next state, for one token."""
        state = self.ratio * state + torch.matmul(k.transpose(-1, -2), v)
        o = torch.cat([torch.matmul(q, state)], -2)
        return o.transpose(1, 2).reshape(q.shape[0], 1, -1), state


def projected(batch: int, tokens: int, heads: int, width: int) -> tuple[torch.Tensor, ...]:
    """q, k, v `[B, T, H, D]` as views of one tensor, and slopes `[H]`."""
    packed = torch.randn(batch, tokens, heads, 3 * width) / width**0.25
    slope = 2.0 ** (-8 * (torch.arange(heads) + 1) / heads)
    return *packed.split(width, 3), slope


def compare(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    apart = ((found - wanted).norm() / wanted.norm()).item()
    if not apart < 1e-4:
        raise SystemExit(f"{what}: ours is {apart:.1e} from stock's, which is more than rounding: nothing was timed")


def row(shape: str, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {
        "shape": shape,
        **{f"{name} ms": times[name]["median"] for name in ("ours", "stock")},
        "stock / ours": times["stock"]["median"] / times["ours"]["median"],
        "of least": times["stock"]["least"] / times["ours"]["least"],
        "spread": times,
    }


@torch.no_grad()
def forward(shape: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    batch, tokens, heads, width = shape
    q, k, v, slope = projected(*shape)
    stock, log_decay = Stock(slope), -slope
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    calls = {
        "ours": lambda: linear_attention(q, k, v, log_decay)[0].reshape(batch, tokens, -1),
        "stock": lambda: stock.forward(*heads_first),
    }
    name = f"B{batch} T{tokens} H{heads} D{width}"
    compare(calls["ours"](), calls["stock"](), name)
    return row(name, timed_in_turns(calls, rounds, "cpu"))


@torch.no_grad()
def step(shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Milliseconds a step, over whole cycles of the buffer: most steps append, one in a cycle folds."""
    batch, heads, width = shape
    q, k, v, slope = projected(batch, 2 * BUFFER, heads, width)
    stock, log_decay = Stock(slope), -slope
    state = DecodeState.allocate(batch, heads, width, width, buffer=BUFFER)
    tokens = [tuple(x[:, t : t + 1] for x in (q, k, v)) for t in range(2 * BUFFER)]
    heads_first = [tuple(x.transpose(1, 2) for x in token) for token in tokens]

    def ours() -> torch.Tensor:
        return [linear_attention_step(*token, log_decay, state).reshape(batch, 1, -1) for token in tokens][-1]

    def theirs() -> torch.Tensor:
        past = torch.zeros(batch, heads, width, width)
        for token in heads_first:
            o, past = stock.step(*token, past)
        return o

    name = f"step B{batch} H{heads} D{width}"
    compare(ours(), theirs(), name)
    state.reset()
    times = timed_in_turns({"ours": ours, "stock": theirs}, rounds, "cpu")
    each = {who: {key: value / len(tokens) for key, value in numbers.items()} for who, numbers in times.items()}
    return row(name, each)


def main() -> None:
    chosen = options(__doc__, quick="one forward and one step, few rounds").parse_args()
    torch.manual_seed(0)
    one_thread()
    rounds = 5 if chosen.quick else 31
    first = 1 if chosen.quick else None
    rows = [forward(shape, rounds) for shape in itertools.islice(FORWARD, first)]
    rows += [step(shape, rounds) for shape in itertools.islice(STEP, first)]
    print(table(rows, ["shape", "ours ms", "stock ms", "stock / ours", "of least"]))
    payload = {"device": cpu_name(), "clock": "processor time of one thread", "rounds": rounds, "rows": rows}
    print(f"wrote {write('cpu', payload, chosen.output)}")


if __name__ == "__main__":
    main()
