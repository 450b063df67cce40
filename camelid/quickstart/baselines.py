"""What the model's docstrings must beat: the function's name as words, and the nearest training docstring."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from camelid.quickstart.source import Pair, words


def name_as_words(pair: Pair) -> str:
    """ "get_file_name" -> "Get file name." """
    text = " ".join(words(pair.name)) or pair.name
    return f"{text[0].upper()}{text[1:]}."


class Nearest:
    """The docstring of the training function whose code is closest: cosine of TF-IDF over identifier words,
    the function's name counted three times."""

    def __init__(self, training: Sequence[Pair]) -> None:
        self.training = training
        counts = [self._count(p) for p in training]
        documents = Counter(word for c in counts for word in c)
        self.weight = {w: math.log(len(training) / n) for w, n in documents.items()}
        self.index: dict[str, list[tuple[int, float]]] = {}
        for number, c in enumerate(counts):
            for word, value in self._unit(c).items():
                self.index.setdefault(word, []).append((number, value))

    def __call__(self, pair: Pair) -> str:
        scores: Counter[int] = Counter()
        for word, value in self._unit(self._count(pair)).items():
            for number, other in self.index.get(word, ()):
                scores[number] += value * other  # type: ignore[assignment]
        best = max(scores, key=lambda n: (scores[n], -n), default=0)
        return self.training[best].docstring

    def _count(self, pair: Pair) -> Counter[str]:
        return Counter(words(pair.code) + 2 * words(pair.name))

    def _unit(self, count: Counter[str]) -> dict[str, float]:
        vector = {w: (1 + math.log(n)) * self.weight.get(w, 0.0) for w, n in count.items()}
        norm = math.sqrt(sum(v * v for v in vector.values())) or 1.0
        return {w: v / norm for w, v in vector.items() if v}
