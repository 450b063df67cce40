"""The adaptor to lm-eval: what it computes is tested here without lm-eval, and with it on a task file where it is
installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from camelid.errors import CamelidError, InputError, MissingExtra
from camelid.evaluate.harness import _plain, _shots, encode_pair, generate_until, harness, loglikelihood, rolling
from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams
from camelid.model.llama import Llama
from camelid.tokenizer.sentencepiece_model import set_ends
from camelid.tokenizer.tokenizer import Tokenizer


def alone(model: Llama, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
    """One forward pass of the end of both that fits, as lm-eval's own models score a pair."""
    whole = [*prompt, *answer][-model.config.max_position_embeddings - 1 :]
    with torch.inference_mode():
        scores = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)[-len(answer) :]
    return (
        sum(float(row[token]) for row, token in zip(scores, answer, strict=True)),
        scores.argmax(-1).tolist() == answer,
    )


def test_pairs_are_scored_one_by_one(scorer: Llama, tokenizer: Tokenizer) -> None:
    """Shared contexts, a repeated pair, a context too long for the model, an empty one, spaces at a context's end."""
    long = "a context that goes on and on, and then on, until no model of this size can read it. " * 12
    contexts = [
        "The meaning of life is",
        "The meaning of life is",
        "骆驼在",
        long,
        "",
        "to learn ",
        "The meaning of life is",
    ]
    answers = [" to learn", " a number", "沙漠里走", " end", "to", "and", " to learn"]
    pairs = list(zip(contexts, answers, strict=True))
    found = loglikelihood(scorer, tokenizer, pairs)
    for pair, (total, greedy) in zip(pairs, found, strict=True):
        expected = alone(scorer, *encode_pair(tokenizer, *pair))
        assert total == pytest.approx(expected[0], rel=1e-4)
        assert greedy == expected[1]
    flagged = 0
    for context in ("The", "a", "to", "is", "and", "life", "number", "end", "learn", "of"):
        likeliest = int(scorer(torch.tensor([tokenizer.encode(context)])).logits[0, -1].argmax())
        word = tokenizer.decode([likeliest])
        if tokenizer.encode(context + word) == [*tokenizer.encode(context), likeliest]:
            assert loglikelihood(scorer, tokenizer, [(context, word)])[0][1]
            flagged += 1
    assert flagged


def test_what_cannot_be_scored(scorer: Llama, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="no token of the continuation"):
        loglikelihood(scorer, tokenizer, [("The", "")])
    with pytest.raises(InputError, match=r"an answer of \d+ tokens is to be scored, and the model's context is"):
        loglikelihood(scorer, tokenizer, [("The", " meaning" * scorer.config.max_position_embeddings)])
    with torch.no_grad():
        scorer.norm.weight[0] = torch.nan
    with pytest.raises(CamelidError, match="no probability"):
        loglikelihood(scorer, tokenizer, [("The", " meaning")])


