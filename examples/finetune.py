"""Fine-tune a patched model, all of it, with Trainer: documents packed into rows without padding.

    pip install -e ".[examples]"
    python examples/finetune.py --smoke                  # the whole path, on a CPU too
    python examples/finetune.py --model FOLDER --text book.txt --output tuned
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/finetune.py    # several GPUs

Started again, it goes on from its last checkpoint. The output folder then holds model/ (a stock Transformers
checkpoint), loss.png and summary.json.

Measured: --smoke takes 16 s of processor time on one thread (imports included) and 0.74 GiB; four steps took the loss
of three held-out verses from 3.43 to 3.17 nats per token. On an H100 that other work shared, `--steps 60 --every 30`
(the real setting otherwise) took 55 s and 1.14 GiB: the text is the model's own, and held-out loss went from 3.046 to
3.021.
"""

from __future__ import annotations

from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from corpus import CheckedCollator, documents, read_sections, split_sections
from recipe import (
    is_main_process,
    load,
    measure,
    needs,
    options,
    remember,
    report,
    sample,
    save_trained,
    train,
    trainer_settings,
)


def main() -> None:
    chosen = options(__doc__, "finetuned", learning_rate=2e-4)
    needs("matplotlib")
    kept, held = split_sections(read_sections(chosen.text, chosen.characters or None))
    model, tokenizer = load(chosen.model)
    settings = {name: value for name, value in vars(chosen).items() if name != "output"}
    remember(chosen.output, settings, model)

    # Several documents a row, each with its bounds; a patched model keeps them apart in every layer.
    packing = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    arguments = TrainingArguments(**trainer_settings(chosen), weight_decay=0.1, remove_unused_columns=False)
    trainer = Trainer(
        model,
        arguments,
        data_collator=CheckedCollator(packing, model.config.vocab_size, tokenizer.eos_token_id),
        train_dataset=documents(kept, tokenizer, chosen.length),  # type: ignore[arg-type]
        eval_dataset=documents(held, tokenizer, chosen.length),  # type: ignore[arg-type]
        processing_class=tokenizer,
    )
    before = measure(model, tokenizer, held, chosen.length)
    result = train(trainer, chosen.output)
    save_trained(trainer, chosen.output / "model")
    if not is_main_process():
        return

    saved, tokenizer = load(chosen.output / "model")
    result["settings"] = settings
    result["held_out"] = {"before": before, "after": measure(saved.to(model.device), tokenizer, held, chosen.length)}
    result["sample"] = sample(saved, tokenizer, "And it came to pass", 16 if chosen.smoke else 120)
    report(chosen.output, result)
    print("held-out loss {before:.4f} before, {after:.4f} after, nats per token".format(**result["held_out"]))
    print(result["sample"])


if __name__ == "__main__":
    main()
