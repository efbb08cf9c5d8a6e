"""A process of its own for the package flash-linear-attention, which takes model type "retnet" in the Auto classes.

    python fla_package.py FOLDER fla|leet_hf

Imports both packages, the one named first, says which classes the Auto classes give, and writes checkpoints and answers
of FLA's RetNet to FOLDER, one directory for each of MODELS. Without a GPU, FLA's kernels run in Triton's interpreter.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from untuned import take_the_first_that_runs

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "intermediate_size": 64, "vocab_size": 64,
    "initializer_range": 0.1, "fuse_cross_entropy": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "as published": {},
    "grouped, nothing fused": {
        "num_kv_heads": 2, "expand_k": 0.5, "expand_v": 1.5, "feature_map": "relu", "fuse_norm": False,
        "fuse_swiglu": False, "tie_word_embeddings": True, "elementwise_affine": False, "norm_eps": 1e-4,
    },
}  # fmt: skip
TOKENS = 9


def run_on_the_cpu() -> None:
    """Interpreted kernels need no tuning, and FLA's chunked ones can not be interpreted: its recurrent ones can."""
    from fla.layers import multiscale_retention
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
    multiscale_retention.chunk_retention = multiscale_retention.fused_recurrent_retention


def answers(folder: Path, options: dict[str, Any], device: str) -> None:
    """Save a random model, and its logits, loss, gradients and, on a GPU, what it writes; and those of it patched."""
    from fla.models.retnet import RetNetConfig, RetNetForCausalLM
    from safetensors.torch import save_file

    from leet_hf import patch_model, patch_report, unpatch_model

    torch.manual_seed(0)
    model = RetNetForCausalLM(RetNetConfig(**SIZES | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    model.to(device)
    ids = torch.randint(3, 64, (1, TOKENS), device=device)
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    held = {"ids": ids, "logits": out.logits, "loss": out.loss}
    held |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    patched = patch_model(copy.deepcopy(model))
    assert {layer.adapter for layer in patch_report(patched).layers} == {"retnet-fla"}
    patched.zero_grad()
    again = patched(ids, labels=ids)
    again.loss.backward()
    held |= {"patched logits": again.logits, "patched loss": again.loss}
    held |= {f"patched gradient {name}": p.grad for name, p in patched.named_parameters() if p.grad is not None}
    written = patched.generate(ids[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None)
    held |= {"patched written": written, "unpatched logits": unpatch_model(patched)(ids, use_cache=False).logits}
    held["read again"] = model(written[:, :-1], use_cache=False).logits[:, 4:]
    if device == "cuda":
        held["written"] = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    save_file({name: x.detach().cpu().contiguous() for name, x in held.items()}, folder / "answers.safetensors")


def loads(folder: Path) -> str:
    """What AutoModelForCausalLM makes of a checkpoint: the module of its class, or the error."""
    from transformers import AutoModelForCausalLM

    try:
        return type(AutoModelForCausalLM.from_pretrained(folder)).__module__
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def registered(folder: Path, order: list[str]) -> dict[str, str]:
    """What the Auto classes give once the first package is imported, and once both are: names of modules."""
    importlib.import_module(order[0])
    from transformers import AutoConfig, AutoModelForCausalLM

    first = {"first": type(AutoConfig.for_model("retnet")).__module__}
    if find_spec("fla") is None:
        return first
    importlib.import_module(order[1])
    from fla.models.retnet import RetNetConfig as Theirs

    from leet_hf.retnet import RetNetConfig, RetNetForCausalLM

    sizes = {name: value for name, value in SIZES.items() if name != "fuse_cross_entropy"}
    RetNetForCausalLM(RetNetConfig(**sizes)).save_pretrained(folder / "ours")
    RetNetForCausalLM(RetNetConfig(**sizes, position_embedding="theta_shift")).save_pretrained(folder / "beyond")
    return first | {
        "their config": type(AutoModelForCausalLM.from_config(Theirs(**SIZES))).__module__,
        "our config": type(AutoModelForCausalLM.from_config(RetNetConfig(**sizes))).__module__,
        "our checkpoint": loads(folder / "ours"),
        "our checkpoint, beyond FLA": loads(folder / "beyond"),
    }


def main(folder: Path, first: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = registered(folder, ["fla", "leet_hf"] if first == "fla" else ["leet_hf", "fla"])
    (folder / "registered.json").write_text(json.dumps(given))
    if first != "fla":
        return
    if device == "cpu":
        run_on_the_cpu()
    else:
        take_the_first_that_runs()
    for name, options in MODELS.items():
        answers(folder / name, options, device)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