def test_how_a_pair_is_cut(tokenizer: Tokenizer) -> None:
    prompt, answer = encode_pair(tokenizer, "to learn ", "and")
    assert (prompt, answer) == encode_pair(tokenizer, "to learn", " and")
    assert prompt == tokenizer.encode("to learn")
    assert [*prompt, *answer] == tokenizer.encode("to learn and")
    # As folders of training scripts have it: no text that goes on has its end behind it.
    plain = tokenizer.encode("to learn")
    assert tokenizer.bos_token_id is not None
    assert tokenizer.eos_token_id is not None
    ends = [(tokenizer.token(i), i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    set_ends(tokenizer.backend, ends[0], ends[1])
    ended = Tokenizer(tokenizer.backend, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    assert ended.encode("to learn") == [*plain, tokenizer.eos_token_id]
    assert ended.encode_prompt("to learn") == plain
    assert encode_pair(ended, "to learn", " and") == (prompt, answer)
    empty, whole = encode_pair(tokenizer, "", "to learn")
    assert empty == [tokenizer.bos_token_id]
    assert whole == tokenizer.encode("to learn", add_special_tokens=False)


def test_whole_texts(scorer: Llama, tokenizer: Tokenizer) -> None:
    text = "The meaning of life is to learn"
    bos = tokenizer.bos_token_id
    assert bos is not None
    expected = alone(scorer, [bos], tokenizer.encode(text, add_special_tokens=False))[0]
    assert rolling(scorer, tokenizer, [text, ""]) == pytest.approx([expected, 0.0], rel=1e-5)


def lm_evals_windows(tokens: list[int], prefix: int, most: int) -> list[tuple[list[int], list[int]]]:
    """lm_eval/utils.py: make_disjoint_window of get_rolling_token_windows with context_len=1: context, scored."""
    first = tokens[:most]
    found, predicted = [([prefix, *first[:-1]][:1], first)], len(first)
    while predicted < len(tokens):
        count = min(len(tokens) - predicted, most)
        end = predicted + count
        found.append((tokens[end - most - 1 : end - count], tokens[end - count : end]))
        predicted = end
    return found


def test_whole_texts_in_several_windows(scorer: Llama, tokenizer: Tokenizer) -> None:
    """The last window is lm-eval's: it begins before what the one before it scored."""
    text = "a text that goes on and on, " * 60
    tokens, bos, most = tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id, 256
    assert bos is not None
    assert len(tokens) > 2 * most
    assert len(tokens) % most > 20
    cut = lm_evals_windows(tokens, bos, most)
    assert [t for _, scored in cut for t in scored] == tokens
    expected = sum(alone(scorer, context, scored)[0] for context, scored in cut)
    assert rolling(scorer, tokenizer, [text]) == pytest.approx([expected], rel=1e-5)


def test_text_up_to_a_stop(scorer: Llama, tokenizer: Tokenizer) -> None:
    [whole] = generate_until(scorer, tokenizer, [("The meaning", {"max_gen_toks": 12})])
    assert len(whole) > 4
    stop = whole[3]
    [cut] = generate_until(scorer, tokenizer, [("The meaning", {"max_gen_toks": 12, "until": [stop]})])
    assert cut == whole[: whole.index(stop)]
    long = "a context that goes on and on, and then on. " * 40
    [late] = generate_until(scorer, tokenizer, [(long, {"max_gen_toks": 12})])
    end = tokenizer.encode(long)[-244:]
    [alone_] = Engine(scorer, tokenizer).generate([end], SamplingParams(max_new_tokens=12))
    assert late == alone_.text
    with pytest.raises(InputError, match="256 new tokens, and the model's context is 256"):
        generate_until(scorer, tokenizer, [("The meaning", {"max_gen_toks": 256})])


def test_a_question_asked_again_is_answered_anew(scorer: Llama, tokenizer: Tokenizer) -> None:
    """As tasks ask that vote over many samples."""
    how = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    drawn = generate_until(scorer, tokenizer, [("The meaning", how)] * 4)
    assert len(set(drawn)) == 4
    assert generate_until(scorer, tokenizer, [("The meaning", how)] * 4) == drawn
    [greedy] = generate_until(scorer, tokenizer, [("The meaning", {"max_gen_toks": 12})])
    assert generate_until(scorer, tokenizer, [("The meaning", {**how, "top_k": 1})] * 2) == [greedy] * 2
    assert generate_until(scorer, tokenizer, [("The meaning", {"max_gen_toks": 12, "top_k": -1})]) == [greedy]


def test_without_lm_eval_the_extra_is_named(scorer: Llama, tokenizer: Tokenizer) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match="harness"):
            harness(scorer, tokenizer, ["arc_easy"])
    else:
        with pytest.raises(InputError, match="has no task 'no_such_task'"):
            harness(scorer, tokenizer, ["no_such_task"])


def test_a_task_file_of_lm_eval(scorer: Llama, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    rows: list[dict[str, Any]] = [
        {"q": f"{n} and one?", "a": ["to learn", "a number"], "gold": n % 2} for n in range(6)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{train: {tmp_path / 'd.jsonl'}}}}}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
        "doc_to_choice: '{{a}}'\nmetric_list: [{metric: acc}]\n"
    )
    found = harness(scorer, tokenizer, ["mine"], str(tmp_path))
    pairs = [(r["q"], f" {a}") for r in rows for a in r["a"]]
    sums = [total for total, _ in loglikelihood(scorer, tokenizer, pairs)]
    right = [(sums[2 * n + 1] > sums[2 * n]) == (n % 2) for n in range(6)]
    assert found["results"]["mine"]["acc,none"] == pytest.approx(sum(right) / 6)
    assert ", 0 examples in the prompt, " in found["protocol"]


def test_what_metrics_leave_in_samples_is_plain() -> None:
    left = {"mcc": (1, np.int64(0)), "brier": np.array([0.25, 0.75]), "other": {1}}
    assert json.loads(json.dumps(left, default=_plain)) == {"mcc": [1, 0], "brier": [0.25, 0.75], "other": "{1}"}
    assert _shots({"n-shot": {"a": 5, "b": 5}}) == "5"
    assert _shots({"n-shot": {"a": 5, "b": 0}}) == "5 (a), 0 (b)"
