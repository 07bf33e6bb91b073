"""How far attention scores are off because keys are stored in fewer bits, measured before the first token is written.

A prompt's last keys are still in full precision. They are quantised as the tile that they will be in, and the scores of
the prompt's last query with them are compared before and after. The unit is the nat: an error of x in a score
multiplies its token's weight by e^x. A relative error would say nothing, since adding the same number to all scores
changes no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selective_kv.formats import TILE, Format

if TYPE_CHECKING:
    from selective_kv.cache import KVCache

# A layer's error from which on it is too large: an attention weight is then off by a factor of e.
# SmolLM2-135M-Instruct's worst layer is at 0.03 with 8 bits, 0.33 with 4, 0.7 with 3 and 1.7 with 2 (of its layers'
# mean 0.01, 0.23, 0.49 and 1.2), and it is at 2 bits that its text suffers: KL 0.05, perplexity 6% worse.
BOUND = 1.0

# The first sequences of a batch, which are measured: each of their chunks costs a copy of its last query.
MOST_ROWS = 8
LEAST_TOKENS = 16  # keys to measure by: the range of so few, and with it the error, is two thirds of a whole tile's


def score_error(q: Tensor, k: Tensor, form: Format, bias: Tensor | None = None) -> Tensor:
    """The root mean square, over query heads and tokens, of the change of a score by quantising, in nats: float32 [].

    q: [n_head, head_dim]; k: [n_kv_head, token, head_dim] in full precision, 1 to TILE tokens of one tile; bias: the
    key bias that is kept out of that tile, [n_kv_head, TILE, head_dim]. If there are fewer tokens than TILE, they are
    repeated to fill it.
    """
    n = k.shape[1]
    x = k.float()
    if bias is not None:
        x = (x - bias[:, :n]).to(k.dtype).float()
    every = torch.arange(TILE, device=k.device) % n
    off = form.dequantize(form.quantize(x[:, every]))[:, :n] - x
    group = q.float().unflatten(0, (len(k), -1))
    return (group @ off.transpose(-1, -2) * q.shape[-1] ** -0.5).square().mean().sqrt()


def layer_errors(
    layers: Sequence[KVCache], lengths: Sequence[int], first_row: int = 0, k_bits: int | None = None
) -> list[float] | None:
    """`KVCache.score_error` of every layer: the root mean square of those of sequences `first_row` and on, which hold
    `lengths` tokens. Waits for the device. None where a layer has nothing to measure.
    """
    found = []
    for layer in layers:
        errors = [layer.score_error(first_row + i, n, k_bits) for i, n in enumerate(lengths)]
        known = [error for error in errors if error is not None]
        if not known:
            return None
        found.append(torch.stack(known).square().mean().sqrt())
    return torch.stack(found).tolist() if found else None
