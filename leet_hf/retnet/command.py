"""How `leet-hf convert` looks on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .checkpoint import ConversionError
from .convert import Conversion, convert


def show_conversion(
    console: Console, source: Path, target: Path, origin: str, config: Path | None, max_shard_size: str, force: bool
) -> int:
    """Convert and print what was done. Returns the exit status: 2 if nothing was, which leaves the target as it was."""
    try:
        with console.status(f"converting {escape(str(source))}"):
            done = convert(source, target, origin=origin, config=config, force=force, max_shard_size=max_shard_size)
    except (ConversionError, OSError) as error:
        console.print(f"[red]not converted:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    _show(console, done)
    return 0


def _show(console: Console, done: Conversion) -> None:
    plan, config = done.plan, done.plan.config
    norms = "before" if config.norm_first else "after"
    table = Table(title=f"RetNetForCausalLM in {escape(str(done.target))}", title_justify="left", show_header=False)
    table.add_row("converted from", plan.layout.title)
    mlp = f"{config.hidden_act} {config.mlp_type}"
    table.add_row("layers", f"{config.num_hidden_layers} of {config.num_heads} heads, {mlp}")
    table.add_row("norms", f"{norms} each residual{', DeepNorm' if config.deepnorm else ''}")
    table.add_row("tokens", f"{config.vocab_size}{', tied embeddings' if config.tie_word_embeddings else ''}")
    size = f"{plan.nbytes / 1e9:.3f} GB in {done.shards} file{'s' if done.shards > 1 else ''}"
    table.add_row("weights", f"{len(plan.names)} tensors, {str(config.dtype).removeprefix('torch.')}, {size}")
    if done.copied:
        table.add_row("copied", escape(", ".join(done.copied)))
    console.print(table)
    for folder in done.unfinished:
        console.print(
            f"[yellow]{escape(str(folder))} is of a conversion that still runs or was killed: if killed, delete it[/]",
            soft_wrap=True,
        )
