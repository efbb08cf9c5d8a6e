"""Train a small MiniMax from nothing, with its linear layers on leet_hf's kernels, and write what `leet-hf demo` loads.

    pip install -e ".[examples]"
    python examples/train_from_scratch.py --smoke        # the whole path on a CPU, in less than a minute
    python examples/train_from_scratch.py                # the model in examples/assets, on a GPU

It needs no network: the text is examples/assets/kjv.txt.xz (King James Bible, public domain), and the tokenizer is
trained on it. The output folder holds a stock Transformers checkpoint (no remote code), its tokenizer, a model card,
the loss curve and a summary in JSON. A run that was stopped goes on from its last epoch when it is started again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, MiniMaxConfig, PreTrainedTokenizerFast

from corpus import batches, encode, read_sections, split_sections, train_tokenizer
from leet_hf import patch_model
from reporting import plot_losses, write_model_card

ASSETS = Path(__file__).parent / "assets"
PROMPTS = ("In the beginning", "And it came to pass", "Blessed are they", "Psalm 151\n\n1 ")
DECAY_TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


@dataclass
class Settings:
    """Everything that decides the result of a run; a checkpoint is continued only by a run with the same."""

    text: str = str(ASSETS / "kjv.txt.xz")
    model: str | None = None
    vocabulary: int = 4096
    hidden: int = 192
    experts: int = 4
    expert_width: int = 128
    length: int = 1024
    batch: int = 16
    epochs: int = 24
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    patience: int = 5
    seed: int = 0
    stock: bool = False
    characters: int | None = None


SMOKE: dict[str, Any] = dict(
    characters=90_000, vocabulary=512, hidden=64, experts=2, expert_width=64, length=128, batch=8, epochs=2
)


def make_config(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> MiniMaxConfig:
    """Seven linear layers and one softmax layer, linear first, as in the published MiniMax models."""
    layers = 8
    # DeepNorm's factor on the residual, (2 * layers)^(1/4); the published models' 3.5566 is that of 80 layers.
    alpha = (2 * layers) ** 0.25
    return MiniMaxConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.expert_width,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * (layers - 1) + ["full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64 if settings.hidden > 64 else 16,
        num_local_experts=settings.experts,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
        full_attn_alpha_factor=alpha,
        linear_attn_alpha_factor=alpha,
        mlp_alpha_factor=alpha,
        block_size=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def residual_dropout(model: Any, probability: float) -> Iterator[None]:
    """Dropout on the embeddings and on what each attention and expert block adds; stock MiniMax has none."""

    def drop(module: torch.nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], probability, module.training), *output[1:])
        return F.dropout(output, probability, module.training)

    blocks = [model.model.embed_tokens, *(b for layer in model.model.layers for b in (layer.self_attn, layer.mlp))]
    handles = [block.register_forward_hook(drop) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def half_precision(device: torch.device) -> Any:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def held_out_loss(model: Any, tokens: Tensor, length: int, batch: int) -> float:
    """Mean negative log-likelihood in nats per token, over windows of `length` tokens that do not overlap."""
    model.eval()
    device = next(model.parameters()).device
    total, starts = 0.0, range(0, len(tokens) - 1, length)
    windows = [tokens[start : start + length + 1] for start in starts]
    full = [w for w in windows if len(w) == length + 1]
    groups = [torch.stack(full[i : i + batch]) for i in range(0, len(full), batch)]
    groups += [w[None] for w in windows if len(w) < length + 1]
    for group in groups:
        logits = model(input_ids=group[:, :-1].to(device), use_cache=False).logits
        targets = group[:, 1:].flatten().to(device)
        total += F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum").item()
    model.train()
    return total / (len(tokens) - 1)


def make_optimizer(model: Any, settings: Settings, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW (no weight decay on norms) under a linear warm-up and a cosine down to a twentieth of the learning rate."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=fused)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(model: Any, tokens: Tensor, held_out: Tensor, settings: Settings, checkpoint: Path) -> dict[str, Any]:
    """Train until the last epoch, or until the held-out loss has not fallen for `patience` epochs; leave the best
    weights in `model`. Returns history (one entry per epoch), steps per epoch and seconds."""
    device = next(model.parameters()).device
    per_epoch = len(batches(tokens, settings.length, settings.batch, seed=0))
    if per_epoch == 0:
        raise ValueError(f"text gives {len(tokens)} tokens; one batch needs {(settings.batch + 1) * settings.length}")
    optimizer, schedule = make_optimizer(model, settings, per_epoch * settings.epochs)
    history: list[dict[str, float]] = []
    best, seconds = {}, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["settings"] != asdict(settings):
            raise ValueError(f"checkpoint {checkpoint} was written with other settings; delete it to start afresh")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        history, best, seconds = saved["history"], saved["best"], saved["seconds"]
    lowest = min((entry["held_out"] for entry in history), default=math.inf)
    bar = tqdm(total=per_epoch * settings.epochs, initial=per_epoch * len(history), unit="step", mininterval=1.0)
    model.train()
    for epoch in range(len(history), settings.epochs):
        if epoch - min(range(epoch), key=lambda e: history[e]["held_out"], default=epoch) > settings.patience:
            break
        began, losses = time.perf_counter(), []
        # An epoch's seed does not depend on what ran before it: a continued run gives what an unbroken one gives.
        seed = settings.seed * 100_003 + epoch
        torch.manual_seed(seed)
        for batch in batches(tokens, settings.length, settings.batch, seed):
            batch = batch.to(device)
            with half_precision(device):
                output = model(input_ids=batch, labels=batch, use_cache=False, output_router_logits=True)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(output.loss.detach() - model.router_aux_loss_coef * output.aux_loss.detach())
            bar.update()
        with half_precision(device):
            loss = held_out_loss(model, held_out, settings.length, settings.batch)
        seconds += time.perf_counter() - began
        history.append({"step": (epoch + 1) * per_epoch, "train": torch.stack(losses).mean().item(), "held_out": loss})
        bar.set_postfix({key: f"{history[-1][key]:.3f}" for key in ("train", "held_out")})
        if loss < lowest:
            lowest, best = loss, {name: value.clone() for name, value in model.state_dict().items()}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        state |= {"settings": asdict(settings), "history": history, "best": best, "seconds": seconds}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
    bar.close()
    model.load_state_dict(best)
    return {"history": history, "steps_per_epoch": per_epoch, "seconds": seconds}


def save(model: Any, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save as stock Transformers does, then store the weights in bfloat16. The decay tables stay float32: in bfloat16
    the slopes would be off by up to 0.4 percent."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    file = output / "model.safetensors"
    tensors = load_file(file)
    small = {n: t if n.endswith(DECAY_TABLES) else t.to(torch.bfloat16) for n, t in tensors.items()}
    save_file(small, file, metadata={"format": "pt"})


def write_samples(model: Any, tokenizer: Any, count: int) -> list[str]:
    """One continuation of each prompt by `count` tokens, sampled with a fixed seed."""
    torch.manual_seed(0)
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=count, do_sample=True, temperature=0.8, top_p=0.95)
        samples.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return samples


def run(settings: Settings, output: Path, device: torch.device) -> dict[str, Any]:
    """The whole of it: text, tokenizer, training, saving, and a measurement of what was saved."""
    output.mkdir(parents=True, exist_ok=True)
    sections = read_sections(settings.text, settings.characters)
    kept, held = split_sections(sections)
    torch.manual_seed(settings.seed)
    tokenizer: Any
    model: Any
    if settings.model is None:
        tokenizer = train_tokenizer(kept, settings.vocabulary)
        model = AutoModelForCausalLM.from_config(make_config(settings, tokenizer), dtype=torch.float32)
    else:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    model.to(device)
    # grouped_mm does not take part in autocast; the plain loop over experts does.
    model.set_experts_implementation("eager")
    if not settings.stock:
        patch_model(model)
    tokens, held_out = encode(kept, tokenizer), encode(held, tokenizer)
    with residual_dropout(model, settings.dropout):
        result = train(model, tokens, held_out, settings, output / "checkpoint.pt")
    save(model, tokenizer, output)

    saved: Any = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, experts_implementation="eager")
    saved.to(device)
    stock = held_out_loss(saved, held_out, settings.length, settings.batch)
    patched = held_out_loss(patch_model(saved), held_out, settings.length, settings.batch)
    characters = sum(map(len, held))
    summary = {
        "settings": asdict(settings) | {"text": Path(settings.text).name},
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": {"train": len(tokens), "held_out": len(held_out)},
        "sections": {"train": len(kept), "held_out": len(held)},
        "held_out": {
            "loss": patched,
            "loss_stock_forward": stock,
            "perplexity": math.exp(patched),
            "bits_per_character": patched * (len(held_out) - 1) / characters / math.log(2),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **result,
        "samples": write_samples(saved.eval(), tokenizer, 120 if settings.characters is None else 16),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot_losses(result["history"], output / "loss.png")
    write_model_card(summary, output / "README.md")
    (output / "checkpoint.pt").unlink()
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    defaults = Settings()
    parser.add_argument("--output", type=Path, default=ASSETS / "kjv-minimax", help="folder to write (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a little text: does the whole path run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", default=defaults.text, help="plain text, or .xz of it (%(default)s)")
    parser.add_argument("--model", help="go on from this saved model and its tokenizer, not from nothing")
    parser.add_argument("--stock", action="store_true", help="train without patch_model, to compare")
    for name in ("batch", "epochs", "length", "seed", "patience", "learning_rate", "weight_decay", "dropout"):
        value = getattr(defaults, name)
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), help=f"default {value}")
    args = vars(parser.parse_args())
    output, device, smoke = args.pop("output"), torch.device(args.pop("device")), args.pop("smoke")
    if smoke and output == ASSETS / "kjv-minimax":
        output = Path("smoke-model")
    given = {name: value for name, value in args.items() if value is not None}
    summary = run(Settings(**((SMOKE if smoke else {}) | given)), output, device)
    held = summary["held_out"]
    print(f"held-out loss {held['loss']:.4f} nats per token, perplexity {held['perplexity']:.2f}, in {output}")
    print("\n\n".join(summary["samples"]))


if __name__ == "__main__":
    main()
