"""The tutorial's names: `AutoModelForCausalLM`, `AutoTokenizer`, over `formats` and `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.errors import InputError
from camelid.formats.hf import dtype_named, save
from camelid.formats.load import load, load_tokenizer, stop_ids
from camelid.generate.beam import BeamParams, pages_needed
from camelid.generate.engine import MOST_TEXTS, Engine, Result
from camelid.generate.sampling import SamplingParams, nth, whole
from camelid.kernels.decoder import PAGE
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer

_UNSET: Any = object()


class CausalLM(Llama):
    """A Llama that also generates. `stop_ids` come from the folder's generation_config.json."""

    stop_ids: tuple[int, ...] = ()
    finish_reasons: list[str]

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = _UNSET,
        pad_token_id: int | None = None,
        num_return_sequences: int = 1,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        assistant_model: Llama | None = None,
    ) -> Tensor:
        """Complete each row of input_ids [batch, seq]; returns prompt + new ids, int64 [batch * num_return_sequences,
        longest].

        Greedy unless do_sample, or a beam search (generate/beam.py) with num_beams above 1. `max_length` counts prompt
        and new tokens, `max_new_tokens` new ones only; without either, 20 new tokens. `attention_mask` marks padding
        (0), on either side. `eos_token_id=None` never stops early. Shorter rows are filled with pad_token_id (default:
        the first end token, else 0). `assistant_model` is a draft (generate/draft.py): fewer steps of this
        model for one row or a few, and the same ids up to the order of sums. Each row that is returned draws by a seed
        of its own, from `seed` on.
        `finish_reasons` holds, per row, what ended it.
        """
        rows = torch.as_tensor(input_ids)
        if rows.dim() != 2 or not len(rows) or rows.is_floating_point():
            raise InputError(f"input_ids must be whole numbers, [batch, seq], not {rows.dtype} {list(rows.shape)}")
        rows = rows.long()
        keep = torch.ones_like(rows) if attention_mask is None else torch.as_tensor(attention_mask)
        if keep.shape != rows.shape:
            raise InputError(f"attention_mask is {list(keep.shape)}, input_ids {list(rows.shape)}")
        ends = self._ends(eos_token_id)
        if max_length is None and max_new_tokens is None:
            max_new_tokens = 20
        whole("num_return_sequences", num_return_sequences, 1, MOST_TEXTS)
        search = BeamParams(
            num_beams, min(num_return_sequences, num_beams), max_new_tokens, max_length, length_penalty, early_stopping
        )
        if num_beams > 1 and do_sample:
            raise InputError("num_beams with do_sample: a beam search does not draw; leave one of them out")
        if num_beams > 1 and assistant_model is not None:
            raise InputError("num_beams with assistant_model: a beam search guesses nothing; leave one of them out")
        if num_beams > 1 and num_return_sequences > num_beams:
            raise InputError(
                f"num_return_sequences={num_return_sequences}: num_beams={num_beams} has no more than that"
            )
        if num_beams == 1 and num_return_sequences > 1 and not do_sample:
            raise InputError(f"num_return_sequences={num_return_sequences} needs do_sample or num_beams: there is one")
        params = SamplingParams(
            max_length=max_length, max_new_tokens=max_new_tokens, temperature=temperature if do_sample else 0.0,
            top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
        )  # fmt: skip
        prompts = [row[mask.bool()].tolist() for row, mask in zip(rows, keep, strict=True)]
        cache_tokens = _cache_tokens(self, prompts, params, search) if num_beams > 1 else None
        engine = Engine(self, None, ends, cache_tokens, assistant_model)
        if num_beams > 1:
            results = [found for prompt in prompts for found in engine.beam_search(prompt, search)]
        else:
            count = range(num_return_sequences)
            asked = [prompt for prompt in prompts for _ in count]  # each draws by its own seed, equal rows too
            results = engine.generate(asked, [nth(params, i) for i in range(len(asked))])
        rows = rows.repeat_interleave(num_return_sequences, 0)
        self.finish_reasons = [r.finish_reason for r in results]
        pad = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
        return _stack(rows, results, pad)

    def _ends(self, given: int | Sequence[int] | None) -> tuple[int, ...]:
        if given is _UNSET:
            return self.stop_ids or self.config.stop_ids
        try:
            if given is None or not isinstance(given, Iterable):
                return () if given is None else (index(given),)
            return tuple(map(index, given))  # also numpy's numbers, and a tensor's
        except TypeError:
            raise InputError(f"eos_token_id is {given!r}: an id, or several") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face folder."""
        save(self, folder)


def _cache_tokens(model: Llama, prompts: Sequence[Sequence[int]], params: SamplingParams, search: BeamParams) -> int:
    """What the widest of the searches needs."""
    context = model.config.max_position_embeddings
    budgets = {len(prompt): max(1, min(params.budget(len(prompt))[0], context)) for prompt in prompts}
    # Not the longest prompt's: a shorter one has fewer pages that its beams share, and may have more to come.
    return PAGE * (max(pages_needed(n, budget, search.num_beams) for n, budget in budgets.items()) + 1)


def _stack(rows: Tensor, results: Sequence[Result], pad: int) -> Tensor:
    """Prompt rows as given (padding included) followed by the new ids."""
    longest = max(len(r.ids) for r in results)
    new = [r.ids + [pad] * (longest - len(r.ids)) for r in results]
    return torch.cat((rows, torch.tensor(new, dtype=rows.dtype, device=rows.device)), dim=1)


class AutoModelForCausalLM:
    """Opens any MODEL."""

    @staticmethod
    def from_pretrained(
        path: str | Path, *, torch_dtype: torch.dtype | str | None = None, device: str = "cpu"
    ) -> CausalLM:
        """Read a model in the file's own dtype, or in `torch_dtype`. Raises InputError naming what is wrong."""
        dtype = dtype_named(torch_dtype) if isinstance(torch_dtype, str) and torch_dtype != "auto" else torch_dtype
        model = load(path, dtype=None if isinstance(dtype, str) else dtype, device=device, model_class=CausalLM)
        model.stop_ids = stop_ids(path)
        return model


class AutoTokenizer:
    """Opens the tokenizer of any MODEL."""

    @staticmethod
    def from_pretrained(path: str | Path) -> Tokenizer:
        """A folder with tokenizer.json or tokenizer.model, or a GGUF file."""
        return load_tokenizer(path)
