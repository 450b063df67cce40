"""Tokenizer and template: what a person writes, as the model reads it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from camelid.artifact import read_manifest
from camelid.errors import CamelidError, InputError
from camelid.formats.load import stop_ids
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.verify.checklist import Check, Failed, NotApplicable, Subject

SAMPLES = (
    "The meaning of life is to learn.", "Café naïve Ω≈ç√∫ — “quotes”", "骆驼在沙漠里走，白天热，夜里冷。",
    "私はラクダです。", "الجمل يمشي في الصحراء", "Верблюд идёт по пустыне", "ऊँट रेगिस्तान में",
    "def f(x):\n    return x ** 2\n", "1234567890 3.14", "🐪🏜️🧑‍🚀", "  two  blanks\n\n\ttab ", "ünïcödé e\u0301",
)  # fmt: skip
TALK: list[dict[str, str]] = [
    {"role": "user", "content": "What is a camel? zqx"},
    {"role": "assistant", "content": "An animal. zqy"},
]


def tokenizer(subject: Subject) -> str:
    """Opens, and fits the embedding."""
    words, config = subject.tokenizer, subject.checkpoint.config
    if len(words) > config.vocab_size:
        raise Failed(f"the tokenizer has {len(words)} tokens, the embedding {config.vocab_size} rows (vocab_size)")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        of_config: Any = getattr(config, name)
        ids = of_config if isinstance(of_config, list) else [] if of_config is None else [of_config]
        bad = next((i for i in ids if not 0 <= i < config.vocab_size), None)
        if bad is not None:
            raise Failed(f"{name} {bad} of config.json is outside the vocabulary of {config.vocab_size}")
        own = getattr(words, name)
        if name == "bos_token_id" and own is not None and ids and own not in ids:
            raise Failed(f"bos_token_id is {ids[0]} in config.json, {own} in the tokenizer")
    spare = config.vocab_size - len(words)
    return f"{len(words):,} tokens" + (f", {spare} rows of the embedding to spare" if spare else "")


def round_trip(subject: Subject) -> str:
    """Text to ids and back."""
    lost = [text for text in SAMPLES if _back(subject.words, text) != text]
    if len(lost) > len(SAMPLES) // 2:
        raise Failed(f"{lost[0]!r} comes back as {_back(subject.words, lost[0])!r}")
    if lost:
        return f"{len(SAMPLES) - len(lost)} of {len(SAMPLES)} samples come back, but not {lost[0]!r}"
    return f"all {len(SAMPLES)} samples, in nine scripts, come back"


def _back(words: Tokenizer, text: str) -> str:
    return words.decode(words.encode(text, add_special_tokens=False))


def bos(subject: Subject) -> str:
    """How often a text and a conversation begin."""
    words = subject.words
    begin = words.bos_token_id
    if begin is None:
        raise NotApplicable("the model has no BOS token")
    text = words.encode("The meaning of life").count(begin)
    if text > 1:
        raise Failed(f"a text begins with {text} BOS tokens")
    if words.chat_template is None:
        return f"a text has {text} BOS token{'s' * (text != 1)}"
    ids = _rendered(words, TALK, False)  # ChatML begins every message with one: only two in a row are wrong
    if any(a == b == begin for a, b in itertools.pairwise(ids)):
        raise Failed(f"a conversation has two {words.token(begin)} in a row: the template writes one too many")
    return f"a text has {text}, a conversation {ids.count(begin)}, never two in a row"


def template(subject: Subject) -> str:
    """What was said is in what the model reads, unchanged, and no control token comes of it."""
    words = subject.words
    _has_template(words)
    ids = _rendered(words, TALK[:1], True)
    shown = words.decode(ids)
    if TALK[0]["content"] not in shown:
        raise Failed(f"the message is not in the rendered conversation: {shown[:200]!r}")
    if ids == _rendered(words, TALK[:1], False) == _of_the_model(words, TALK[0]["content"]):
        raise Failed("the template does not tell a person's message from the model's")
    begun = _rendered(words, TALK, False)
    prompt = _rendered(words, TALK[:1], True)
    special = set(words.special_tokens)
    marks = [i for i, token in enumerate(prompt) if token in special]
    certain = marks[-1] + 1 if marks else 0  # what a template opens after its last mark, as <think>, it may drop again
    if begun[:certain] != prompt[:certain]:
        raise Failed("an answer does not follow the generation prompt: what is trained is not what is asked for")
    before = sum(i in special for i in ids)
    for token in words.special_tokens.values():
        attacked = _rendered(words, [{"role": "user", "content": f"What is a camel? {token} zqx"}], True)
        if sum(i in special for i in attacked) > before:
            raise Failed(f"a person who writes {token} makes a control token")
    return f"{len(ids)} tokens for one message; no text becomes one of {len(special)} control tokens"


def stops(subject: Subject) -> str:
    """The token after an answer ends generation."""
    words = subject.words
    _has_template(words)
    ends = set(stop_ids(subject.path))
    if not ends:
        raise Failed("no token ends a text: generation would never stop (eos_token_id)")
    ids = _rendered(words, TALK, False)
    answer = words.encode(TALK[1]["content"], add_special_tokens=False)[-1]
    if answer not in ids:
        raise NotApplicable("the answer is not in the rendered conversation")
    last = max(i for i, token in enumerate(ids) if token == answer)
    after = [token for token in ids[last + 1 :] if token in words.special_tokens]
    if not after:
        raise Failed("no control token follows an answer: the model cannot learn to stop")
    if after[0] not in ends and _is_pretrained(subject.path):
        raise NotApplicable("the model was not taught to answer yet: it stops at the end of a text")
    if after[0] not in ends:
        named = ", ".join(words.token(i) for i in sorted(ends))
        raise Failed(f"an answer ends with {words.token(after[0])}, but generation stops only at {named}")
    return f"an answer ends with {words.token(after[0])}, and generation stops there"


def _is_pretrained(folder: Path, seen: tuple[Path, ...] = ()) -> bool:
    """Whether the manifests tell of a checkpoint of pre-training, or of one that was converted or rounded since."""
    seen = (*seen, folder.resolve())
    try:
        manifest = read_manifest(folder)
        settings, inputs = manifest["settings"], manifest["inputs"]
        if manifest["kind"] == "model" and inputs:
            before = Path(inputs[0]["path"])
            return before.resolve() not in seen and _is_pretrained(before, seen)  # one may have replaced its source
    except (InputError, KeyError, OSError):
        return False
    return "train" in settings and not settings.get("finetune")


def _has_template(words: Tokenizer) -> None:
    if words.chat_template is None:
        raise NotApplicable("the model has no chat template")


def _rendered(words: Tokenizer, talk: list[dict[str, str]], prompt: bool) -> list[int]:
    try:
        ids: list[int] = words.apply_chat_template(talk, add_generation_prompt=prompt)
    except CamelidError as error:
        raise Failed(str(error)) from None
    return ids


def _of_the_model(words: Tokenizer, content: str) -> list[int] | None:
    """A conversation that the model begins; None where the template lets only a person begin one, as Llama 2's."""
    try:
        ids: list[int] = words.apply_chat_template(
            [{"role": "assistant", "content": content}], add_generation_prompt=False
        )
    except CamelidError:
        return None
    return ids


CHECKS = [
    Check("tokenizer", "a tokenizer of another model, special ids that are not there", tokenizer),
    Check("round trip", "a lost decoder or normalizer", round_trip),
    Check("bos", "a double BOS: some points of every benchmark", bos),
    Check("template", "a template that drops messages, that is trained unlike it is used, or that can be broken out of",
          template),
    Check("stops", "a model that never stops talking", stops),
]  # fmt: skip
