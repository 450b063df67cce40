"""A layer that is compiled is one piece: nothing in it sends the compiler back to Python."""

from __future__ import annotations

import pytest
import torch

from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import quantize_layers
from camelid.model.rope import rotation


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_one_graph(
    tiny: LlamaConfig, dtype: torch.dtype, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Llama(tiny).to(dtype)
    if rounded:
        quantize_layers(model, 8, group=16, rounds_inputs=False)
    layer = model.layers[0]
    x, turn = torch.randn(2, 8, tiny.hidden_size, dtype=dtype), rotation(tiny, torch.arange(8))
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x, turn), layer(x, turn))
    longer, further = torch.randn(2, 12, tiny.hidden_size, dtype=dtype), rotation(tiny, torch.arange(12))
    torch.testing.assert_close(whole(longer, further), layer(longer, further))  # from here on lengths are unknown to it
    monkeypatch.setattr("camelid.model.quantized.runs_triton", lambda x: pytest.fail("asked within a compiled layer"))
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend="eager")(x, turn)
