"""Chat templates (Jinja2) in an immutable sandbox: a template comes with a download, so it is not trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from camelid.errors import FormatError

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}."""

MAX_RENDERED_CHARACTERS = 8 * 2**20

# The layout of Llama 3 (llama-models, models/llama3/chat_format.py), for byte-level tokenizers trained here.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The layout of Llama 2 chat (llama/generation.py), for SentencePiece tokenizers trained here.
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{% if not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "<<SYS>>\n{{ messages[0]['content'] }}\n<</SYS>>\n\n{% endif %}{{ message['content'] }} [/INST]{% endif %}"
    "{% endfor %}"
)
# The layout of Alpaca (tatsu-lab/stanford_alpaca, train.py): for tokenizers without tokens of a chat.
ALPACA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
# ChatML (OpenAI's layout of 2023), for tokenizers that have its two control tokens.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = {"llama2": LLAMA2, "llama3": LLAMA3, "alpaca": ALPACA, "chatml": CHATML}
NEEDED = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def render(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The conversation as text. Raises FormatError when the template is broken, refuses, or forbidden things."""
    from jinja2 import TemplateError

    pieces: list[str] = []
    size = 0
    try:
        for piece in _compiled(template).generate(messages=list(messages), **variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED_CHARACTERS:
                raise TemplateError("its output grows past 8 MiB")
    except Exception as error:  # a template is a program: it may end in any, as `{{ 1e999 }}` in a NameError
        raise FormatError(f"the chat template cannot be applied: {str(error) or type(error).__name__}") from None
    return "".join(pieces)


@lru_cache(maxsize=8)  # a data set is rendered by one template, thousands of times
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    class Environment(ImmutableSandboxedEnvironment):
        """Also against one `*`, `**` or `%` that makes a text long or a number large. What is left (`ljust`, a loop
        that doubles a text) only a process of its own can limit: see template_child.py."""

        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if not _is_cheap(operator, left, right):
                raise TemplateError(f"{operator!r} would make it long")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}` around what the model says, by which trainers find it: its body, as in transformers."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own type

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    extensions: list[Any] = ["jinja2.ext.loopcontrols", Generation]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = _json
    return environment.from_string(template)


def _is_cheap(operator: str, left: Any, right: Any) -> bool:
    """Whether a product, or a text filled in, cannot become longer than what may be rendered."""
    if operator == "%":
        return not (isinstance(left, str) and re.search(r"%(\([^)]*\))?[^a-zA-Z%]*(\d{4}|\*)", left))
    if operator == "**":
        return isinstance(left, float) or isinstance(right, float) or (abs(left) < 2**64 and right <= 64)
    sizes = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
    times = [abs(x) for x in (left, right) if isinstance(x, int)]
    if sizes:
        return max(sizes, default=0) * max(times, default=1) <= MAX_RENDERED_CHARACTERS
    return all(x < 2**64 for x in times)


def _json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers writes it, which models were trained on: Jinja's own sorts keys and escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


ASKED_FOR = frozenset((
    "role", "content", "type", "text", "name", "id", "tool_calls", "tool_call_id", "function", "arguments",
    "parameters", "description", "properties", "required", "reasoning_content", "thinking",
))  # fmt: skip


class Guard:
    """Keeps what people write from becoming a control token, without changing a letter of it.

    `hide` puts a private character before every place in a message where a control token begins, in any case, or may
    begin at its end and go on in the next part; the template then cannot render one that counts. `cut` tells a
    rendered text's own control tokens from the text between them, where `show` takes the private characters out
    again. A message that already holds the private character keeps it (it is doubled).
    """

    MARK = "\U000f8ffe"

    def __init__(self, control_tokens: Iterable[str]) -> None:
        names = sorted((t for t in control_tokens if t), key=len, reverse=True)
        either = "|".join(map(re.escape, names)) or r"(?!)"
        self._begins = re.compile(f"(?=(?:{either}))", re.I)
        self._found = re.compile(f"{self.MARK}.|({either})", re.S)
        self._hidden = re.compile(f"{self.MARK}(.)", re.S)
        self._halves = {name[:size].lower() for name in names for size in range(1, len(name))}
        self._longest = max(map(len, self._halves), default=0)

    def hide(self, text: str) -> str:
        text = text.replace(self.MARK, self.MARK * 2)
        places = {found.start() for found in self._begins.finditer(text)}
        sizes = range(1, min(self._longest, len(text)) + 1)
        places |= {len(text) - size for size in sizes if text[-size:].lower() in self._halves}
        cuts = [0, *sorted(places), len(text)]
        return self.MARK.join(text[a:b] for a, b in pairwise(cuts))

    def hide_in(self, value: Any) -> Any:
        """`hide` in every text inside lists and mappings, their keys too but for those that templates ask for."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {k if k in ASKED_FOR else self.hide_in(k): self.hide_in(inner) for k, inner in value.items()}
        return [self.hide_in(inner) for inner in value] if isinstance(value, Sequence) else value

    def show(self, text: str) -> str:
        return self._hidden.sub(r"\1", text)

    def cut(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """(text, is it a control token) in order; nothing empty."""
        at = 0
        for found in self._found.finditer(rendered):
            if found[1] is None:  # a hidden character
                continue
            if found.start() > at:
                yield self.show(rendered[at : found.start()]), False
            yield found[1], True
            at = found.end()
        if at < len(rendered):
            yield self.show(rendered[at:]), False
