"""One rank's share of a model, where several devices hold it together (tensor parallelism).

As in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): attention by heads and the feed-forward by columns, so that a
layer needs two sums over the ranks, after `wo` and after `w2`. The head is cut by rows of the vocabulary; embedding
and norms are whole everywhere. Of 8 query and 4 KV heads, rank 1 of 2 has

    wqkv   rows of q4..q7, then of k2 k3, then of v2 v3        wo   the columns of q4..q7
    w13    the second half of the gate's rows, then of up's    w2   the second half of its columns
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from checkpoint.layout import Fill, Slot
from common.errors import UserError
from model import Config

Span = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class Share:
    """What rank `rank` of `n_rank` holds of a model of shape `whole`. Raises UserError where it cannot be cut."""

    whole: Config
    rank: int
    n_rank: int

    def __post_init__(self) -> None:
        n_kv_head, n_rank = self.whole.n_kv_head, self.n_rank
        if n_kv_head % n_rank:
            counts = [str(n) for n in range(1, n_kv_head + 1) if n_kv_head % n == 0 and not self.whole.ffn_dim % n]
            raise UserError(
                f"{n_rank} ranks cannot share {n_kv_head} KV heads: a rank has whole ones, as many as every other "
                f"(this model goes on {' or '.join(counts)})"
            )
        if self.whole.ffn_dim % n_rank:
            raise UserError(f"{n_rank} ranks cannot share a feed-forward of {self.whole.ffn_dim} columns")
        if self._vocab(n_rank - 1)[0] >= self.whole.vocab_size:
            raise UserError(f"{n_rank} ranks cannot share a vocabulary of {self.whole.vocab_size}")

    def _vocab(self, rank: int) -> Span:
        most = -(-self.whole.vocab_size // self.n_rank)  # the last ranks may have fewer
        return rank * most, min((rank + 1) * most, self.whole.vocab_size)

    @property
    def config(self) -> Config:
        """The shape of the share: a model of its own heads, whose head scores a part of the vocabulary."""
        start, stop = self._vocab(self.rank)
        return replace(
            self.whole,
            n_head=self.whole.n_head // self.n_rank,
            n_kv_head=self.whole.n_kv_head // self.n_rank,
            ffn_dim=self.whole.ffn_dim // self.n_rank,
            vocab_start=start,
            vocab_rows=stop - start,
        )

    def rows(self, parameter: str) -> tuple[Span, ...] | None:
        """Rows of a whole parameter that the share's consists of, in order; None: all."""
        c = self.config
        q, kv, ffn = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.ffn_dim
        if ".wqkv." in parameter:
            q_start, k_start = self.rank * q, self.n_rank * q + self.rank * kv
            v_start = k_start + self.n_rank * kv
            return (q_start, q_start + q), (k_start, k_start + kv), (v_start, v_start + kv)
        if ".w13." in parameter:
            gate, up = self.rank * ffn, (self.n_rank + self.rank) * ffn
            return (gate, gate + ffn), (up, up + ffn)
        return (self._vocab(self.rank),) if parameter == "output.weight" else None

    def columns(self, parameter: str) -> Span | None:
        """Columns of a whole parameter that the share has; None: all."""
        c = self.config
        n = {"wo.weight": c.n_head * c.head_dim, "w2.weight": c.ffn_dim}.get(".".join(parameter.split(".")[-2:]), 0)
        return (self.rank * n, (self.rank + 1) * n) if n else None

    def spans(self, parameter: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The parts of rows [start, stop) of a whole parameter that the share has: its own row, first, one past the
        last."""
        at = 0
        for own_start, own_stop in self.rows(parameter) or ((0, stop),):
            first, last = max(start, own_start), min(stop, own_stop)
            if first < last:
                yield at + first - own_start, first, last
            at += own_stop - own_start

    def fills(self, fills: tuple[Fill, ...]) -> tuple[Fill, ...]:
        """What fills the share, of what fills the whole model: only these rows and columns are read."""
        return tuple(part for fill in fills for part in self._parts(fill))

    def _parts(self, fill: Fill) -> Iterator[Fill]:
        before = 0  # rows of the stored tensor that belong to other slots
        for slot in fill.slots:
            rows, columns = self.rows(slot.parameter), self.columns(slot.parameter)
            if rows is None and columns is None:
                yield fill
                return
            at = 0
            for start, stop in rows or ((slot.start, slot.start + slot.shape[0]),):
                if slot.start <= start < slot.start + slot.shape[0]:
                    first = before + start - slot.start
                    stored = fill.stored.part((first, first + stop - start), columns)
                    yield Fill(stored, (Slot(slot.parameter, stored.shape, at, slot.rotated),), fill.interleaved)
                at += stop - start
            before += slot.shape[0]
