"""Numbers with their protocol: perplexity, BLEU, ROUGE, multiple choice."""

from __future__ import annotations

from camelid.evaluate.bleu import bleu
from camelid.evaluate.choice import choice
from camelid.evaluate.perplexity import perplexity
from camelid.evaluate.rouge import rouge

__all__ = ["bleu", "choice", "perplexity", "rouge"]
