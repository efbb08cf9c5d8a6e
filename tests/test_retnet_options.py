"""RetNet's options in combination, drawn at random: what each pair of them does together is in no other test."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_retnet
from leet_hf.modes.truth import relative_error
from leet_hf.retnet import RetNetConfig, RetNetForCausalLM
from leet_hf.versions import CACHE, cache_of

OPTIONS: dict[str, tuple[Any, ...]] = {
    "position_embedding": ("rope", "theta_shift"),
    "decay": ("retnet", "retnet_language_model"),
    "retention_scale": ("none", "decay", "score"),
    "hidden_act": ("swish", "gelu", "relu"),
    "gate_act": (None, "swish", "gelu"),
    "use_output_gate": (True, True, False),
    "fuse_norm": (True, False),
    "elementwise_affine": (True, False),
    "norm_type": ("rmsnorm", "layernorm"),
    "head_norm_type": ("rmsnorm", "layernorm"),
    "mlp_type": ("glu", "ffn"),
    "mlp_bias": (False, True),
    "attention_bias": (False, True),
    "subln": (False, True),
    "subln_type": ("layernorm", "rmsnorm"),
    "deepnorm": (False, True),
    "normalize_before": (None, True, False),
    "scale_embeddings": (False, True),
    "norm_embeddings": (False, True),
    "tie_word_embeddings": (False, True),
    "num_kv_heads": (None, 1, 2),
    "expand_k": (0.5, 1.0),
    "expand_v": (1.0, 1.5, 2.0),
    "feature_map": (None, "relu"),
    "attn": (None, {"layers": [1], "num_heads": 4, "num_kv_heads": 2}),
}
# Those that contradict each other, each refused by name.
REFUSED = ("normalize_before is True with deepnorm", "subln is True with deepnorm", "gate_act is ")
IDS = torch.randint(3, tiny_retnet.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))


def drawn(seed: int) -> dict[str, Any]:
    """Options that go together; those that do not are refused by a message of REFUSED."""
    dice = random.Random(seed)
    while True:
        options = {name: dice.choice(values) for name, values in OPTIONS.items()}
        try:
            RetNetConfig(**tiny_retnet.SIZES | options)
        except ValueError as error:
            assert str(error).startswith(REFUSED), error
            continue
        return options


@pytest.mark.parametrize("seed", range(16))
def test_cache_gradients_and_files(seed: int, tmp_path: Path) -> None:
    """Pieces after a cache give what one forward gives; every weight has a gradient; a file holds all of it."""
    model = RetNetForCausalLM(RetNetConfig(**tiny_retnet.SIZES | drawn(seed))).eval()
    whole = model(IDS, labels=IDS)
    cache, logits = None, []
    for piece in IDS.split([13, 4, 1, 2], dim=1):
        out = model(piece, **{CACHE: cache}, use_cache=True)
        cache = cache_of(out)
        logits.append(out.logits)
    assert relative_error(torch.cat(logits, 1), whole.logits) <= 1e-4
    whole.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name
    model.save_pretrained(tmp_path)
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_every_option_is_drawn() -> None:
    for name, values in OPTIONS.items():
        taken = [drawn(seed)[name] for seed in range(16)]
        assert all(value in taken for value in values), name
