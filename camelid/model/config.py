"""What shape a LLaMA has: the fields of a Hugging Face `config.json`, and the published sizes by name.

Shapes: LLaMA paper table 2 (arXiv:2302.13971), Llama 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783), and the
`params.json` / `config.json` published with each. A new size is one row in SIZES.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from camelid.errors import InputError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


LARGEST, MOST_LAYERS = 2**31 - 1, 1024  # of any size; a file that says more is broken


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is stretched past the trained context. Field names are Hugging Face's `rope_scaling`.

    linear, dynamic: `factor`. llama3: also `low_freq_factor`, `high_freq_factor`,
    `original_max_position_embeddings`. yarn (arXiv:2309.00071): also `beta_fast`, `beta_slow`, `mscale*`,
    `attention_factor`, `truncate`.
    """

    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a `rope_scaling` or `rope_parameters` dictionary, old spelling (`type`) or new (`rope_type`)."""
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in get_args(RopeType):
            raise InputError(
                f"rope_scaling.rope_type is {kind!r}; camelid knows {', '.join(get_args(RopeType))}. "
                "Opening the model without its scaling would give wrong text, so it is refused."
            )
        known = {f.name for f in fields(cls)} - {"rope_type"}
        values = {name: raw[name] for name in known if raw.get(name) is not None}
        needs = {"linear": ["factor"], "dynamic": ["factor"], "llama3": ["factor"], "yarn": ["factor"]}.get(kind, [])
        for name in needs:
            if name not in values:
                raise InputError(f"rope_scaling of type {kind!r} lacks the field {name!r}")
        for name, value in values.items():
            if name == "truncate":
                if not isinstance(value, bool):
                    raise InputError(f"rope_scaling.truncate must be true or false, not {value!r}")
                continue
            _check_number(f"rope_scaling.{name}", value)
            if name == "factor" and value > LARGEST:
                raise InputError(f"rope_scaling.factor must be a number up to {LARGEST:,}, not {value!s:.40}")
            if name == "original_max_position_embeddings" and value != int(value):
                raise InputError(f"rope_scaling.{name} must be a whole number, not {value!r}")
        return cls(rope_type=kind, **values)

    def to_dict(self) -> dict[str, Any]:
        """The fields that this type of scaling uses, for `config.json`."""
        used = {
            "default": [],
            "linear": ["factor"],
            "dynamic": ["factor", "original_max_position_embeddings"],
            "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
            "yarn": [
                "factor",
                "beta_fast",
                "beta_slow",
                "truncate",
                "attention_factor",
                "mscale",
                "mscale_all_dim",
                "original_max_position_embeddings",
            ],
        }[self.rope_type]
        values = asdict(self)
        return {"rope_type": self.rope_type} | {name: values[name] for name in used if values[name] is not None}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA. Every field has its Hugging Face name and meaning.

    `num_key_value_heads` below `num_attention_heads` is grouped-query attention, 1 is multi-query.
    `head_dim` defaults to hidden_size / num_attention_heads but may differ from it.
    Raises InputError for a shape that cannot be built.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive whole number, not {value!r}")
            most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
            if value > most:
                raise InputError(f"{name} is {value}; no LLaMA has more than {most}")
        self._check_types()
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise InputError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}: change one of them or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2 or self.head_dim < 2:  # type: ignore[operator]
            raise InputError(f"head_dim must be even for RoPE, not {self.head_dim}")
        kind = self.rope_scaling.rope_type
        if kind == "yarn" and self.rope_theta <= 1:
            raise InputError(f"rope_theta must be above 1 where RoPE is stretched by yarn, not {self.rope_theta:g}")
        if kind == "dynamic" and self.head_dim == 2:
            raise InputError("head_dim must be above 2 where RoPE is stretched dynamically")
        if self.num_attention_heads % self.kv_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    def _check_types(self) -> None:
        """Fields that come from files: a wrong type would be found much later, or not at all."""
        size = self.head_dim
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size > LARGEST):
            raise InputError(f"head_dim must be a whole number, not {size!r}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            _check_number(name, getattr(self, name))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for one in value if isinstance(value, list) and name == "eos_token_id" else [value]:
                if one is not None and (isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= LARGEST):
                    raise InputError(f"{name} must be the id of a token, not {value!r}")

    @property
    def kv_heads(self) -> int:
        """`num_key_value_heads`, resolved: never None."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """`head_dim`, resolved: never None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, as a tuple: `eos_token_id` may be one id, several or None."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @classmethod
    def named(cls, size: str, **changes: Any) -> Self:
        """A published size ("7b", "llama-3.2-1b", …) or a laptop one ("15m"), with fields changed by name.

        Raises InputError with the nearest known name.
        """
        if size not in SIZES:
            near = difflib.get_close_matches(size, SIZES, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"no model size named {size!r}{hint} Known sizes: {', '.join(SIZES)}")
        return cls(**(SIZES[size] | changes))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a Hugging Face `config.json` dictionary, in the spellings of transformers 4 and 5.

        Raises InputError for another architecture, and for fields that would change the computation in a way
        this model does not implement: silently ignoring them would give wrong text.
        """
        _refuse_other_models(raw)
        known = {f.name for f in fields(cls)} - {"rope_scaling", "rope_theta"}
        values = {name: raw[name] for name in known if name in raw}
        for required in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if required not in values:
                raise InputError(f"the field {required!r} is missing")
        rope: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            given = raw.get(name) or {}
            if not isinstance(given, Mapping):
                raise InputError(f"{name} is {given!r}, not an object")
            rope |= given
        given = rope.pop("rope_theta", None)
        given = raw.get("rope_theta") if given is None else given
        theta = 10000.0 if given is None else given
        _check_number("rope_theta", theta)
        if raw.get("architectures") == ["LLaMAForCausalLM"] and (raw.get("bos_token_id"), raw.get("eos_token_id")) == (
            0,
            1,
        ):
            # That first conversion's ids are off by one against its own tokenizer: <unk> 0, <s> 1, </s> 2.
            values |= {"bos_token_id": 1, "eos_token_id": 2}
        for name in ("bos_token_id", "pad_token_id"):  # the tutorial's checkpoint writes -1 for "none"
            if isinstance(values.get(name), int) and values[name] < 0:
                values[name] = None
        for name in ("initializer_range", "rms_norm_eps"):
            if values.get(name) is None:
                values.pop(name, None)
        return cls(**values, rope_theta=float(theta), rope_scaling=RopeScaling.from_dict(rope))

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this model: readable by transformers 4 and 5, vLLM and llama.cpp's converter."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        scaling = self.rope_scaling.to_dict()
        values["rope_parameters"] = {"rope_theta": self.rope_theta} | scaling
        values["rope_scaling"] = None if self.rope_scaling.rope_type == "default" else scaling
        extra = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
        }
        return extra | values

    def num_parameters(self) -> int:
        """Weights of the model, counted from the shape alone; `Llama.num_parameters` counts the tensors."""
        d, h, kv, hd, f = (
            self.hidden_size,
            self.num_attention_heads,
            self.kv_heads,
            self.head_size,
            self.intermediate_size,
        )
        attention = d * h * hd + 2 * d * kv * hd + h * hd * d
        biases = self.attention_bias * (h * hd + 2 * kv * hd + d) + self.mlp_bias * (2 * f + d)
        layer = attention + 3 * d * f + 2 * d + biases
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + d


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < sys.float_info.max:
        raise InputError(f"{name} must be a positive number, not {value!s:.40}")


def _refuse_other_models(raw: Mapping[str, Any]) -> None:
    kind = raw.get("model_type", "llama")
    names = raw.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(names, list):
        raise InputError(f"architectures is {names!r}, not a list")
    # "LLaMAForCausalLM" is how decapoda-research spelled it before transformers had settled on a name.
    if kind != "llama" or names[0] not in ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"):
        raise InputError(f"this is a {kind!r} model ({names[0]}); camelid opens LLaMA models only")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"hidden_act is {raw['hidden_act']!r}; a LLaMA uses 'silu'")


def _llama(hidden: int, layers: int, heads: int, kv: int, ffn: int, **more: Any) -> dict[str, Any]:
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
    }
    return shape | more


_V2: dict[str, Any] = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
_V3: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _v31(factor: float) -> dict[str, Any]:
    scaling = RopeScaling("llama3", factor=factor, original_max_position_embeddings=8192)
    return _V3 | {"max_position_embeddings": 131072, "rope_scaling": scaling}


_SMALL: dict[str, Any] = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}

SIZES: dict[str, dict[str, Any]] = {
    # laptop sizes: 32,000 tokens unless the recipe's tokenizer says otherwise
    "1m": _llama(128, 4, 4, 4, 352, **_SMALL),
    "5m": _llama(256, 5, 4, 2, 704, **_SMALL),
    "15m": _llama(288, 6, 6, 6, 768, **_SMALL),
    "42m": _llama(512, 8, 8, 8, 1376, **_SMALL),
    "110m": _llama(768, 12, 12, 12, 2048, **_SMALL),
    "tinyllama": _llama(2048, 22, 32, 4, 5632, rms_norm_eps=1e-5),
    # LLaMA
    "7b": _llama(4096, 32, 32, 32, 11008),
    "13b": _llama(5120, 40, 40, 40, 13824),
    "30b": _llama(6656, 60, 52, 52, 17920),
    "65b": _llama(8192, 80, 64, 64, 22016, rms_norm_eps=1e-5),
    # Llama 2
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, **_V2),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824, **_V2),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672, **_V2),
    # Llama 3, 3.1, 3.2
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336, **_V3),
    "llama-3-70b": _llama(8192, 80, 64, 8, 28672, **_V3),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, **_v31(8.0)),
    "llama-3.1-70b": _llama(8192, 80, 64, 8, 28672, **_v31(8.0)),
    "llama-3.1-405b": _llama(16384, 126, 128, 8, 53248, **_v31(8.0)),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, tie_word_embeddings=True, **_v31(32.0)),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, tie_word_embeddings=True, **_v31(32.0)),
}
