"""Checkpoints of torchscale's RetNet and of its Hugging Face port, as users have them, and comparison with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hosts import torchscale_retnet as published
from leet_hf.modes.truth import relative_error

TOLERANCE = 1e-4
# In float64 what is left is that of the angles and decays, which both keep in float32.
FLOAT64_TOLERANCE = 1e-5
PORTS_OWN = ("use_lm_decay", "use_glu", "use_ffn_rms_norm")
# Where the first token's q and k of a head are almost at right angles, the norm of that head multiplies rounding by up
# to 1 / sqrt(eps), a thousand. With this seed that happens in none of the models; gradients agree to about 1e-5.
SEED = 1


def tokens(batch: int = 2, length: int = 20, vocabulary: int = 64) -> Tensor:
    """Random tokens [batch, length]."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(3))


def torchscale(**options: Any) -> tuple[Any, dict[str, Any]]:
    """A decoder, and the options torchscale's RetNetConfig would get for it."""
    o = published.Options(**options)
    given = {name: value for name, value in vars(o).items() if name not in PORTS_OWN}
    return published.randomized(published.RetNetDecoder(o), SEED), given


def port(**options: Any) -> tuple[Any, dict[str, Any]]:
    """The port's model, and its `config.json`."""
    o = published.Options(**options)
    given = vars(o) | {"tie_word_embeddings": o.share_decoder_input_output_embed, "model_type": "retnet"}
    given |= {"architectures": ["RetNetForCausalLM"], "torch_dtype": "float32", "transformers_version": "4.35.0"}
    del given["share_decoder_input_output_embed"]
    return published.randomized(published.PortForCausalLM(o), SEED), given


def write_torchscale(folder: Path, **options: Any) -> tuple[Path, Path, Any]:
    """A checkpoint as torchscale's users have it, a file of its options, and the model."""
    source, given = torchscale(**options)
    folder.mkdir(exist_ok=True)
    torch.save(source.state_dict(), folder / "retnet.pt")
    (folder / "options.json").write_text(json.dumps(given))
    return folder / "retnet.pt", folder / "options.json", source


def write_port(folder: Path, shards: int = 1, **options: Any) -> Any:
    """A directory as the port's `save_pretrained` makes it, its weights in several shards if asked for."""
    source, given = port(**options)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(given))
    state = {key: value.clone() for key, value in source.state_dict().items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return source
    homes = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(sorted(state))}
    for file in set(homes.values()):
        save_file({key: value for key, value in state.items() if homes[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return source


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of predicting the next token."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def assert_same_function(ours: Any, theirs: Any, names: dict[str, str]) -> None:
    """Logits, loss and gradients of every weight, in float32 and, closer, in float64; and generated tokens.

    names: for each weight of ours, theirs.
    """
    _same_gradients(ours, theirs, names, TOLERANCE)
    _same_gradients(copy.deepcopy(ours).double(), copy.deepcopy(theirs).double(), names, FLOAT64_TOLERANCE)
    prompt = tokens()[:, :9]
    generated = ours.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, published.greedy(theirs, prompt, 12))


def _same_gradients(ours: Any, theirs: Any, names: dict[str, str], tolerance: float) -> None:
    batch = tokens()
    logits = theirs(batch)
    assert logits.std() > 0.1
    out = ours(input_ids=batch, labels=batch)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=tolerance)
    loss, own = loss_of(logits, batch), out.loss
    if logits.dtype == torch.float64:  # transformers' own loss is of float32
        own = loss_of(out.logits, batch)
    torch.testing.assert_close(own, loss, rtol=0, atol=tolerance)
    for model, value in ((ours, own), (theirs, loss)):
        model.zero_grad(set_to_none=True)
        value.backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters(remove_duplicate=False)}
    for name, p in ours.named_parameters():
        assert gradients[names[name]].abs().max() > 0, name
        assert relative_error(p.grad, gradients[names[name]]) <= tolerance, name


def assert_equal_weights(ours: Any, theirs: Any, names: dict[str, str]) -> None:
    """Every weight is there once, bit for bit."""
    state, source = ours.state_dict(), theirs.state_dict()
    assert {name for name, _ in ours.named_parameters()} == names.keys()
    for name, key in names.items():
        assert torch.equal(state[name], source[key]), name
