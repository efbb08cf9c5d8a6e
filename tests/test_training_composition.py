"""What people put around a patched model in training: autocast, compile, accumulation, packing, NEFTune, Trainers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    MiniMaxForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import tiny
from leet_hf import patch_model
from leet_hf.modes.truth import relative_error

ROWS = [{"input_ids": row} for row in tiny.prompts((19, 30, 9, 24, 12, 27, 15, 21))]


def all_experts(layout: str = "linear-first", **changes: Any) -> Any:
    """A tiny model that uses all experts: a choice of experts would turn rounding into jumps."""
    return tiny.model(layout, num_experts_per_tok=4, **changes)


def arguments(folder: Path, kind: type = TrainingArguments, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 3e-3,
        "adam_epsilon": 1e-4, "save_strategy": "no", "report_to": "none", "logging_steps": 1, "use_cpu": True,
        "remove_unused_columns": False, "disable_tqdm": True, "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(**settings | changes)


def pad_right(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right; nothing is to be learnt from pads."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def flatten(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)


def trained(
    model: Any,
    folder: Path,
    collate: Callable[..., Any] = flatten,
    callbacks: list[TrainerCallback] | None = None,
    **changes: Any,
) -> tuple[Any, list[float]]:
    """The weights after a Trainer's run, and the losses it logged."""
    trainer = Trainer(
        model, arguments(folder, **changes), data_collator=collate, train_dataset=ROWS, callbacks=callbacks,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: value.clone() for name, value in model.state_dict().items()}, losses


def same(got: tuple[Any, list[float]], want: tuple[Any, list[float]]) -> None:
    assert got[1] == pytest.approx(want[1], rel=1e-4)
    errors = {name: relative_error(got[0][name], value) for name, value in want[0].items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-4, f"{worst} is off by {errors[worst]:.2g}"


def test_rows_without_padding_train_as_padded_rows(tmp_path: Path) -> None:
    """The padding-free collator of Transformers, and stock with pads on the right as the truth."""
    want = trained(all_experts("softmax-first"), tmp_path, pad_right)
    same(trained(patch_model(all_experts("softmax-first")), tmp_path), want)
    same(trained(patch_model(all_experts("softmax-first")), tmp_path, pad_right), want)


def test_packing_by_trl_trains_as_padded_rows(tmp_path: Path) -> None:
    """Rows of several sequences, as SFTTrainer's packing makes them, without padding."""
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    collate = trl.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)

    def pack(rows: list[dict[str, Any]]) -> Any:
        lengths = [len(row["input_ids"]) for row in rows]
        ids = [token for row in rows for token in row["input_ids"]]
        return collate([{"input_ids": ids, "seq_lengths": lengths}])

    want = trained(patch_model(all_experts()), tmp_path, pad_right)
    same(trained(patch_model(all_experts()), tmp_path, pack), want)


@pytest.mark.parametrize("collate", [pad_right, flatten])
def test_accumulated_gradients_are_those_of_the_large_batch(collate: Callable[..., Any], tmp_path: Path) -> None:
    """Batches of different numbers of tokens: each token counts the same."""
    want = trained(patch_model(all_experts()), tmp_path, collate)
    got = trained(
        patch_model(all_experts()), tmp_path, collate, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    same(got, want)


def test_neftune(tmp_path: Path) -> None:
    """Noise on the embeddings, the same as stock gets for the same seed; taken off again afterwards."""
    rows = {"collate": lambda rows: pad_right([{"input_ids": row["input_ids"][:9]} for row in rows])}
    want = trained(all_experts("softmax-first"), tmp_path, **rows, neftune_noise_alpha=5.0)
    model = patch_model(all_experts("softmax-first"))
    got = trained(model, tmp_path, **rows, neftune_noise_alpha=5.0)
    same(got, want)
    quiet = trained(patch_model(all_experts("softmax-first")), tmp_path, **rows)
    assert abs(quiet[1][0] - got[1][0]) > 1e-4
    assert not model.model.embed_tokens._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_through_a_trainer_of_ones_own(dtype: torch.dtype) -> None:
    """Gradients of a loss under autocast, scaled for float16, against float32."""
    model, batch = patch_model(all_experts()), flatten(ROWS[:4])
    model.train()
    exact = torch.autograd.grad(model(**batch, use_cache=False).loss, list(model.parameters()))
    scale = 1024.0 if dtype == torch.float16 else 1.0
    with torch.autocast("cpu", dtype):
        loss = model(**batch, use_cache=False).loss
    rounded = torch.autograd.grad(scale * loss, list(model.parameters()))
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in rounded)
    got, want = (torch.cat([gradient.flatten() for gradient in g]) for g in (rounded, exact))
    assert relative_error(got / scale, want) <= (0.1 if dtype == torch.bfloat16 else 0.02)


