"""RetNet of torchscale and of its Hugging Face port: their options and names, said in those of RetNetConfig.

torchscale 0.3.0 (`torchscale.architecture.retnet`; Microsoft) keeps a decoder's weights without its options, or, where
fairseq trained it, with them. The port (repository syncdoth/RetNet) is the same decoder as a Transformers model, with a
`config.json`; it adds a second decay (`use_lm_decay`), and MLPs without a gate (`use_glu=False`), which have biases
and, with sub-LN, a norm inside. The weights are the same in both; only names differ.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from .checkpoint import ConversionError
from .checks import COMMON
from .configuration_retnet import RetNetConfig

# Options that the function depends on, with the defaults of torchscale's RetNetConfig, which are also the port's.
DECODER: dict[str, Any] = {
    "decoder_embed_dim": 768,
    "decoder_value_embed_dim": 1280,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 1280,
    "decoder_layers": 12,
    "decoder_normalize_before": True,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "drop_path_rate": 0.0,
    "activation_dropout": 0.0,
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "deepnorm": False,
    "subln": True,
    "layernorm_eps": 1e-6,
}
# Those of torchscale alone: the last groups say how it computes, or are not read by its RetNet.
TORCHSCALE: dict[str, Any] = DECODER | {
    "vocab_size": -1,  # or the number of embeddings
    "share_decoder_input_output_embed": False,
    "max_target_positions": 1024,
    "no_output_layer": False,
    "moe_freq": 0,
    "multiway": False,
    **{"chunkwise_recurrent": False, "recurrent_chunk_size": 512, "checkpoint_activations": False, "fsdp": False},
    **{"ddp_rank": 0, "moe_top1_expert": False, "moe_expert_count": 0, "moe_gating_use_fp32": True, "use_xmoe": False},
    **{"moe_eval_capacity_token_fraction": 0.25, "moe_second_expert_policy": "random"},
    **{"moe_normalize_gate_prob_before_dropping": False},
    **{"rel_pos_buckets": 0, "max_rel_pos": 0, "xpos_rel_pos": False, "xpos_scale_base": 512},
}
PORT: dict[str, Any] = DECODER | {
    "vocab_size": 50257,
    "use_lm_decay": False,
    "use_glu": True,
    "use_ffn_rms_norm": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
    **{"recurrent_chunk_size": 512, "forward_impl": "parallel", "z_loss_coeff": 0.0, "disable_fused_ops": False},
    **{"output_retentions": False, "is_decoder": True, "model_type": "retnet"},
}
ACTIVATIONS = ("swish", "gelu", "relu")
GATE = "swish"


@dataclass(frozen=True)
class Layout:
    """How a source names what it holds: `decoder` before the decoder's keys, and the key of the output layer."""

    title: str
    decoder: str
    head: str
    # Prefixes that training tools put before every key.
    wrappers: tuple[str, ...] = ()


LAYOUTS = {
    "torchscale": Layout("torchscale", "", "output_projection.weight", ("module.", "decoder.")),
    "hf-port": Layout("the Hugging Face port of torchscale's RetNet", "model.", "lm_head.weight"),
}
POSITION, DECAY = "retnet_rel_pos.angle", "retnet_rel_pos.decay"


def torchscale_options(given: Any) -> dict[str, Any]:
    """All options of torchscale's RetNet from what a user has of them.

    A mapping is what its `RetNetConfig` would be called with. An object with attributes is such a config, as it is. The
    options of a fairseq run (a Namespace) hold many more; those that `RetNetConfig.override` would take are taken.
    Raises ConversionError for an option it does not know, or of another type.
    """
    if isinstance(given, argparse.Namespace):
        known = {name: value for name, value in vars(given).items() if name in TORCHSCALE and value is not None}
        return _checked(known, TORCHSCALE, "torchscale's RetNet")
    if isinstance(given, Mapping):
        return _ordered_norms(_checked(given, TORCHSCALE, "torchscale's RetNet"))
    if hasattr(given, "__dict__"):
        return _checked(vars(given), TORCHSCALE, "torchscale's RetNet")
    kind = type(given).__name__
    raise ConversionError(f"config is a {kind}, must be torchscale's RetNetConfig or its options as a dict")


