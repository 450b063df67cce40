"""What a recipe may say: each section's keys, their types, ranges and defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from camelid.errors import RecipeError


def _as_list(value: Any) -> Any:
    """ "a,b" is ["a", "b"], and "none" the empty list: easier to type on a command line."""
    if not isinstance(value, str):
        return value
    return [] if value == "none" else [word for part in value.split(",") if (word := part.strip())]


def _are_codes(languages: list[str]) -> list[str]:
    for language in languages:
        if not re.fullmatch("[a-z]{2,3}", language):
            raise ValueError(f"{language!r} is no ISO 639 code such as en or zh")
    return languages


Words = Annotated[list[str], BeforeValidator(_as_list)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)


class ModelSection(_Section):
    """`size` by name, or a shape, or (to fine-tune) `from`, a MODEL."""

    size: str | None = None
    from_: str | None = Field(default=None, alias="from")
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None
    tie_word_embeddings: bool | None = None

    def shape(self) -> dict[str, Any]:
        """The shape fields that were given."""
        return {k: v for k, v in self.model_dump().items() if v is not None and k not in ("size", "from_")}


# What a size's name says of a shape.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
         "head_dim")  # fmt: skip


class DataSection(_Section):
    tokens: str | list[str] | None = None  # one tokens folder, or several with weights
    weights: list[float] = []
    files: Words = []
    held_out: float = Field(default=0.0, ge=0, lt=1)  # the share of rows (to 65,536 tokens) or records, only measured
    max_bad_share: float = Field(default=0.1, ge=0, le=1)  # of a file's rows, before it is refused


LENGTHS = ("steps", "epochs", "minutes")
# What is heeded with one value of another key only.
HEEDED_WITH = {"decay_share": ("schedule", "wsd"), "muon_learning_rate": ("optimizer", "muon")}


class TrainSection(_Section):
    """Defaults are LLaMA's own (paper, table 2 and section 2.3) where the paper states them."""

    steps: int | None = Field(default=None, ge=1)  # how long: by steps, epochs or minutes
    epochs: float | None = Field(default=None, gt=0)  # times through the data
    minutes: float | None = Field(default=None, gt=0)  # of training
    sequence_length: int = Field(default=2048, ge=2)  # tokens a row
    global_batch_tokens: int = Field(default=4_194_304, ge=2)  # a step, over all processes and micro-batches
    micro_batch_rows: int | None = Field(default=None, ge=1)  # at once in one process
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0)
    muon_learning_rate: float = Field(default=0.02, gt=0)  # of the layers' matrices under muon
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    min_learning_rate_share: float = Field(default=0.1, ge=0, le=1)  # of the rate, at the end
    decay_share: float = Field(default=0.2, gt=0, le=1)  # of a wsd run
    warmup_steps: int = Field(default=2000, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)  # of matrices, times learning_rate, under muon too
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0)  # the gradient's norm
    z_loss: float = Field(default=0.0, ge=0)  # weight of the squared log of softmax's sum
    skip_sigma: float = Field(default=6.0, ge=0)  # deviations above the last losses, from which a step is skipped
    max_skips: int = Field(default=8, ge=1)  # in a row, before the run goes back to its last checkpoint
    max_rollbacks: int = Field(default=2, ge=0)  # before the run stops
    dtype: Literal["auto", "float32", "bfloat16", "float8"] = "auto"  # of products; float8: large layers' on a GPU
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    compile: bool | None = None  # each layer; by default where a GPU is
    memory_gib: float | None = Field(default=None, gt=0)  # what the run may use; by default what the machine has free
    threads: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        said = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} each say how long to train: keep one")
        return self

    def check_heeded(self, given: Iterable[str]) -> None:
        """Raise RecipeError for a key that would not be looked at; where `given` settings replace what decides that,
        for one of them only."""
        for key, (other, wanted) in HEEDED_WITH.items():
            said = f"train.{key}" in given if f"train.{other}" in given else key in self.model_fields_set
            if said and getattr(self, other) != wanted:
                raise RecipeError(f"train.{key} is for train.{other} {wanted}, and {getattr(self, other)} ignores it: "
                                  "take it out")  # fmt: skip


