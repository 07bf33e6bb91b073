"""Saved caches as what is timed: their flags."""

from __future__ import annotations

import argparse
from itertools import product

from common.errors import UserError
from engine.saved import SavedCache
from kv_cache import format_policy


def load_saved(args: argparse.Namespace) -> None:
    """Take caches, batch and context from the files of --load_cache; else `shapes`, batches and contexts, from
    --shapes, or --batch and --context. Raises UserError where flags say them too."""
    said = args.caches or args.context or args.batch or args.shapes or args.kernels or args.largest_batch
    if args.load_cache and said:
        raise UserError("--load_cache says which caches, how many sequences and how long: no other flag for that")
    if args.load_cache and (args.prefill or args.peer):
        raise UserError("--load_cache does not go with --prefill or --peer")
    batches, args.context, args.saved = args.batch or [1], sorted(set(args.context or [256, 2048, 8000])), {}
    args.shapes = list(dict.fromkeys(args.shapes or product(batches, args.context)))
    lengths: set[tuple[int, ...]] = set()
    for path in args.load_cache:
        saved = SavedCache(path)
        lengths.add(tuple(map(len, saved.tokens)))
        args.saved[format_policy(saved.policy())] = saved
    if len(lengths) > 1 or any(len(set(found)) > 1 for found in lengths):
        raise UserError("--load_cache: the sequences of all files must have one length, to be compared")
    if lengths:
        found = lengths.pop()
        args.caches, args.shapes = list(args.saved), [(len(found), found[0])]
