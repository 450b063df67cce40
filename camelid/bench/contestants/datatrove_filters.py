"""datatrove's side of the data race: its Gopher quality, Gopher repetition and C4 filters, in that order."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter


def main() -> None:
    with open(sys.argv[2], encoding="utf-8") as file:
        documents = [Document(text=json.loads(line)["text"], id=str(n)) for n, line in enumerate(file)]
    size = sum(len(d.text.encode()) for d in documents)
    filters = [GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter()]
    for one in filters:
        one.filter(Document(text="A first call loads the tokenizer.", id="warm"))
    decisions = []
    started = time.perf_counter()
    for document in documents:
        reason = ""
        for one in filters:
            verdict = one.filter(document)
            if verdict is not True:
                reason = verdict[1] if isinstance(verdict, tuple) else "dropped"
                break
        decisions.append(reason)
    seconds = time.perf_counter() - started
    result = {"value": size / seconds / 1e6, "unit": "MB/s", "version": version("datatrove"), "decisions": decisions}
    print(json.dumps(result))


main()
