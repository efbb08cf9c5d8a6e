"""A few steps of a tiny patched model in several processes, by DDP and by FSDP2, to be compared with one process.

accelerate launch --config_file examples/accelerate/ddp.yaml tests/distributed_training.py FOLDER

With ddp.yaml it trains by accelerate's DDP, then by PyTorch's own fully_shard; with fsdp2.yaml, which needs GPUs, by
accelerate's FSDP2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import tiny
from leet_hf import patch_model

STEPS, BATCH, TOKENS = 3, 4, 24
Result = tuple[dict[str, torch.Tensor], list[float]]


def model() -> Any:
    """All experts are used: a choice of experts would turn rounding into jumps."""
    return patch_model(tiny.model(num_experts_per_tok=4)).train()


def optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)


def steps(model: Any, update: Callable[[torch.Tensor], None], rank: int = 0, ranks: int = 1) -> list[float]:
    """Train on this process's rows of each batch; the loss of each step, the mean over processes."""
    losses = []
    for step in range(STEPS):
        rows = torch.tensor(tiny.prompts((TOKENS,) * BATCH, seed=step))[rank::ranks]
        rows = rows.to(next(model.parameters()).device)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        update(loss)
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def whole(model: Any) -> dict[str, torch.Tensor]:
    """The state dict, shards put together; all processes take part."""
    state = model.state_dict()
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().cpu() for n, v in state.items()}


def by_accelerate(accelerator: Accelerator) -> tuple[Any, Result]:
    """DDP where there are several processes, or what the config that was launched says."""
    own = model()
    wrapped, stepped = accelerator.prepare(own, optimizer(own))

    def update(loss: torch.Tensor) -> None:
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        stepped.step()
        stepped.zero_grad()

    losses = steps(wrapped, update, accelerator.process_index, accelerator.num_processes)
    return wrapped, (whole(getattr(wrapped, "module", wrapped)), losses)


def by_fsdp2(rank: int, ranks: int) -> Result:
    """Each decoder layer sharded over the processes."""
    own = model()
    for layer in own.model.layers:
        fully_shard(layer)
    fully_shard(own)
    assert all(isinstance(parameter, DTensor) for parameter in own.parameters())
    adam = optimizer(own)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    losses = steps(own, update, rank, ranks)
    return whole(own), losses


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    wrapped, result = by_accelerate(accelerator)
    kind = type(wrapped).__name__
    if accelerator.distributed_type == DistributedType.FSDP:
        results = {"fsdp2": (kind, result)}
        assert all(isinstance(parameter, DTensor) for parameter in wrapped.parameters())
    else:
        sharded = by_fsdp2(accelerator.process_index, accelerator.num_processes)
        results = {"ddp": (kind, result), "fully_shard": ("fully_shard", sharded)}
    if accelerator.is_main_process:
        for name, (kind, (weights, losses)) in results.items():
            tensors = {key: value.contiguous().clone() for key, value in weights.items()}
            metadata = {"kind": kind, "processes": str(accelerator.num_processes)}
            save_file(tensors | {"losses": torch.tensor(losses)}, Path(sys.argv[1]) / f"{name}.safetensors", metadata)
    accelerator.end_training()


if __name__ == "__main__":
    main()