def port_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the port from its `config.json`. Raises ConversionError as `torchscale_options` does."""
    common = (COMMON | set(GenerationConfig().to_dict()) | {"architectures"}) - set(PORT)
    known = {name: value for name, value in given.items() if name not in common and not name.startswith("_")}
    return _ordered_norms(_checked(known, PORT, "the Hugging Face port of RetNet"))


def _checked(given: Mapping[str, Any], defaults: dict[str, Any], title: str) -> dict[str, Any]:
    for name in sorted(set(given) - set(defaults)):
        near = difflib.get_close_matches(name, defaults, n=1)
        hint = f"did you mean {near[0]}?" if near else "take it out"
        raise ConversionError(f"config has {name!r}, which {title} does not have: {hint}")
    for name, value in given.items():
        default = defaults[name]
        kinds: tuple[type, ...] = (int, type(None)) if name.endswith("token_id") else (type(default),)
        if isinstance(default, float):
            kinds = (float, int)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ConversionError(f"config has {name} = {value!r}, must be {names}, such as {default!r}")
    return defaults | dict(given)


def _ordered_norms(options: dict[str, Any]) -> dict[str, Any]:
    """What both configs do on creation: DeepNorm is after each residual and without sub-LN, sub-LN is before."""
    if options["deepnorm"]:
        return options | {"decoder_normalize_before": False, "subln": False}
    if options["subln"]:
        return options | {"decoder_normalize_before": True}
    return options


def config_of(options: Mapping[str, Any], vocab_size: int) -> RetNetConfig:
    """The RetNetConfig of the same function, from all options of either source and the number of embeddings.

    Raises ConversionError where the options contradict each other or the embeddings, where heads do not divide, or
    where the model has what RetNetForCausalLM has not: experts, two ways, no output layer.
    """
    absent: dict[str, Any] = {"use_lm_decay": False, "use_glu": True, "use_ffn_rms_norm": False}
    o = absent | {"moe_freq": 0, "multiway": False} | dict(options)
    for name in ("moe_freq", "multiway"):
        if o[name]:
            raise ConversionError(f"{name} is {o[name]}: models with experts or with two ways can not be converted")
    if o["activation_fn"] not in ACTIVATIONS:
        raise ConversionError(f"activation_fn is {o['activation_fn']!r}, must be one of {', '.join(ACTIVATIONS)}")
    heads, width, value = (o[f"decoder_{name}"] for name in ("retention_heads", "embed_dim", "value_embed_dim"))
    for name, dim in (("decoder_embed_dim", width), ("decoder_value_embed_dim", value)):
        if heads < 1 or dim < 1 or dim % heads:
            raise ConversionError(f"decoder_retention_heads is {heads}, must divide {name}, {dim}, into whole heads")
    if o["vocab_size"] > 0 and o["vocab_size"] != vocab_size:
        raise ConversionError(f"vocab_size is {o['vocab_size']} but the checkpoint has {vocab_size} embeddings")
    ours: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": o["decoder_layers"],
        "num_heads": heads,
        "expand_k": 1.0,
        "expand_v": value / width,
        "intermediate_size": o["decoder_ffn_embed_dim"],
        "hidden_act": o["activation_fn"],
        "gate_act": GATE,
        "elementwise_affine": False,
        "norm_eps": o["layernorm_eps"],
        "position_embedding": "theta_shift",
        "decay": "retnet_language_model" if o["use_lm_decay"] else "retnet",
        "retention_scale": "score",  # of the parallel form, which both train in
        "mlp_type": "glu" if o["use_glu"] else "ffn",
        "mlp_bias": not o["use_glu"],
        "subln": o["subln"] and not o["use_glu"],  # a GLU has no norm inside
        "subln_type": "rmsnorm" if o["use_ffn_rms_norm"] else "layernorm",
        "normalize_before": o["decoder_normalize_before"],
        "deepnorm": o["deepnorm"],
        "scale_embeddings": not o["no_scale_embedding"],
        "norm_embeddings": o["layernorm_embedding"],
        "tie_word_embeddings": o.get("tie_word_embeddings", o.get("share_decoder_input_output_embed")),
        "max_position_embeddings": o.get("max_target_positions", RetNetConfig.max_position_embeddings),
        **{name: o[name] for name in ("dropout", "activation_dropout", "drop_path_rate")},
        # torchscale has no tokens of its own: those of a dictionary are for its user to set.
        **{name: o.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        **{name: o[name] for name in ("initializer_range", "use_cache") if name in o},
    }
    try:
        return RetNetConfig(**ours, architectures=["RetNetForCausalLM"])
    except ValueError as error:
        raise ConversionError(f"the checkpoint's options do not make a RetNet: {error}") from error


def source_names(config: RetNetConfig, layout: Layout) -> dict[str, str]:
    """For each weight of RetNetForCausalLM, the key it has in a source with this layout."""
    names = {"embeddings": "embed_tokens"}
    if config.norm_embeddings:
        names["embeddings_norm"] = "layernorm_embedding"
    if config.norm_first:
        names["norm"] = "layer_norm"
    glu = config.mlp_type == "glu"
    mlp = {"gate_proj": "fc1", "up_proj": "gate"} if glu else {"up_proj": "fc1"}  # its `gate` is not activated
    for i in range(config.num_hidden_layers):
        here, there = f"layers.{i}.", f"layers.{i}."
        for name in "qkvg":
            names[f"{here}attn.{name}_proj"] = f"{there}retention.{name}_proj"
        names[f"{here}attn.o_proj"] = f"{there}retention.out_proj"
        names[f"{here}attn_norm"] = f"{there}retention_layer_norm"
        names[f"{here}mlp_norm"] = f"{there}final_layer_norm"
        for ours, theirs in (mlp | {"down_proj": "fc2"}).items():
            names[f"{here}mlp.{ours}"] = f"{there}ffn.{theirs}"
        if config.subln:
            names[f"{here}mlp.norm"] = f"{there}ffn.ffn_layernorm"
    weights = {f"model.{ours}.weight": f"{layout.decoder}{theirs}.weight" for ours, theirs in names.items()}
    biased = [ours for ours in names if ".mlp." in ours and ours.endswith("_proj")] if config.mlp_bias else []
    if config.subln and config.subln_type == "layernorm":
        biased += [ours for ours in names if ours.endswith("mlp.norm")]
    weights |= {f"model.{ours}.bias": f"{layout.decoder}{names[ours]}.bias" for ours in biased}
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = layout.head
    return weights
