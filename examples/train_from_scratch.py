"""Train a small MiniMax from nothing, with its linear layers on leet_hf's kernels, and write what `leet-hf demo` loads.

    pip install -e ".[examples]"
    python examples/train_from_scratch.py --smoke        # the whole path on a CPU, in less than a minute
    python examples/train_from_scratch.py                # the model in examples/assets, on a GPU

It needs no network: the text is examples/assets/kjv.txt.xz (King James Bible, public domain), and the tokenizer is
trained on it. The output folder holds a stock Transformers checkpoint (no remote code), its tokenizer, a model card,
the loss curve and a summary in JSON. A run that was stopped goes on from its last epoch when it is started again, bit
for bit. The loop is plain `accelerate`: bfloat16 on a GPU, --accumulation, and several processes with

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_from_scratch.py

Measured: --smoke takes 26 s of processor time on one thread (imports included) and ends at 4.40 nats per token held
out; what the real setting took and gave is in the model's card, examples/assets/kjv-minimax/README.md. Its first two
epochs (`--epochs 2`) took 24 s and 2.74 GiB on an H100 that other work shared, and end at 4.22.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from corpus import batches, encode, held_out_loss, read_sections, split_sections, train_tokenizer
from leet_hf import patch_model
from recipe import ASSETS, TEXT, needs, peak_memory, write_json, write_whole
from reporting import plot_losses, write_model_card
from small_minimax import make_config, residual_dropout

PROMPTS = ("In the beginning", "And it came to pass", "Blessed are they", "Psalm 151\n\n1 ")
DECAY_TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


@dataclass
class Settings:
    """Everything that decides the result of a run; a checkpoint is continued only by a run with the same."""

    text: str = str(TEXT)
    model: str | None = None
    vocabulary: int = 4096
    hidden: int = 192
    experts: int = 4
    expert_width: int = 128
    length: int = 1024
    batch: int = 16
    accumulation: int = 1
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


def train(
    model: Any, tokens: Tensor, held_out: Tensor, settings: Settings, checkpoint: Path, accelerator: Accelerator
) -> dict[str, Any]:
    """Train until the last epoch, or until the held-out loss has not fallen for `patience` epochs; leave the best
    weights in `model`. Returns history (one entry per epoch), steps per epoch and seconds."""
    shares = settings.accumulation * accelerator.num_processes
    if settings.batch % shares:
        raise ValueError(f"batch is {settings.batch}, must be a multiple of accumulation times processes, {shares}")
    per_epoch = len(batches(tokens, settings.length, settings.batch, seed=0))
    if per_epoch == 0:
        raise ValueError(f"text gives {len(tokens)} tokens; one batch needs {(settings.batch + 1) * settings.length}")
    optimizer, schedule = make_optimizer(model, settings, per_epoch * settings.epochs)
    history: list[dict[str, float]] = []
    best, seconds = {}, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=accelerator.device, weights_only=True)
        if saved["settings"] != asdict(settings):
            raise ValueError(f"checkpoint {checkpoint} was written with other settings; delete it to start afresh")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        history, best, seconds = saved["history"], saved["best"], saved["seconds"]
    wrapped, stepped = accelerator.prepare(model, optimizer)
    lowest = min((entry["held_out"] for entry in history), default=math.inf)
    bar = tqdm(
        total=per_epoch * settings.epochs, initial=per_epoch * len(history), unit="step", mininterval=1.0,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    model.train()
    for epoch in range(len(history), settings.epochs):
        if epoch - min(range(epoch), key=lambda e: history[e]["held_out"], default=epoch) > settings.patience:
            break
        began, losses = time.perf_counter(), []
        # An epoch's seed does not depend on what ran before it: a continued run gives what an unbroken one gives.
        seed = settings.seed * 100_003 + epoch
        torch.manual_seed(seed)
        for batch in batches(tokens, settings.length, settings.batch, seed):
            own = batch[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
            for rows in own.split(settings.batch // shares):
                with accelerator.accumulate(wrapped):
                    output = wrapped(input_ids=rows, labels=rows, use_cache=False, output_router_logits=True)
                    accelerator.backward(output.loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                    stepped.step()
                    stepped.zero_grad()
                losses.append(output.loss.detach() - model.router_aux_loss_coef * output.aux_loss.detach())
            schedule.step()
            bar.update()
        with accelerator.autocast():
            loss = held_out_loss(model, held_out, settings.length, settings.batch)
        seconds += time.perf_counter() - began
        mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        history.append({"step": (epoch + 1) * per_epoch, "train": mean, "held_out": loss})
        bar.set_postfix({key: f"{history[-1][key]:.3f}" for key in ("train", "held_out")})
        if loss < lowest:
            lowest, best = loss, {name: value.clone() for name, value in model.state_dict().items()}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        state |= {"settings": asdict(settings), "history": history, "best": best, "seconds": seconds}
        if accelerator.is_main_process:
            write_whole(checkpoint, partial(torch.save, state))
    bar.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    model.load_state_dict(best)
    return {"history": history, "steps_per_epoch": per_epoch, "seconds": seconds}


def save(model: Any, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save as stock Transformers does, then store the weights in bfloat16. The decay tables stay float32: in bfloat16
    the slopes would be off by up to 0.4 percent."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        small = {n: t if n.endswith(DECAY_TABLES) else t.to(torch.bfloat16) for n, t in tensors.items()}
        save_file(small, file, metadata={"format": "pt"})

    whole = output / "saved"
    write_whole(whole, write)
    for file in whole.iterdir():
        file.replace(output / file.name)
    whole.rmdir()


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
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if device.type == "cuda" else "no",
        gradient_accumulation_steps=settings.accumulation,
        # Experts that no token of a process chose have no gradient there.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    device = accelerator.device
    sections = read_sections(settings.text, settings.characters)
    kept, held = split_sections(sections)
    torch.manual_seed(settings.seed)
    tokenizer: Any
    model: Any
    if settings.model is None:
        tokenizer = train_tokenizer(kept, settings.vocabulary)
        sizes = {"hidden": settings.hidden, "experts": settings.experts, "expert_width": settings.expert_width}
        config = make_config(tokenizer, **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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
        result = train(model, tokens, held_out, settings, output / "checkpoint.pt", accelerator)
    memory = peak_memory()
    if not accelerator.is_main_process:
        return {}
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
        "peak_memory_gib": memory,
        "samples": write_samples(saved.eval(), tokenizer, 120 if settings.characters is None else 16),
    }
    write_json(output / "summary.json", summary)
    write_whole(output / "loss.png", lambda file: plot_losses(result["history"], file))
    write_model_card(summary, output / "README.md")
    (output / "checkpoint.pt").unlink()
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    parser.add_argument("--output", type=Path, default=ASSETS / "kjv-minimax", help="folder to write (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a little text: does the whole path run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", default=defaults.text, help="plain text, or .xz of it (%(default)s)")
    parser.add_argument("--model", help="go on from this saved model and its tokenizer, not from nothing")
    parser.add_argument("--stock", action="store_true", help="train without patch_model, to compare")
    for name in (
        "batch",
        "accumulation",
        "epochs",
        "length",
        "seed",
        "patience",
        "learning_rate",
        "weight_decay",
        "dropout",
    ):
        value = getattr(defaults, name)
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), help=f"default {value}")
    args = vars(parser.parse_args())
    needs("matplotlib")
    output, device, smoke = args.pop("output"), torch.device(args.pop("device")), args.pop("smoke")
    if smoke and output == ASSETS / "kjv-minimax":
        output = Path("smoke-model")
    given = {name: value for name, value in args.items() if value is not None}
    summary = run(Settings(**((SMOKE if smoke else {}) | given)), output, device)
    if not summary:  # this is not the process that reports
        return
    held = summary["held_out"]
    print(f"{summary['seconds']:.0f} s, {summary['peak_memory_gib']:.2f} GiB on {summary['device']}")
    print(f"held-out loss {held['loss']:.4f} nats per token, perplexity {held['perplexity']:.2f}, in {output}")
    print("\n\n".join(summary["samples"]))


if __name__ == "__main__":
    main()
