"""tokenizer.json, its settings, and chat templates."""

from __future__ import annotations

from functools import partial

from .changes import (
    GONE,
    Cases,
    edited,
    not_json,
    written,
)


def tokenizer_cases() -> Cases:
    name = "tokenizer.json"
    yield from not_json(name)
    yield from not_json("tokenizer_config.json")
    for value in (GONE, None, {}, {"type": "X"}, [], 7):
        yield f"{name}: model {value!r:.20}", partial(edited, name, ("model",), value)
    for value in (GONE, None, [], {}, {"a": -1}, {"a": "x"}, {"a": 2**40}, {"a": 0, "b": 0}, {"a": 5}):
        yield f"{name}: vocab {value!r:.20}", partial(edited, name, ("model", "vocab"), value)
    for value in ("x", [["a"]], [["a", "b", "c"]], [[1, 2]], [["nosuch", "pair"]], ["nosuch pair"], 7):
        yield f"{name}: merges {value!r:.20}", partial(edited, name, ("model", "merges"), value)
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for value in (7, [], {"type": "X"}, {"type": 7}, "x"):
            yield f"{name}: {key} {value!r}", partial(edited, name, (key,), value)
    split = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    yield "a pattern that is none", partial(edited, name, ("pre_tokenizer",), split)
    for value in (7, [7], [{"id": -1}], [{"id": 99999, "content": "x", "special": True}], [{"content": "x"}]):
        yield f"{name}: added_tokens {value!r:.30}", partial(edited, name, ("added_tokens",), value)
    for text in (
        "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.system('touch owned') }}", "{{ 1 / 0 }}",
        "{% for", "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ lipsum.__globals__.os }}",
        "{{ messages.append(1) }}", "{{ messages[0].update({}) }}", "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'x' * 10**8 }}{{ 'x' * 10**8 }}", "{{ raise_exception('no') }}", "{% extends 'a' %}", "{{ self.x() }}",
        "{{ [].pop() }}", "{{ (messages | attr('__class__')).x }}", "{{ ('%s' * 9) % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ undefined.name.more }}", "{{ nothing() }}",
    ):  # fmt: skip
        yield f"a template {text[:40]}", partial(written, "chat_template.jinja", text.encode())
    yield "a template that is not UTF-8", partial(written, "chat_template.jinja", b"\xff\xfe")
