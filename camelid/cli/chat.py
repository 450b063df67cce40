"""Talk to a model in the terminal.

/help shows the commands (/system /params /retry /undo /save /load /tokens …), /quit or Ctrl-D leaves, Ctrl-C stops an
answer. Without a terminal, each line of stdin is one message.
"""

from __future__ import annotations

import argparse
from typing import Any

from camelid.cli import settings
from camelid.cli.generate import open_engine, sampling, sampling_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--system", help="instructions that precede the conversation")
    sampling_arguments(parser, temperature=0.6, min_p=0.1)  # a small model's rare tokens are noise
    settings.example(parser, 'camelid chat runs/sft --system "Answer in one sentence." --seed 1')


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    params = sampling(options)
    from camelid.errors import InputError
    from camelid.serve.conversation import Conversation
    from camelid.serve.terminal import talk

    engine = open_engine(options)
    try:
        conversation = Conversation(engine, params, options.system)
    except InputError as error:
        raise InputError(f"{options.model}: {error}") from None
    talk(conversation, quiet=options.json)
    opening = [{"role": "system", "content": conversation.system}] if conversation.system else []
    return {"messages": [*opening, *conversation.messages]}
