"""Chat templates (Jinja2) in an immutable sandbox: a template comes with a download, so it is not trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from camelid.errors import FormatError

Message = Mapping[str, str]
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
    "{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)


def render(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The conversation as text. Raises FormatError when the template is broken, refuses, or forbidden things."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    pieces: list[str] = []
    size = 0
    try:
        for piece in environment.from_string(template).generate(messages=list(messages), **variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED_CHARACTERS:
                raise TemplateError("its output grows past 8 MiB")
    except (TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise FormatError(f"the chat template cannot be applied: {error}") from None
    return "".join(pieces)


def defuse(text: str, control_tokens: Iterable[str]) -> str:
    """Break control tokens written inside a message ("<|im_end|>" -> "< |im_end|>")."""
    for token in control_tokens:
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
