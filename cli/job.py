"""All that one run of generate.py is, once flags, configs and prompts have been read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint import (
    Checkpoint,
)
from cli.conversation import Conversation
from engine import Sampling
from engine.parallel import Parallel
from engine.saved import SavedCache
from quantize import WeightSetting
from selective_kv import KVCache, Shape
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Output:
    """What a run leaves besides its text, and what it was made from."""

    json: str | None  # a file, or "-"
    profile: str | None
    save_cache: Path | None
    command: list[str]
    files: list[Path | None]  # read beside the checkpoint


@dataclass(frozen=True)
class Job:
    """All that is decided before any memory is taken."""

    checkpoint: Checkpoint
    weights: WeightSetting | None  # in how many bits
    tokenizer: Tokenizer | None
    policy: KVCache
    shape: Shape
    sampling: Sampling
    end_ids: frozenset[int]
    prompts: list[list[int]]  # one per sequence; empty for a conversation
    n_new: int
    chunk: int  # prompt tokens read at once
    echo: bool
    chat: Conversation | None
    ranks: Parallel | None  # where several hold the model together
    saved: SavedCache | None
    interactive: bool
    given: list[str]  # a conversation's first lines
    system: str | None
    random_weights: bool
    seed: int
    reference: bool  # the caches' slow path
    any_bits: bool  # the policy's are still to be chosen, by what fits
    budget: int  # bytes that this run, or each of its ranks, may take
    dry_run: bool
    output: Output
