"""RetNetConfig: every wrong option is refused with a message that names the field, its value and what it must be."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import tiny_retnet
from leet_hf.retnet import RetNetConfig, RetNetForCausalLM

SOFTMAX = {"layers": [1], "num_heads": 4}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"expand": 2}, "expand is 2 but RetNetConfig has no such field: did you mean expand_v?"),
    ({"zzz": 1}, "zzz is 1 but RetNetConfig has no such field: take it out"),
    ({"decoder_embed_dim": 64}, "decoder_embed_dim is a field of torchscale's RetNet or its port: convert"),
    ({"position_embedding": "xpos"}, "position_embedding is 'xpos', must be one of 'rope', 'theta_shift'"),
    ({"decay": "none"}, "decay is 'none', must be one of 'retnet', 'retnet_language_model'"),
    ({"retention_scale": "sum"}, "retention_scale is 'sum', must be one of"),
    ({"norm_type": "batch"}, "norm_type is 'batch', must be one of 'rmsnorm', 'layernorm'"),
    ({"mlp_type": "moe"}, "mlp_type is 'moe', must be one of 'glu', 'ffn'"),
    ({"attn_mode": "quadratic"}, "attn_mode is 'quadratic', must be one of"),
    ({"hidden_act": "swash"}, "hidden_act is 'swash', must be an activation of transformers"),
    ({"gate_act": "swash"}, "gate_act is 'swash', must be an activation of transformers"),
    ({"gate_act": "gelu", "use_output_gate": False}, "gate_act is 'gelu' but use_output_gate is False"),
    ({"feature_map": "elu1"}, "feature_map is 'elu1', must be an activation"),
    ({"method": "fast"}, "method is 'fast', must be one of 'auto', "),
    ({"subln": "yes"}, "subln is 'yes', must be True or False"),
    ({"normalize_before": "no"}, "normalize_before is 'no', must be True, False or None"),
    ({"vocab_size": None}, "vocab_size is None, must be a positive integer"),
    ({"hidden_size": "64"}, "hidden_size is '64', must be a positive integer"),
    ({"num_heads": 0}, "num_heads is 0, must be a positive integer"),
    ({"num_kv_heads": -1}, "num_kv_heads is -1, must be a positive integer"),
    ({"intermediate_size": -3}, "intermediate_size is -3, must be a positive integer"),
    ({"num_heads": 3}, "num_heads is 3, must divide hidden_size * expand_k, 64"),
    ({"num_kv_heads": 3}, "num_kv_heads is 3, must divide num_heads, 4"),
    ({"expand_k": 0.3}, "expand_k is 0.3: hidden_size * expand_k is 19.2, must be an integer"),
    ({"expand_v": 0}, "expand_v is 0, must be above 0"),
    ({"num_heads": 64}, "num_heads is 64: a head of k has 1 dims, must be even"),
    ({"hidden_size": 1024, "num_heads": 1}, "num_heads is 1: a head has 1024 dims, must have at most 512"),
    (
        {"hidden_size": 512, "num_heads": 1, "expand_v": 1, "retention_scale": "score"},
        "must have at most 512, one less with retention_scale 'score'",
    ),
    ({"norm_eps": float("nan")}, "norm_eps is nan, must be above 0"),
    ({"dropout": 1}, "dropout is 1, must be at least 0 and below 1"),
    ({"deepnorm": True, "normalize_before": True}, "normalize_before is True with deepnorm"),
    ({"deepnorm": True, "subln": True}, "subln is True with deepnorm"),
    ({"attnres_block_size": 4}, "attnres_block_size is 4, must be None"),
    ({"attn": [1]}, "attn is [1], must be a dict, a list of dicts, or None"),
    ({"attn": SOFTMAX | {"layers": [2]}}, "attn['layers'] is [2], must list layers from 0 to 1"),
    ({"attn": SOFTMAX | {"layers": [1, 1]}}, "give each layer once"),
    ({"attn": [SOFTMAX, SOFTMAX]}, "attn names layer 1 twice"),
    ({"attn": SOFTMAX | {"layers": [0, 1]}}, "attn names every layer"),
    ({"attn": {"layers": [1]}}, "attn['num_heads'] is None, must be a positive integer"),
    ({"attn": SOFTMAX | {"num_kv_heads": 3}}, "attn has 4 heads and 3 of keys"),
    ({"attn": SOFTMAX | {"num_heads": 64}}, "attn['num_heads'] is 64: a head has 1 dims, must be even"),
    ({"attn": SOFTMAX | {"window_size": 64}}, "attn['window_size'] is 64, must be None"),
    ({"attn": SOFTMAX | {"rope_theta": 0}}, "attn['rope_theta'] is 0, must be above 0"),
    ({"attn": SOFTMAX | {"heads": 4}}, "attn has 'heads', which no softmax layer"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_options_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    sizes = tiny_retnet.SIZES | options
    with pytest.raises(ValueError) as raised:
        RetNetConfig(**sizes)
    assert words in str(raised.value)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "retnet"}))
    with pytest.raises(ValueError) as raised:
        AutoConfig.from_pretrained(tmp_path)
    assert words in str(raised.value)


@pytest.mark.parametrize("kind", tiny_retnet.KINDS)
def test_configs_survive_files_copies_and_pickles(kind: str, tmp_path: Path) -> None:
    config = tiny_retnet.config(kind)
    config.save_pretrained(tmp_path)
    for twin in (AutoConfig.from_pretrained(tmp_path), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is RetNetConfig and twin.to_json_string() == config.to_json_string()
    assert len(config.layer_types) == 2 and (kind == "hybrid") == ("full_attention" in config.layer_types)


def test_names_of_transformers() -> None:
    config = tiny_retnet.config("grouped")
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert tiny_retnet.config("fla").num_key_value_heads == 4


def test_a_model_fla_can_not_express_says_so_to_fla() -> None:
    """Its attn_mode is one that FLA refuses, where it would ignore the fields that matter."""
    assert tiny_retnet.config("fla").attn_mode == "chunk"
    assert tiny_retnet.config("fla", attn_mode="fused_recurrent", dropout=0.1).attn_mode == "fused_recurrent"
    for changes in ({"decay": "retnet_language_model"}, {"normalize_before": False}, {"mlp_bias": True}):
        config = tiny_retnet.config("fla", **changes)
        assert config.attn_mode == "leet_hf"
        again = RetNetConfig(**config.to_diff_dict())
        assert again.attn_mode == "leet_hf"
    assert tiny_retnet.config("fla", attn_mode="leet_hf").attn_mode == "chunk"


def test_a_checkpoint_of_torchscales_port_is_sent_to_the_converter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "retnet", "decoder_layers": 2}))
    with pytest.raises(ValueError, match=r"decoder_layers is a field of torchscale's RetNet.*leet-hf convert"):
        RetNetForCausalLM.from_pretrained(tmp_path)
