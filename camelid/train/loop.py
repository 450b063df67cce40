"""The training loop: take a batch, step, log, save; skip, roll back, stop and resume.

Which data a step sees depends only on the position, one integer (`tokens/order.py`), and nothing here is drawn at
random, so a resumed run takes up the very next sequence, and the same seed, threads and machine give the same weights
bit for bit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from camelid.artifact import MANIFEST, described, identity
from camelid.disk import write_atomic
from camelid.errors import CamelidError, InputError, RecipeError
from camelid.formats.load import finished
from camelid.kernels.device import uncompiled
from camelid.kernels.memory import give_back, large_blocks
from camelid.report.progress import Advance, progress
from camelid.tokens.batch import IGNORE, PADDING, Batch
from camelid.tokens.loader import batches
from camelid.train import checkpoint, plan
from camelid.train.checkpoint import LoopState, Saver
from camelid.train.guard import WINDOW, Stop, stoppable
from camelid.train.log import Log
from camelid.train.optimizer import optimizer_for
from camelid.train.parallel import Ranks, anywhere, release, rows_of_all, together, told
from camelid.train.schedule import drawn, learning_rate
from camelid.train.step import Job, Taken, autocast, compiled, rows_per_step, take_float8, train_step

# What may change when a run goes on; everything else decides what the run computes.
FREE = ("log", "checkpoint", "evaluate", "parallel", "train.threads", "train.micro_batch_rows", "train.max_skips",
        "train.max_rollbacks", "train.activation_checkpointing", "train.memory_gib")  # fmt: skip
# What may too, but is told: it changes what the run computes from here on, and cures a run that goes astray, or is what
# another machine can do.
CURES = ("train.learning_rate", "train.muon_learning_rate", "train.skip_sigma", "train.dtype")

OFTEN = 4  # times the data is read, up to which it teaches about as much as new data would (arXiv:2305.16264)


def planned_steps(job: Job, who: Ranks, stop: Stop) -> int:
    """How many updates the recipe asks for, the same on every rank."""
    settings = job.recipe.train
    seconds = plan.seconds_per_step(job, who, stop) if settings.minutes else None
    found = plan.steps_wanted(settings, len(job.source), rows_per_step(settings), seconds)
    if found is None:
        raise InputError("the recipe does not say how long to train: set train.steps, train.epochs or train.minutes")
    return anywhere(who, found) if settings.minutes else found


def check_begun(out: Path, resume: bool) -> None:
    """Raise InputError when another run is in the folder of one that begins."""
    if finished(out) and not resume:
        raise InputError(f"{out} already holds a run: continue it with --resume, or choose another log.out")


def run(job: Job, resume: bool = False, who: Ranks | None = None) -> dict[str, Any]:
    """Train to the end of the recipe. Returns steps, loss, tokens, tokens_per_second, checkpoint, digest, memory and
    speed planned and measured, and what stopped the run early, if anything did."""
    who = who or Ranks()
    if job.recipe.train.threads:
        torch.set_num_threads(job.recipe.train.threads)
    out = Path(job.recipe.log.out)
    check_begun(out, resume)
    with stoppable() as stop, _alone(out, who), told(who, 0):
        return _Run(job, out, who, stop).go(resume)


class _Run:
    """One run's moving parts."""

    def __init__(self, job: Job, out: Path, who: Ranks, stop: Stop) -> None:
        self.job, self.out, self.who, self.stop = job, out, who, stop
        self.rows = rows_per_step(job.recipe.train, who.data_world)
        self.state = LoopState()
        self.saver = Saver(out, job.recipe.checkpoint.keep)
        # As they were when they were read: a later save asks nothing of files that may have gone.
        self.inputs = [described(path) for path in job.inputs] if who.rank == 0 else []

    def go(self, resume: bool) -> dict[str, Any]:
        job, out = self.job, self.out
        together(self.who)  # some read their part more slowly than a collective waits
        last = self._newest() if resume else None
        if resume and not last and not finished(out) and not job.quiet and self.who.rank == 0:
            print(f"{out} holds no checkpoint to resume: a new run begins", file=sys.stderr)
        if resume and not last and finished(out):
            raise InputError(f"{out}: no checkpoint is whole, there is nothing to go on from. Choose another log.out")
        for change in same_run(last, job) if last else ():
            if self.who.rank == 0:
                print(f"camelid: {change} from here on", file=sys.stderr)
        take_float8(job)
        self.planned, refused = plan.fit(job, self.who)
        if refused:
            raise RecipeError(refused)
        with large_blocks(plan.keeps_memory(job.model)):
            return self._from(last)

    def _from(self, last: Path | None) -> dict[str, Any]:
        """Train from a checkpoint, or from the start."""
        job, out, recipe = self.job, self.out, self.job.recipe
        self.optimizer = optimizer_for(job.model, recipe.train)
        if self.who.rank == 0:
            checkpoint.sweep(out)
            kept = recipe.checkpoint.keep if recipe.checkpoint.every else 0
            checkpoint.preflight(out, self.planned["checkpoint"], kept)
        torch.manual_seed(recipe.train.seed)
        if last:
            self.state = checkpoint.restore(last, job.model, self.optimizer)
            together(self.who)
        job.model.train()
        if compiled(self.who.device, recipe.train):
            for layer in job.model.layers:
                layer.compile()
        if not last:
            self.state.steps = planned_steps(job, self.who, self.stop)
        quiet = job.quiet or self.who.rank > 0
        if not quiet:
            print(f"learning rate {drawn(self.state.steps, recipe.train)}", file=sys.stderr)
            times = self.state.steps * self.rows / len(job.source)
            if times > OFTEN and job.objective.level:  # else each reading has other answers
                print(f"the data is read {times:.1f} times: more of it would teach more", file=sys.stderr)
            wanted, length = recipe.train.global_batch_tokens, recipe.train.sequence_length
            if wanted % length:
                read = f"a step reads {self.rows:,} sequences of {length:,}, {self.rows * length:,} tokens of the"
                print(f"{read} {wanted:,} that train.global_batch_tokens asks for", file=sys.stderr)
        with Log(out, recipe, job.model, self.who, self.state) as log:
            with progress(out.name, self.state.steps, quiet, begun=self.state.step) as advance:
                try:
                    self._train(log, advance)
                finally:
                    self.saver.wait()
            with told(self.who, self.state.step):
                together(self.who)
            return self._summary(log)

    def _train(self, log: Log, advance: Advance) -> None:
        state, every = self.state, self.job.recipe.checkpoint.every
        incoming = self._incoming()
        if state.step == 0 and self.job.check:
            self._check(log)
        while state.step < state.steps:
            with told(self.who, state.step + 1):
                state.position, batch = next(incoming)
                rate = learning_rate(state.step, state.steps, self.job.recipe.train)
                taken = train_step(self.job.model, self.optimizer, batch, self.job.recipe.train, rate, self.who,
                                   state.recent, self.job.objective)  # fmt: skip
                self._count(batch, taken)
                advance(state.step, log.step(state, taken, rate, self.job.objective.told))
                if taken.skipped:
                    self._dump(taken)
                if state.in_a_row >= self.job.recipe.train.max_skips:
                    self._roll_back(taken, log)
                    incoming = self._incoming()
                    continue
                if self._checks(state.step):
                    self._check(log)
                asked = anywhere(self.who, self.stop.signal)
                # Amid a bad stretch nothing is saved: going back there would be going nowhere.
                due = bool(every) and state.step % (every or 1) == 0 and not state.in_a_row
                if state.step == state.steps or asked or due:
                    self._save(last=bool(asked))
                if asked:
                    log.stopped = signal.Signals(asked).name
                    return

    def _checks(self, step: int) -> bool:
        every = self.job.recipe.evaluate.every
        return self.job.check is not None and (step == self.state.steps or (every is not None and step % every == 0))

    def _check(self, log: Log) -> None:
        """Measure the model on what it does not learn from. Before a save: what a checkpoint holds was measured."""
        if self.job.check:
            started = time.monotonic()
            give_back()  # its blocks are of other sizes than a step's, and each would keep the gaps of the other
            # A check generates: lengths that change with every token are not worth compiling for.
            with torch.no_grad(), autocast(self.job.model.device, self.job.recipe.train.dtype), uncompiled():
                found = self.job.check(self.job.model)
            release(self.job.model)
            give_back()
            log.checked(self.state, found, time.monotonic() - started)

    def _incoming(self) -> Iterator[tuple[int, Batch]]:
        workers = 2 if self.who.device.type == "cuda" else 0
        return batches(self.job.source, self.state.position, self.rows, rank=self.who.data_rank,
                       world=self.who.data_world, workers=workers)  # fmt: skip

    def _count(self, batch: Batch, taken: Taken) -> None:
        state = self.state
        state.step += 1
        state.tokens += taken.supervised
        rows = rows_of_all(self.who, batch.fingerprints().to(self.who.device)).cpu().numpy().tobytes()
        state.chain = hashlib.blake2b(state.chain.encode() + rows, digest_size=8).hexdigest()
        if taken.skipped:
            state.skipped += 1
            state.in_a_row += 1
        else:
            state.in_a_row = 0
            state.recent = [*state.recent, taken.loss][-WINDOW:]

    def _dump(self, taken: Taken) -> None:
        """The offending rows as text, each rank its own, for a person to look at."""
        name = f"step-{self.state.step:08}" + (f"-rank-{self.who.rank}" if self.who.world > 1 else "")
        (self.out / "skipped").mkdir(parents=True, exist_ok=True)
        texts = [f"step {self.state.step} was not applied: {taken.skipped}"]
        rows = taken.batch
        for ids, labels, documents in zip(rows.input_ids, rows.labels, rows.document_ids, strict=True):
            supervised = int((labels != IGNORE).sum())
            texts.append(f"--- {supervised} supervised tokens\n{self.job.tokenizer.decode(ids[documents != PADDING])}")
        write_atomic(self.out / "skipped" / f"{name}.txt", "\n".join(texts) + "\n")
        if self.who.rank == 0:
            where = self.out / "skipped" / f"{name}.txt"
            print(f"camelid: step {self.state.step} skipped: {taken.skipped}; its text is in {where}", file=sys.stderr)

    def _roll_back(self, taken: Taken, log: Log) -> None:
        """Back to the last checkpoint's weights; the data goes on after the bad stretch."""
        state, settings = self.state, self.job.recipe.train
        last = self._newest()
        if last is None or state.rollbacks >= settings.max_rollbacks:
            bad, state.in_a_row = state.in_a_row, 0
            tried = f"after {state.rollbacks} returns to a checkpoint"
            if last is None or not settings.max_rollbacks:  # no bad step was applied: what was learned is worth keeping
                self._save(last=True)
                tried = f"the weights before them are in {checkpoint.folder_of(self.out, state.step)}"
            rate = "train.muon_learning_rate" if settings.optimizer == "muon" else "train.learning_rate"
            raise CamelidError(
                f"{bad} steps in a row were bad ({taken.skipped}; {tried}). Go on with --resume and a lower "
                f"{rate} or a higher train.skip_sigma, or look at the texts in {self.out / 'skipped'}"
            )
        before = checkpoint.restore(last, self.job.model, self.optimizer)
        together(self.who)
        before.position, before.tokens, before.chain = state.position, state.tokens, state.chain
        before.skipped, before.rollbacks, before.in_a_row = state.skipped, state.rollbacks + 1, 0
        self.state.__dict__.update(before.__dict__)
        log.rolled_back(self.state)

    def _newest(self) -> Path | None:
        """The newest whole checkpoint, the first rank's choice once nothing is being written."""
        self.saver.wait()
        together(self.who)
        found = checkpoint.newest_good(self.out) if self.who.rank == 0 else None
        together(self.who)  # it reads whole checkpoints, for which no other collective would wait
        step = anywhere(self.who, int(found.name.removeprefix("step-")) if found else -1)
        return checkpoint.folder_of(self.out, step) if step >= 0 else None

    def _save(self, last: bool) -> None:
        self.saver.wait()
        together(self.who)
        last = last or self.state.step == self.state.steps  # nothing goes on beside it, so it needs no copy
        background = self.job.recipe.checkpoint.background and not last
        first = self.who.rank == 0
        give_back()  # the copy takes the place of what a step left, not one beside it
        taken = checkpoint.snapshot(self.job.model, self.optimizer, self.state, keep=first, copy=background)
        if first:
            self.saver.save(taken, background, tokenizer=self.job.tokenizer, inputs=self.inputs,
                            settings=self.job.recipe.settings(), generation=self.job.generation,
                            facts=self.job.facts)  # fmt: skip
        if not background:
            together(self.who)  # else the others would wait in the next step, and not as long

    def _summary(self, log: Log) -> dict[str, Any]:
        folder = checkpoint.folder_of(self.out, self.state.step)
        figures = log.figures()
        return {
            "steps": self.state.step,
            **figures,
            "tokens": self.state.tokens,
            "checkpoint": str(folder),
            "digest": checkpoint.weights_digest(folder) if self.who.rank == 0 else None,
            "skipped_steps": self.state.skipped,
            "planned": {"memory_bytes": self.planned["peak"]},
            "measured": {"memory_bytes": plan.peak_memory(self.who), "tokens_per_second": figures["tokens_per_second"]},
        }


