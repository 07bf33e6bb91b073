"""A model's shape as others write it down: Hugging Face's config.json, Meta's params.json, a name.

Each becomes a `model.Config` or a `UserError`. What the model could not compute faithfully is refused
here by name (another RoPE scaling, quantised weights), never ignored.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from pathlib import Path
from typing import Any

from checkpoint.packed import packing_of
from common.errors import UserError, printable
from model import CONFIGS, Config, RopeScaling


def note(message: str) -> None:
    """Print to standard error what a user should know but need not act on."""
    print(f"note: {printable(message)}", file=sys.stderr)


LARGEST = sys.float_info.max
LARGEST_WHOLE = 2**53  # the floats past it are not every whole number


class Fields:
    """A JSON object that knows its file, so that a missing or odd value is told with both names."""

    def __init__(self, fields: dict[str, Any], path: Path) -> None:
        self.fields, self.path = fields, path

    def get(self, name: str, default: Any = None) -> Any:
        """Its value; the default where it is missing or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def number(self, name: str, default: float | None = None, least: float = -LARGEST, most: float = LARGEST) -> float:
        value = self.get(name, default)
        if value is None:
            raise self.error(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{name} is {value!r}, not a number")
        if not -LARGEST <= value <= LARGEST:  # json reads NaN, Infinity and 400 digits too
            raise self.error(f"{name} is not a finite number")
        if value < least:
            raise self.error(f"{name} is {value}, and must be at least {least}")
        if value > most:
            raise self.error(f"{name} is {value}, and must be at most {most}")
        return float(value)

    def whole(self, name: str, default: int | None = None, least: float = -LARGEST_WHOLE) -> int:
        value = self.number(name, default, least, LARGEST_WHOLE)
        if value != int(value):
            raise self.error(f"{name} is {value}, not a whole number")
        return int(value)

    def inner(self, name: str) -> Fields:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(f"{name} is {value!r}, not an object")
        return Fields(value, self.path)

    def refuse(self, name: str, value: object) -> None:
        raise self.error(f"{name} {value!r} is not supported")

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}: {message}")


