"""A bar while a long prompt is being read: tokens, and tokens per second. On a terminal only."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import Engine

PATIENCE = 1.0  # seconds before it shows: most prompts have been read by then


class ReadingBar:
    """`watch` an engine, and have `hook` told of its events. Every layer that has seen a chunk counts for its share.

    On a GPU the host is ahead of the work, so the bar waits for the layer before: never for the one just queued, which
    would leave the GPU without work.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.shown = 0.0
        self.before: torch.cuda.Event | None = None

    def watch(self, engine: Engine) -> None:
        if not sys.stderr.isatty():
            return
        self.share = 1 / engine.model.config.n_layer
        for block in engine.model.layers:
            block.attention.wqkv.register_forward_hook(self._layer)  # type: ignore[union-attr]  # it sees every token

    def hook(self, event: str) -> None:
        if event == "prefill" and sys.stderr.isatty():
            form = "reading: {n:,.0f} tokens in {elapsed}, {rate_fmt}{postfix}"
            self.bar = tqdm(unit=" tokens", delay=PATIENCE, leave=False, bar_format=form)
        elif self.bar is not None:
            self.bar.close()
            self.bar = self.before = None

    def _layer(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if self.bar is None:
            return
        if out.is_cuda:
            if self.before is not None:
                self.before.synchronize()
            self.before = torch.cuda.Event()
            self.before.record()
        self.bar.update(out.shape[:-1].numel() * self.share)
