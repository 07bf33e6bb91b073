"""How many tokens a run may have: what the model's context, the cache and the flags leave room for."""

from __future__ import annotations

import argparse

from common.errors import UserError
from common.messages import say
from model import Config
from selective_kv import KVCache


def context_with(policy: KVCache, config: Config) -> int:
    """How many tokens the model was trained to handle. Raises UserError if the cache does not fit the model."""
    context = config.far_context if config.reach and policy.slides else config.context
    if policy.n_exact > context:
        raise UserError(
            f"--sink_size + --window_size is {policy.n_exact}, {policy.n_exact - context} past the model's "
            f"context of {context}"
        )
    return context


def conversation_room(args: argparse.Namespace, policy: KVCache, config: Config) -> int:
    """The most tokens that a conversation may have."""
    context = context_with(policy, config)
    room = args.context or context
    if room < policy.n_exact:
        raise UserError(f"--context {room} is less than --sink_size + --window_size, {policy.n_exact}")
    if room > context and not policy.endless_with(config.reach or None):
        raise UserError(f"--context {room} is {room - context} past the model's context of {context}")
    return room


def new_tokens(args: argparse.Namespace, policy: KVCache, config: Config, longest: int) -> int:
    """How many tokens to write after the longest prompt."""
    context = context_with(policy, config)
    if policy.endless_with(config.reach or None):
        return args.max_new_tokens
    if longest > context:
        raise UserError(
            f"the prompt has {longest} tokens, {longest - context} more than the model's context of {context} "
            "(compress_kv can read on: it keeps only a window)"
        )
    if longest + args.max_new_tokens - 1 <= context:  # the last token is written, not read
        return args.max_new_tokens
    n_new = context - longest + 1
    say(f"writing {n_new} tokens, not {args.max_new_tokens}: the model's context is {context}")
    return n_new