def test_compiled_training_step_is_one_graph() -> None:
    """Forward, loss and backward of a batch under torch.compile: no graph break, gradients of the eager step."""
    model = patch_model(all_experts(num_hidden_layers=2, layer_types=[tiny.LINEAR, tiny.SOFTMAX])).train()
    model.set_experts_implementation("batched_mm")
    ids = torch.tensor([row["input_ids"][:9] for row in ROWS[:2]])

    def loss(model: Any) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    names = [name for name, _ in model.named_parameters()]
    want = torch.autograd.grad(loss(model), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(model), list(model.parameters()))
    for name, one, other in zip(names, got, want, strict=True):
        assert relative_error(one, other) <= 1e-4, name


def test_evaluation_and_generation_while_training(tmp_path: Path) -> None:
    """Seq2SeqTrainer with predict_with_generate: what it writes is what generate() writes then."""
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(torch.tensor(prediction.predictions))
        return {"tokens": float(prediction.predictions.size)}

    model = patch_model(tiny.model())
    model.generation_config.pad_token_id = 0
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words(), pad_token="0")
    settings = arguments(
        tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, eval_strategy="steps", eval_steps=1,
        generation_max_length=16, generation_num_beams=2, per_device_eval_batch_size=2,
    )  # fmt: skip
    held = [{"input_ids": row["input_ids"][:9]} for row in ROWS[:3]]
    trainer = Seq2SeqTrainer(
        model, settings, data_collator=pad_right, train_dataset=ROWS, eval_dataset=held,  # type: ignore[arg-type]
        compute_metrics=metrics, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(seen) == len(losses) == 2 and losses[1] < losses[0]
    want = model.eval().generate(pad_right(held)["input_ids"], max_length=16, num_beams=2)
    # The trainer pads what is written to a length of its own.
    assert want.shape == (3, 16) and seen[-1][:, :16].tolist() == want.tolist() and not seen[-1][:, 16:].any()


def test_saving_in_the_middle_disturbs_nothing(tmp_path: Path) -> None:
    """save_pretrained after each step writes what stock loads and computes alike; the run ends as one without it."""
    ids = torch.tensor([ROWS[0]["input_ids"]])
    model = patch_model(all_experts("softmax-first"))
    seen: list[torch.Tensor] = []

    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                seen.append(model(input_ids=ids, use_cache=False).logits)
            model.save_pretrained(tmp_path / f"step-{state.global_step}")

    got = trained(model, tmp_path, callbacks=[Saves()])
    want = trained(patch_model(all_experts("softmax-first")), tmp_path)
    assert got[1] == want[1] and all(torch.equal(got[0][name], value) for name, value in want[0].items())
    assert len(seen) == 2 and not torch.equal(*seen)
    for step, logits in enumerate(seen, 1):
        stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / f"step-{step}", dtype=torch.float32)
        assert type(stock) is MiniMaxForCausalLM
        with torch.no_grad():
            torch.testing.assert_close(stock(input_ids=ids, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)


def test_mlm_collator_of_transformers(tmp_path: Path) -> None:
    """The usual collator of causal language models, which pads and masks by itself."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words(), pad_token="0")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    same(
        trained(patch_model(all_experts()), tmp_path, collate), trained(patch_model(all_experts()), tmp_path, pad_right)
    )


@pytest.mark.parametrize(
    ("package", "optimizer"), [("bitsandbytes", "adamw_bnb_8bit"), ("torchao", "adamw_torch_8bit")]
)
def test_optimizers_with_8_bits(package: str, optimizer: str, tmp_path: Path) -> None:
    """Where they are installed: the run goes as with 32 bits, to the precision of a short one."""
    try:
        importlib.import_module(package)
    except ImportError:
        pytest.skip(f"{package} is not installed")
    want = trained(patch_model(all_experts()), tmp_path, max_steps=6)[1]
    got = trained(patch_model(all_experts()), tmp_path, max_steps=6, optim=optimizer)[1]
    assert got[-1] < got[0] - 0.1
    assert got == pytest.approx(want, rel=0.02)


def _words() -> Any:
    """A tokenizer whose words are the numbers of a tiny model's tokens."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(i): i for i in range(tiny.VOCAB)}, unk_token="1"))
