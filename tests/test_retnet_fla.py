"""RetNet of flash-linear-attention (FLA): its checkpoints as they are, the same function, and both packages at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import configuration_auto

import host_checks
from hosts import fla_retnet as fla
from leet_hf.modes.truth import relative_error
from leet_hf.retnet import RetNetConfig, RetNetForCausalLM, RetNetForSequenceClassification, RetNetModel
from leet_hf.retnet.registration import register_config
from retnet_checkpoints import TOLERANCE, assert_equal_weights, assert_same_function

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "intermediate_size": 64, "vocab_size": 64,
    "initializer_range": 0.125,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "as published": {},
    "MLP by ratio": {"intermediate_size": None, "hidden_ratio": 4, "num_hidden_layers": 1},
    "grouped": {"num_kv_heads": 2},
    "one key-value head, narrow keys": {"num_kv_heads": 1, "expand_k": 0.5, "expand_v": 1.0},
    "wide values": {"num_heads": 2, "expand_v": 3.0},
    "norms not fused": {"fuse_norm": False, "norm_eps": 1e-4},
    "no weight in the heads' norm": {"elementwise_affine": False},
    "no gate": {"use_output_gate": False},
    "feature map": {"feature_map": "relu"},
    "tied": {"tie_word_embeddings": True},
}
# config.json of a model of 1.3 billion parameters, as FLA's versions of 2024 wrote it.
PUBLISHED = {
    "architectures": ["RetNetForCausalLM"], "attn_mode": "fused_chunk", "bos_token_id": 1, "conv_size": 4,
    "elementwise_affine": True, "eos_token_id": 2, "expand_k": 1, "expand_v": 2, "fuse_cross_entropy": True,
    "fuse_norm": True, "hidden_act": "swish", "hidden_ratio": 2, "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": None, "max_position_embeddings": 2048, "model_type": "retnet", "norm_eps": 1e-06,
    "num_heads": 8, "num_hidden_layers": 24, "num_kv_heads": 8, "share_conv_kernel": True,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True,
    "use_output_gate": True, "use_short_conv": False, "vocab_size": 32000,
}  # fmt: skip


class Logits(nn.Module):
    """A stand-in whose forward gives the logits alone; names as they are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=ids, use_cache=False).logits


