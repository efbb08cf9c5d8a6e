"""What the scripts that train share: options, loading, checkpoints that survive, and what a run leaves for people."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from corpus import encode, held_out_loss
from leet_hf import UnsupportedModelError, patch_model
from reporting import plot_losses

ASSETS = Path(__file__).parent / "assets"
MODEL, TEXT = ASSETS / "kjv-minimax", ASSETS / "kjv.txt.xz"
# Settings of every script, and what --smoke makes of them. characters: of the text, 0 for all. every: steps from one
# evaluation and checkpoint to the next.
REAL: dict[str, Any] = dict(
    steps=400, length=1024, batch=8, accumulate=2, every=50, seed=0, characters=0, checkpointing=False
)
SMOKE: dict[str, Any] = dict(steps=4, length=64, batch=4, every=2, characters=12_000)
# What libraries raise where a file can not be written: torch.save a RuntimeError, safetensors its own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def needs(*packages: str) -> None:
    """Leave with the remedy where packages of the extra "examples" are missing, before anything is computed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{Path(sys.argv[0]).name} needs {', '.join(missing)}: pip install -e '.[examples]'")


def options(doc: str | None, output: str, **own: Any) -> argparse.Namespace:
    """The command line: --model, --text, --output, --smoke, and one option for each setting in REAL and `own`.

    own: settings of one script with their defaults. What is given on the command line wins over --smoke.
    """
    real = REAL | own
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="checkpoint folder or hub name (%(default)s)")
    parser.add_argument("--text", default=str(TEXT), help="plain text, .xz of it, or a folder of such (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder to write (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a little text: does the whole path run?")
    for name, value in real.items():
        kind: dict[str, Any] = {"action": "store_true", "default": None} if value is False else {"type": type(value)}
        parser.add_argument("--" + name.replace("_", "-"), help=f"default {value}", **kind)
    chosen = parser.parse_args()
    for name, value in (real | (SMOKE if chosen.smoke else {})).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    return chosen


def load(name: str | Path) -> tuple[Any, Any]:
    """(patched model in float32, tokenizer) of a checkpoint folder or hub name; autocast does the rest.

    Raises ValueError where the weights are not those that its config asks for, or the tokenizer is another model's.
    A model without linear-attention layers is not patched, which is said.
    """
    model = _read(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"tokenizer of {name} has {len(tokenizer)} entries but the model embeds {model.config.vocab_size}: "
            "give the tokenizer saved with the model"
        )
    # grouped_mm does not take part in autocast; the plain loop over experts does.
    model.set_experts_implementation("eager")
    try:
        patch_model(model)
    except UnsupportedModelError as error:
        print(f"not patched: {error}", file=sys.stderr)
    model.config.use_cache = False
    return model, tokenizer


def restore(model: Any, checkpoint: Path) -> None:
    """Give a model the weights of a checkpoint, all of them.

    Trainer (Transformers 5.17 to 5.24) reads a checkpoint by the names the model uses while it runs, but saves it by
    those of the hub: where they differ, as for MiniMax's experts, it goes on without them and only warns
    (github.com/huggingface/transformers/issues/48805). Adapters are not concerned.
    """
    if not (checkpoint / "adapter_config.json").exists():
        model.load_state_dict(_read(checkpoint).state_dict())


