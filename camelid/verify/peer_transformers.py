"""Run as a script in a Python that has transformers: a folder's logits, float32 [seq, vocab], into a file."""

from __future__ import annotations

import json
import sys


def main() -> None:
    asked = json.load(sys.stdin)
    try:
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        sys.exit(3)
    model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=torch.float32, local_files_only=True)
    model.train(False)
    with torch.inference_mode():
        np.save(asked["out"], model(torch.tensor(asked["ids"])).logits[0].numpy())


if __name__ == "__main__":
    main()
