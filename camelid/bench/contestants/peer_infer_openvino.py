"""OpenVINO's side of the generation race: optimum-intel writes the model, weights in 8 bits or in 4 (groups of 128,
symmetric), and the runtime runs it itself, with scores of each row's last token only, as its own pipeline for text has
them made. BENCH_FORM is 8 or 4."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any


def exported(folder: Path, bits: int) -> Path:
    """The model's folder, made when it is first asked for."""
    made = folder / f"openvino-{bits}"
    if not made.exists():
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        small = OVWeightQuantizationConfig(
            bits=bits, sym=True, **({"group_size": 128, "ratio": 1.0} if bits == 4 else {})
        )
        model: Any = OVModelForCausalLM.from_pretrained(
            folder / "model", export=True, quantization_config=small, compile=False
        )
        model.save_pretrained(folder / f"openvino-{bits}.part")
        os.replace(folder / f"openvino-{bits}.part", made)
    return made


def last_scores_only(model: Any) -> Any:
    """The same model, whose last product sees nothing but each row's last token."""
    from openvino import opset13

    (product,) = (node for node in model.get_ops() if node.get_type_name() == "MatMul" and _makes_logits(node, model))
    last = opset13.slice(product.input_value(0), *([value] for value in (-1, 2**31 - 1, 1, 1)))
    product.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return model


def _makes_logits(product: Any, model: Any) -> bool:
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return bool(node.get_friendly_name() == product.get_friendly_name())


def main() -> None:
    made = exported(Path(sys.argv[2]), int(os.environ["BENCH_FORM"]))
    import json

    import numpy as np
    import openvino
    from infer_protocol import race, threads

    started = time.perf_counter()
    options = {"INFERENCE_NUM_THREADS": threads(), "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    model = last_scores_only(core.read_model(made / "openvino_model.xml"))
    request: Any = core.compile_model(model, "CPU", options).create_infer_request()
    loaded = time.perf_counter() - started
    names = {name for port in request.model_inputs for name in port.names}

    def step(ids: Any, before: int) -> Any:
        rows, new = ids.shape
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, before + new), dtype=np.int64),
            "position_ids": np.tile(np.arange(before, before + new), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        request.infer({name: value for name, value in given.items() if name in names})
        return request.get_tensor("logits").data[:, -1].argmax(-1)

    def generate(prompts: list[list[int]], new: int) -> None:
        request.reset_state()
        tokens = step(np.array(prompts), 0)
        for at in range(new - 1):
            tokens = step(tokens[:, None], len(prompts[0]) + at)

    vocab = json.loads((Path(sys.argv[2]) / "model" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    race(generate, vocab, openvino.__version__.split("-")[0], loaded)


main()
