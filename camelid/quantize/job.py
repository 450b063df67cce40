"""Write a quantised copy of a model, with what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from camelid.artifact import new_folder, write_manifest
from camelid.errors import InputError
from camelid.evaluate.opened import measured_in
from camelid.evaluate.perplexity import WINDOW, Cut, Piece, pieces
from camelid.evaluate.texts import files_of, read_texts
from camelid.formats.adapter import is_adapter
from camelid.formats.checkpoint import Checkpoint
from camelid.formats.compressed import Scheme, named_tensors
from camelid.formats.convert import size_of
from camelid.formats.hf import write_weights
from camelid.formats.load import generation_of, load, load_tokenizer, open_model, resolve
from camelid.kernels.packed import BLOCK
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import BITS, quantize_head, quantize_layers
from camelid.quantize.awq import scale_for_rounding
from camelid.quantize.gptq import quantize_by_gptq
from camelid.quantize.measure import compare, sensitivity, shared_copy, states_of
from camelid.report.page import Curve, Page
from camelid.report.progress import progress
from camelid.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wish:
    """`group` None: one scale a row. `calibration`: a text, corpus or tokens folder, for `method` (GPTQ by default);
    without it weights are rounded to nearest. `data`: what the cost is measured on. `tokens`: of each whole windows
    are read until there are so many. With `kv_cache` keys and values are in int8 too where the cost is measured."""

    format: str
    group: int | None = BLOCK
    symmetric: bool = True
    calibration: str | None = None
    method: Literal["gptq", "awq", "awq+gptq"] | None = None
    data: str | None = None
    tokens: int = 65536
    by_layer: bool = False
    kv_cache: bool = False


def quantize(source: str | Path, out: str | Path, wish: Wish, quiet: bool = True) -> dict[str, Any]:
    """Write `out`, a Hugging Face folder whose layers are in int8 or int4, and report.html. Returns out, digest,
    scheme, `before` and `after` (bytes; with `data` token_perplexity), with `data` also kl, kl_p999, top1_agreement and
    protocol.

    Raises InputError for a wish that cannot be fulfilled, before any work.
    """
    path, target = resolve(source), Path(out).resolve()
    if path.is_dir() and is_adapter(path):
        raise InputError(f"{path} is an adapter: put it into its base first (camelid merge)")
    if target == path.resolve() or target in path.resolve().parents or path.resolve() in target.parents:
        raise InputError(f"--out {out} would take the place of the model itself, {path}: choose another folder")
    if wish.method and not wish.calibration:
        raise InputError(f"--method {wish.method} needs --calibration, a text")
    if wish.by_layer and not wish.data:
        raise InputError("--by-layer tells what each layer costs on a text: name one with --data")
    if wish.kv_cache and not wish.data:
        raise InputError("--kv-cache is measured, not written into the folder: it needs --data, a text")
    if wish.tokens < 2:
        raise InputError(f"--tokens {wish.tokens}: at least 2 are read")
    scheme = Scheme(BITS[wish.format], wish.group, wish.symmetric)
    checkpoint = open_model(path)
    _check(checkpoint.quantized, checkpoint.config, scheme, path)
    tokenizer = load_tokenizer(path)
    calibration = _windows(wish.calibration, tokenizer, checkpoint.config.max_position_embeddings, wish.tokens)
    measured_on = _windows(wish.data, tokenizer, checkpoint.config.max_position_embeddings, wish.tokens)
    # What is only rounded needs no room in float32: a layer at a time is read from the disk.
    full: Llama = load(path, dtype=torch.float32 if calibration or measured_on else None)
    full.requires_grad_(False)
    rounded = shared_copy(full)
    method = "to nearest"
    if calibration:
        method = f"{(wish.method or 'gptq').upper()} on {sum(len(p.ids) for p in calibration):,} tokens"
    _round(rounded, scheme, wish, [piece.ids for piece in calibration], _dtype(checkpoint), quiet)
    figures = _cost(full, rounded, measured_on, scheme, wish, tokenizer, quiet) if measured_on else {}
    digest = _write(rounded, checkpoint, Path(out), scheme, method, figures, wish)
    before: dict[str, Any] = {"bytes": size_of(path)}
    after: dict[str, Any] = {"bytes": size_of(Path(out))}
    if figures:
        before["token_perplexity"] = figures.pop("token_perplexity_before")
        after["token_perplexity"] = figures.pop("token_perplexity_after")
    told = {"out": str(out), "digest": digest, "scheme": scheme.label, "method": method}
    return told | {"before": before, "after": after} | figures


def _round(
    model: Llama, scheme: Scheme, wish: Wish, windows: Sequence[Sequence[int]], dtype: torch.dtype, quiet: bool
) -> None:
    """Round the layers of a model, whose parameters others may hold: they are replaced."""
    how = (scheme.bits, scheme.group, scheme.symmetric)
    method = (wish.method or "gptq") if windows else ""
    layers, scales = len(model.layers), method.startswith("awq")
    with progress("quantize", layers * (1 + scales), quiet) as advance:
        if scales:
            scale_for_rounding(model, windows, *how, dtype, advance)
        if method.endswith("gptq"):
            quantize_by_gptq(model, windows, *how, lambda done, note: advance(done + layers * scales, note))
        else:
            quantize_layers(model, *how)
            advance(layers * (1 + scales), "layers")


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The file's own."""
    return checkpoint.tensors()["embed_tokens.weight"].dtype


