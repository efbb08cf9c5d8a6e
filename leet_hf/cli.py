"""The command `leet-hf`: demo, env, models."""

from __future__ import annotations

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
