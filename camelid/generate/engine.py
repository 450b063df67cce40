"""Run requests on a model: prompts in chunks, unfinished texts together, pages of the KV cache shared where texts begin
alike.

`from_pretrained` runs the torch model on a GPU that holds it, else the native decoder where that takes it
(`kernels/decoder.py`): there a text's tokens are the same bits alone and in any batch. A model given as it is runs in
torch, where it is.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from camelid.errors import CamelidError, InputError
from camelid.generate.beam import BeamParams, Hypothesis, beam_search
from camelid.generate.constrain import Matcher
from camelid.generate.draft import Draft, check_same
from camelid.generate.native import shape_of
from camelid.generate.place import runner_for
from camelid.generate.runner import Runner, TorchRunner, depends_on_length
from camelid.generate.sampling import SamplingParams, TokenLogprob, generator_for, mean_logprob, nth, whole
from camelid.generate.scheduler import Scheduler, run_to_end, step_or_wait
from camelid.generate.sequence import FinishReason, Sequence
from camelid.kernels.decoder import PAGE
from camelid.kernels.device import free_on_gpu, on_its_gpu
from camelid.kernels.memory import installed
from camelid.model.llama import Llama
from camelid.model.quantized import BITS
from camelid.tokenizer.stream import StreamDecoder
from camelid.tokenizer.tokenizer import Tokenizer

Prompt = str | abc.Sequence[int]
MOST_TEXTS = 1024  # of one prompt at a time
SHARE_OF_MEMORY = 0.25  # that the cache may take unless told otherwise
DEFAULT_CACHE = 1 << 15  # tokens, or one whole context if that is more


@dataclass(frozen=True)
class Result:
    """One finished text. `ids` are the new tokens (the end token included), `text` their text without it.

    `finish_reason`: "eos", "stop" (a stop string), "max_new_tokens", "max_length", "cancelled", or "error" with
    `error`. `logprobs`: one for each id when they were asked for. `score`: what several texts are ordered by.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None
    score: float | None = None


class PromptTooLong(InputError):
    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens; the model takes at most {most}")