def cost_of(source: str | Path, made: str | Path, data: str, tokens: int = 65536, quiet: bool = True) -> dict[str, Any]:
    """What a copy in another format costs beside its source, both in float32: token_perplexity_before and _after, kl,
    kl_p999, top1_agreement, tokens and protocol. Raises InputError for a text without two tokens."""
    tokenizer, measured_on = measured_windows(source, data, tokens)
    full: Llama = load(source, dtype=torch.float32)
    kind = open_model(made).quantized or "full"
    copied: Llama = load(made, dtype=torch.float32)
    with _measuring(2 * len(measured_on), quiet) as tell:
        found = compare(full, states_of(full, measured_on, tell), copied, measured_on, tell)
    found["protocol"] = _protocol(found, data, full, f"{kind} weights as they are meant", tokenizer)
    return found


def measured_windows(source: str | Path, data: str, tokens: int) -> tuple[Tokenizer, list[Piece]]:
    """MODEL's tokenizer, and the windows of a text by it. Raises InputError for a text without two tokens."""
    if tokens < 2:
        raise InputError(f"--tokens {tokens}: at least 2 are read")
    tokenizer = load_tokenizer(source)
    return tokenizer, _windows(data, tokenizer, open_model(source).config.max_position_embeddings, tokens)


@contextmanager
def _measuring(pieces: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """Progress, told after each piece of text."""
    done = count(1)
    with progress("measure", pieces, quiet) as advance:
        yield lambda: advance(next(done))


def _protocol(found: dict[str, Any], data: str | None, full: Llama, how: str, tokenizer: Tokenizer) -> str:
    window = min(WINDOW, full.config.max_position_embeddings)
    has_bos = tokenizer.bos_token_id is not None
    begun = "BOS before each document, not scored" if has_bos else "no BOS, first token not scored"
    return (
        f"{found['tokens']} tokens of {data}, window {window}, no overlap, {begun}; "
        f"{how}; {measured_in(full, tokenizer)}"
    )


def _check(already: str | None, config: LlamaConfig, scheme: Scheme, path: Path) -> None:
    if already:
        raise InputError(f"{path} is quantised already ({already}): start from the full-precision model")
    wide = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_size)
    group = scheme.group
    if group is not None and (group < BLOCK or group % BLOCK):
        raise InputError(f"--group {group}: a multiple of {BLOCK}, or row")
    bad = next((n for n in wide if n % BLOCK or (group is not None and n % group)), None)
    if bad is not None:
        raise InputError(
            f"{path}: a layer has {bad} inputs, which are no whole groups of {group or BLOCK}: choose --group"
        )