def trainer_settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """Arguments of TrainingArguments, or of what is made from them, that all scripts set alike."""
    return {
        "output_dir": str(chosen.output),
        "max_steps": chosen.steps,
        "per_device_train_batch_size": chosen.batch,
        "per_device_eval_batch_size": chosen.batch,
        "gradient_accumulation_steps": chosen.accumulate,
        "learning_rate": chosen.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, chosen.steps // 20),
        "bf16": torch.cuda.is_available(),
        # Several processes on CPUs find one another only where this is said.
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": chosen.checkpointing,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_strategy": "steps",
        "eval_steps": chosen.every,
        "save_steps": chosen.every,
        "save_total_limit": 2,
        "logging_steps": max(1, chosen.every // 5),
        "seed": chosen.seed,
        "report_to": "none",
    }


def is_main_process() -> bool:
    """The one of the processes that `accelerate launch` or `torchrun` started that writes files and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def write_whole(target: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file or folder beside `target`, then put it in place; of several processes the main one does.

    A full disk or a kill in the middle leaves what was there before. Raises OSError that says so.
    """
    if not is_main_process():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    _remove(fresh)
    try:
        write(fresh)
    except WRITE_ERRORS as error:
        _remove(fresh)
        raise OSError(
            f"could not write {target} ({error}); {_free(target.parent)}: make room or give another --output, "
            "then start the same command again"
        ) from error
    if target.is_dir():
        # Folders are not replaced in one step: the old one stays beside until the new one is in place.
        old = target.with_name(target.name + ".old")
        _remove(old)
        target.rename(old)
        fresh.rename(target)
        _remove(old)
    else:
        os.replace(fresh, target)


def save_trained(trainer: Any, target: Path) -> None:
    """Save what a Trainer trained to the folder `target`. All processes must call this: each may hold a part of it."""
    if is_main_process():
        write_whole(target, lambda folder: trainer.save_model(str(folder)))
    else:
        trainer.save_model(str(target))
    trainer.accelerator.wait_for_everyone()


def write_json(target: Path, content: Any) -> None:
    write_whole(target, lambda file: file.write_text(json.dumps(content, indent=1, default=str) + "\n"))


def remember(output: Path, settings: dict[str, Any], model: Any) -> None:
    """Write what decides the run to `output`, or compare with what is there: a checkpoint goes on only as it began.

    Raises ValueError naming the first difference.
    """
    if not is_main_process():
        return
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    content = json.loads(json.dumps({"settings": settings, "config": config}, default=str))
    file = output / "settings.json"
    if not file.exists():
        write_json(file, content)
        return
    began = json.loads(file.read_text())
    for part, own in content.items():
        for name in sorted(own.keys() | began[part].keys()):
            if own.get(name) != began[part].get(name):
                raise ValueError(
                    f"output {output} holds a run with {name} = {began[part].get(name)!r}, not {own.get(name)!r}: "
                    "give another --output, or delete the folder to start afresh"
                )


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a Trainer. Those cut in the middle are removed: they would stop a resume.

    A Trainer writes trainer_state.json last. Of several processes the main one removes.
    """
    found = None
    for folder in sorted(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2])):
        if _is_whole(folder):
            found = folder
        elif is_main_process():
            print(f"removed {folder}: it was cut in the middle of a save", file=sys.stderr)
            shutil.rmtree(folder)
    return found


def train(trainer: Any, output: Path) -> dict[str, Any]:
    """Train to the end, from the last whole checkpoint in `output` if there is one.

    Returns history (loss by step, as `plot_losses` takes it), seconds and peak memory of this call. Raises OSError
    where a checkpoint could not be written; the last whole one stays.
    """
    began, start = time.perf_counter(), last_checkpoint(output)
    if start is not None:
        print(f"going on from {start} (Trainer may warn of missing keys: they are restored here)", file=sys.stderr)
        restore(trainer.model, start)
    try:
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    except WRITE_ERRORS as error:
        cut = next((folder for folder in output.glob("checkpoint-*") if not _is_whole(folder)), None)
        if cut is None:
            raise
        kept = last_checkpoint(output)
        raise OSError(
            f"could not write {cut} ({error}); {_free(output)}: make room, then start the same command again; it "
            f"goes on from {'the beginning' if kept is None else kept}"
        ) from error
    names = {"loss": "train", "eval_loss": "held_out"}
    history = [
        {"step": entry["step"], names[key]: entry[key]}
        for entry in trainer.state.log_history
        for key in names
        if key in entry
    ]
    return {"history": history, "seconds": time.perf_counter() - began, "peak_memory_gib": peak_memory()}


def measure(model: Any, tokenizer: Any, sections: list[str], length: int) -> float:
    """Held-out loss in nats per token of a model whose attention sees one row of windows, in float32."""
    return held_out_loss(model, encode(sections, tokenizer), length, batch=4)


def peak_memory() -> float:
    """GiB: the most that tensors took on the GPU so far, or the process on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def sample(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """A continuation of `prompt` by up to `count` tokens, drawn with a fixed seed."""
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    ids = model.eval().generate(
        **inputs, max_new_tokens=count, do_sample=True, temperature=0.8, top_p=0.95, use_cache=True
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def report(output: Path, result: dict[str, Any]) -> None:
    """Write summary.json and loss.png, and print where they are."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(output / "summary.json", {**result, "device": device, "versions": versions})
    write_whole(output / "loss.png", lambda file: plot_losses(result["history"], file))
    print(f"{result['seconds']:.0f} s, {result['peak_memory_gib']:.2f} GiB on {device}; see {output}/summary.json")


def _read(name: str | Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = loaded
    wrong = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"model {name}: {len(wrong)} tensors that its config.json asks for are missing or of another shape, "
            f"{wrong[0]} first: the file is cut, or the config is of another model; save both together"
        )
    return model


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB are free there"
