"""The kernels for a GPU, run by Triton's interpreter on a CPU: what a text reads in chunks and writes is what the torch
reference makes of it. By hand, where Triton is: pip install triton (its interpreter wants numpy below 2.4)."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton"),
]


def test_chunks_and_single_tokens() -> None:
    """In a process of its own, for Triton reads the variable when it is first imported."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr


def check(bits: int | None, integers: bool) -> None:
    """Chunks of several lengths end to end, twice, and then one token in each text."""
    import torch

    from camelid.generate import graphs, runner
    from camelid.generate.runner import Chunk, TorchRunner
    from camelid.kernels import elementwise
    from camelid.model import quantized, rope
    from camelid.model.config import LlamaConfig
    from camelid.model.llama import Llama
    from camelid.model.rope import Rotation, rotation

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = Llama(config).eval()
    if bits is not None:
        quantized.quantize_layers(model, bits)
        quantized.quantize_head(model)
        quantized.keep_inputs(model)
    ids = torch.randint(0, 300, (200,)).tolist()
    rounds = [
        [Chunk(ids[:70], 0, [3, 1, 4], 1), Chunk(ids[:33], 0, [0, 2], 33), Chunk(ids[5:6], 0, [5], 0)],
        [Chunk(ids[70:90], 70, [3, 1, 4], 3), Chunk(ids[33:35], 33, [0, 2], 2), Chunk(ids[6:50], 1, [5, 6], 1)],
    ]
    last = [Chunk([7], 90, [3, 1, 4], 1), Chunk([8], 35, [0, 2], 1), Chunk([9], 45, [5, 6], 1)]
    rooms = graphs, runner, elementwise, quantized, rope
    for room in rooms:
        room.runs_triton = lambda x: False
    reference = TorchRunner(model, integers)
    wanted = [logits for chunks in [*rounds, last] for logits in reference.run(chunks)]

    flat = TorchRunner(model, integers)
    flat._cache.reserve(9, model.embed_tokens.weight)
    for room in rooms:
        room.runs_triton = lambda x: True
    flat._graphs = object()  # as where single tokens are recorded
    with torch.inference_mode():
        found = [logits for chunks in rounds for logits in flat.run(chunks)]
        starts = torch.tensor([c.position for c in last])
        tables = torch.tensor([[*c.pages, 8][:3] for c in last])
        turn = rotation(config, starts)
        texts = graphs._OneToken(flat._cache, starts, tables)
        turned = Rotation(turn.cos[:, None], turn.sin[:, None])
        states = model.hidden(torch.tensor([c.ids for c in last]), turn=turned, cache=texts)
        found += list(model.lm_head(states))
    # A byte of the cache may be rounded the other way.
    bound = 1e-3 if integers else 1e-5
    for one, other in zip(wanted, found, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=bound), float((one - other).abs().max())


if __name__ == "__main__":
    for bits in (None, 8, 4):
        for integers in (False, True):
            check(bits, integers)
