"""Build a corpus folder: clean every unit, find what says the same, write what is left, close the books.

All intermediate results lie in `.NAME.building` beside the output, under a plan that fingerprints inputs and settings.
A run that was killed goes on where it stopped; the output folder appears complete or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.artifact import new_folder, read_manifest, write_manifest
from camelid.corpus import decontaminate, dedup, filters, minhash, mixture
from camelid.corpus.account import Account, total
from camelid.corpus.dedup import Store
from camelid.corpus.engine import Engine, engine_named
from camelid.corpus.finish import SHARDS, finish
from camelid.corpus.read import find_files
from camelid.corpus.unit import DONE, Unit, plan, process
from camelid.disk import write_atomic
from camelid.errors import InputError
from camelid.recipe import CorpusSection
from camelid.report.progress import progress

VERSION = 1  # of the files in the work folder
NOT_OUTPUT = {"workers", "engine"}  # settings that change nothing in what comes out


def build(
    inputs: Sequence[str | Path], out: str | Path, settings: CorpusSection | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Make the corpus folder `out` from files, folders and globs, or from the settings' sources.

    Returns documents and bytes (read, kept, dropped and quarantined by reason), the digest of the kept texts in order
    and `out`. Raises InputError for bad settings or inputs, and when no document is kept.
    """
    settings, target = settings or CorpusSection(), Path(out).resolve()  # "." has no name
    filters.check_names(settings.filters, settings.limits)
    sources = _sources(inputs, settings)
    started = time.monotonic()
    units = plan(sources)
    stats = _stats(units, settings)
    planned = _fingerprint(units, stats, settings)

    def unchanged() -> None:
        if changed := sorted({path for path, *_ in set(stats) ^ set(_stats(units, settings))}):
            raise InputError(
                f"an input changed while it was read: {', '.join(changed[:3])}{' …' * (len(changed) > 3)}. Build again "
                "when nothing writes to it any more, or leave it out"
            )

    with new_folder(target, "corpus") as folder, _work_folder(target, planned) as work:
        engine = engine_named(settings.engine, settings.workers)
        stages = Stages(work, units, settings, engine, quiet, unchanged)
        account, digest, groups = stages.run(folder)
        summary = account.to_dict()
        if not account.documents.kept:
            shutil.rmtree(work)  # there is nothing to go on with
            raise InputError(f"no document was kept: {json.dumps(summary['documents'])}")
        checked = decontaminate.record(settings.decontaminate)
        result = {"documents": summary["documents"], "bytes": summary["bytes"], "digest": digest}
        facts = {
            **result, "text_bytes": account.text_bytes, "languages": summary["languages"], "pii": summary["pii"],
            "near_duplicate_clusters": len(np.unique(groups[:, 1])), "decontaminated": checked,
            "mixture": mixture.table(stages.kept_by_origin, settings.sources), "seconds": time.monotonic() - started,
        }  # fmt: skip
        from camelid.corpus.report import write_report

        write_report(folder, target.name, account, facts, settings, groups)
        files = sorted({span.path for unit in units for span in unit.spans})
        files += _beside(settings)
        unchanged()  # the manifest has their hashes
        write_manifest(folder, "corpus", files, settings.model_dump(exclude=NOT_OUTPUT), **facts)
    shutil.rmtree(_work_path(target), ignore_errors=True)
    return {**result, "text_bytes": account.text_bytes, "out": str(out)}


def _sources(inputs: Sequence[str | Path], settings: CorpusSection) -> list[tuple[str, Sequence[str | Path]]]:
    if bool(inputs) == bool(settings.sources):
        raise InputError("name the inputs on the command line or as [[corpus.sources]] of a recipe, one of the two")
    mixture.check(settings.sources)
    if inputs:
        return [("input", inputs)]
    return [(source.name, source.inputs) for source in settings.sources]


def _work_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.building")


@contextmanager
def _work_folder(target: Path, fingerprint: str) -> Iterator[Path]:
    """The work folder of this plan: an interrupted run's with the same plan, or a fresh one. One process at a time."""
    work = _work_path(target)
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is building {target} at this moment") from None
        plan_file = work / "plan"
        if not plan_file.exists() or plan_file.read_text(encoding="utf-8") != fingerprint:
            for old in work.iterdir():
                if old.name != "lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            write_atomic(plan_file, fingerprint)
        yield work


def _stats(units: Sequence[Unit], settings: CorpusSection) -> list[tuple[str, int, int]]:
    """The files that are read: path, size and time."""
    used = [*{s.path for u in units for s in u.spans}, *_beside(settings)]
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in used if p.exists())


def _fingerprint(units: Sequence[Unit], stats: Sequence[tuple[str, int, int]], settings: CorpusSection) -> str:
    """What decides the output: files by path, size and time, settings, and the version of this code's files."""
    spans = [(u.source, str(s.path.resolve()), s.start, s.end) for u in units for s in u.spans]
    plain = json.dumps([VERSION, spans, stats, settings.model_dump(exclude=NOT_OUTPUT)], default=str)
    return hashlib.sha256(plain.encode()).hexdigest()


def _beside(settings: CorpusSection) -> list[Path]:
    """The files that decide what is kept: evaluation sets, and the reference for perplexity."""
    sets = [Path(name).expanduser() for name in settings.decontaminate]
    return [*sets, *(find_files(settings.perplexity_reference) if settings.perplexity_reference else [])]


