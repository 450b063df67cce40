"""A sound model, a way to break a copy of it, and what a verification finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid.formats import save
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.load import from_folder
from camelid.verify import behaviour, language, stored
from camelid.verify.checklist import Check, Subject, run

CHECKS = [*stored.CHECKS, *language.CHECKS, *behaviour.CHECKS]
Break = Callable[[Path], None]


def fields(file: str, **changes: Any) -> Break:
    """A fault of a JSON file."""

    def broken(folder: Path) -> None:
        value = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps({**value, **changes}), encoding="utf-8")

    return broken


@pytest.fixture(scope="session")
def sound(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has learned its text."""
    words = from_folder(tokenizers["byte-level"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )  # fmt: skip
    model = Llama(config)
    ids = torch.tensor([words.encode(behaviour.TEXT)[: behaviour.LONGEST]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other tests run beside this one, and small tensors gain nothing
    for _ in range(400):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    assert loss.item() < 4
    folder = tmp_path_factory.mktemp("sound") / "model"
    save(model.eval(), folder)
    words.save(folder)
    template = folder / "chat_template.jinja"
    assert "<|eot_id|>" in template.read_text()
    ends = [words.eos_token_id, words.encode("<|eot_id|>", add_special_tokens=False)[0]]
    fields("generation_config.json", eos_token_id=ends)(folder)
    return folder


def failures(folder: Path, checks: Sequence[Check] = CHECKS) -> dict[str, str]:
    return {one.name: one.detail for one in run(Subject(folder), checks) if one.status == "fail"}
