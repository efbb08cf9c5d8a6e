"""What a RetNetConfig must be: every refusal names the field, its value, what it must be and what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from leet_linear_attention import available_methods

if TYPE_CHECKING:
    from .configuration_retnet import RetNetConfig

# A value of attn_mode that FLA knows not.
OWN_MODE = "leet_hf"
CHOICES: dict[str, tuple[str, ...]] = {
    "position_embedding": ("rope", "theta_shift"),
    "decay": ("retnet", "retnet_language_model"),
    "retention_scale": ("none", "decay", "score"),
    "norm_type": ("rmsnorm", "layernorm"),
    "head_norm_type": ("rmsnorm", "layernorm"),
    "subln_type": ("layernorm", "rmsnorm"),
    "mlp_type": ("glu", "ffn"),
    "attn_mode": ("chunk", "fused_chunk", "parallel", "fused_recurrent", OWN_MODE),
}
POSITIVE_INTEGERS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "kv_heads", "mlp_size")
POSITIVE_NUMBERS = ("expand_k", "expand_v", "rope_theta", "norm_eps")
BOOLEANS = (
    "use_output_gate", "fuse_norm", "tie_word_embeddings", "use_cache", "mlp_bias", "attention_bias", "subln",
    "deepnorm", "scale_embeddings", "norm_embeddings",
)  # fmt: skip
BOOLEANS_OR_NONE = ("elementwise_affine", "normalize_before")
RATES = ("dropout", "activation_dropout", "drop_path_rate")
WIDEST_HEAD = 512  # of the operator

# What configs hold besides a model's own fields: of transformers and of tools around it, present and past.
COMMON = frozenset(
    [
        "torch_dtype",
        "dtype",
        "num_labels",
        "name_or_path",
        "attn_implementation",
        "experts_implementation",
        "output_attentions",
        "auto_map",
        "quantization_config",
        "transformers_weights",
        "per_layer_config",
        "tokenizer_class",
        "prefix",
        "task_specific_params",
        "finetuning_task",
        "is_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "pruned_heads",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "use_return_dict",
        "decoder_start_token_id",
        "sep_token_id",
        "model_type",
        "unsloth_version",
        "unsloth_fixed",
    ]
)
# FLA's fields of other versions, which say nothing about the model.
PAST_FLA = frozenset(["share_conv_kernel", "clamp_min", "clamp_max", "fuse_mlp"])
TORCHSCALE = frozenset(
    [
        "decoder_embed_dim",
        "decoder_value_embed_dim",
        "decoder_retention_heads",
        "decoder_ffn_embed_dim",
        "decoder_layers",
        "decoder_normalize_before",
        "activation_fn",
        "no_scale_embedding",
        "layernorm_embedding",
        "use_lm_decay",
        "use_glu",
        "use_ffn_rms_norm",
        "recurrent_chunk_size",
        "forward_impl",
        "share_decoder_input_output_embed",
        "layernorm_eps",
    ]
)


def reject_unknown(options: dict[str, Any]) -> None:
    """Raise ValueError for an option that no field, and no tool around transformers, has."""
    from transformers.generation.configuration_utils import GenerationConfig

    known = COMMON | PAST_FLA | set(GenerationConfig().to_dict())
    for name in options:
        if name in known or name.startswith("_"):
            continue
        if name in TORCHSCALE:
            raise ValueError(
                f"{name} is a field of torchscale's RetNet or its port: convert the checkpoint with `leet-hf convert`"
            )
        from .configuration_retnet import RetNetConfig

        near = difflib.get_close_matches(name, [field.name for field in fields(RetNetConfig)], n=1)
        hint = f"did you mean {near[0]}?" if near else "take it out"
        raise ValueError(f"{name} is {options[name]!r} but RetNetConfig has no such field: {hint}")


def check_config(config: RetNetConfig) -> dict[str, Any] | list[dict[str, Any]] | None:
    """Raise ValueError where fields are wrong or contradict each other. Returns `attn` with its defaults filled in."""
    for name, choices in CHOICES.items():
        _require(config, name, getattr(config, name) in choices, f"must be one of {', '.join(map(repr, choices))}")
    for name in POSITIVE_INTEGERS:
        _require(config, name, _is_count(getattr(config, name)), "must be a positive integer")
    for name in POSITIVE_NUMBERS:
        _require(config, name, _is_number(getattr(config, name)) and getattr(config, name) > 0, "must be above 0")
    for name in RATES:
        value = getattr(config, name)
        _require(config, name, _is_number(value) and 0 <= value < 1, "must be at least 0 and below 1")
    for name in BOOLEANS:
        _require(config, name, isinstance(getattr(config, name), bool), "must be True or False")
    for name in BOOLEANS_OR_NONE:
        _require(config, name, getattr(config, name) in (True, False, None), "must be True, False or None")
    methods = ("auto", *available_methods())
    _require(config, "method", config.method in methods, f"must be one of {', '.join(map(repr, methods))}")
    for name in ("hidden_act", "gate_activation"):
        _check_activation(name.replace("gate_activation", "gate_act"), getattr(config, name))
    if config.feature_map is not None:
        _check_activation("feature_map", config.feature_map)
    if config.attnres_block_size is not None:
        raise ValueError(f"attnres_block_size is {config.attnres_block_size}, must be None: not supported here")
    _check_heads(config)
    _check_order(config)
    return _checked_attn(config)


def _check_heads(config: RetNetConfig) -> None:
    heads, kv_heads = config.num_heads, config.kv_heads
    if heads % kv_heads:
        raise ValueError(f"num_kv_heads is {kv_heads}, must divide num_heads, {heads}")
    for name, one in (("expand_k", config.key_dim), ("expand_v", config.value_dim)):
        expand = getattr(config, name)
        exact = config.hidden_size * expand
        whole = round(exact)
        if not math.isclose(exact, whole):
            raise ValueError(f"{name} is {expand}: hidden_size * {name} is {exact}, must be an integer")
        if whole % heads or whole < heads:
            raise ValueError(f"num_heads is {heads}, must divide hidden_size * {name}, {whole}: change either")
        spare = 1 if config.retention_scale == "score" and name == "expand_v" else 0
        if one + spare > WIDEST_HEAD:
            reason = ", one less with retention_scale 'score'" if spare else ""
            raise ValueError(f"num_heads is {heads}: a head has {one} dims, must have at most {WIDEST_HEAD}{reason}")
    if config.key_dim % 2:
        raise ValueError(f"num_heads is {heads}: a head of k has {config.key_dim} dims, must be even for positions")


def _check_order(config: RetNetConfig) -> None:
    if config.deepnorm and config.norm_first:
        raise ValueError("normalize_before is True with deepnorm, which normalises after: leave one of them out")
    if config.deepnorm and config.subln:
        raise ValueError("subln is True with deepnorm: choose one of them")
    if config.gate_act is not None and not config.use_output_gate:
        raise ValueError(f"gate_act is {config.gate_act!r} but use_output_gate is False: leave one of them out")


def _check_activation(name: str, value: Any) -> None:
    # Here, as this module is loaded while transformers loads its Auto classes.
    from transformers.activations import ACT2FN

    if value not in ACT2FN:
        raise ValueError(f"{name} is {value!r}, must be an activation of transformers, such as 'swish' or 'gelu'")


def _checked_attn(config: RetNetConfig) -> dict[str, Any] | list[dict[str, Any]] | None:
    attn = config.attn
    if attn is None:
        return None
    if not isinstance(attn, dict | list) or not all(isinstance(spec, dict) for spec in _as_list(attn)):
        raise ValueError(f"attn is {attn!r}, must be a dict, a list of dicts, or None")
    specs, taken = [], set[int]()
    for given in _as_list(attn):
        spec = _checked_spec(config, given)
        if taken & set(spec["layers"]):
            raise ValueError(f"attn names layer {min(taken & set(spec['layers']))} twice: give each layer once")
        taken |= set(spec["layers"])
        specs.append(spec)
    if len(taken) == config.num_hidden_layers:
        raise ValueError("attn names every layer: leave at least one to retention")
    return specs[0] if isinstance(attn, dict) else specs


def _checked_spec(config: RetNetConfig, given: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"qkv_bias": False, "window_size": None, "rope_theta": 10000.0}
    unknown = set(given) - {"layers", "num_heads", "num_kv_heads", *defaults}
    if unknown:
        raise ValueError(f"attn has {min(unknown)!r}, which no softmax layer of a RetNet has: take it out")
    spec = defaults | given
    layers = spec.get("layers")
    if not isinstance(layers, list | tuple) or not all(_in_range(layer, config.num_hidden_layers) for layer in layers):
        raise ValueError(f"attn['layers'] is {layers!r}, must list layers from 0 to {config.num_hidden_layers - 1}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"attn['layers'] is {layers!r}: give each layer once")
    if spec.get("num_kv_heads") is None:
        spec["num_kv_heads"] = spec.get("num_heads")
    for name in ("num_heads", "num_kv_heads"):
        if not _is_count(spec.get(name)):
            raise ValueError(f"attn[{name!r}] is {spec.get(name)!r}, must be a positive integer")
    heads, kv_heads = spec["num_heads"], spec["num_kv_heads"]
    if config.hidden_size % heads or heads % kv_heads:
        raise ValueError(
            f"attn has {heads} heads and {kv_heads} of keys: the first must divide hidden_size, {config.hidden_size}, "
            "the second the first"
        )
    if config.hidden_size // heads % 2:
        raise ValueError(f"attn['num_heads'] is {heads}: a head has {config.hidden_size // heads} dims, must be even")
    if spec["window_size"] is not None:
        raise ValueError(f"attn['window_size'] is {spec['window_size']}, must be None: windows are not supported here")
    if not _is_number(spec["rope_theta"]) or spec["rope_theta"] <= 0:
        raise ValueError(f"attn['rope_theta'] is {spec['rope_theta']!r}, must be above 0")
    return spec | {"layers": list(layers)}


def _as_list(attn: Any) -> Iterable[Any]:
    return attn if isinstance(attn, list) else [attn]


def _require(config: RetNetConfig, name: str, right: bool, must: str) -> None:
    if not right:
        shown = {"kv_heads": "num_kv_heads", "mlp_size": "intermediate_size"}.get(name, name)
        raise ValueError(f"{shown} is {getattr(config, name)!r}, {must}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _in_range(value: Any, stop: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < stop
