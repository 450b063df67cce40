"""What a TOML recipe may say, and errors that name the key, its line and the nearest valid key.

`camelid pretrain small.toml train.steps=400` overrides a value; the resolved recipe goes into the run's manifest.
"""

from __future__ import annotations

from camelid.recipe.load import find, load, parse
from camelid.recipe.sections import (
    LENGTHS,
    SIZES,
    CorpusSection,
    DataSection,
    EvaluateSection,
    FinetuneSection,
    ParallelSection,
    Recipe,
    SourceSection,
    TrainSection,
)

__all__ = [
    "LENGTHS",
    "SIZES",
    "CorpusSection",
    "DataSection",
    "EvaluateSection",
    "FinetuneSection",
    "ParallelSection",
    "Recipe",
    "SourceSection",
    "TrainSection",
    "find",
    "load",
    "parse",
]
