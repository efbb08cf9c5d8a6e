"""What a run leaves for people: the loss curve and, of train_from_scratch.py, the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_losses(history: list[dict[str, float]], file: Path) -> None:
    """Training and held-out loss over steps, as PNG; the lowest held-out loss is marked.

    history: entries with "step" and "train", "held_out" or both.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=100)
    for name, label, colour in (("train", "training", "#8a8a8a"), ("held_out", "held out", "#0b62a4")):
        curve = [(entry["step"], entry[name]) for entry in history if name in entry]
        if curve:
            axes.plot(*zip(*curve, strict=True), color=colour, label=label)
    held = [entry for entry in history if "held_out" in entry]
    if held:
        best = min(held, key=lambda entry: entry["held_out"])
        place = (best["step"], best["held_out"])
        axes.plot(*place, "o", color="#0b62a4")
        axes.annotate(f"{best['held_out']:.3f}", place, xytext=(-6, 10), textcoords="offset points")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, format="png")
    pyplot.close(figure)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [minimax, linear-attention]
---

# A small MiniMax that writes like the King James Bible

A model for demonstrations and tests of `leet_hf`: small enough for two CPU cores, trained well enough to be read. It
knows one book and no facts; do not use it for anything else.

| | |
|---|---|
| architecture | stock `MiniMaxForCausalLM`: 7 linear layers, then 1 softmax layer; no remote code |
| parameters | {parameters:,} |
| held-out loss | {loss:.4f} nats per token (perplexity {perplexity:.2f}, {bits:.3f} bits per character) |
| held-out text | {held_sections} of {all_sections} chapters, {held_tokens:,} tokens; kept from the tokenizer too |
| training text | King James Bible, public domain, {train_tokens:,} tokens |
| epochs | {epochs}; the weights after {best}, where the held-out loss was lowest, are kept |
| trained on | {device}, {seconds:.0f} s, torch {torch}, transformers {transformers} |
| weights | bfloat16, with the decay tables in float32 |

The loss is that of the file in this folder in float32, over windows of {length} tokens; the stock forward gives
{stock:.4f}. `summary.json` holds every setting and the loss of each epoch, `loss.png` shows them.

![loss](loss.png)

Made by `python examples/train_from_scratch.py`.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from leet_hf import patch_model

folder = "examples/assets/kjv-minimax"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = patch_model(AutoModelForCausalLM.from_pretrained(folder))
inputs = tokenizer("And it came to pass", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.8)[0]))
```

## Samples

Temperature 0.8, top-p 0.95, one draw each, not selected.

{samples}
"""


def write_model_card(summary: dict[str, Any], file: Path) -> None:
    """README.md of the model's folder, from the run's summary."""
    history, held = summary["history"], summary["held_out"]
    best = min(range(len(history)), key=lambda epoch: history[epoch]["held_out"])
    text = CARD.format(
        parameters=summary["parameters"],
        loss=held["loss"],
        stock=held["loss_stock_forward"],
        perplexity=held["perplexity"],
        bits=held["bits_per_character"],
        held_sections=summary["sections"]["held_out"],
        all_sections=sum(summary["sections"].values()),
        held_tokens=summary["tokens"]["held_out"],
        train_tokens=summary["tokens"]["train"],
        epochs=len(history),
        best=f"epoch {best + 1}",
        device=summary["device"],
        seconds=summary["seconds"],
        length=summary["settings"]["length"],
        samples="\n\n".join("```text\n" + sample + "\n```" for sample in summary["samples"]),
        **summary["versions"],
    )
    file.write_text(text)
