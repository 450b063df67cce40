"""CTranslate2's side of the generation race, int8: its own converter makes the model."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main() -> None:
    import ctranslate2
    from infer_protocol import race, threads

    folder = Path(sys.argv[2])
    made = folder / "ctranslate2"
    if not made.exists():
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder / "model"), low_cpu_mem_usage=True).convert(
            str(folder / "ct2.part"), quantization="int8"
        )
        os.replace(folder / "ct2.part", made)
    started = time.perf_counter()
    generator = ctranslate2.Generator(
        str(made), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads()
    )
    loaded = time.perf_counter() - started
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(folder / "model" / "tokenizer.json")).id_to_token
    vocab = Tokenizer.from_file(str(folder / "model" / "tokenizer.json")).get_vocab_size()

    def generate(prompts: list[list[int]], new: int) -> None:
        rows = [[words(i) for i in prompt] for prompt in prompts]
        found = generator.generate_batch(
            rows, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False, end_token=[],
            max_batch_size=len(rows),
        )  # fmt: skip
        assert all(len(result.sequences_ids[0]) == new for result in found)

    race(generate, vocab, ctranslate2.__version__, loaded)


main()
