"""The command `leet-hf`: demo, env, models, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Linear-attention models in Transformers, right and fast.", no_args_is_help=True, add_completion=False
)


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write with each model.")] = 60,
    model: Annotated[str | None, typer.Option(help="A saved model, instead of the one shipped.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    modes: Annotated[bool, typer.Option(help="Check every decoding mode.")] = True,
    why: Annotated[bool, typer.Option(help="Say for each wrong mode what was wrong.")] = False,
) -> None:
    """Write text with a stock and a patched model, and compare speed, cache size and every decoding mode.

    Exits with 1 if the patched model is wrong anywhere.
    """
    from .show import show_demo

    raise typer.Exit(show_demo(Console(), prompt, max_new_tokens, model, seed, device, modes, why))


@app.command()
def env() -> None:
    """Print versions, devices, which methods can run here, and why others can not."""
    from .show import show_environment

    show_environment(Console())


@app.command()
def models() -> None:
    """Print the model families that patch_model supports."""
    from .show import show_models

    show_models(Console())


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint: a file of weights, or a directory that holds some.")],
    target: Annotated[Path, typer.Argument(help="The directory to make, for AutoModelForCausalLM.from_pretrained.")],
    origin: Annotated[str, typer.Option("--from", help="torchscale, hf-port, or auto to tell by the keys.")] = "auto",
    config: Annotated[Path | None, typer.Option(help="A JSON file with the source's options.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file to write; about the memory used.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace a target that is not empty.")] = False,
) -> None:
    """Convert a RetNet checkpoint of torchscale, or of its Hugging Face port, to leet_hf's RetNetForCausalLM.

    Exits with 2, and leaves the target as it was, if anything about the checkpoint is not as expected.
    """
    from .retnet.command import show_conversion

    raise typer.Exit(show_conversion(Console(), source, target, origin, config, max_shard_size, force))
