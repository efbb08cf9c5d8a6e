"""Modes of assisted decoding: drafts of several kinds, prompt lookup, early exit, and the model as a draft itself."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from .base import Answer, Expected, Mode, ModeError, Row
from .helpers import generate, perturbed, seeded
from .truth import Prompts, Truth

# Five candidates every time, however unsure the draft is, so that candidates are also turned down.
DRAFTING: dict[str, Any] = {
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0,
}


def assisting_modes(new: int) -> list[Mode]:
    """Assisted decoding, writing `new` tokens. Whatever the draft proposes, the tokens are those of greedy decoding."""

    def mode(name: str, title: str, run: Any) -> Mode:
        return Mode(name, title, partial(run, new=new), lambda truth: _greedy(truth, new))

    return [
        mode("assisted-recurrent-draft", "assisted by a recurrent draft", _recurrent_draft),
        mode("assisted-softmax-draft", "assisted by a softmax draft", _softmax_draft),
        Mode("assisted-as-draft", "as the draft of a softmax model", partial(_as_draft, new=new)),
        mode("prompt-lookup", "prompt lookup", _prompt_lookup),
        mode("early-exit", "assisted by its own first layers", _early_exit),
    ]


def _greedy(truth: Truth, new: int) -> Expected:
    return Expected([truth.greedy(prompt, new) for prompt in truth.prompts[:2]])


def _each(model: Any, prompts: Prompts, new: int, **options: Any) -> Answer:
    return Answer([generate(model, [prompt], new, **options)[0][0] for prompt in prompts[:2]])


def _recurrent_draft(model: Any, prompts: Prompts, new: int) -> Answer:
    draft = perturbed(model)
    draft.generation_config = GenerationConfig(**DRAFTING)
    return _each(model, prompts, new, assistant_model=draft)


def _softmax_draft(model: Any, prompts: Prompts, new: int) -> Answer:
    return _each(model, prompts, new, assistant_model=softmax_model(model))


def _prompt_lookup(model: Any, prompts: Prompts, new: int) -> Answer:
    return _each(model, prompts, new, prompt_lookup_num_tokens=4, max_matching_ngram_size=2)


def _early_exit(model: Any, prompts: Prompts, new: int) -> Answer:
    layers = max(1, len(model.base_model.layers) // 2)
    model = copy.deepcopy(model)  # generate() shortens the config for the draft and leaves it so if it raises
    return _each(model, prompts, new, assistant_early_exit=layers, settings=DRAFTING)


def _as_draft(model: Any, prompts: Prompts, new: int) -> Answer:
    """The model proposes, a softmax model decides. The rows are the proposals: they must be right as they stand."""
    target = softmax_model(model)
    rows: list[Row] = []
    inner = model.generate

    def propose(*args: Any, **options: Any) -> Any:
        output = inner(*args, **options)
        for sequence, logits in zip(output.sequences, torch.stack(output.scores, dim=1), strict=True):
            rows.append(Row(sequence.tolist(), len(sequence) - len(logits) - 1, logits.float().cpu()))
        return output

    kept_config, model.generation_config = model.generation_config, GenerationConfig(**DRAFTING)
    model.generate = propose
    try:
        for prompt in prompts[:2]:
            written = generate(target, [prompt], new, assistant_model=model)[0][0].tokens
            alone = generate(target, [prompt], new, use_cache=False)[0][0].tokens
            if written != alone:
                raise ModeError("the softmax model writes other tokens with this draft than alone")
    finally:
        model.generation_config = kept_config
        del model.generate
    if not rows:
        raise ModeError("the draft was never asked")
    return Answer(rows)


def softmax_model(model: Any) -> LlamaForCausalLM:
    """A tiny random Llama with the vocabulary, device and dtype of `model`: it agrees with nothing `model` writes."""
    config = LlamaConfig(
        vocab_size=model.config.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with seeded(2, torch.device("cpu")):
        llama = LlamaForCausalLM(config).eval()
    llama.generation_config = GenerationConfig(**DRAFTING)
    return llama.to(device=model.device, dtype=model.dtype)
