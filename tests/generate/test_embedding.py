"""A text's embedding is made between the steps of others."""

from __future__ import annotations

import torch

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