def make_config(path: Path, **shape: Any) -> Config:
    """A Config; what it says is impossible (sizes that do not divide, ...) is the file's fault."""
    if shape["n_head"] < 1:  # Config divides by it before it looks
        raise UserError(f"{path}: config: n_head must be positive, not {shape['n_head']}")
    try:
        return Config(**shape)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def config_from_hugging_face(fields: dict[str, Any], path: Path) -> Config:
    """From a config.json as transformers 4 or 5 writes it (models/{llama,mistral,qwen2,qwen3})."""
    f = Fields(fields, path)
    kind = f.get("model_type")
    if kind not in MODEL_TYPES:
        raise f.error(f"model_type {kind!r} is not supported ({', '.join(MODEL_TYPES)} are)")
    packing_of(f)  # raises where nobody reads such weights
    attention_bias = kind in ("llama", "qwen3") and bool(f.get("attention_bias"))
    if f.get("hidden_act", "silu") != "silu":
        f.refuse("hidden_act", f.get("hidden_act"))
    n_head = f.whole("num_attention_heads")
    theta, scaling = _rope(f)
    return make_config(
        path,
        vocab_size=f.whole("vocab_size"),
        dim=f.whole("hidden_size"),
        n_layer=f.whole("num_hidden_layers"),
        n_head=n_head,
        n_kv_head=f.whole("num_key_value_heads", n_head),
        ffn_dim=f.whole("intermediate_size"),
        head_dim=f.whole("head_dim", 128 if kind == "qwen3" else 0),
        norm_eps=f.number("rms_norm_eps", 1e-6, least=0),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(f.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or kind == "qwen2",
        wo_bias=attention_bias,
        ffn_bias=kind == "llama" and bool(f.get("mlp_bias")),
        **_context(f, kind, scaling),
        qk_norm=kind == "qwen3",
    )


def _base(f: Fields, default: float) -> float:
    theta = f.number("rope_theta", default)
    if theta <= 0:
        raise f.error(f"rope_theta is {theta}, not a positive number")
    return theta


def _rope(f: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling. transformers 4 has rope_theta and rope_scaling, 5 has rope_parameters.

    A rope_scaling that was added to a newer config replaces all of rope_parameters, its base too, as in transformers.
    """
    rope, before = f.inner("rope_scaling"), f.inner("rope_parameters")
    if not rope.fields:
        rope = before
    theta = _base(rope, _base(f, 10000.0))
    lost = before.get("rope_theta")
    if lost is not None and lost != theta:
        note(f"{f.path.parent.name}: rope_scaling replaces rope_parameters, and with it rope_theta {lost} by {theta:g}")
    if rope.number("partial_rotary_factor", f.number("partial_rotary_factor", 1.0)) != 1:
        raise f.error("partial_rotary_factor other than 1 is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.fields.values()):
        kind = "per layer"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise f.error(f"rope scaling {kind!r} is not supported (default, linear, llama3 and yarn are)")
    factor = rope.number("factor")
    if factor < 1:
        raise f.error(f"rope scaling factor {factor} is below 1")
    if kind == "linear":
        return theta, RopeScaling(kind, factor)
    original = rope.whole("original_max_position_embeddings", f.whole("max_position_embeddings"), least=1)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    else:
        low, high = rope.number("beta_slow", 1.0) or 1.0, rope.number("beta_fast", 32.0) or 32.0
        if low <= 0:
            raise f.error(f"beta_slow is {low}, not a positive number")
    if high <= low:
        names = ("high_freq_factor", "low_freq_factor") if kind == "llama3" else ("beta_fast", "beta_slow")
        raise f.error(f"{names[0]} {high} is not above {names[1]} {low}")
    if kind == "llama3":
        return theta, RopeScaling(kind, factor, low, high, original)
    return theta, RopeScaling(
        kind, factor, low, high, original, (), _yarn_magnitude(rope, factor), bool(rope.fields.get("truncate", True))
    )


def _yarn_magnitude(rope: Fields, factor: float) -> float:
    """How much longer YaRN makes queries and keys: stated, or 0.1 ln(factor) + 1 (section 3.4 of the paper).

    DeepSeek's mscale and mscale_all_dim weigh the logarithm, as in transformers' modeling_rope_utils.py.
    """
    stated = rope.get("attention_factor")
    if stated is not None:
        return rope.number("attention_factor", least=0)
    scale, scale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    log = 0.1 * math.log(factor)
    if not (scale and scale_all):
        return log + 1
    if log * scale_all + 1 == 0:
        raise rope.error(f"mscale_all_dim {scale_all} makes attention infinite")
    return (log * scale + 1) / (log * scale_all + 1)


def _context(f: Fields, kind: str, scaling: RopeScaling | None) -> dict[str, int]:
    """The positions a model was trained for; or its attention's window where that is shorter, and both."""
    context = f.whole("max_position_embeddings")
    if scaling is not None and scaling.kind == "yarn":  # model cards add the scaling and leave the context as it was
        context = max(context, int(min(scaling.factor * scaling.original_context, LARGEST_WHOLE)))
    window = _window(f, kind)
    if not 0 < window < context:
        return {"context": context}
    n_layer, n_slide = f.whole("num_hidden_layers"), _sliding_layers(f, kind)
    if n_slide == 0:
        return {"context": context}
    if n_slide < n_layer:  # no cache here is right for both kinds of layers past the window
        note(
            f"{f.path.parent.name}: {n_slide} of {n_layer} layers attend to the last {window} tokens only, "
            f"so its context is {window}"
        )
        return {"context": window}
    return {"context": window, "reach": window, "far_context": context}


def _window(f: Fields, kind: str) -> int:
    """sliding_window, where the family has one; 0: none."""
    if kind != "mistral" and not (kind in ("qwen2", "qwen3") and f.get("use_sliding_window")):
        return 0
    unsaid = 4096 if "sliding_window" not in f.fields else 0  # transformers' default; null is none
    return f.whole("sliding_window", unsaid, least=0)


def _sliding_layers(f: Fields, kind: str) -> int:
    """How many layers slide. Of Qwen 2 and 3: those that layer_types says, or from max_window_layers on."""
    n_layer = f.whole("num_hidden_layers")
    if kind == "mistral":
        return n_layer
    kinds = f.get("layer_types")
    if isinstance(kinds, list):
        return sum(kind == "sliding_attention" for kind in kinds)
    return max(0, n_layer - f.whole("max_window_layers", 28, least=0))


def config_from_params(fields: dict[str, Any], path: Path, vocab_size: int, tied: bool) -> Config:
    """From Meta's params.json, or Mistral's. It states neither context nor tying: the former is told by the RoPE.

    vocab_size: rows of the embedding (Llama 2 writes -1). The feed-forward size is computed as in
    llama/model.py of meta-llama/llama.
    """
    f = Fields(fields, path)
    for name in ("moe", "quantization", "vision_encoder"):
        if f.get(name):
            f.refuse(name, f.get(name))
    dim, n_head = f.whole("dim"), f.whole("n_heads")
    theta, scaling, context = _base(f, 10000.0), None, 4096
    if f.get("use_scaled_rope"):
        # 3.2 states no factor of its own; Meta's 1B and 3B have 32, the larger ones 8
        factor = f.number("rope_scaling_factor", 32.0 if dim <= 3072 else 8.0, least=1)
        scaling, context = RopeScaling("llama3", factor), 131072
    elif theta == 500000.0:
        context = 8192
    elif theta == 1000000.0 or "sliding_window" in fields:  # Mistral 7B
        context = 32768
    window = f.whole("sliding_window", 0, least=0)
    slides = {"reach": window, "far_context": context} if 0 < window < context else {}
    ffn_dim = int(f.number("ffn_dim_multiplier", 1.0, most=LARGEST_WHOLE) * (8 * dim // 3))
    multiple = f.whole("multiple_of", 256, least=1)
    return make_config(
        path,
        vocab_size=vocab_size,
        dim=dim,
        n_layer=f.whole("n_layers"),
        n_head=n_head,
        n_kv_head=f.whole("n_kv_heads", n_head),
        ffn_dim=f.whole("hidden_dim", -(-ffn_dim // multiple) * multiple),
        context=window if slides else context,
        head_dim=f.whole("head_dim", 0),
        norm_eps=f.number("norm_eps", least=0),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=tied,
        **slides,
    )


_NOISE = {"meta", "hf", "instruct", "chat", "it", "base", "v0.2"}  # mistral-7b is v0.2; others differ


def _key(name: str) -> str:
    """What is left of a model's name when spelling is set aside: Meta-Llama-3-8B-Instruct is llama38b."""
    words = re.split(r"[^a-z0-9.]+", name.lower())
    return re.sub(r"[^a-z0-9]", "", "".join(word for word in words if word not in _NOISE))


def find_name(name: str) -> str | None:
    """The name in CONFIGS that `name` means, whatever its case, dashes or publisher; None if none."""
    keys = {_key(known): known for known in CONFIGS}
    return keys.get(_key(name.rstrip("/").split("/")[-1]))


def named_config(name: str) -> tuple[str, Config]:
    """The name and the shape that --model means; UserError lists the nearest names."""
    known = find_name(name)
    if known is None:
        near = difflib.get_close_matches(name.lower(), CONFIGS, n=3, cutoff=0.4) or list(CONFIGS)
        raise UserError(f"--model {name}: unknown; did you mean {', '.join(near)}?")
    return known, CONFIGS[known]
