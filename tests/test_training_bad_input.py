"""What training scripts say to bad input: what it was, what it must be, what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DataCollatorWithFlattening

import corpus
import finetune
import recipe
from scripts import SHIPPED, run, save_small

VOCABULARY = 50


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small"))


def check(end: int | None = 0, **batch: Any) -> None:
    corpus.CheckedCollator(lambda given: given, VOCABULARY, end)(batch)


ROW = torch.tensor([[0, 5, 6, 0, 7, 8, 0]])


def test_packed_rows_without_boundaries() -> None:
    with pytest.raises(ValueError, match=r"several documents in a row without their boundaries: give cu_seq_lens_q"):
        check(input_ids=ROW, labels=ROW)
    check(input_ids=ROW, labels=ROW, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    check(input_ids=ROW, labels=ROW, end=None)  # a row that is meant to run on


def test_a_padded_row_is_no_packed_one() -> None:
    labels = ROW.clone()
    labels[:, 4:] = -100
    check(input_ids=ROW, labels=labels)


def test_packing_by_transformers_has_boundaries() -> None:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    checked = corpus.CheckedCollator(collate, VOCABULARY, 0)
    batch = checked([{"input_ids": [0, 5, 6, 0]}, {"input_ids": [0, 7, 8, 9, 0]}])
    assert batch["input_ids"].shape == (1, 9) and batch["cu_seq_lens_q"].tolist() == [0, 4, 9]


def test_labels_of_the_wrong_shape() -> None:
    with pytest.raises(
        ValueError, match=r"labels have shape \[1, 6\], must be \[1, 7\] as input_ids: give one per token"
    ):
        check(input_ids=ROW, labels=ROW[:, 1:])


def test_labels_with_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="-100 at every token"):
        check(input_ids=ROW, labels=torch.full_like(ROW, -100))


def test_tokens_that_the_model_does_not_embed() -> None:
    with pytest.raises(ValueError, match="input_ids go from 0 to 50, must be below 50: use the tokenizer saved with"):
        check(input_ids=torch.tensor([[0, VOCABULARY]]), labels=torch.tensor([[0, VOCABULARY]]))


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"text .*nowhere\.txt is no file and no folder with \.txt"):
        run(finetune, tmp_path / "out", "--smoke", "--text", tmp_path / "nowhere.txt")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="give --text a file of plain text"):
        corpus.read_sections(str(tmp_path / "empty"), None)
    (tmp_path / "empty" / "picture.txt").write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.txt can not be read .* must be UTF-8"):
        corpus.read_sections(str(tmp_path / "empty"), None)


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text("\n\n\n".join(f"{name} section {i}\n" for i in range(15)))
    (tmp_path / "c.bin").write_bytes(b"\xff")
    sections = corpus.read_sections(str(tmp_path), None)
    assert len(sections) == 30 and sections[0] == "a.md section 0" and sections[-1] == "b.txt section 14"


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    with pytest.raises(SystemExit, match=r"sft\.py needs no_such_package: pip install -e '\.\[examples\]'"):
        recipe.needs("json", "no_such_package")


def test_a_run_with_other_settings_or_of_another_model(small: Path, tmp_path: Path) -> None:
    arguments = ("--smoke", "--model", small, "--steps", 1, "--every", 1)
    run(finetune, tmp_path / "out", *arguments)
    kept = (tmp_path / "out" / "checkpoint-1" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"out holds a run with seed = 0, not 3: give another --output, or delete"):
        run(finetune, tmp_path / "out", *arguments, "--seed", 3)
    other = save_small(small, intermediate_size=32)  # another config in the same place
    with pytest.raises(ValueError, match="out holds a run with intermediate_size = 64, not 32"):
        run(finetune, tmp_path / "out", *arguments)
    save_small(other)
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").read_bytes() == kept


def test_weights_that_are_not_those_of_the_config(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.out_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 tensors that its config.json asks for are missing .*{name} first"):
        recipe.load(folder)
    save_file(tensors | {name: tensors[name][:8].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 tensors .* of another shape, {name} first"):
        recipe.load(folder)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ValueError, match=r"tensors that its config\.json asks for are missing or of another shape"):
        recipe.load(folder)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "model", vocab_size=500)
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED)
    with pytest.raises(ValueError, match=f"has {len(tokenizer)} entries but the model embeds 500: give the tokenizer"):
        recipe.load(folder)


def test_a_model_without_linear_attention_is_trained_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path)
    model, _ = recipe.load(tmp_path)
    assert type(model) is LlamaForCausalLM
    assert "not patched: LlamaForCausalLM has no linear-attention layer" in capsys.readouterr().err
