"""Against the package torchscale 0.3.0 itself, in its parallel and recurrent forms; skipped where it is not installed.

It pins an old timm, and with it a torchvision, for one function that only training calls, and fairscale for training in
parallel: install it with `pip install --no-deps torchscale==0.3.0`, and stand-ins take their place here.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import test_training_convergence as convergence
from hosts.torchscale_retnet import randomized
from leet_hf.retnet import RetNetForCausalLM
from leet_hf.retnet.convert import convert, plan_conversion
from leet_hf.versions import CACHE, cache_of
from retnet_checkpoints import SEED, TOLERANCE, assert_equal_weights, assert_same_function, tokens

pytest.importorskip("torchscale", reason="pip install --no-deps torchscale==0.3.0")

SIZES: dict[str, Any] = {
    "decoder_embed_dim": 32, "decoder_value_embed_dim": 48, "decoder_retention_heads": 4, "decoder_ffn_embed_dim": 40,
    "decoder_layers": 3, "vocab_size": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "swish, scaled and normalised embeddings": {
        "activation_fn": "swish", "no_scale_embedding": False, "layernorm_embedding": True,
    },
    "deepnorm": {"deepnorm": True, "subln": False},
    "norms after": {"subln": False, "decoder_normalize_before": False},
    "tied": {"share_decoder_input_output_embed": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def package() -> Any:
    """torchscale's module `retnet` and its `RetNetConfig`, imported with stand-ins for what they only import."""
    stand_ins: dict[str, dict[str, Any]] = {
        "timm": {}, "timm.models": {}, "timm.models.layers": {"drop_path": None},
        "fairscale": {}, "fairscale.nn": {"checkpoint_wrapper": None, "wrap": None},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        for name, values in stand_ins.items():
            module = types.ModuleType(name)
            module.__dict__.update(values)
            patched.setitem(sys.modules, name, module)
        from torchscale.architecture import config, retnet
    return types.SimpleNamespace(RetNetConfig=config.RetNetConfig, RetNetDecoder=retnet.RetNetDecoder)


def made(package: Any, **options: Any) -> tuple[Any, Any]:
    """A decoder of the package, whose forward gives the logits alone, and its config."""
    config = package.RetNetConfig(**SIZES | options)
    embeddings = nn.Embedding(config.vocab_size, config.decoder_embed_dim)

    class Decoder(package.RetNetDecoder):  # type: ignore[misc,name-defined]
        def forward(self, ids: Tensor, **arguments: Any) -> Tensor:
            return super().forward(ids, **arguments)[0]

    return randomized(Decoder(config, embed_tokens=embeddings), SEED), config


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_parallel_form(options: dict[str, Any], package: Any, tmp_path: Path) -> None:
    source, config = made(package, **options)
    torch.save(source.state_dict(), tmp_path / "retnet.pt")
    done = convert(tmp_path / "retnet.pt", tmp_path / "new", config=config)
    ours = RetNetForCausalLM.from_pretrained(tmp_path / "new")
    assert_equal_weights(ours, source, done.plan.names)
    assert_same_function(ours, source, done.plan.names)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
@torch.no_grad()
def test_recurrent_form(options: dict[str, Any], package: Any) -> None:
    """Token by token, with torchscale's incremental state and with our cache."""
    source, config = made(package, **options)
    ready = plan_conversion(source.state_dict(), config=config).config
    ready.retention_scale = "decay"  # the recurrent form leaves the sum of scores out, which only eps can tell
    ours = RetNetForCausalLM.from_torchscale(source.state_dict(), config=ready)
    ids, theirs, cache = tokens(length=24), dict[Any, Any](), None
    for step in range(ids.shape[1]):
        want = source(ids[:, : step + 1], incremental_state=theirs)[:, -1]
        out = ours(ids[:, step : step + 1], **{CACHE: cache}, use_cache=True)
        cache = cache_of(out)
        torch.testing.assert_close(out.logits[:, -1], want, rtol=0, atol=TOLERANCE)


def test_training(package: Any, tmp_path: Path) -> None:
    """50 steps on the same batches; with the eps of the other runs of training, whose comment says why."""
    source, config = made(package, activation_fn="swish", layernorm_eps=convergence.NORM_EPS)
    torch.save(source.state_dict(), tmp_path / "retnet.pt")
    convert(tmp_path / "retnet.pt", tmp_path / "new", config=config)
    ours = RetNetForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)

    def next_token(model: Any, ids: Tensor) -> Tensor:
        return cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    batches = [convergence.batch_of(step, 0, config.vocab_size) for step in range(convergence.STEPS)]
    convergence.near(convergence.losses(ours, batches), convergence.losses(source, batches, next_token))
