"""Sampling, stopping, batches, streaming, and stories260K's golden text."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from camelid.errors import InputError
from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams, probabilities, sample
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt, use_adapter
from camelid.model.rope import interleaved_to_half_split
from camelid.tokenizer.tokenizer import Tokenizer


def test_a_batch_is_its_members_alone(model: Llama) -> None:
    engine = Engine(model)
    prompts = [[1, 2, 3], [7] * 20, [9], list(range(50, 60))]
    for params in (SamplingParams(max_new_tokens=15), SamplingParams(max_new_tokens=15, temperature=1.0, seed=3)):
        together = engine.generate(prompts, params)
        for prompt, result in zip(prompts, together, strict=True):
            assert engine.generate([prompt], params)[0].ids == result.ids


def test_greedy_is_the_argmax_of_the_whole_text(model: Llama) -> None:
    [result] = Engine(model, stop_ids=()).generate([[5, 6]], SamplingParams(max_new_tokens=10))
    text = [5, 6]
    for token in result.ids:
        with torch.inference_mode():
            assert int(model(torch.tensor([text])).logits[0, -1].argmax()) == token
        text.append(token)


def test_a_repetition_penalty_looks_at_the_prompt_too(model: Llama) -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    penalty = RepetitionPenaltyLogitsProcessor(penalty=1.5)
    prompt = [*range(0, 300, 2)]  # half of all tokens: without the penalty some of them would be the likeliest
    params = SamplingParams(max_new_tokens=20, repetition_penalty=1.5)
    [result] = Engine(model, stop_ids=()).generate([prompt], params)
    text = torch.tensor([prompt])
    for token in result.ids:
        with torch.inference_mode():
            assert int(penalty(text, model(text).logits[:, -1]).argmax()) == token
        text = torch.cat((text, torch.tensor([[token]])), dim=1)
    assert not set(result.ids) <= set(prompt)


@pytest.mark.parametrize("lookup", [0, 4])
def test_logprobs_are_the_models_before_anything_is_done_to_them(model: Llama, lookup: int) -> None:
    params = SamplingParams(
        max_new_tokens=24, temperature=0.6, seed=1, top_k=20, repetition_penalty=1.3, frequency_penalty=0.4,
        logit_bias={9: 3.0}, logprobs=2, lookup=lookup,
    )  # fmt: skip
    prompt = [5, 6, 7, 9, 5, 6, 7, 9, 5, 6]
    [result] = Engine(model, stop_ids=()).generate([prompt], params)
    with torch.inference_mode():
        logs = model(torch.tensor([prompt + result.ids])).logits[0].float().log_softmax(-1)
    assert result.logprobs is not None
    assert [one.token for one in result.logprobs] == result.ids
    for one, row in zip(result.logprobs, logs[len(prompt) - 1 :], strict=False):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-5)
        assert [token for token, _ in one.top] == row.topk(2).indices.tolist()


def test_eos_ends_and_can_be_ignored(model: Llama) -> None:
    plain = Engine(model, stop_ids=()).generate([[5, 6]], SamplingParams(max_new_tokens=12))[0].ids
    stop = plain[4]
    first = plain.index(stop)
    ended = Engine(model, stop_ids=[stop]).generate([[5, 6]], SamplingParams(max_new_tokens=12))[0]
    assert (ended.ids, ended.finish_reason) == (plain[: first + 1], "eos")
    ignored = Engine(model, stop_ids=[stop]).generate([[5, 6]], SamplingParams(max_new_tokens=12, ignore_eos=True))[0]
    assert (ignored.ids, ignored.finish_reason) == (plain, "max_new_tokens")


@pytest.fixture
def speaking(tokenizer: Tokenizer) -> Engine:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=128)  # fmt: skip
    return Engine(Llama(config).eval(), tokenizer, stop_ids=())


def test_the_stream_is_the_text(speaking: Engine) -> None:
    for seed in range(5):
        params = SamplingParams(max_new_tokens=60, temperature=1.5, seed=seed)
        [result] = speaking.generate(["骆驼 in the"], params)
        assert "".join(speaking.stream("骆驼 in the", params)) == result.text


def test_a_stream_that_another_call_ends_is_whole(speaking: Engine) -> None:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    [alone] = speaking.generate(["The meaning of"], params)
    stream, pieces = speaking.stream("The meaning of", params), []
    pieces.append(next(stream))
    speaking.generate(["x"], SamplingParams(max_new_tokens=40, ignore_eos=True))  # whose steps are also the stream's
    pieces += stream
    assert "".join(pieces) == alone.text


def test_closing_a_stream_frees_what_it_held(speaking: Engine) -> None:
    stream = speaking.stream("骆驼 in the", SamplingParams(max_new_tokens=60, temperature=1.5, seed=0))
    next(stream)
    assert speaking.scheduler.pages.taken > 0
    stream.close()
    assert speaking.scheduler.pages.taken == 0


def test_stop_strings_are_never_shown(speaking: Engine) -> None:
    params = SamplingParams(max_new_tokens=60, temperature=1.0, seed=1)
    whole = speaking.generate(["Numbers"], params)[0].text
    stop = whole[10:13]
    assert len(stop) == 3
    stopped = SamplingParams(max_new_tokens=60, temperature=1.0, seed=1, stop=(stop,))
    [result] = speaking.generate(["Numbers"], stopped)
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(stop)]
    assert "".join(speaking.stream("Numbers", stopped)) == result.text


def test_one_stop_string_is_not_its_letters(speaking: Engine) -> None:
    assert SamplingParams(stop="ab").stop == SamplingParams(stop=["ab"]).stop == ("ab",)
    for several in (speaking.generate, speaking.embed):
        with pytest.raises(InputError, match="is one string"):
            several("Numbers")


def test_a_stop_string_may_name_a_control_token(speaking: Engine) -> None:
    """No text shows it, so it is looked for among the ids."""
    assert speaking.tokenizer is not None
    number, name = next(iter(speaking.tokenizer.special_tokens.items()))
    for ignore_eos in (False, True):
        wishes = SamplingParams(max_new_tokens=9, logit_bias={number: 1000.0}, ignore_eos=ignore_eos)
        assert speaking.generate(["Numbers"], wishes)[0].finish_reason == "max_new_tokens"
        [result] = speaking.generate(["Numbers"], replace(wishes, stop=(name,)))
        assert (result.ids, result.text, result.finish_reason) == ([number], "", "eos")


def test_a_request_leaves_the_models_adapter_as_it_was(model: Llama) -> None:
    """Whoever else holds the model, and the next engine over it, compute what they did."""
    prompt, params = [[5, 6, 7]], SamplingParams(max_new_tokens=8)
    plain = Engine(model, stop_ids=()).generate(prompt, params)[0].ids
    adapt(model, LoraConfig(r=4), "other")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    use_adapter(model, None)
    engine = Engine(model, stop_ids=())
    other = engine.generate(prompt, replace(params, adapter="other"))[0].ids
    engine.embed(prompt, adapter="other")
    assert model.active_adapter is None
    assert Engine(model, stop_ids=()).generate(prompt, params)[0].ids == plain != other


def test_both_limits_and_the_context(model: Llama) -> None:
    engine = Engine(model, stop_ids=())
    assert engine.generate([[1] * 5], SamplingParams(max_length=8))[0].finish_reason == "max_length"
    assert len(engine.generate([[1] * 5], SamplingParams(max_length=8))[0].ids) == 3
    assert (
        engine.generate([[1] * 5], SamplingParams(max_length=8, max_new_tokens=2))[0].finish_reason == "max_new_tokens"
    )
    assert len(engine.generate([[1] * 250], SamplingParams(max_new_tokens=100))[0].ids) == 6
    with pytest.raises(InputError, match="256 tokens"):
        engine.generate([[1] * 256])


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def test_filters_keep_what_they_promise() -> None:
    def kept(**fields: float) -> list[int]:
        return probabilities(LOGITS, SamplingParams(temperature=1.0, **fields)).nonzero().flatten().tolist()  # type: ignore[arg-type]

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.6) == [0]  # the first alone holds 0.636
    assert kept(top_p=0.7) == [0, 1]
    assert kept(min_p=0.13) == [0, 1, 2]  # e^-2 = 0.135
    assert kept(min_p=0.14) == [0, 1]


def test_sampling_follows_the_distribution() -> None:
    params = SamplingParams(temperature=0.8)
    generator = torch.Generator().manual_seed(0)
    draws = [sample(LOGITS, params, generator) for _ in range(20_000)]
    observed = np.bincount(draws, minlength=5) / len(draws)
    assert np.abs(observed - (LOGITS / 0.8).softmax(0).numpy()).max() < 0.012


def test_a_seed_repeats(model: Llama) -> None:
    engine = Engine(model, stop_ids=())
    texts = [
        engine.generate([[1]], SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed))[0].ids
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2},
     {"max_new_tokens": 0}, {"max_length": True}, {"stop": ("",)}],
)  # fmt: skip
def test_wishes_out_of_range(fields: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        SamplingParams(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [[], [-1], [300]])
def test_prompts_out_of_range(model: Llama, prompt: list[int]) -> None:
    with pytest.raises(InputError, match="prompt"):
        Engine(model).generate([prompt])


def read_llama2c(path: Path) -> Llama:
    """llama2.c's first layout: seven int32, then float32 tensors kind by kind, all layers of a kind together."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", raw[:28])
    model = Llama(
        LlamaConfig(vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
                    num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length,
                    rms_norm_eps=1e-5, tie_word_embeddings=True)
    )  # fmt: skip
    values, at = np.frombuffer(raw, dtype="<f4", offset=28), 0
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    mlp = ["post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]
    order = ["embed_tokens", "input_layernorm", *attention, *mlp, "norm"]
    state = model.state_dict()
    for kind in order:
        names = (
            [f"{kind}.weight"] if f"{kind}.weight" in state else [f"layers.{i}.{kind}.weight" for i in range(layers)]
        )
        for name in names:
            count = state[name].numel()
            tensor = torch.from_numpy(values[at : at + count].copy()).view(state[name].shape)
            if "q_proj" in name or "k_proj" in name:
                tensor = interleaved_to_half_split(tensor, heads if "q_proj" in name else kv_heads)
            state[name].copy_(tensor)
            at += count
    return model.eval()


def test_stories260k_tells_its_golden_story(data: Path) -> None:
    folder = data / "models" / "stories260k"
    golden = json.loads((folder / "golden_greedy.json").read_text())
    model = read_llama2c(folder / "stories260K.bin").double()
    assert model.num_parameters() == 260_032
    params = SamplingParams(max_new_tokens=len(golden["greedy_ids"]))
    [result] = Engine(model, stop_ids=()).generate([golden["prompt_ids"]], params)
    assert result.ids == golden["greedy_ids"]
