"""Run requests on a model: prefill each prompt by itself, then decode all unfinished texts together."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from camelid.errors import InputError
from camelid.generate.cache import KVCache
from camelid.generate.sampling import SamplingParams, generator_for, sample
from camelid.model.llama import Llama
from camelid.model.lora import use_adapter
from camelid.tokenizer.stream import StreamDecoder
from camelid.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]
FinishReason = Literal["eos", "stop", "max_new_tokens", "max_length"]


@dataclass(frozen=True)
class Result:
    """One finished text. `ids` are the new tokens (the end token included), `text` their text without it.

    `finish_reason`: "eos", "stop" (a stop string), "max_new_tokens" or "max_length".
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass
class _Sequence:
    row: int
    prompt: list[int]
    params: SamplingParams
    budget: int
    limit: str
    generator: torch.Generator | None
    decoder: StreamDecoder | None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None


class Engine:
    """A model and its tokenizer, ready to generate. Without a tokenizer, prompts must be ids and text stays empty."""

    def __init__(self, model: Llama, tokenizer: Tokenizer | None = None, stop_ids: Sequence[int] | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.adapter = model.active_adapter  # of requests that name none
        self.adapter_stop_ids: dict[str, set[int]] = {}
        self.stop_ids = set(model.config.stop_ids if stop_ids is None else stop_ids)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        quantization: None = None,
        threads: int | None = None,
        dtype: torch.dtype | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> Engine:
        """Open MODEL with its tokenizer, and more adapters of it by name, for `SamplingParams.adapter`. `threads` sets
        torch's thread count for the process."""
        from camelid.formats.load import load, load_adapters, load_tokenizer, stop_ids

        if quantization is not None:
            raise InputError(f"quantization={quantization!r} is not available in this version; use None")
        if threads is not None:
            torch.set_num_threads(threads)
        tokenizer = load_tokenizer(path)
        model: Llama = load_adapters(path, adapters, dtype) if adapters else load(path, dtype=dtype)
        if len(tokenizer) > model.config.vocab_size:
            raise InputError(
                f"{path}: the tokenizer has {len(tokenizer)} tokens but the embedding only "
                f"{model.config.vocab_size} rows (vocab_size in config.json): they do not belong together"
            )
        engine = cls(model, tokenizer, stop_ids(path))
        # An adapter may have learned to end its answers by a token of its own.
        engine.adapter_stop_ids = {name: set(stop_ids(folder)) for name, folder in (adapters or {}).items()}
        return engine

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        batch_size: int = 64,
    ) -> list[Result]:
        """Complete every prompt, `batch_size` at a time, by the same params or each by its own. Order is kept."""
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but {len(each)} params: give one for all, or one for each")
        results: list[Result] = []
        for start in range(0, len(prompts), batch_size):
            sequences = self._start(prompts[start : start + batch_size], each[start : start + batch_size])
            for _ in self._run(sequences):
                pass
            results += [self._result(s) for s in sequences]
        return results

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[str, None, Result]:
        """Yield the text of one completion as it appears; the generator's return value is the Result.

        Characters are held back while they may still be part of a stop string or of an unfinished character.
        """
        [sequence] = sequences = self._start([prompt], [params or SamplingParams()])
        shown = 0
        for _ in self._run(sequences):
            end = len(sequence.text) if sequence.finish else _safe_end(sequence.text, sequence.params.stop)
            if end > shown:
                yield sequence.text[shown:end]
                shown = end
        return self._result(sequence)

    @property
    def context_length(self) -> int:
        """Most tokens of a text: max_position_embeddings, times the factor of dynamic scaling."""
        config = self.model.config
        stretch = config.rope_scaling.factor if config.rope_scaling.rope_type == "dynamic" else 1.0
        return int(config.max_position_embeddings * stretch)

    def _start(self, prompts: Sequence[Prompt], each: Sequence[SamplingParams]) -> list[_Sequence]:
        sequences = []
        for row, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            if params.adapter is not None and params.adapter not in self.model.adapters:
                known = ", ".join(self.model.adapters) or "none"
                raise InputError(f"the model has no adapter named {params.adapter!r} (it has {known})")
            ids = self._ids(prompt)
            budget, limit = params.budget(len(ids))
            if budget < 1:
                raise InputError(f"max_length {params.max_length} leaves no room after a prompt of {len(ids)} tokens")
            room = self.context_length - len(ids)
            if room < 1:
                raise InputError(f"the prompt has {len(ids)} tokens; the model takes at most {self.context_length - 1}")
            if room < budget:
                budget, limit = room, "max_length"
            decoder = StreamDecoder(self.tokenizer, ids[-8:]) if self.tokenizer else None
            sequences.append(_Sequence(row, ids, params, budget, limit, generator_for(params), decoder))
        return sequences

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("this engine has no tokenizer: give the prompt as token ids")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [int(i) for i in prompt]
        if not ids:
            raise InputError("the prompt is empty: the model needs at least one token to start from")
        bad = next((i for i in ids if not 0 <= i < self.model.config.vocab_size), None)
        if bad is not None:
            raise InputError(
                f"the prompt holds token id {bad}; the model's vocabulary is {self.model.config.vocab_size}"
            )
        return list(ids)

    @torch.inference_mode()
    def _step(self, rows: list[int], ids: list[list[int]], cache: KVCache, adapter: str | None) -> Tensor:
        """Feed tokens to the selected rows; logits of the last position, [rows, vocab]."""
        cache.rows = rows
        if self.model.active_adapter != (adapter or self.adapter):
            use_adapter(self.model, adapter or self.adapter)
        hidden = self.model.hidden(torch.tensor(ids, device=self.model.device), cache=cache)
        logits: Tensor = self.model.lm_head(hidden[:, -1])
        return logits

    def _run(self, sequences: list[_Sequence]) -> Iterator[None]:
        """Advance all sequences to their ends, yielding after every step."""
        cache = KVCache(self.model.config, rows=len(sequences))
        for s in sequences:
            self._take(s, self._step([s.row], [s.prompt], cache, s.params.adapter)[0])
        yield
        while active := [s for s in sequences if s.finish is None]:
            for adapter in {s.params.adapter: None for s in active}:
                together = [s for s in active if s.params.adapter == adapter]
                logits = self._step([s.row for s in together], [[s.ids[-1]] for s in together], cache, adapter)
                for s, row in zip(together, logits, strict=True):
                    self._take(s, row)
            yield

    def _take(self, s: _Sequence, logits: Tensor) -> None:
        """Choose the next token of one sequence and decide whether it ends."""
        token = sample(logits, s.params, s.generator)
        s.ids.append(token)
        if token in self.adapter_stop_ids.get(s.params.adapter or "", self.stop_ids) and not s.params.ignore_eos:
            s.finish = "eos"
        elif len(s.ids) >= s.budget:
            s.finish = "max_length" if s.limit == "max_length" else "max_new_tokens"
        if s.decoder is not None:
            s.text += "" if s.finish == "eos" else s.decoder.push(token)
            s.text += s.decoder.finish() if s.finish else ""
        for stop in s.params.stop:
            at = s.text.find(stop)
            if at >= 0:
                s.text, s.finish = s.text[:at], "stop"

    def _result(self, s: _Sequence) -> Result:
        assert s.finish is not None
        return Result(s.ids, s.text, s.finish, len(s.prompt))


def _safe_end(text: str, stops: Sequence[str]) -> int:
    """How much of an unfinished text can be shown: not the start of a stop string."""
    end = len(text)
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:size]):
                end -= size
                break
    return end
