"""A text's embedding is made between the steps of others."""

from __future__ import annotations

import pytest
import torch

from camelid.errors import InputError
from camelid.generate.engine import Engine
from camelid.generate.native import NativeRunner
from camelid.generate.runner import TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.model.llama import Llama

from .test_scheduler import CONFIG, engine, prompts


class Narrow(TorchRunner):
    at_once = 8


def test_a_long_text_to_embed_lets_others_step_between() -> None:
    torch.manual_seed(0)
    both, params = engine(Narrow(Llama(CONFIG).eval())), SamplingParams(max_new_tokens=20, ignore_eos=True)
    long, short = prompts(1, seed=4)[0] * 2, prompts(1, seed=5)[0][:5]
    alone, wanted = both.embed([long]), both.generate([short], params)[0].ids
    written = both.prepare(short, params)
    both.scheduler.add(written)
    rounds, count, found = both.embedding(long), 0, None
    while found is None:
        try:
            next(rounds)
            both.scheduler.step()
            count += 1
        except StopIteration as end:
            found = end.value
    assert torch.equal(found, alone[0])
    assert count == -(-len(long) // 8) > 3
    assert written.ids == wanted[: len(written.ids)] != []
    both.scheduler.cancel(written)
    left = both.embedding(long)
    next(left)
    assert both.scheduler.pages.taken > 0
    left.close()  # whoever asked has left
    assert both.scheduler.pages.taken == 0


def test_what_cannot_be_embedded_is_refused() -> None:
    """By every runner: a text beyond the context has positions that the model never saw."""
    model = Llama(CONFIG).eval()
    for runner in (TorchRunner(model), NativeRunner(model, threads=1)):
        one = Engine(runner, cache_tokens=4 * CONFIG.max_position_embeddings)
        most = CONFIG.max_position_embeddings
        assert one.embed([[1] * most]).shape == (1, CONFIG.hidden_size)
        with pytest.raises(InputError, match=f"{most + 1} tokens"):
            one.embed([[1] * (most + 1)])
        with pytest.raises(InputError, match="no adapter named 'typo'"):
            one.embed([[1]], adapter="typo")
