"""Texts that must have a form have it, whatever the model; and a form that cannot be followed is refused before it
runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid.cli import run
from camelid.errors import InputError
from camelid.formats.hf import save
from camelid.generate.constrain import Form, Matcher
from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.load import from_folder
from camelid.tokenizer.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ages": {"type": "array", "items": {"type": "integer"},
                   "maxItems": 3}, "kind": {"enum": ["骆驼", "horse"]}},
    "required": ["name", "ages", "kind"], "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(params=["byte-level", "sentencepiece"])
def folder(request: pytest.FixtureRequest, tokenizers: dict[str, Path], tmp_path: Path) -> Path:
    """A model that knows nothing, with a tokenizer of each kind."""
    torch.manual_seed(0)
    tokenizer = from_folder(tokenizers[request.param])
    config = LlamaConfig(vocab_size=len(tokenizer) + 7, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=512,
                         eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    save(Llama(config), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder)


def params(kind: str, text: str, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=400, form=Form(kind, text), **more)


def test_json_of_a_schema(engine: Engine) -> None:
    for seed in range(4):
        [result] = engine.generate(["Who?"], params("json_schema", json.dumps(SCHEMA), temperature=1.0, seed=seed))
        if result.finish_reason == "max_new_tokens":  # an integer may go on for ever
            continue
        found = json.loads(result.text)
        assert found.keys() == {"name", "ages", "kind"}
        assert found["kind"] in ("骆驼", "horse")
        assert len(found["name"]) <= 8
        assert all(isinstance(age, int) for age in found["ages"])


@pytest.mark.parametrize("lookup", [0, 5])
def test_regular_expressions_choices_and_grammars(engine: Engine, lookup: int) -> None:
    asked = [
        params("regex", "[0-9]{4}-[0-9]{2}", temperature=1.0, seed=3, lookup=lookup),
        params("choice", json.dumps(['ja "quoted"', "骆驼", "no"], ensure_ascii=False), lookup=lookup),
        params("grammar", 'start: "a" ("b" | "c") "d"', lookup=lookup),
    ]
    date, choice, letters = engine.generate(["x", "y", "z"], asked)
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", date.text)
    assert choice.text in ('ja "quoted"', "骆驼", "no")
    assert letters.text in ("abd", "acd")
    assert {r.finish_reason for r in (date, choice, letters)} <= {"stop", "eos"}


def test_streaming_and_a_neighbour_without_form(engine: Engine) -> None:
    shaped = params("regex", "(ab)+c", temperature=1.0, seed=1)
    free = SamplingParams(max_new_tokens=5, temperature=1.0, seed=2, ignore_eos=True)
    both = engine.generate(["x", "x"], [shaped, free])
    assert both[1].ids == engine.generate(["x"], free)[0].ids
    assert "".join(engine.stream("x", shaped)) == both[0].text


def test_letters_that_spell_a_control_token_are_letters(engine: Engine) -> None:
    assert engine.tokenizer is not None
    for name in engine.tokenizer.special_tokens.values():
        keys = {"properties": {name: {"const": 1}}, "required": [name], "additionalProperties": False}
        forms = [
            params("json_schema", json.dumps({"const": name})),
            params("json_schema", json.dumps({"type": "object", **keys})),
            params("regex", f"[a-c]{re.escape(name)}"),
            params("choice", json.dumps([name])),
        ]
        const, keyed, behind, choice = [r.text for r in engine.generate(["x"] * 4, forms)]
        assert json.loads(const) == name
        assert json.loads(keyed)[name] == 1
        assert behind[1:] == name
        assert choice == name


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", ["merges", "unigram"])
def test_control_tokens_that_are_pieces_too(kind: str, padding: int) -> None:
    """A BPE in which they are made of others and others of them, and a Unigram, whose vocabulary is a list."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    letters = ["<", "s", ">", "a", "b", '"', "<s", "<s>", "<s>a", "</s>"]
    bytes_too = [f"<0x{n:02X}>" for n in range(256)]
    if kind == "merges":
        merges = [("<", "s"), ("<s", ">"), ("<s>", "a")]
        backend = Backend(models.BPE({w: i for i, w in enumerate([*letters, *bytes_too])}, merges, byte_fallback=True))
    else:
        backend = Backend(models.Unigram([(w, -float(i)) for i, w in enumerate([*letters, *bytes_too])], 0, True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(w, special=True) for w in ("<s>", "</s>")])
    tokenizer = Tokenizer(backend, bos_token_id=7, eos_token_id=9)
    matcher = Matcher(Form("regex", "a<s>b"), tokenizer, len(tokenizer) + padding, [9])
    written = []
    while not written or not matcher.take(written[-1]):
        written.append(int(matcher.allowed().nonzero()[0]))
        assert written[-1] not in (7, 9)
    assert tokenizer.decode(written) == "a<s>b"


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [("json_schema", "{", "not JSON"), ("json_schema", '{"type": "nothing"}', "followed"),
     ("json_schema", '{"type": "number", "maximum": NaN}', "cannot be read"),
     ("json_schema", '{"const": "\\ud800"}', "cannot be"), ("choice", '["\\ud800"]', "cannot be"),
     ("json_schema", '{"type": "object", "patternProperties": {"(": {}}}', "followed"), ("regex", "(", "followed"),
     ("regex", "a" * 70000, "70000"),
     ("grammar", "start: missing", "followed"), ("choice", "[]", "at least one"), ("choice", '"a"', "at least one")],
)  # fmt: skip
def test_forms_that_cannot_be_followed(engine: Engine, kind: str, text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        engine.generate(["x"], params(kind, text))


def test_a_form_that_grows_beyond_all_bounds_ends_its_own_text_alone(engine: Engine) -> None:
    free = SamplingParams(max_new_tokens=5, ignore_eos=True)
    going_on = dict.fromkeys(engine.stop_ids, -100.0)
    grows = params("regex", "(a{1,9999}){1,9999}", logit_bias=going_on)
    bad, fine = engine.generate(["x", "y"], [grows, free], strict=False)
    assert bad.finish_reason == "error"
    assert "too many" in (bad.error or "")
    assert fine.ids == engine.generate(["y"], free)[0].ids


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    assert run(["generate", str(folder), "Well?", "--json-schema", str(schema), "--json"]) == 0
    assert json.loads(json.loads(capsys.readouterr().out)["text"]) in ("yes", "no")
    assert run(["generate", str(folder), "Well?", "--regex", "a", "--json-schema", str(schema)]) == 2
    assert run(["generate", str(folder), "Well?", "--regex", "["]) == 2
    assert run(["generate", str(folder), "Well?", "--json-schema", str(tmp_path / "none.json")]) == 2