def same_run(last: Path, job: Job) -> list[str]:
    """Returns what of CURES was changed. Raises InputError naming the setting or the data that is not what the
    checkpoint was trained with."""
    changed = []
    manifest = json.loads((last / MANIFEST).read_text(encoding="utf-8"))
    then, now = _flat(manifest["settings"]), _flat(json.loads(json.dumps(job.recipe.settings())))
    if then.get("train.compile") is False:  # what a run without a word on it said before GPUs compiled by themselves
        then["train.compile"] = now.get("train.compile")
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) == now.get(key) or key.startswith(FREE):
            continue
        if key in CURES:
            changed.append(f"{key} was {then.get(key)!r} and is {now.get(key)!r}")
        else:
            raise InputError(
                f"--resume: {key} was {then.get(key)!r} and is now {now.get(key)!r}: a resumed run goes on as it "
                "began. Put it back, or begin a new run with another log.out"
            )
    known = [entry.get("sha256") for entry in manifest["inputs"]]  # in order: the project may have moved
    if len(known) != len(job.inputs):
        raise InputError(f"--resume: this run began with {len(known)} inputs, and there are {len(job.inputs)} now")
    for path, then_sha in zip(job.inputs, known, strict=True):
        if then_sha is not None and identity(path.resolve()) != then_sha:
            raise InputError(
                f"--resume: {path} is not the data that this run began with: its hash changed. "
                "Restore it, or begin a new run with another log.out"
            )
    return changed


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@contextmanager
def _alone(out: Path, who: Ranks) -> Iterator[None]:
    """Only one run at a time writes into a run folder. Raises InputError when another one does."""
    if who.rank:
        with nullcontext():
            yield
        return
    fresh = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = out / ".lock"
    try:
        with lock.open("w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{out}: another process is training into it: choose another log.out") from None
            except OSError as error:  # some file systems of several machines have no locks
                print(
                    f"camelid: {out} cannot be locked ({error.strerror}): start no second run into it", file=sys.stderr
                )
            yield
            lock.unlink(missing_ok=True)
    except BaseException:
        if fresh and not any(p.name != ".lock" for p in out.iterdir()):  # nothing came of it
            lock.unlink(missing_ok=True)
            out.rmdir()
        raise