class ParallelSection(_Section):
    """How torchrun's processes share the work: `tensor` of them split each layer's matrices, `context` of them each
    row, the rest is data parallel (FSDP2)."""

    tensor: int = Field(default=1, ge=1)  # processes that share each layer's matrices
    context: int = Field(default=1, ge=1)  # processes that share each row, for long ones


class CheckpointSection(_Section):
    every: int | None = Field(default=None, ge=1)  # steps; by default only the end is kept
    keep: int = Field(default=2, ge=2)  # the newest
    background: bool = True  # written while training goes on


class LogSection(_Section):
    out: str = "runs/run"
    tensorboard: bool = False


# The methods, or adapters, that a key is for, where it is not for all.
OF_METHOD = {
    **dict.fromkeys(("rank", "alpha", "rslora", "targets"), ("lora", "dora", "qlora")),
    **dict.fromkeys(("bits", "group"), ("qlora",)),
    "beta": ("dpo", "orpo", "simpo", "kto"),
    "margin": ("simpo",),
    **dict.fromkeys(("desirable", "undesirable"), ("kto",)),
    **dict.fromkeys(("samples", "reward", "temperature", "max_new_tokens"), ("grpo",)),
}


class FinetuneSection(_Section):
    """How a model is taught. `method` is what is learned: whole answers (full, or through an adapter: lora, dora,
    qlora), which of two is better (dpo, orpo, kto, simpo), or what is rewarded (grpo), through `adapter`.

    `template` is a named chat template, "own" the model's. An adapter has `rank`, `alpha`, `targets`; `bits` and
    `group` are qlora's, of the frozen weights: without `group`, eight bits have one scale a row, and a CPU with VNNI
    and no AMX multiplies them as bytes, and in the loss of answers the output projection. `beta` weighs a preference
    (of DPO and KTO against the reference, of ORPO its odds), `margin` is SimPO's gamma, `desirable` and `undesirable`
    KTO's weights.
    For grpo each question is answered `samples` times a step, in at most `max_new_tokens` at `temperature`; `reward` is
    1 for an answer that ends by itself and whose last number (`number`), or all of it (`exact`), is the data's.
    """

    method: Literal["full", "lora", "dora", "qlora", "dpo", "orpo", "kto", "simpo", "grpo"] = "full"
    adapter: Literal["auto", "none", "lora", "dora", "qlora"] = "auto"
    template: Literal["own", "llama2", "llama3", "chatml", "alpaca"] = "own"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    rslora: bool = False
    targets: Words = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    bits: Literal[4, 8] = 4
    group: int | None = Field(default=None, ge=8)  # of a row's weights that share a scale; 64, or of 8 bits whole rows
    beta: float = Field(default=0.1, gt=0)
    margin: float = Field(default=0.5, ge=0)
    desirable: float = Field(default=1.0, gt=0)
    undesirable: float = Field(default=1.0, gt=0)
    samples: int = Field(default=8, ge=2)
    reward: Literal["number", "exact"] = "number"
    temperature: float = Field(default=1.0, gt=0, le=100)
    max_new_tokens: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _said(self) -> Self:
        if self.method in ("lora", "dora", "qlora") and self.adapter not in ("auto", self.method):
            raise ValueError(f"adapter {self.adapter} contradicts method {self.method}: take one of them out")
        return self

    def check_heeded(self, keys: Iterable[str]) -> None:
        """Raise RecipeError for one of the keys that were given that the method would not look at."""
        for key in sorted(OF_METHOD.keys() & keys):
            if not {self.method, self.stands_on} & set(OF_METHOD[key]):
                wanted = f"finetune.{key} is for {' or '.join(OF_METHOD[key])}"
                raise RecipeError(f"{wanted}, and {self.method} ignores it: take one of them out")

    @property
    def preference(self) -> bool:
        """Whether answers are compared, not copied."""
        return self.method in ("dpo", "orpo", "kto", "simpo")

    @property
    def stands_on(self) -> str:
        """The kind of adapter, "none" when all weights are learned."""
        if self.adapter != "auto":
            return self.adapter
        if self.preference or self.method == "grpo":
            return "lora"
        return "none" if self.method == "full" else self.method


