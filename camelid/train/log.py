"""What a run tells: a line a step and a check in metrics.jsonl, live figures, a report, TensorBoard if asked."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Self, TextIO

import torch

from camelid.disk import write_atomic
from camelid.errors import MissingExtra
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.recipe import Recipe
from camelid.report.page import Curve, Page
from camelid.report.progress import Pace
from camelid.train.checkpoint import LoopState
from camelid.train.parallel import Ranks
from camelid.train.schedule import drawn
from camelid.train.step import Taken

METRICS = "metrics.jsonl"
# Dense bfloat16 peaks of the makers' data sheets, FLOP/s.
GPU_PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "4090": 165e12,
}  # fmt: skip


def flops_per_token(config: LlamaConfig, sequence_length: int, frozen: bool = False) -> float:
    """Of one training step: 6 for each weight that is multiplied (the embedding's lookup is not), 4 for a frozen one
    under an adapter (the adapter's own are not counted), and causal attention, 6 * layers * sequence * heads *
    head_dim (half of the PaLM paper's appendix B, which counts the masked half too)."""
    multiplied = config.num_parameters() - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    width = config.num_attention_heads * config.head_size
    return (4.0 if frozen else 6.0) * multiplied + 6.0 * config.num_hidden_layers * sequence_length * width


def peak_flops(device: torch.device) -> tuple[float, str]:
    """FLOP/s that utilisation is measured against, and what it is: a GPU's data sheet, or a product timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in GPU_PEAKS.items():
            if known in name:
                return peak, f"{known} bf16 dense peak, {peak / 1e12:.0f} TFLOP/s"
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or device.type == "cuda" else torch.float32
    a = torch.ones(1024, 1024, dtype=dtype, device=device)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    peak = 2 * 1024**3 / best
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return peak, f"torch.mm {str(dtype)[6:]} 1024^3 here{threads}, {peak / 1e9:.0f} GFLOP/s"


class Log:
    """The records of a run, written as it goes; rank 0 writes, the others only count."""

    def __init__(self, out: Path, recipe: Recipe, model: Llama, who: Ranks, state: LoopState) -> None:
        self.out, self.recipe, self.who = out, recipe, who
        self.stopped: str | None = None
        teaching = recipe.finetune
        self.unit = "mean over pairs or verdicts" if teaching and teaching.preference else "nats per token"
        if teaching and teaching.method == "grpo":
            self.unit = "minus advantage times log-probability, mean over answers"
        self.unit += ", z-loss included in the run's own" if recipe.train.z_loss else ""
        self.records = earlier(out / METRICS, state.step)
        self._held_out = _last_held_out(self.records)
        self.pace: Pace
        self.tokens = self.positions = 0  # learned from, and computed, since this process began
        self._flops = flops_per_token(model.config, recipe.train.sequence_length, frozen=bool(model.adapters))
        self._steps = state.steps
        self.peak, self.denominator = peak_flops(who.device)
        self._file: TextIO | None = None
        self._board: Any = None

    def __enter__(self) -> Self:
        if self.who.rank == 0:
            write_atomic(self.out / METRICS, "".join(json.dumps(record) + "\n" for record in self.records))
            self._file = (self.out / METRICS).open("a", encoding="utf-8")
            if self.recipe.log.tensorboard:
                self._board = _board(self.out)
        self.pace = Pace(0, 0)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # On a full disk the first error is the one to hear of.
        with suppress(OSError) if kind else nullcontext():
            if self._file:
                self._file.close()
                self._report()
            if self._board:
                self._board.close()

    def step(self, state: LoopState, taken: Taken, rate: float, told: Mapping[str, float]) -> str:
        """Record a step and what its objective told; returns what a progress line says about it."""
        self.tokens += taken.supervised
        self.positions += taken.positions
        self.pace.mark(self.tokens, self.positions)
        speed, used = self._measured(*self.pace.of_late())
        finite = math.isfinite(taken.loss) and math.isfinite(taken.norm)
        record: dict[str, Any] = {
            "step": state.step, "loss": taken.loss if finite else None, "gradient_norm": taken.norm if finite else None,
            "learning_rate": rate, "tokens": state.tokens, "tokens_per_second": speed, "utilization": used,
            "rows": state.chain,
        }  # fmt: skip
        if taken.skipped:
            record["skipped"] = taken.skipped
        if told:
            record["told"] = dict(told)
        self._write(record)
        loss = f"loss {taken.loss:.3f}" if finite else "skipped"
        if self._held_out is not None:
            loss += f" (held-out {self._held_out:.3f})"
        if "reward" in told:
            loss = f"reward {told['reward']:.2f}  {loss}"
        return f"{loss}  {speed:,.0f} tokens/s  MFU {used:.0%}"

    def checked(self, state: LoopState, found: Mapping[str, float], seconds: float) -> None:
        """Record figures of what is not learned from, under `held_out`. The `seconds` they took are not training's."""
        self.pace.pause(seconds)
        self._held_out = found.get("loss")
        self._write({"step": state.step, "held_out": dict(found)})

    def rolled_back(self, state: LoopState) -> None:
        """Record a return to a checkpoint: the steps after it count no more."""
        self.records = [r for r in self.records if r["step"] <= state.step]
        self._held_out = _last_held_out(self.records)
        self._write({"step": state.step, "rolled_back": state.rollbacks, "rows": state.chain})

    def _overall(self) -> tuple[float, float]:
        """Tokens a second and utilisation of this process's steps; if it made none, as the last record has them."""
        if self.positions:
            return self._measured(*self.pace.on_the_whole())
        last: dict[str, Any] = next((r for r in reversed(self.records) if "tokens_per_second" in r), {})
        return last.get("tokens_per_second", 0.0), last.get("utilization", 0.0)

    def _measured(self, tokens: float, positions: float) -> tuple[float, float]:
        """Of a pace: tokens a second, and the share of the machine's product that its positions take. More than all of
        it: the product was timed while something else ran, and is timed again."""
        needed = positions * self._flops / self.who.world
        if needed > self.peak:
            self.peak, self.denominator = max((self.peak, self.denominator), peak_flops(self.who.device))
        return round(tokens, 1), round(needed / self.peak, 4)

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self._file:
            print(json.dumps(record), file=self._file, flush=True)
        if self._board:
            for kind in ("held_out", "told"):
                for name, value in record.get(kind, {}).items():
                    self._board.add_scalar(f"{kind}/{name}", value, record["step"])
            for name in ("loss", "gradient_norm", "learning_rate", "tokens_per_second"):
                if record.get(name) is not None:
                    self._board.add_scalar(name, record[name], record["step"])

    def figures(self) -> dict[str, Any]:
        """The last loss, speed and utilisation of the whole, its denominator, and the signal that ended the run."""
        steps = [r for r in self.records if "loss" in r]
        good = [r for r in steps if r["loss"] is not None]
        speed, used = self._overall()
        found = {
            "loss": good[-1]["loss"] if good else None,
            "tokens_per_second": speed,
            "utilization": {"value": used, "of": self.denominator},
        }
        if checks := [r for r in self.records if "held_out" in r]:
            found["held_out"] = {"before": checks[0]["held_out"], "after": checks[-1]["held_out"]}
        return found | ({"stopped_by": self.stopped} if self.stopped else {})

    def _report(self) -> None:
        page = Page(f"Run {self.out.name}")
        steps = [r for r in self.records if r.get("loss") is not None]
        x = [float(r["step"]) for r in steps]
        if steps:
            speed, used = self._overall()
            page.text(
                f"{steps[-1]['step']:,} of {self._steps:,} steps, {steps[-1]['tokens']:,} supervised tokens, "
                f"loss {steps[-1]['loss']:.4f}, {speed:,.0f} tokens/s; {used:.1%} of {self.denominator}"
            )
        checks = [r for r in self.records if "held_out" in r]
        curves = {name: _curve(f"held-out {name}", checks, "held_out", name) for name in _names(checks, "held_out")}
        apart = [curves.pop(name) for name in list(curves) if name.startswith("loss")]
        losses = [Curve("loss", x, [r["loss"] for r in steps]), *apart]
        page.plot(f"Training loss, {self.unit}", losses, x="step")
        for name in _names(steps, "told"):
            curve = _curve("of each step", steps, "told", name)
            page.plot(_worded(name), [curve, *([curves.pop(name)] if name in curves else [])], x="step")
        for name, curve in curves.items():
            page.plot(f"Held-out {_worded(name).lower()}", [curve], x="step")
        page.plot("Gradient norm before clipping", [Curve("norm", x, [r["gradient_norm"] for r in steps])], x="step")
        page.plot("Learning rate", [Curve("rate", x, [r["learning_rate"] for r in steps])], x="step")
        page.pre(drawn(self._steps, self.recipe.train))
        if skipped := [(r["step"], r["skipped"]) for r in self.records if "skipped" in r]:
            page.heading("Steps that were not applied")
            page.table(["step", "why"], skipped)
        page.pre(json.dumps(self.recipe.settings(), indent=1))
        page.write(self.out / "report.html")


def _last_held_out(records: Sequence[dict[str, Any]]) -> float | None:
    """The loss that the last check found, where it told one."""
    return next((r["held_out"].get("loss") for r in reversed(records) if "held_out" in r), None)


def _names(records: Sequence[dict[str, Any]], kind: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.get(kind, {})))


def _curve(title: str, records: Sequence[dict[str, Any]], kind: str, name: str) -> Curve:
    """A figure where there is one: a run that was gone on with may tell others than it began with."""
    there = [r for r in records if name in r.get(kind, {})]
    return Curve(title, [float(r["step"]) for r in there], [r[kind][name] for r in there])


def _worded(name: str) -> str:
    return name.replace("_", " ").capitalize()


def applied(out: Path) -> list[dict[str, Any]]:
    """The records of a run's steps that have a loss, in order; what a return to a checkpoint undid is left out."""
    return [record for record in earlier(out / METRICS) if record.get("loss") is not None]


def earlier(path: Path, step: int | None = None) -> list[dict[str, Any]]:
    """Records of an earlier part of the run, up to the step it goes on from; half a line at the end is no record."""
    found: list[dict[str, Any]] = []
    if step == 0 or not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "rolled_back" in record:
            found = [r for r in found if r["step"] <= record["step"]]
        if step is None or record["step"] <= step:
            found.append(record)
    return found


def _board(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", "tensorboard", "log.tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"))
