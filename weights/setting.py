"""What `--weights` says: in how many bits each kind of matrix is kept. Needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    from model import Config

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUPS = {8: 0, 4: 128}  # by bits


_GROUPS = (
    "elements that share a scale, in 4 bits also a base; in int8 of matrices in 8 bits too, where 0 is a whole row "
    f"(default: {DEFAULT_GROUPS[4]} in int4, {DEFAULT_GROUPS[8]} in int8)"
)


def _bits(default: int | None, choices: tuple[int | None, ...], help_text: str) -> Any:
    return field(default=default, metadata={"choices": choices, "help": help_text})


@dataclass(frozen=True)
class WeightSetting:
    """Bits of each kind of matrix; 16 is as the model's dtype has it. Norms and biases always are.

    Spelled "int8", "int4", or with what differs from the defaults: "int4:group_size=64,down_bits=8". group_size: None:
    the default of these bits.
    """

    bits: int
    group_size: int | None = _bits(None, (None, 0, *GROUP_SIZES), _GROUPS)
    embedding_bits: int = _bits(8, (8, 16), "of the embedding, and of the head where the two are tied")
    head_bits: int = _bits(8, (4, 8, 16), "of the head, which makes the logits")
    down_bits: int = _bits(0, (0, 4, 8, 16), "of the feed-forward's second matrix (w2); 0: as the others")
    edge_layers: int = _bits(0, (), "so many first layers, and last ones, have 8 bits")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices:
                known = ", ".join(str(choice) for choice in choices if choice is not None)
                raise UserError(f"--weights: {f.name} must be one of {known}, not {value}")
        if self.bits == 4 and self.group_size == 0:
            raise UserError("--weights: group_size must be one of 32, 64, 128 in 4 bits, not 0")
        if self.group_size == DEFAULT_GROUPS[self.bits]:
            object.__setattr__(self, "group_size", None)  # equal settings are equal
        if self.edge_layers < 0:
            raise UserError(f"--weights: edge_layers must not be negative, not {self.edge_layers}")

    def __str__(self) -> str:
        values = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)[1:]]
        changed = [f"{name}={value}" for name, value in values if value != getattr(type(self), name)]
        return f"int{self.bits}" + (":" + ",".join(changed) if changed else "")

    def in_full(self) -> str:
        """The setting with its size of groups, which a file must name, since the default may change."""
        group = self.group_of(self.bits)
        rest = str(dataclasses.replace(self, group_size=None)).partition(":")[2]
        return f"int{self.bits}:group_size={group}" + (f",{rest}" if rest else "")

    def bits_of(self, module: str, config: Config) -> int:
        """Bits of the matrix of a module of `model.Transformer`, by the module's name."""
        if module == "tok_embeddings" or (module == "output" and config.tied_embeddings):
            return self.embedding_bits
        if module == "output":
            return self.head_bits
        _, layer, *_, name = module.split(".")
        if min(int(layer), config.n_layer - 1 - int(layer)) < self.edge_layers:
            return 8
        return self.down_bits or self.bits if name == "w2" else self.bits

    def group_of(self, bits: int) -> int:
        """Elements of a group in a matrix of so many bits; 0: none, a scale a row.

        What has 8 bits among 4 is little, and keeps a scale a row.
        """
        if bits == 8 and self.bits != 8:
            return 0
        default = DEFAULT_GROUPS[bits]
        return default if self.group_size is None else self.group_size or default


def parse_weights(text: str) -> WeightSetting | None:
    """`--weights`: "16" (None: as the checkpoint has them), "int8", "int4:group_size=64". Raises UserError."""
    name, _, rest = text.partition(":")
    known = {f.name: f for f in dataclasses.fields(WeightSetting)[1:]}
    if name not in ("16", "int8", "int4"):
        raise UserError(f"--weights {text!r}: give 16 (as they are), int8 or int4")
    if name == "16":
        if rest:
            raise UserError(f"--weights {text!r}: there is nothing to say of 16 bits")
        return None
    values: dict[str, int] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise UserError(f"--weights {text!r}: {key!r} is none of {', '.join(known)}")
        if not value.isdecimal():
            raise UserError(f"--weights {text!r}: {key} takes a whole number, not {value!r}")
        if key in values:
            raise UserError(f"--weights {text!r}: {key} is said twice")
        values[key] = int(value)
    return WeightSetting(int(name[3:]), **values)


def weights_help(default: str) -> str:
    """What a command line says of `--weights`."""
    fields = dataclasses.fields(WeightSetting)[1:]
    defaults = ["" if f.default is None else f" (default: {f.default})" for f in fields]
    knobs = "; ".join(f"{f.name} {f.metadata['help']}{default}" for f, default in zip(fields, defaults, strict=True))
    return (
        f"bits of the weights: int8, int4, or 16 as they are (default: {default}); "
        f"with settings as in int4:group_size=64,head_bits=16: {knobs}"
    )
