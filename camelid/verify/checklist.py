"""A check is a function of the model: it returns what it saw, or raises Failed or NotApplicable. The report names for
each what it would have caught."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import torch

from camelid.errors import CamelidError, InputError
from camelid.formats.adapter import is_adapter
from camelid.formats.checkpoint import Checkpoint
from camelid.formats.load import load, load_tokenizer, open_model, resolve
from camelid.model.llama import Llama
from camelid.model.lora import merge
from camelid.model.quantized import make_dense
from camelid.tokenizer.template_child import TemplateChild, limited
from camelid.tokenizer.tokenizer import Tokenizer

Part = TypeVar("Part")
Status = Literal["pass", "fail", "not_applicable"]
TEMPLATE_SECONDS = 5.0  # for one conversation


class Failed(Exception):
    """The check found what it looks for."""


class NotApplicable(Exception):
    """There is nothing here for the check to look at."""


class Subject:
    """The model under test. Its parts are opened when a check first asks; a part that does not open fails the check
    that is about opening it, and the others do not apply."""

    def __init__(self, source: str | Path) -> None:
        self.source, self.path = str(source), resolve(source)
        self._templates: TemplateChild | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_model(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        words = load_tokenizer(self.path)
        self._templates = limited(words, TEMPLATE_SECONDS)  # a stranger's may never end
        return words

    def close(self) -> None:
        """End the process that renders its chat template."""
        if self._templates is not None:
            self._templates.close()

    @cached_property
    def model(self) -> Llama:
        """The reference: in float32, on the CPU, rounded layers as the full numbers that they stand for, an adapter
        merged into its base."""
        with torch.inference_mode(False):  # whoever asks first: its weights are turned and put back
            model: Llama = load(self.path, dtype=torch.float32)
            make_dense(model)
            for name in list(model.adapters):
                merge(model, name)
        return model

    @property
    def adapted(self) -> bool:
        """Whether it is an adapter, whose weights are its base's for the most part."""
        return self.path.is_dir() and is_adapter(self.path)

    @property
    def words(self) -> Tokenizer:
        """The tokenizer, for checks that are not about opening it."""
        return _opened(lambda: self.tokenizer, "the tokenizer does not open")

    @property
    def weights(self) -> Llama:
        """The model, for checks that are not about opening it."""
        return _opened(lambda: self.model, "the weights do not open")


def _opened(part: Callable[[], Part], otherwise: str) -> Part:
    try:
        return part()
    except CamelidError:
        raise NotApplicable(otherwise) from None


@dataclass(frozen=True)
class Check:
    """`name`, what it looks at, and the fault that it would catch."""

    name: str
    catches: str
    look: Callable[[Subject], str]


@dataclass(frozen=True)
class Found:
    """What came of one check."""

    name: str
    status: Status
    detail: str
    catches: str


def run(subject: Subject, checks: Iterable[Check]) -> Iterator[Found]:
    """The checks one after the other, after which the subject is closed. A check that cannot be finished has failed."""
    try:
        yield from (_found(subject, check) for check in checks)
    finally:
        subject.close()


def _found(subject: Subject, check: Check) -> Found:
    status: Status = "pass"
    try:
        detail = check.look(subject)
    except NotApplicable as reason:
        status, detail = "not_applicable", str(reason)
    except (Failed, InputError) as fault:
        status, detail = "fail", str(fault)
    except Exception as error:  # whatever a broken model provokes is a finding, not the end of the report
        status, detail = "fail", f"it could not be finished: {type(error).__name__}: {error}"
    return Found(check.name, status, " ".join(detail.split()), check.catches)
