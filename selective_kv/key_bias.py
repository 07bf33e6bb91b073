"""A key bias kept out of tiles: what all keys of a layer have in them, turned by their positions.

Qwen 2 and 2.5 add a bias b to their keys before RoPE, so that the key at position p is R(p) (W x + b), and b may be a
hundred times as long as W x is in a channel. Where RoPE turns slowly, R(p) b hardly changes over a tile of 128 tokens:
it goes into the base of a channel, and costs nothing. Where it turns fast, a channel swings by 2 |b| within the tile,
its steps become as wide as that asks for, and after a Hadamard rotation those of all channels do.

So tiles store the key less R(p) b, and a score gets q · R(p) b back: nothing is lost, whatever b is. Only the pairs of
channels in which it counts are taken out, at most `PAIRS` of a KV head: those that swing the most, and none of a head
in which it would not show. As S + 128 i + t is the position of token t of tile i, R(p) b = R(t) (R(S + 128 i) b):

    turned   R(S + 128 i) b, two numbers (u, w) of a pair and tile
    within   cos and sin of a pair's angle at t = 0 to 127, rounded to float16: the same for all tiles

    of the key, in channel j:                 u cos - w sin
    in channel j + head_dim / 2:              w cos + u sin
    of the score:                             (q1 u + q2 w) cos + (q2 u - q1 w) sin

What is taken out and what is given back are made of the same rounded numbers, so rounding them costs no accuracy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selective_kv.formats import TILE

PAIRS = 8

# The sum of squares by which a head's bias swings within a tile, over head_dim, from which on it is taken out. 1: as
# much as keys whose elements are about 1. At 4 bits that makes the error of attention a fifth larger, at 4 it doubles.
LEAST_SWING = 1.0


class KeyBias(NamedTuple):
    """What is kept out of the tiles of one layer's keys; all sequences share it."""

    pairs: Tensor  # int32 [n_kv_head, PAIRS]: the channels j; 0 where a head has fewer
    within: Tensor  # float16 [n_kv_head, TILE, 2 * PAIRS]: cos and sin of each pair
    turned: Tensor  # float32 [n_kv_head, n_tile, PAIRS, 2]: u and w; 0 where a head has fewer

    def dense(self, tiles: slice, head_dim: int) -> Tensor:
        """What the keys of some tiles have in them: float32 [n_kv_head, n_tile, TILE, head_dim]."""
        u, w = self.turned[:, tiles, None].unbind(-1)  # [n_kv_head, n_tile, 1, PAIRS]
        cos, sin = self.within.float()[:, None].unflatten(-1, (PAIRS, 2)).unbind(-1)  # [n_kv_head, 1, TILE, PAIRS]
        out = torch.zeros(*u.shape[:2], TILE, head_dim, device=u.device)
        channel = self.pairs.long()[:, None, None].expand(*out.shape[:3], PAIRS)
        out.scatter_add_(-1, channel, u * cos - w * sin)  # adds: where there is no pair, nothing to channel 0
        return out.scatter_add_(-1, channel + head_dim // 2, w * cos + u * sin)

    def taken_out(self, k: Tensor, tiles: slice) -> Tensor:
        """k [..., n_kv_head, n_tile, TILE, head_dim], the keys of some tiles, without it: in k's dtype."""
        return (k - self.dense(tiles, k.shape[-1])).to(k.dtype)

    def scores(self, q: Tensor, n_tile: int) -> Tensor:
        """The bias' part of the products of q with the keys of the first n_tile tiles.

        q: float32 [n_kv_head, group, head_dim], not rotated by Hadamard. Returns [n_kv_head, group, n_tile, TILE].
        """
        channel = self.pairs.long()[:, None].expand(*q.shape[:2], PAIRS)
        q1, q2 = (q.gather(-1, at)[:, :, None] for at in (channel, channel + q.shape[-1] // 2))
        u, w = self.turned[:, None, :n_tile].unbind(-1)
        terms = torch.stack((q1 * u + q2 * w, q2 * u - q1 * w), -1).flatten(-2)  # [n_kv_head, group, n_tile, 2 * PAIRS]
        return terms @ self.within.float()[:, None].transpose(-1, -2)


def swing(frequencies: Tensor) -> Tensor:
    """How much of a vector's square changes over a tile where it turns by `frequencies`: from 0, none, to 1, all."""
    angle = torch.arange(TILE, device=frequencies.device)[:, None] * frequencies
    return 1 - angle.cos().mean(0) ** 2 - angle.sin().mean(0) ** 2


def key_bias(bias: Tensor, frequencies: Tensor, sink_size: int, n_tile: int) -> KeyBias | None:
    """What to keep out of n_tile tiles after sink_size sinks; None where that would not show in any head.

    bias: [n_kv_head, head_dim], as it is added before RoPE; frequencies: [head_dim / 2], radians that a pair turns per
    position. Waits for the device. On the meta device it is a `KeyBias`, whatever the bias may be.
    """
    n_kv_head, head_dim = bias.shape
    if bias.is_meta:
        return KeyBias(
            torch.empty(n_kv_head, PAIRS, dtype=torch.int32, device="meta"),
            torch.empty(n_kv_head, TILE, 2 * PAIRS, dtype=torch.float16, device="meta"),
            torch.empty(n_kv_head, n_tile, PAIRS, 2, device="meta"),
        )
    frequencies = frequencies.double().cpu()
    value = bias.double().cpu().unflatten(-1, (2, -1)).transpose(-1, -2)  # [n_kv_head, head_dim / 2, 2]
    energy = value.square().sum(-1) * swing(frequencies)
    n = min(PAIRS, head_dim // 2)
    most, pairs = energy.topk(n)
    worth = most.sum(-1, keepdim=True) >= LEAST_SWING * head_dim
    if not worth.any():
        return None
    chosen = torch.where(worth[..., None], value.gather(1, pairs[..., None].expand(-1, -1, 2)), 0.0)
    pairs, frequency = pairs.where(worth, 0), frequencies[pairs]  # [n_kv_head, n]
    angle = torch.arange(TILE)[:, None] * frequency[:, None]
    within = torch.stack((angle.cos(), angle.sin()), -1)  # [n_kv_head, TILE, n, 2]
    angle = (sink_size + TILE * torch.arange(n_tile))[:, None] * frequency[:, None]  # [n_kv_head, n_tile, n]
    cos, sin, (u, w) = angle.cos(), angle.sin(), chosen[:, None].unbind(-1)
    turned = torch.stack((u * cos - w * sin, w * cos + u * sin), -1)
    missing = PAIRS - n
    return KeyBias(
        torch.nn.functional.pad(pairs, (0, missing)).int().to(bias.device),
        torch.nn.functional.pad(within, (0, 0, 0, missing)).flatten(-2).half().to(bias.device),
        torch.nn.functional.pad(turned, (0, 0, 0, missing)).float().to(bias.device),
    )
