"""A whole small life by the command line: what each verb makes for the next, in one folder, in some seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from camelid import cli

from .conftest import TEXT

RUN = """
[train]
sequence_length = 64
global_batch_tokens = 128
warmup_steps = 1
threads = 1
dtype = "float32"
steps = 3
[checkpoint]
every = 1
"""
SHAPE = "[model]\nhidden_size = 32\nintermediate_size = 32\nnum_hidden_layers = 1\nnum_attention_heads = 2\n"
METHOD = '[finetune]\nmethod = "lora"\nrank = 2\n'
VERBS = {
    "corpus": "corpus build {inputs}/text --out {out} workers=1 min_characters=1 filters=[] deduplicate_lines=true",
    "tokenizer": "tokenizer train {inputs}/corpus --out {out} --vocab-size 400 --threads 1",
    "tokens": "tokens build {inputs}/corpus --tokenizer {inputs}/tokenizer --out {out}",
    "pretrain": "pretrain {inputs}/pretrain.toml data.tokens={inputs}/tokens log.out={out}",
    "finetune": "finetune {inputs}/finetune.toml model.from={inputs}/model data.files=[\"{inputs}/chats.jsonl\"] "
                "log.out={out}",
    "merge": "merge {inputs}/adapter --out {out}",
    "quantize": "quantize {inputs}/model --format int8 --out {out}",
    "convert-hf": "convert {inputs}/model --to hf --out {out}",
    "convert-meta": "convert {inputs}/model --to meta --out {out}",
    "convert-gguf": "convert {inputs}/model --to gguf --out {out}",
    "evaluate": "evaluate perplexity {inputs}/model --data {inputs}/text/0.txt --out {out}",
}  # fmt: skip


def words(name: str, out: Path, inputs: Path, more: str = "") -> list[str]:
    return [*f"{VERBS[name]} {more}".format(out=out, inputs=inputs).split(), "--json"]


def live(root: Path) -> None:
    """Text, and what the verbs up to an adapter make of it, under the verbs' names; `model` and `adapter` are the last
    checkpoints."""
    (root / "text").mkdir()
    for number, line in enumerate(TEXT[:4]):
        (root / "text" / f"{number}.txt").write_text(f"{line} {number}\n{TEXT[0]}\n" * 20, encoding="utf-8")
    (root / "pretrain.toml").write_text(RUN + SHAPE)
    (root / "finetune.toml").write_text(RUN + METHOD)
    rows = [{"prompt": f"Number {n}?", "completion": f"It is {n}."} for n in range(8)]
    (root / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert cli.run(["corpus", "build", str(root / "text/0.txt"), "--out", str(root / "other"), "filters=[]"]) == 0
    for name in ("corpus", "tokenizer", "tokens", "pretrain", "finetune"):
        assert cli.run(words(name, root / name, root)) == 0
        for run, last in (("pretrain", "model"), ("finetune", "adapter")):
            if name == run:
                shutil.copytree(root / name / "checkpoints" / "step-00000003", root / last)
