"""Numbers with their protocol: perplexity, BLEU, ROUGE."""

from __future__ import annotations

from camelid.evaluate.bleu import bleu
from camelid.evaluate.perplexity import perplexity
from camelid.evaluate.rouge import rouge

__all__ = ["bleu", "perplexity", "rouge"]