class Stages:
    """The stages in order, over one work folder. `unchanged` raises when the inputs are no longer what they were."""

    def __init__(
        self, work: Path, units: Sequence[Unit], settings: CorpusSection, engine: Engine, quiet: bool,
        unchanged: Callable[[], None],
    ) -> None:  # fmt: skip
        self.work, self.units, self.settings, self.engine, self.quiet = work, units, settings, engine, quiet
        self.unchanged = unchanged
        self.kept_by_origin: dict[str, dict[str, int]] = {}

    def run(self, folder: Path) -> tuple[Account, str, NDArray[np.int64]]:
        """Write the shards into `folder`; returns the closed account, the digest and the near-duplicate pairs."""
        model = self._perplexity_model()
        self._each("cleaning", process, [(u, self.work, self.settings, model) for u in self.units])
        self.unchanged()  # they have been read for the last time
        done = [json.loads((self.work / u.folder / DONE).read_text(encoding="utf-8")) for u in self.units]
        store = Store(self.work, tuple(u.folder for u in self.units), tuple(d["rows"] for d in done))
        copies, near = self._duplicates(store)
        lines = self._lines(store, copies, near)
        self._each("writing", finish, [(u.folder, int(s), self.work, copies, near, lines)
                                       for u, s in zip(self.units, store.starts, strict=False)])  # fmt: skip
        return self._collect(folder, near)

    def _each(self, label: str, function: Callable[..., None], tasks: Sequence[tuple[Any, ...]]) -> None:
        with progress(label, len(tasks), self.quiet) as advance:
            for finished in self.engine(function, tasks):
                advance(finished)

    def _perplexity_model(self) -> Path | None:
        if not self.settings.perplexity_reference:
            return None
        from camelid.corpus.ngram import train_on_files

        path = self.work / "ngram.npz"
        train_on_files(self.settings.perplexity_reference, path, self.settings.max_perplexity_quantile)
        return path

    def _duplicates(self, store: Store) -> tuple[Path, Path]:
        """Files with (dropped, kept) ids: exact copies, and near ones."""
        copies_file, near_file = self.work / "copies.npy", self.work / "near.npy"
        if not copies_file.exists():
            found = dedup.exact_copies(store) if self.settings.deduplicate != "none" else np.empty((0, 2), np.int64)
            dedup.save(copies_file, found)
        if self.settings.deduplicate != "near":
            dedup.save(near_file, np.empty((0, 2), np.int64))
        elif not near_file.exists():
            dedup.save(near_file, minhash.clusters(self._similar(store, np.load(copies_file))))
        return copies_file, near_file

    def _similar(self, store: Store, copies: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pairs of documents at least near_threshold alike."""
        bands = [self.work / f"band-{b:02}.npy" for b in range(minhash.BANDS)]
        self._each("comparing bands", dedup.band_candidates, [(store, b, path) for b, path in enumerate(bands)])
        pairs_file = self.work / "candidates.npy"
        count = dedup.merge_candidates(bands, copies, pairs_file)
        starts = range(0, count, dedup.PAIRS_AT_ONCE)
        parts = [self.work / f"similar-{start:012}.npy" for start in starts]
        self._each("comparing pairs", dedup.verify, [
            (store, pairs_file, start, self.settings.near_threshold, path)
            for start, path in zip(starts, parts, strict=True)
        ])  # fmt: skip
        return np.concatenate([np.load(p) for p in parts] or [np.empty((0, 2), np.int64)])

    def _lines(self, store: Store, copies: Path, near: Path) -> Path | None:
        if not self.settings.deduplicate_lines:
            return None
        path = self.work / "repeated_lines.npy"
        if not path.exists():
            dropped = np.concatenate([np.load(file)[:, 0] for file in (copies, near)])
            hashes, first = dedup.repeated_lines(store, dropped)
            dedup.save(path, np.stack((hashes.view(np.int64), first)))
        return path

    def _collect(self, folder: Path, near: Path) -> tuple[Account, str, NDArray[np.int64]]:
        """Number the shards that hold documents, and add the accounts up."""
        digest, accounts, shards = hashlib.sha256(), [], 0
        for unit in self.units:
            done = json.loads((self.work / unit.folder / "finished.json").read_text(encoding="utf-8"))
            accounts.append(Account.from_dict(done["account"]))
            origin = self.kept_by_origin.setdefault(unit.source, {"documents": 0, "bytes": 0})
            origin["documents"] += done["rows"]
            origin["bytes"] += accounts[-1].text_bytes
            digest.update(done["digest"].encode())
            if done["rows"]:
                shutil.copyfile(self.work / unit.folder / "final.parquet", folder / SHARDS.format(shards))
                shards += 1
        account = total(accounts)
        account.check()
        return account, digest.hexdigest(), np.load(near)


def documents(corpus: str | Path) -> Iterator[str]:
    """The texts of a corpus folder, in order; each as often as its mixture says.

    Raises InputError when it is not a finished corpus.
    """
    folder = Path(corpus)
    manifest = read_manifest(folder)
    if manifest["kind"] != "corpus":
        raise InputError(f"{folder} is not a corpus: make one with `camelid corpus build`")
    epochs = {name: row["epochs"] for name, row in manifest.get("mixture", {}).items()}
    yield from mixture.repeated(_rows(folder), epochs)


def _rows(folder: Path) -> Iterator[tuple[str, str]]:
    """(text, origin) of every document."""
    import pyarrow.parquet as pq

    for shard in sorted(folder.glob("documents-*.parquet")):
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(columns=["text", "origin"], batch_size=256):
                yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)
