"""Templates and stops as they are met: sound ones that look odd are not blamed."""

from __future__ import annotations

from pathlib import Path

import pytest

from camelid.artifact import new_folder, write_manifest
from camelid.formats.convert import convert
from camelid.tokenizer.load import from_folder
from camelid.verify import language
from camelid.verify.checklist import Subject, run

from .conftest import failures, fields


def test_a_template_that_never_ends_is_a_finding(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camelid.verify.checklist.TEMPLATE_SECONDS", 0.5)
    convert(sound, tmp_path / "copy")
    forever = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    (tmp_path / "copy" / "chat_template.jinja").write_text(forever)
    found = failures(tmp_path / "copy", language.CHECKS)
    assert "was stopped: it has 0.5 s" in found["template"]


def test_a_template_in_which_only_a_person_begins(sound: Path, tmp_path: Path) -> None:
    """As Llama 2's: without a prompt to answer after, and with a word of its own for what does not alternate."""
    convert(sound, tmp_path / "copy")
    (tmp_path / "copy" / "camelid.json").unlink()
    (tmp_path / "copy" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    found = {one.name: one for one in run(Subject(tmp_path / "copy"), language.CHECKS)}
    assert {one.detail for one in found.values() if one.status == "fail"} == set()
    assert found["template"].status == found["stops"].status == "pass"


def test_a_base_that_was_converted_since_is_not_blamed(sound: Path, tmp_path: Path) -> None:
    base = tmp_path / "run"
    with new_folder(base, "checkpoint") as folder:
        convert(sound, folder / "model")
        for path in (folder / "model").iterdir():
            path.rename(folder / path.name)
        (folder / "model").rmdir()
        fields("generation_config.json", eos_token_id=from_folder(folder).eos_token_id)(folder)
        (folder / "camelid.json").unlink()
        write_manifest(folder, "checkpoint", settings={"train": {}})
    convert(base, tmp_path / "copy")
    convert(tmp_path / "copy", tmp_path / "second")
    for model in (base, tmp_path / "second"):
        [stops] = [one for one in run(Subject(model), language.CHECKS) if one.name == "stops"]
        assert stops.status == "not_applicable", stops
    convert(tmp_path / "second", tmp_path / "second")  # in the place of its own source
    [stops] = [one for one in run(Subject(tmp_path / "second"), language.CHECKS) if one.name == "stops"]
    assert "stops only at" in stops.detail
    (tmp_path / "second" / "camelid.json").unlink()
    assert "stops only at" in failures(tmp_path / "second", language.CHECKS)["stops"]
