"""A layer's decode step as a CUDA graph of its own, for a model that is not compiled.

There transformers' step is bound by the processor, and launching two or three Triton kernels from Python costs ten
times what replaying a graph of them does (0.4 ms a layer on an H100's host). Queries, keys and values are copied to
where the graph expects them; all layers share those places, for each is done with before the next begins.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selective_kv.kernels.launch import capturing

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v to attention's output, as `KVCache.attend` has them


class CapturedSteps:
    """Graphs by layer, valid as long as the cache's memory, and what the steps read besides q, k, v, stay in place."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: has run once
        self.inputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
        self.out = torch.empty_like(self.inputs[0])
        self.pool = torch.cuda.graph_pool_handle()

    def replay(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """`step(q, k, v)`, captured at a layer's second call: the first one compiles the kernels.

        The result is valid until the next call, of any layer.
        """
        torch._foreach_copy_(self.inputs, [q, k, v])
        if layer not in self.graphs:
            self.graphs[layer] = None
            return step(*self.inputs)
        graph = self.graphs[layer]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self.out.device, self.pool):  # records, and runs nothing
                self.out.copy_(step(*self.inputs))
            self.graphs[layer] = graph
        graph.replay()
        return self.out
