"""How the command `leet-hf` looks on a terminal."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re

import torch
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

import leet_linear_attention

from . import demo
from .adapters import adapters
from .modes import ModeError, Outcome

PACKAGES = ("leet-hf", "torch", "triton", "transformers", "accelerate", "safetensors", "peft", "kernels")


class Page:
    """Writes text word by word and breaks lines between words at the console's width."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.column = 0
        self.spaces = ""  # held back: at a line's end they would fall into the next line

    def write(self, text: str) -> None:
        for piece in re.findall(r"\n| +|[^\n ]+", text):
            if piece.startswith(" "):
                self.spaces += piece
                continue
            if piece == "\n" or self.column + len(self.spaces) + len(piece) > self.console.width:
                self.console.out("")
                self.column, self.spaces = 0, ""
            if piece != "\n":
                self.console.out(self.spaces + piece, end="", highlight=False)
                self.column, self.spaces = self.column + len(self.spaces) + len(piece), ""
        self.console.file.flush()


def show_demo(
    console: Console,
    prompt: str | None,
    count: int,
    model: str | None,
    seed: int,
    device: str,
    modes: bool,
    why: bool,
) -> int:
    """Run the demo and return the exit status: 1 if the patched model is wrong anywhere, 2 if there is none."""
    with demo.quiet():
        try:
            with console.status("loading"):
                subject = demo.Subject.load(model or demo.shipped_model(), device)
        except (OSError, ValueError) as error:
            console.print(
                f"[red]can not load {escape(model or demo.MODEL)}:[/] {type(error).__name__}: {escape(str(error))}"
            )
            return 2
        parameters = sum(p.numel() for p in subject.stock.parameters())
        console.print(
            f"[bold]{type(subject.stock).__name__}[/], {parameters / 1e6:.1f} M parameters, float32, on {device}, "
            f"{torch.get_num_threads()} CPU threads"
        )
        written = {}
        for name, subject_model in (("stock", subject.stock), ("patched", subject.patched)):
            console.print(Rule(name, align="left"))
            page = Page(console)
            written[name] = demo.write(subject_model, subject.tokenizer, prompt or demo.PROMPT, count, seed, page.write)
            console.print("\n")
        _show_speed(console, subject, written)
        same = written["stock"].tokens == written["patched"].tokens
        wrong = _show_modes(console, subject, why) if modes else 0
    return int(not same or wrong > 0)


def _show_speed(console: Console, subject: demo.Subject, written: dict[str, demo.Written]) -> None:
    table = Table(title="One prompt, no padding", title_justify="left")
    table.add_column("")
    for name in written:
        table.add_column(name, justify="right")
    stock, patched = (written[name] for name in ("stock", "patched"))
    pairs = zip(stock.tokens, patched.tokens, strict=True)
    differs = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    text = "the same text" if differs is None else f"[red]differs from token {differs}[/]"
    table.add_row("text", f"{len(stock.tokens)} tokens", text)
    table.add_row("time to first token", *(f"{w.first * 1e3:.1f} ms" for w in (stock, patched)))
    table.add_row("tokens per second", *(f"{w.rate:.0f}" for w in (stock, patched)))
    for length in (128, 4096):
        sizes = [demo.cache_bytes(model, length) for model in (subject.stock, subject.patched)]
        table.add_row(f"cache after {length} tokens", *(f"{size / 1024:,.0f} KiB" for size in sizes))
    console.print(table)
    softmax = demo.softmax_cache_bytes(subject.stock, length)
    console.print(f"With softmax attention in every layer, {length} tokens would take {softmax / 1024:,.0f} KiB.\n")


def _show_modes(console: Console, subject: demo.Subject, why: bool) -> int:
    """Print the table of modes; returns in how many the patched model is wrong."""
    verdicts = []
    with console.status("decoding modes") as status:
        for verdict in demo.judge_modes(subject):
            verdicts.append(verdict)
            status.update(f"decoding modes: {verdict.mode.title}")
    table = Table(title="Decoding modes, against forwards without a cache", title_justify="left")
    table.add_column("decoding mode")
    table.add_column("stock")
    table.add_column("patched")
    for v in verdicts:
        table.add_row(v.mode.title, *((_cell(v.stock), _cell(v.patched)) if v.stock else ("[dim]not run[/]",) * 2))
    console.print(table)
    ran = [v for v in verdicts if v.stock and v.patched]
    right = [sum(outcome.agrees for outcome in side) for side in zip(*((v.stock, v.patched) for v in ran), strict=True)]
    console.print(f"Right in {len(ran)} modes: stock [bold]{right[0]}[/], patched [bold]{right[1]}[/].")
    for v in verdicts:
        if v.missing:
            console.print(f"[dim]not run: {escape(v.mode.title)}: {escape(v.missing)}[/]")
        for name, outcome in (("stock", v.stock), ("patched", v.patched)):
            if outcome and not outcome.agrees and (why or name == "patched"):
                console.print(f"[dim]{name}, {escape(v.mode.title)}:[/] {escape(outcome.reason)}", highlight=False)
    return len(ran) - right[1]


def _cell(outcome: Outcome | None) -> str:
    if outcome is None or outcome.agrees:
        return "[green]right[/]"
    if math.isfinite(outcome.error):
        return "[red]wrong[/]"
    kind = outcome.reason.partition(":")[0]
    return "[red]not done[/]" if kind == ModeError.__name__ else f"[red]{escape(kind)}[/]"


def show_environment(console: Console) -> None:
    """Versions, devices, and for each device which methods can run there and why others can not."""
    table = Table("package", "version", title="Versions", title_justify="left")
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "[dim]not installed[/]")
    console.print(table)

    devices = Table("device", "what it is", title="Devices", title_justify="left")
    devices.add_row("cpu", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.add_row(f"cuda:{i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}")
    if not torch.cuda.is_available():
        devices.add_row("cuda", "[dim]none[/]")
    console.print(devices)

    methods = Table("device", "method", "can run", title="Methods of linear attention, in order", title_justify="left")
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for name, reason in leet_linear_attention.available_methods(device).items():
            methods.add_row(device, name, "[green]yes[/]" if reason is None else f"no: {escape(reason)}")
    console.print(methods)


def show_models(console: Console) -> None:
    """The families that patch_model knows, what it recognises them by, and the formula of their decay."""
    table = Table(title="Supported models", title_justify="left", show_lines=True)
    table.add_column("family", no_wrap=True)
    for column in ("linear layer", "base model", "decay"):
        table.add_column(column, overflow="fold")
    for adapter in reversed(adapters()):
        classes = (name.replace(" or ", "\n") for name in (adapter.layer_class, adapter.base_class))
        table.add_row(adapter.name, *classes, escape(adapter.decay_formula))
    console.print(table)