class Engine:
    """A model and its tokenizer, ready to generate. Without a tokenizer, prompts must be ids and text stays empty.

    `cache_tokens`: how many tokens of all texts together the KV cache holds; by default 32,768, or a whole context if
    that is more, in at most a quarter of memory (of a GPU's free memory). `draft`: a smaller model of the same
    vocabulary that guesses what comes next (generate/draft.py).
    """

    def __init__(
        self, model: Llama | Runner, tokenizer: Tokenizer | None = None, stop_ids: abc.Sequence[int] | None = None,
        cache_tokens: int | None = None, draft: Llama | Runner | None = None,
    ) -> None:  # fmt: skip
        self.runner: Runner = TorchRunner(model) if isinstance(model, Llama) else model
        self._model = self.runner.model if isinstance(self.runner, TorchRunner) else None
        self.config, self.tokenizer = self.runner.config, tokenizer
        self.adapter_stop_ids: dict[str, frozenset[int]] = {}
        self.other_templates: frozenset[str] = frozenset()  # adapters that were taught in a chat template of their own
        self.stop_ids = frozenset(self.config.stop_ids if stop_ids is None else stop_ids)
        if cache_tokens is not None and cache_tokens < 1:
            raise InputError(f"cache_tokens must be at least 1, not {cache_tokens}")
        guessing = TorchRunner(draft) if isinstance(draft, Llama) else draft
        if guessing is not None and depends_on_length(self.config):
            raise InputError("a draft cannot guess for a model whose rope scaling is dynamic")
        runners = [self.runner] if guessing is None else [self.runner, guessing]
        pages = -(-(cache_tokens or self._cache_tokens(sum(r.page_bytes() for r in runners))) // PAGE)
        for runner in runners:
            runner.reserve(pages)
        self.scheduler = Scheduler(
            self.runner, pages, reuse=not depends_on_length(self.config),
            draft=Draft(guessing, self.config.vocab_size) if guessing else None,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        quantization: str | None = None,
        threads: int | None = None,
        dtype: torch.dtype | None = None,
        adapters: abc.Mapping[str, str | Path] | None = None,
        cache_tokens: int | None = None,
        kv_cache: Literal["int8"] | None = None,
        draft: str | Path | None = None,
        draft_quantization: str | None = None,
        device: str = "auto",
    ) -> Engine:
        """Open MODEL with its tokenizer, and more adapters of it by name, for `SamplingParams.adapter`.

        `quantization` "int8" or "int4" rounds the weights of a full-precision model to groups of 32, to nearest.
        Without it, a `dtype` and adapters, where the native library takes the model's shape, the matrices of a GGUF
        file that are in Q8_0, Q4_0, Q4_1 or Q4_K are the file's whole numbers (on a GPU those of the last two in int8),
        and those in its other quantised types are rounded to int8 by groups of 32.
        `threads` is what the native decoder uses, and torch for the process. `kv_cache` "int8" keeps keys and values as
        bytes, each head's of a token by its greatest: half the memory of bfloat16. `draft` names a smaller model that
        guesses for it, rounded by `draft_quantization`. `device` "auto" is a GPU where there is one of whose free
        memory the weights take at most four fifths, "cpu" or "cuda" that one. Raises InputError naming what is wrong.
        """
        from camelid.formats.load import chat_template, load, load_adapters, load_tokenizer, open_model, stop_ids

        for name, given in (("quantization", quantization), ("draft_quantization", draft_quantization)):
            if given is not None and given not in BITS:
                raise InputError(f"{name} is {given!r}; it can be {', '.join(BITS)} or None")
        if draft_quantization is not None and draft is None:
            raise InputError("draft_quantization: there is no draft to round")
        if kv_cache not in (None, "int8"):
            raise InputError(f"kv_cache is {kv_cache!r}; it can be int8 or None")
        if threads is not None:
            if threads < 1:
                raise InputError(f"threads must be at least 1, not {threads}")
            torch.set_num_threads(threads)
        open_model(path)  # an adapter's base is here then: no token of its tokenizer may lack a row there
        tokenizer = load_tokenizer(path)
        if draft is not None:
            check_same(tokenizer, load_tokenizer(draft), str(draft))

        def opened(source: str | Path, form: str | None) -> Llama:
            # Where torch runs the layers on a CPU they are expanded at every step: once is better.
            kept = form is None and dtype is None and shape_of(open_model(source).config).refusal() is None
            return load(source, dtype=dtype, bits=BITS[form] if form else None, integers=kept, head=True)

        bits = BITS[quantization] if quantization else None
        model = load_adapters(path, adapters, dtype, bits) if adapters else opened(path, quantization)
        tokenizer.check_rows(model.config.vocab_size, path)
        runner = runner_for(model, None, threads, kv_cache, device, keep=False)
        guessing = None
        if draft is not None:
            try:
                beside = runner.model.device.type if isinstance(runner, TorchRunner) else "cpu"
                guessing = runner_for(opened(draft, draft_quantization), None, threads, kv_cache, beside, keep=False)
            except InputError as error:
                raise InputError(f"draft {draft}: {error}") from None
        engine = cls(runner, tokenizer, stop_ids(path), cache_tokens, guessing)
        # An adapter may have learned to end its answers by a token of its own.
        engine.adapter_stop_ids = {name: frozenset(stop_ids(folder)) for name, folder in (adapters or {}).items()}
        own = {name: chat_template(folder) for name, folder in (adapters or {}).items()}
        engine.other_templates = frozenset(n for n, text in own.items() if text not in (None, tokenizer.chat_template))
        return engine

    def __repr__(self) -> str:
        runs = "native decoder"
        if self._model is not None:
            runs = f"torch, {str(self._model.dtype).removeprefix('torch.')} on {self._model.device.type}"
        size = f"{self.config.num_parameters() / 1e6:,.1f} M weights"
        cache = self.scheduler.pages.count * PAGE
        return f"Engine({size}, {runs}, context {self.context_length:,}, cache {cache:,} tokens)"

    @property
    def model(self) -> Llama:
        """The torch model. Raises InputError when the native decoder runs instead, which keeps its own weights only."""
        if self._model is None:
            raise InputError("this engine runs the native decoder; formats.load opens the model in torch")
        return self._model

    def generate(
        self, prompts: abc.Sequence[Prompt], params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        strict: bool = True,
    ) -> list[Result]:  # fmt: skip
        """Complete every prompt by the same params or each by its own; as many at once as the cache holds. Order is
        kept. When a text fails the others go on; then CamelidError is raised, or without `strict` its result has the
        reason "error"."""
        _several(prompts, "prompts")
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, abc.Sequence) else list(params)
        if len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but {len(each)} params: give one for all, or one for each")
        texts = [self.prepare(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        try:
            for text in texts:
                self.scheduler.add(text)
            run_to_end(self.scheduler, texts)
        finally:
            for text in texts:
                self.scheduler.cancel(text)
        if strict:
            _check(texts)
        return [result_of(text) for text in texts]

    def several(
        self, prompt: Prompt, params: SamplingParams, n: int, best_of: int | None = None, strict: bool = True
    ) -> list[Result]:
        """n texts that go on from one prompt, which is read once; the seed goes up by one from text to text. With
        `best_of` so many are drawn, and the n of the greatest mean log-probability come back, the best first, each with
        its score."""
        drawn = n if best_of is None else best_of
        whole("best_of", drawn, 1, MOST_TEXTS)
        whole("n", n, 1, drawn)
        if drawn > 1 and params.temperature == 0:
            raise InputError(f"{drawn} texts are to be drawn at temperature 0, where all are the same")
        ids = self._ids(prompt)
        if best_of is None:
            return self.generate([ids] * n, [nth(params, number) for number in range(n)], strict)
        kept = replace(params, logprobs=params.logprobs or 0)
        found = self.generate([ids] * drawn, [nth(kept, number) for number in range(drawn)], strict)
        scored = [replace(r, score=mean_logprob(r.logprobs or [])) for r in found]
        best = sorted(scored, key=lambda r: (r.error is not None, -(r.score or 0.0)))[:n]
        return best if params.logprobs is not None else [replace(r, logprobs=None) for r in best]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> abc.Generator[str, None, Result]:
        """Yield the text of one completion as it appears; the generator's return value is the Result.

        Characters are held back while they may still be part of a stop string or of an unfinished character. Closing
        the generator ends the text and frees what it held.
        """
        text, shown = self.prepare(prompt, params or SamplingParams()), 0
        self.scheduler.add(text)
        try:
            while text.finish is None:
                step_or_wait(self.scheduler)
                end = text.shown()
                if end > shown:
                    yield text.text[shown:end]
                    shown = end
            if text.shown() > shown:  # another call's step ended it
                yield text.text[shown : text.shown()]
        finally:
            self.scheduler.cancel(text)
        _check([text])
        return result_of(text)

    @property
    def context_length(self) -> int:
        """Most tokens of a text: max_position_embeddings, times the factor of dynamic scaling; less when the cache does
        not hold that many."""
        return min(_context(self.runner), self.scheduler.pages.count * PAGE)

    def prepare(self, prompt: Prompt, params: SamplingParams, salt: str = "") -> Sequence:
        """A text for `scheduler.add`; pages are shared only among texts of one `salt`. Raises
        InputError for a request that cannot be fulfilled."""
        self._check_adapter(params.adapter)
        if params.adapter is None and (active := self.runner.active) is not None:
            params = replace(params, adapter=active)  # now: the model's owner may choose another before the text ends
        salt += f"/{self.runner.stamp()}"
        bad = next((i for i in params.logit_bias if not 0 <= i < self.config.vocab_size), None)
        if bad is not None:
            raise InputError(f"logit_bias names token {bad}; the model's vocabulary is {self.config.vocab_size}")
        ids = self._ids(prompt)
        budget, limit = params.budget(len(ids))
        if budget < 1:
            raise InputError(f"max_length {params.max_length} leaves no room after a prompt of {len(ids)} tokens")
        room = self.context_length - len(ids)
        if room < 1:
            raise PromptTooLong(len(ids), self.context_length - 1)
        if room < budget:
            budget, limit = room, "max_length"
        if params.stop and self.tokenizer is None:
            raise InputError("this engine has no tokenizer: a text can only be stopped by strings with one")
        decoder = StreamDecoder(self.tokenizer, ids[-8:]) if self.tokenizer else None
        ends = self.adapter_stop_ids.get(params.adapter or "", self.stop_ids)
        matcher = None
        if params.form is not None:
            if self.tokenizer is None:
                raise InputError("this engine has no tokenizer: a text of a given form needs one")
            matcher = Matcher(params.form, self.tokenizer, self.config.vocab_size, sorted(ends))
        ends = frozenset() if params.ignore_eos else ends
        if params.stop and self.tokenizer is not None:
            ends |= {i for i, name in self.tokenizer.special_tokens.items() if name in params.stop}
        return Sequence(ids, params, budget, limit, ends, generator_for(params), decoder, matcher, salt)

    def _check_adapter(self, name: str | None) -> None:
        if name is not None and name not in self.runner.adapters:
            known = ", ".join(self.runner.adapters) or "none"
            raise InputError(f"the model has no adapter named {name!r} (it has {known})")

    def beam_search(self, prompt: Prompt, params: BeamParams | None = None) -> list[Result]:
        """The `n` best of the texts that end in a search over `num_beams`, the best first, each with its score."""
        params = params or BeamParams()
        budget = SamplingParams(params.max_new_tokens, params.max_length, adapter=params.adapter)
        text = self.prepare(prompt, budget)  # its checks and limits
        params = replace(params, adapter=text.params.adapter)
        found = beam_search(self.scheduler, text.prompt, text.stop_ids, text.budget, params)
        return [self._result(text, one) for one in found[: params.n]]

    def _result(self, text: Sequence, found: Hypothesis) -> Result:
        decoder, shown = StreamDecoder(self.tokenizer, text.prompt[-8:]) if self.tokenizer else None, ""
        if decoder is not None:
            shown = "".join(map(decoder.push, found.ids[:-1] if found.ended else found.ids)) + decoder.finish()
        reason: FinishReason = "eos" if found.ended else text.limit
        return Result(found.ids, shown, reason, len(text.prompt), score=found.score)

    def embed(self, texts: abc.Sequence[Prompt], adapter: str | None = None) -> torch.Tensor:
        """The mean of each text's last states, scaled to length 1: float32 [texts, hidden]. A model that was not
        trained for it places texts only roughly by their meaning."""
        _several(texts, "texts")
        return torch.stack([_result(self.embedding(text, adapter)) for text in texts])

    def embedding(self, text: Prompt, adapter: str | None = None) -> abc.Generator[None, None, torch.Tensor]:
        """`embed` of one text, float32 [hidden], a chunk at a time: other texts' steps may come between."""
        self._check_adapter(adapter)
        ids = self._ids(text)
        if len(ids) > self.context_length:
            raise InputError(f"the text has {len(ids)} tokens; the model takes at most {self.context_length}")
        mean = yield from self.scheduler.mean_state(ids, adapter or self.runner.active)
        return torch.nn.functional.normalize(mean.cpu(), dim=0)

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("this engine has no tokenizer: give the prompt as token ids")
            ids = self.tokenizer.encode_prompt(prompt)
        else:
            ids = [int(i) for i in prompt]
        if not ids:
            raise InputError("the prompt is empty: the model needs at least one token to start from")
        bad = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if bad is not None:
            raise InputError(f"the prompt holds token id {bad}; the model's vocabulary is {self.config.vocab_size}")
        return list(ids)

    def _cache_tokens(self, page_bytes: int) -> int:
        wanted = max(DEFAULT_CACHE, _context(self.runner))
        if self._model is not None and self._model.device.type == "cuda":
            with on_its_gpu(self._model.device):
                memory = free_on_gpu()
        else:
            memory = installed()
        return min(wanted, max(PAGE, int(SHARE_OF_MEMORY * memory / page_bytes) * PAGE))


def _several(texts: abc.Sequence[Prompt], name: str) -> None:
    if isinstance(texts, str):  # a sequence too, of letters
        raise InputError(f"{name} is one string: put it into a list, [{texts[:20]!r}]")


def _result(rounds: abc.Generator[None, None, torch.Tensor]) -> torch.Tensor:
    """What a generator comes to."""
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            found: torch.Tensor = end.value
            return found


def _check(texts: abc.Sequence[Sequence]) -> None:
    failed = next((text for text in texts if text.error), None)
    if failed is not None:
        raise CamelidError(f"generation failed: {failed.error}")


def result_of(text: Sequence) -> Result:
    """What a finished text says."""
    assert text.finish is not None
    logprobs = text.logprobs if text.params.logprobs is not None else None
    return Result(text.ids, text.text, text.finish, len(text.prompt), logprobs, text.error)


def _context(runner: Runner) -> int:
    config = runner.config
    stretch = config.rope_scaling.factor if config.rope_scaling.rope_type == "dynamic" else 1.0
    return int(config.max_position_embeddings * stretch)
