"""One rank of a small training, for test_parallel.py: in float64, or adamw's products in bfloat16.

rank.py OUT TENSOR CONTEXT STEPS {adamw,muon,bfloat16} [CHECKPOINT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from camelid.model.config import LlamaConfig
from camelid.model.init import initialize
from camelid.model.llama import Llama
from camelid.recipe import parse
from camelid.tokens.batch import IGNORE, Batch
from camelid.tokens.loader import batches
from camelid.train import checkpoint
from camelid.train.checkpoint import LoopState
from camelid.train.optimizer import optimizer_for
from camelid.train.parallel import full, ranks, shard, spread
from camelid.train.step import train_step

ROWS, LENGTH = 8, 12


class Ragged:
    """Rows with very different numbers of supervised tokens, packed or of one document; a pure function of the
    position."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return 1000

    def batch(self, position: int, rows: int) -> Batch:
        ids = torch.stack([(torch.arange(LENGTH) * 7 + 13 * p * p) % 96 for p in range(position, position + rows)])
        labels = (ids * 5 + 1) % 96
        documents = torch.zeros_like(ids)
        for row, p in enumerate(range(position, position + rows)):
            labels[row, 1 + p % LENGTH :] = IGNORE
            documents[row, p % LENGTH :] = int(self.packed)
        return Batch(ids, labels, documents, one_document=not self.packed)


def main() -> None:
    out, kind = Path(sys.argv[1]), sys.argv[5]
    tensor, context, steps = (int(n) for n in sys.argv[2:5])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32 if kind == "bfloat16" else torch.float64)
    config = LlamaConfig(
        vocab_size=96, hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4 if kind == "muon" else 2, head_dim=6, tie_word_embeddings=kind != "muon",
    )  # fmt: skip
    train = {
        "sequence_length": LENGTH, "global_batch_tokens": ROWS * LENGTH, "micro_batch_rows": 2,
        "steps": max(steps, 1), "optimizer": "muon" if kind == "muon" else "adamw", "learning_rate": 1e-2, "clip": 0.5,
        "dtype": "bfloat16" if kind == "bfloat16" else "float32",
    }  # fmt: skip
    recipe = parse({"train": train, "parallel": {"tensor": tensor, "context": context}})
    with ranks(recipe.parallel) as who:
        with torch.device("meta"):
            model = Llama(config)
        shard(model, who)
        model.to_empty(device="cpu")
        model.tie()
        torch.manual_seed(0)
        initialize(model, model.config, put=lambda parameter, whole: parameter.copy_(spread(whole, parameter)))
        optimizer = optimizer_for(model, recipe.train)
        state = LoopState()
        if len(sys.argv) > 6:
            state = checkpoint.restore(Path(sys.argv[6]), model, optimizer)
        incoming = batches(Ragged(kind != "muon"), state.position, ROWS, rank=who.data_rank, world=who.data_world)
        losses, norms = [], []
        gradients: dict[str, torch.Tensor] = {}
        plain = optimizer.zero_grad

        def keep_first() -> None:
            if not gradients:
                gradients.update({n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None})
            plain()

        optimizer.zero_grad = keep_first  # type: ignore[method-assign]
        for _ in range(steps):
            state.position, batch = next(incoming)
            taken = train_step(model, optimizer, batch, recipe.train, 1e-2, who)
            losses.append(taken.loss)
            norms.append(taken.norm)
        kept = checkpoint.snapshot(model, optimizer, state, keep=who.rank == 0, copy=False)
        if who.rank == 0:
            out.mkdir(parents=True)
            save_file({k: v.contiguous() for k, v in gradients.items()}, out / "gradients.safetensors")
            save_file({k: v.contiguous() for k, v in kept.weights.items()}, out / "weights.safetensors")
            save_file({k: v.contiguous() for k, v in kept.moments.items()}, out / "moments.safetensors")
            (out / "losses.json").write_text(json.dumps({"losses": losses, "norms": norms}))
            checkpoint.write(out / "step-00000001", kept, Silent(), [], {}, {})  # type: ignore[arg-type]


class Silent:
    """A tokenizer that has nothing to save."""

    def save(self, folder: Path) -> None:
        pass


main()