class EvaluateSection(_Section):
    """What a run measures on what it does not learn from (`data.held_out`): its loss every so many steps, and, where a
    model is fine-tuned, with `metric`, its answers to the questions of `files` (or of the held-out records), before and
    after training.

    `number` compares the last number of an answer with the reference's (GSM8K), `exact` the whole text.
    """

    every: int | None = Field(default=None, ge=1)
    metric: Literal["none", "bleu", "rouge", "exact", "number"] = "none"
    files: Words = []
    examples: int = Field(default=100, ge=1)
    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=100)  # 0 is greedy; else answers are drawn, each by its number
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)  # small models write in circles without (1.1)
    frequency_penalty: float = Field(default=0.0, ge=-100, le=100)  # or this (0.3), which leaves the end token alone
    tokenize: str = "13a"  # sacrebleu's tokenizer; zh is ROUGE's too


class SourceSection(_Section):
    """One source of a corpus. How often its documents count: `epochs`, or by `weight` (its share of the mixture)."""

    name: str = Field(pattern=r"^[\w.-]+$")
    inputs: list[str]
    weight: float | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0, le=100)


class CorpusSection(_Section):
    """How raw files become documents. All but `workers` and `engine` decide what comes out.

    `filters`: "auto" (basic, and the web's rules for web pages), or some of basic, c4, gopher_quality,
    gopher_repetition and fineweb; `limits`: thresholds of their rules by name (a wrong name is answered with all).
    `deduplicate`: "exact", "near" (which includes exact) or "none"; `deduplicate_lines` also removes lines seen in an
    earlier document. `decontaminate`: evaluation files to keep out.
    """

    text_field: str = "auto"
    extractor: Literal["trafilatura", "resiliparse"] = "trafilatura"
    min_characters: int = Field(default=50, ge=0)
    filters: Words = ["auto"]
    limits: dict[str, float] = {}
    languages: Annotated[Words, AfterValidator(_are_codes)] = []
    mask_pii: bool = True
    deduplicate: Literal["none", "exact", "near"] = "near"
    near_threshold: float = Field(default=0.7, ge=0.3, le=1)
    deduplicate_lines: bool = False
    decontaminate: Words = []
    perplexity_reference: Words = []
    max_perplexity_quantile: float = Field(default=0.95, gt=0, le=1)
    sources: list[SourceSection] = []
    workers: int | None = Field(default=None, ge=1)
    engine: Literal["local", "ray"] = "local"


class Recipe(_Section):
    """One run."""

    corpus: CorpusSection = CorpusSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    finetune: FinetuneSection | None = None
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="after")
    def _stretches_are_alike(self) -> Self:
        parts, size = self.parallel.context, self.train.sequence_length
        if left := size % parts:
            raise ValueError(f"parallel.context {parts} must divide train.sequence_length {size}: try {size - left}")
        return self

    @model_validator(mode="after")
    def _something_is_measured(self) -> Self:
        if self.evaluate.every and not self.data.held_out:
            raise ValueError("evaluate.every measures what data.held_out sets aside: set it to a share, such as 0.05")
        return self

    def settings(self) -> dict[str, Any]:
        """The recipe as resolved, for the manifest."""
        return self.model_dump(exclude_none=True, by_alias=True, exclude={"corpus"})