def _windows(data: str | None, tokenizer: Tokenizer, context: int, most: int) -> list[Piece]:
    """Whole windows of a text, without overlap, until there are `most` tokens."""
    if data is None:
        return []
    found, total = [], 0
    cut = Cut(min(WINDOW, context), min(WINDOW, context), "document")
    for number, text in enumerate(read_texts(Path(data).expanduser(), tokenizer)):
        for piece in pieces(number, text.ids, cut, tokenizer.bos_token_id):
            if total < most:
                found.append(piece)
                total += len(piece.ids) - piece.first
    if not found:
        raise InputError(f"{data} holds no text of two tokens: there is nothing to read")
    return found


def _cost(
    full: Llama, rounded: Llama, measured_on: Sequence[Piece], scheme: Scheme, wish: Wish, tokenizer: Tokenizer,
    quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    run = shared_copy(rounded)
    quantize_head(run)  # as the engine runs it
    with _measuring(2 * len(measured_on), quiet) as tell:
        before = states_of(full, measured_on, tell)
        found = compare(full, before, run, measured_on, tell, wish.kv_cache)
    if wish.by_layer:
        found["layers"] = sensitivity(full, before, measured_on, scheme.bits, scheme.group, scheme.symmetric)
    how = f"weights {scheme.label}, inputs and output projection int8 in groups of 32"
    how += ", keys and values int8" if wish.kv_cache else ""
    if wish.data and wish.calibration and {*files_of(wish.data)} & {*files_of(wish.calibration)}:
        how += ", calibrated on a text that this is measured on"  # and so flattering
    found["protocol"] = _protocol(found, wish.data, full, how, tokenizer)
    return found


def _write(
    rounded: Llama, checkpoint: Checkpoint, out: Path, scheme: Scheme, method: str, figures: dict[str, Any], wish: Wish
) -> str:
    """What was not rounded goes in the file's dtype."""
    source, whole, dtype = checkpoint.path, dict(rounded.named_parameters()), _dtype(checkpoint)
    tensors = {name: t.to(dtype) if name in whole else t for name, t in named_tensors(rounded)[0].items()}
    inputs = [source, *(files_of(wish.calibration) if wish.calibration else [])]
    with new_folder(out, "model") as folder:
        known = write_weights(rounded.config, tensors, folder, generation_of(source), quantization=scheme.to_dict())
        load_tokenizer(source).save(folder)
        _page(source, scheme, method, figures).write(folder / "report.html")
        write_manifest(
            folder, "model", inputs, known=known, scheme=scheme.label, method=method, calibration=wish.calibration,
            figures=figures, parameters=rounded.config.num_parameters(),
        )  # fmt: skip
    return next(iter(known.values()))


def _page(source: Path, scheme: Scheme, method: str, figures: dict[str, Any]) -> Page:
    page = Page(f"{source.name}: {scheme.label}")
    page.text(f"Rounded {method}.")
    if figures:
        page.table(
            ("measure", "before", "after"),
            [
                ("perplexity", f"{figures['token_perplexity_before']:.4f}", f"{figures['token_perplexity_after']:.4f}"),
                ("KL divergence, mean", "0", f"{figures['kl']:.5f} nats"),
                ("KL divergence, 99.9 % of tokens below", "0", f"{figures['kl_p999']:.4f} nats"),
                ("the same likeliest token", "100 %", f"{100 * figures['top1_agreement']:.2f} %"),
            ],
        )
        page.text(figures["protocol"], note=True)
    if layers := figures.get("layers"):
        curve = Curve("mean KL divergence, nats", [row["layer"] for row in layers], [row["kl"] for row in layers])
        page.plot("What rounding one layer alone costs", [curve], "layer")
    return page
