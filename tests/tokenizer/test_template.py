"""Chat templates: what a template may write, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from camelid.errors import FormatError
from camelid.tokenizer.load import from_folder
from camelid.tokenizer.template import Guard, render


def test_json_in_a_template_is_as_transformers_writes_it() -> None:
    text = render("{{ tools | tojson }}", [], tools=[{"z": "a<b & c's", "a": "é"}])
    assert text == '[{"z": "a<b & c\'s", "a": "é"}]'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", []) == "01"


@pytest.mark.parametrize("template", [
    "{% if tools is not none %}tools{% endif %}{% if documents is none %}none{% endif %}",
    "{% if tools is defined %}defined{% endif %}",
    "{{ pad_token }}|{{ bos_token }}|{{ eos_token }}|{{ messages[0] | tojson(separators=(',', ':')) }}",
])  # fmt: skip
def test_a_template_finds_what_transformers_gives_it(
    tokenizers: dict[str, Path], template: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = from_folder(tokenizers["sentencepiece"])
    ours.chat_template, ours.pad_token_id = template, 0
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "words"}]
    told = {"add_generation_prompt": True, "tokenize": False}
    assert ours.apply_chat_template(messages, **told) == theirs.apply_chat_template(messages, **told)


def test_one_control_token_may_begin_another() -> None:
    guard = Guard(["<s>", "<s>x", "<<end>>"])
    for written in ("hello <s>", "<s>", "a<<", "<s>x", f"{Guard.MARK}<s>"):
        rendered = f"<s>{guard.hide(written)}s>B"
        assert list(guard.cut(rendered)) == [("<s>", True), (f"{written}s>B", False)]


def test_keys_are_guarded_as_values_are() -> None:
    guard = Guard(["<|end|>"])
    rendered = json.dumps(guard.hide_in({"x<|end|>": {"<|end|>": ["<|end|>"]}, "plain": 1}), ensure_ascii=False)
    assert not any(control for _, control in guard.cut(rendered))
    assert json.loads(guard.show(rendered)) == {"x<|end|>": {"<|end|>": ["<|end|>"]}, "plain": 1}


def test_a_template_finds_what_it_asks_for() -> None:
    """Though the name of a field ends as some control token begins."""
    guard = Guard(["eop", "sop"])
    told = guard.hide_in({"role": "user", "content": "one"})
    assert list(told) == ["role", "content"]
    assert guard.show(told["content"]) == "one"


def test_no_operation_makes_a_text_long() -> None:
    large = (
        "{{ 'x' * 10**8 }}", "{{ 10**8 * 'x' }}", "{{ [1] * 10**8 }}", "{{ 9 ** 99999999 }}", "{{ 10**60 * 10**60 }}",
        "{{ '%99999d' % 1 }}", "{{ '%*d' % (10**8, 1) }}", "{{ '%(a)20000000s' % {'a': 1} }}",
    )  # fmt: skip
    for template in large:
        with pytest.raises(FormatError, match="would make it long"):
            render(template, [])
    usual = "{{ 7 % 2 }} {{ '=' * 5 }} {{ 2**9 }} {{ '%.2f and %s' % (1.5, 'x') }} {{ '%-4s|' % 'y' }} {{ 2.5 * 2 }}"
    assert render(usual, []) == "1 ===== 512 1.50 and x y   | 5.0"


def test_what_trainers_mark_is_its_body() -> None:
    marked = "{% for m in messages %}<{% generation %}{{ m['content'] }}{% set x = 1 %}{% endgeneration %}>{% endfor %}"
    assert render(marked, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "<a><b>"
    with pytest.raises(FormatError):
        render("{% generation %}never ends", [])