def saved(folder: Path, options: dict[str, Any], **how: Any) -> Any:
    """FLA's model, written by its `save_pretrained`."""
    model = host_checks.make(fla.RetNetForCausalLM, fla.RetNetConfig(**SIZES | options), seed=1)
    model.save_pretrained(folder, **how)
    return model


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_checkpoints_are_read_as_they_are(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(tmp_path, options, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(ours) is RetNetForCausalLM
    assert not any(loading.values()), loading
    names = {name: name for name, _ in theirs.named_parameters()}
    assert_equal_weights(ours, theirs, names)
    assert_same_function(ours, Logits(theirs), {name: f"inner.{name}" for name in names})


def test_the_published_config_is_read() -> None:
    config = RetNetConfig.from_dict(dict(PUBLISHED))
    assert config.mlp_size == 2816 and config.key_dim == 256 and config.value_dim == 512
    assert config.dtype == torch.bfloat16 and config.attn_mode == "fused_chunk"
    with torch.device("meta"):
        sizes = {name: tuple(p.shape) for name, p in RetNetForCausalLM(config).named_parameters()}
        assert sizes == {
            name: tuple(p.shape)
            for name, p in fla.RetNetForCausalLM(fla.RetNetConfig(**fla_sizes(PUBLISHED))).named_parameters()
        }


def fla_sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("torch_dtype", "architectures", "model_type")}


def test_what_we_write_fla_reads(tmp_path: Path) -> None:
    ours = host_checks.make(RetNetForCausalLM, RetNetConfig(**SIZES | {"num_kv_heads": 2}))
    ours.save_pretrained(tmp_path)
    theirs = fla.RetNetForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 64, (2, 15))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=TOLERANCE)
    assert theirs.config.attn_mode == "chunk"


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "misshapen"])
def test_a_checkpoint_that_does_not_fit(missing: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As for any model of transformers: a warning that names the keys, an error where shapes differ."""
    theirs = saved(tmp_path, {})
    state = dict(theirs.state_dict())
    name = "model.layers.1.attn.g_proj.weight"
    state[name] = state[name][:5]
    if missing:
        del state[name]
        _, loading = RetNetForCausalLM.from_pretrained(
            None, config=RetNetConfig(**SIZES), state_dict=state | {"extra": torch.ones(1)}, output_loading_info=True
        )
        assert loading["missing_keys"] == {name} and loading["unexpected_keys"] == {"extra"}
    else:
        with pytest.raises(RuntimeError, match="mismatched"):
            RetNetForCausalLM.from_pretrained(None, config=RetNetConfig(**SIZES), state_dict=state)


# With another package that has model type "retnet".


def register_fla() -> None:
    """What importing FLA does."""
    AutoConfig.register("retnet", fla.RetNetConfig, exist_ok=True)
    AutoModel.register(fla.RetNetConfig, fla.RetNetModel, exist_ok=True)
    AutoModelForCausalLM.register(fla.RetNetConfig, fla.RetNetForCausalLM, exist_ok=True)


def test_auto_classes() -> None:
    config = AutoConfig.for_model("retnet", **SIZES)
    assert type(config) is RetNetConfig
    assert type(AutoModel.from_config(config)) is RetNetModel
    assert type(AutoModelForCausalLM.from_config(config)) is RetNetForCausalLM
    assert type(AutoModelForSequenceClassification.from_config(config)) is RetNetForSequenceClassification


@pytest.mark.parametrize("first", ["fla", "leet_hf"])
def test_another_package_with_this_model_type(first: str, auto_classes: None, tmp_path: Path) -> None:
    if first == "fla":
        configuration_auto.CONFIG_MAPPING._extra_content.pop("retnet")
        register_fla()
        register_config()
    else:
        register_config()
        register_fla()
    theirs = saved(tmp_path, {})
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is fla.RetNetForCausalLM, "its own name is its own"
    assert type(AutoModelForCausalLM.from_config(RetNetConfig(**SIZES))) is RetNetForCausalLM
    ours = RetNetForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 64, (2, 15))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=TOLERANCE)


def run(code: str) -> str:
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    settings = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TRITON_F32_DEFAULT": "ieee",
    }  # or FLA multiplies as TF32
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Not imported here: it would take "retnet" in the Auto classes of this process.
needs_fla = pytest.mark.skipif(not find_spec("fla"), reason="pip install flash-linear-attention==0.6.0")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What FLA itself answers and registers; leet_hf is imported after it."""
    folder = tmp_path_factory.mktemp("fla")
    run(f"import fla_package, pathlib; fla_package.main(pathlib.Path({str(folder)!r}), 'fla')")
    return folder


EXPECTED = {
    "their config": "fla.models.retnet.modeling_retnet",
    "our config": "leet_hf.retnet.modeling_retnet",
    "our checkpoint": "fla.models.retnet.modeling_retnet",
    "our checkpoint, beyond FLA": "AssertionError: Not supported mode `leet_hf`.",
}


@needs_fla
def test_the_package_itself_imported_before(real: Path) -> None:
    first = {"first": "fla.models.retnet.configuration_retnet"}
    assert json.loads((real / "registered.json").read_text()) == first | EXPECTED


def test_leet_hf_imported_before_transformers_and_before_the_package(tmp_path: Path) -> None:
    run(f"import fla_package, pathlib; fla_package.main(pathlib.Path({str(tmp_path)!r}), 'leet_hf')")
    given = json.loads((tmp_path / "registered.json").read_text())
    assert given.pop("first") == "leet_hf.retnet.configuration_retnet"
    assert given == (EXPECTED if find_spec("fla") else {})


def answers_agree(folder: Path, device: str) -> None:
    """Logits, loss, gradients and what is written, of a checkpoint of FLA's and of ours read from it."""
    held = load_file(folder / "answers.safetensors", device=device)
    ours = RetNetForCausalLM.from_pretrained(folder).to(device)
    out = ours(held["ids"], labels=held["ids"])
    torch.testing.assert_close(out.logits, held["logits"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(out.loss, held["loss"], rtol=0, atol=TOLERANCE)
    out.loss.backward()
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, held[f"gradient {name}"]) <= TOLERANCE, name
    if "written" in held:
        written = ours.generate(held["ids"], max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert torch.equal(written, held["written"])


def the_patched_agrees(folder: Path) -> None:
    """FLA's own model, patched: logits, loss, gradients and greedy tokens; and unpatched again."""
    held = load_file(folder / "answers.safetensors")
    for name in ("logits", "loss"):
        torch.testing.assert_close(held[f"patched {name}"], held[name], rtol=0, atol=TOLERANCE)
    gradients = [name for name in held if name.startswith("gradient ")]
    assert gradients
    for name in gradients:
        assert relative_error(held[f"patched {name}"], held[name]) <= TOLERANCE, name
    assert torch.equal(held["patched written"][:, 5:], held["read again"].argmax(-1))
    torch.testing.assert_close(held["unpatched logits"], held["logits"], rtol=0, atol=1e-6)


@needs_fla
@pytest.mark.skipif(torch.cuda.is_available(), reason="FLA runs on the GPU then")
@pytest.mark.parametrize("name", ["as published", "grouped, nothing fused"])
def test_the_package_itself_interpreted(name: str, real: Path) -> None:
    answers_agree(real / name, "cpu")
    the_patched_agrees(real / name)


@needs_fla
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["as published", "grouped, nothing fused"])
def test_the_package_itself(name: str, real: Path) -> None:
    answers_agree(real / name, "cuda")
    the_patched_agrees(real / name)
