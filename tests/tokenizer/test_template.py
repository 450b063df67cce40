"""Chat templates: what a template may write, and how."""

from __future__ import annotations

from camelid.tokenizer.template import render


def test_json_in_a_template_is_as_transformers_writes_it() -> None:
    text = render("{{ tools | tojson }}", [], tools=[{"z": "a<b & c's", "a": "é"}])
    assert text == '[{"z": "a<b & c\'s", "a": "é"}]'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", []) == "01"
