"""Attention over pages of keys and values: of one new token in each text, and of chunks of any lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # that one token's attention is cut into at least: two for each multiprocessor of a large GPU
LEAST = 64  # keys that make a share
QUERIES = 64  # of a chunk at a time, heads of a group counted


@triton.jit
def _whole(x):
    """One vector of bytes, as numbers, and what one is worth: `kernels.packed.as_bytes`."""
    most = tl.max(tl.abs(x), 0)
    most = tl.where(most < 1e-30, 0.0, most)
    steps = x * tl.where(most > 0, 127.0 / most, 0.0)
    return (steps + 12582912.0) - 12582912.0, most / 127.0  # to the nearest whole number, of two the even one


@triton.jit
def _attend(
    q, new_keys, new_values, keys, values, key_worth, value_worth, tables, starts, out, parts, sums, factor,
    tables_apart, starts_apart,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    BYTES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A share of one text's keys for the query heads of one key head. The last share has the new token too, which it
    writes into its page; nobody else reads that place."""
    text, head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + text * starts_apart)
    g, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = d < SIZE
    heads = (text * KV_HEADS + head) * GROUP + g
    real = (g[:, None] < GROUP) & inside[None, :]
    query = tl.load(q + heads[:, None] * SIZE + d[None, :], mask=real, other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, WIDTH], tl.float32)
    blocks = tl.cdiv(start, BLOCK)
    each = tl.cdiv(blocks, SPLITS)
    for block in range(share * each, tl.minimum((share + 1) * each, blocks)):
        where = block * BLOCK + tl.arange(0, BLOCK)
        seen = where < start
        page = tl.load(tables + text * tables_apart + where // PAGE, mask=seen, other=0)
        row = (page * PAGE + where % PAGE) * KV_HEADS + head
        there = seen[:, None] & inside[None, :]
        at = row[:, None] * SIZE + d[None, :]
        k, v = tl.load(keys + at, mask=there, other=0), tl.load(values + at, mask=there, other=0)
        if BYTES:
            k = (k.to(tl.float32) * tl.load(key_worth + row, mask=seen, other=0.0)[:, None]).to(query.dtype)
            v = (v.to(tl.float32) * tl.load(value_worth + row, mask=seen, other=0.0)[:, None]).to(query.dtype)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * factor
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        weight, shrink = tl.exp(score - higher[:, None]), tl.exp(most - higher)
        total = total * shrink + tl.sum(weight, 1)
        mean = mean * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        most = higher
    if share == SPLITS - 1:
        new = (text * KV_HEADS + head) * SIZE + d
        k, v = tl.load(new_keys + new, mask=inside, other=0.0), tl.load(new_values + new, mask=inside, other=0.0)
        page = tl.load(tables + text * tables_apart + start // PAGE)
        row = (page * PAGE + start % PAGE) * KV_HEADS + head
        if BYTES:
            whole_k, worth_k = _whole(k.to(tl.float32))
            whole_v, worth_v = _whole(v.to(tl.float32))
            tl.store(keys + row * SIZE + d, whole_k.to(tl.int8), mask=inside)
            tl.store(values + row * SIZE + d, whole_v.to(tl.int8), mask=inside)
            tl.store(key_worth + row, worth_k)
            tl.store(value_worth + row, worth_v)
            k, v = (whole_k * worth_k).to(query.dtype), (whole_v * worth_v).to(query.dtype)
        else:
            tl.store(keys + row * SIZE + d, k, mask=inside)
            tl.store(values + row * SIZE + d, v, mask=inside)
        score = tl.sum(query.to(tl.float32) * k.to(tl.float32)[None, :], 1) * factor
        higher = tl.maximum(most, score)
        weight, shrink = tl.exp(score - higher), tl.exp(most - higher)
        total = total * shrink + weight
        mean = mean * shrink[:, None] + weight[:, None] * v.to(tl.float32)[None, :]
        most = higher
    if SPLITS == 1:
        tl.store(out + heads[:, None] * SIZE + d[None, :], (mean / total[:, None]).to(query.dtype), mask=real)
    else:
        part = heads * SPLITS + share
        tl.store(parts + part[:, None] * SIZE + d[None, :], mean, mask=real)
        tl.store(sums + 2 * part, most, mask=g < GROUP)
        tl.store(sums + 2 * part + 1, total, mask=g < GROUP)


@triton.jit
def _join(parts, sums, out, SIZE: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """The shares of one query head, weighed by their sums."""
    row, s, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    part = row * SPLITS + s
    most, total = tl.load(sums + 2 * part), tl.load(sums + 2 * part + 1)
    weight = tl.exp(most - tl.max(most, 0))
    mean = tl.load(parts + part[:, None] * SIZE + d[None, :], mask=(d < SIZE)[None, :], other=0.0)
    found = tl.sum(mean * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + row * SIZE + d, found.to(out.dtype.element_ty), mask=d < SIZE)


def attend(
    q: Tensor, new: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor], worth: tuple[Tensor, Tensor] | None,
    tables: Tensor, starts: Tensor,
) -> Tensor:  # fmt: skip
    """One new token's attention in each text, its key and value written into its page first: [texts, heads, head_dim].

    q [texts, heads, head_dim], new keys and values [texts, kv_heads, head_dim], kept ones [pages, PAGE, kv_heads,
    head_dim] in q's dtype, or int8 with what one is `worth`, float32 [pages, PAGE, kv_heads, 1]. Text t has starts[t]
    tokens, the n-th of them in page tables[t, n // PAGE]; int64.
    """
    texts, heads, size = q.shape
    kv_heads, page, most_pages = new[0].shape[1], kept[0].shape[1], tables.shape[1]
    q, keys, values = q.contiguous(), new[0].contiguous(), new[1].contiguous()
    splits = _splits(texts * kv_heads, most_pages * page)
    out = torch.empty_like(q)
    parts = q.new_empty(texts * heads * splits * size if splits > 1 else 0, dtype=torch.float32)
    sums = q.new_empty(texts * heads * splits * 2 if splits > 1 else 0, dtype=torch.float32)
    group = heads // kv_heads
    width, block, stages = _tiles(q)
    _attend[texts, kv_heads, splits](
        q, keys, values, *kept, *(worth or kept), tables, starts, out, parts, sums, size**-0.5, tables.stride(0),
        starts.stride(0),
        KV_HEADS=kv_heads, GROUP=group, SIZE=size, PAGE=page, SPLITS=splits, BYTES=worth is not None,
        ROWS=max(16, triton.next_power_of_2(group)), WIDTH=width, BLOCK=block, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _join[texts * heads,](parts, sums, out, SIZE=size, SPLITS=splits, WIDTH=width)
    return out


def _splits(programs: int, tokens: int) -> int:
    """Into how many shares, a power of two, each text's keys go for the GPU to be busy."""
    splits = 1
    while splits * programs < PROGRAMS and splits * LEAST < tokens:
        splits *= 2
    return splits


@triton.jit
def _attend_chunk(
    q, keys, values, key_worth, value_worth, tables, texts, blocks, out, factor, most_pages,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, BYTES: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one text, for the query heads of one key head; HEADS is GROUP up to a power of two."""
    text, part = tl.load(blocks + 2 * tl.program_id(0)), tl.load(blocks + 2 * tl.program_id(0) + 1)
    first, count, start = tl.load(texts + 3 * text), tl.load(texts + 3 * text + 1), tl.load(texts + 3 * text + 2)
    head = tl.program_id(1)
    r, d = tl.arange(0, TOKENS * HEADS), tl.arange(0, WIDTH)
    token, inside = part * TOKENS + r // HEADS, d < SIZE
    real = ((token < count) & (r % HEADS < GROUP))[:, None] & inside[None, :]
    at = ((first + token) * KV_HEADS + head) * GROUP + r % HEADS
    query = tl.load(q + at[:, None] * SIZE + d[None, :], mask=real, other=0.0)
    end = start + tl.minimum((part + 1) * TOKENS, count)
    most = tl.full([TOKENS * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    mean = tl.zeros([TOKENS * HEADS, WIDTH], tl.float32)
    for begin in range(0, end, BLOCK):
        where = begin + tl.arange(0, BLOCK)
        page = tl.load(tables + text * most_pages + where // PAGE, mask=where < end, other=0)
        row = (page * PAGE + where % PAGE) * KV_HEADS + head
        there = (where < end)[:, None] & inside[None, :]
        k = tl.load(keys + row[:, None] * SIZE + d[None, :], mask=there, other=0)
        v = tl.load(values + row[:, None] * SIZE + d[None, :], mask=there, other=0)
        if BYTES:
            k = (k.to(tl.float32) * tl.load(key_worth + row, mask=where < end, other=0.0)[:, None]).to(query.dtype)
            v = (v.to(tl.float32) * tl.load(value_worth + row, mask=where < end, other=0.0)[:, None]).to(query.dtype)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * factor
        score = tl.where(where[None, :] <= (start + token)[:, None], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        weight, shrink = tl.exp(score - higher[:, None]), tl.exp(most - higher)
        total = total * shrink + tl.sum(weight, 1)
        mean = mean * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        most = higher
    tl.store(out + at[:, None] * SIZE + d[None, :], (mean / total[:, None]).to(query.dtype), mask=real)


def attend_chunks(
    q: Tensor, kept: tuple[Tensor, Tensor], worth: tuple[Tensor, Tensor] | None, tables: Tensor, texts: Tensor,
    blocks: Tensor,
) -> Tensor:  # fmt: skip
    """Causal attention of several texts' new tokens, laid end to end, over their pages, which hold them already:
    [tokens, heads, head_dim].

    q [tokens, heads, head_dim]; `kept` and `worth` as for `attend`; `tables` int64 [texts, most]; `texts` int64
    [texts, 3]: the place of a text's first new token in q, how many it has, how many came before them. `blocks` are
    `blocks_of` them.
    """
    size, kv_heads = q.shape[2], kept[0].shape[2]
    group = q.shape[1] // kv_heads
    q, heads = q.contiguous(), triton.next_power_of_2(group)
    out = torch.empty_like(q)
    width, block, stages = _tiles(q)
    _attend_chunk[len(blocks), kv_heads](
        q, *kept, *(worth or kept), tables, texts, blocks, out, size**-0.5, tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, SIZE=size, PAGE=kept[0].shape[1], BYTES=worth is not None, HEADS=heads,
        TOKENS=tokens_at_once(group), WIDTH=width, BLOCK=block, num_stages=stages,
    )  # fmt: skip
    return out


def _tiles(q: Tensor) -> tuple[int, int, int]:
    """How wide a head is for Triton, which multiplies by 16 numbers at least; keys at a time; and how many such blocks
    are on their way at once. Less for wide or long numbers: a multiprocessor keeps 99 KiB on many cards."""
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    long = width * q.itemsize
    return (width, 64, 3) if long <= 256 else (width, 32, 1) if long <= 512 else (width, 16, 1)


def tokens_at_once(group: int) -> int:
    """Of a chunk, by each program."""
    heads: int = triton.next_power_of_2(group)
    return max(1, QUERIES // heads)


def blocks_of(counts: Sequence[int], group: int) -> list[tuple[int, int]]:
    """Text and part of it that each program of `attend_chunks` has, where texts have so many new tokens and each key
    head serves `group` heads. The parts that come last in their texts, which take longest, come first."""
    size = tokens_at_once(group)
    parts = [(text, part) for text, count in enumerate(counts) for part in range(-(-count // size))]
    return sorted(parts, key=lambda found: -found[1])
