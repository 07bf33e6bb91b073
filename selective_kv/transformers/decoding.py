"""A whole decode step of a transformers model as CUDA graphs, without compiling the model.

An eager step is bound by the CPU: 32 layers of Python take 20 ms, their kernels 9. In `captured_decoding(model)` a step
is recorded once and then replayed: token and position are copied to where the graphs read them, and the logits are
copied out. The sequences' lengths are on the device (`Sequences.counts`), so the recording serves every length, as long
as the cache's memory stays in its place.

Launching a graph takes a microsecond a kernel, before the first of them starts. So a step is several graphs, the first
of which are short: each runs while the next is launched (`cut_before`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from selective_kv.kernels.launch import capture_stream, uncollected
from selective_kv.transformers.cache import PolicyKVCache, compiling_nothing
from selective_kv.transformers.sequences import Sequences

COPIED = ("input_ids", "position_ids")  # what changes from step to step
CACHE_NAMES = ("past_key_values", "cache")  # the second from transformers 5.24 on
OWN_HOOKS = "transformers.utils.output_capturing"  # stay after a call with output_hidden_states, and do nothing


@contextmanager
def captured_decoding(model: Any) -> Iterator[None]:
    """A context in which decode steps of `model` with a cache of selective_kv are recorded on a GPU and replayed.

        with captured_decoding(model):
            model.generate(**inputs, past_key_values=SelectiveKVCache(model.config))

    `generate` compiles nothing meanwhile. The first step of a cache runs as usual and the second is recorded; so again
    when the cache has moved to more memory. A cache that is `reset()` and used again keeps its recording. The model
    must not change: its Python does not run in a replayed step. Passes that are not one token a sequence with its
    position run as usual, and so does everything on a CPU.

    Raises ValueError, at a step, for a model with forward hooks (they would not be called), or one whose step looks at
    the device from the host, and for a cache whose step does.
    """
    forward, own = model.forward, model.__dict__.get("forward")
    model.forward = functools.wraps(forward)(CapturedForward(model, forward))
    try:
        with compiling_nothing():
            yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


class CapturedForward:
    """Stands in for a model's `forward`: keeps, for each cache, what was recorded of it, as long as the cache lives."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward
        self.ran: WeakKeyDictionary[Sequences, int] = WeakKeyDictionary()  # in which memory, by `handle`
        self.steps: WeakKeyDictionary[Sequences, CapturedStep] = WeakKeyDictionary()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        inputs = {name: kwargs[name] for name in COPIED if kwargs.get(name) is not None}
        rest = {name: value for name, value in kwargs.items() if name not in inputs and name != "attention_mask"}
        if args or not isinstance(cache, PolicyKVCache) or not is_step(cache.sequences, inputs, rest):
            return self.forward(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and not (mask.dim() == 2 and all(mask[:, -1].tolist())):
            return self.forward(**kwargs)
        sequences = cache.sequences
        sequences.make_room(1)
        if self.ran.get(sequences) != sequences.handle:  # a step as ever compiles the kernels, which recording cannot
            self.ran[sequences] = sequences.handle
            self.steps.pop(sequences, None)
            return self.forward(**kwargs)
        settings = {name: value for name, value in rest.items() if value is not cache}
        bound = {name: tensor.shape for name, tensor in inputs.items()}, settings
        step = self.steps.get(sequences)
        if step is None or step.bound != bound:
            refuse_hooks(self.model)
            self.steps.pop(sequences, None)  # gives its memory back before the new one takes its own
            step = self.steps[sequences] = CapturedStep(bound, sequences, self.forward, inputs, rest)
        sequences.n_column += 1
        return step.replay(inputs, cache)


def is_step(sequences: Sequences, inputs: dict[str, Tensor], rest: dict[str, Any]) -> bool:
    """Whether these arguments of a forward pass are a decode step that may be recorded: one token a sequence, and its
    position, that follow what is held.

    Raises ValueError for a cache on a GPU whose step cannot be recorded.
    """
    ids = inputs.get("input_ids")
    if ids is None or len(inputs) < len(COPIED) or ids.shape[1] != 1 or sequences.empty or sequences.under_way:
        return False
    assert sequences.shape is not None
    if len(ids) != sequences.shape.batch or any(isinstance(value, Tensor) for value in rest.values()):
        return False
    if torch.is_autocast_enabled(ids.device.type):
        return False
    if not sequences.layers[0].capturable:
        if ids.is_cuda:
            raise ValueError(f"a step of {type(sequences.policy).__name__} cannot be captured: leave captured_decoding")
        return False
    return not torch.cuda.is_current_stream_capturing()


def refuse_hooks(model: nn.Module) -> None:
    """Raises ValueError for a model that expects Python to run at every step."""
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if hasattr(module, "_hf_hook") or any(getattr(hook, "__module__", None) != OWN_HOOKS for hook in hooks):
            raise ValueError(
                f"{name or type(module).__name__} has forward hooks, which captured steps would not call: leave "
                "captured_decoding, or remove them"
            )


class CapturedStep:
    """One step, recorded. bound: what it was recorded for; inputs: what is copied, by name; rest: constants."""

    def __init__(
        self,
        bound: tuple[Any, ...],
        sequences: Sequences,
        forward: Callable[..., Any],
        inputs: dict[str, Tensor],
        rest: dict[str, Any],
    ) -> None:
        self.bound = bound
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside of it
            self.inputs = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
        self.graphs: list[torch.cuda.CUDAGraph] = []
        out = self.record(sequences, functools.partial(forward, **self.inputs, **rest))
        if not isinstance(out, ModelOutput):
            raise ValueError(f"captured steps need return_dict=True: this model returned a {type(out).__name__}")
        made = [name for name, value in out.items() if value is not None]
        if unknown := set(made) - {"logits", *CACHE_NAMES}:
            raise ValueError(f"captured steps give logits alone, and this model also {sorted(unknown)[0]}")
        self.kind, self.cache_names, self.logits = type(out), set(made) - {"logits"}, out["logits"]

    def record(self, sequences: Sequences, step: Callable[[], Any]) -> Any:
        """Runs the step's Python, and none of its kernels. Returns what the step returns."""
        n_column, device = sequences.n_column, sequences.counts.device
        pool = torch.cuda.graph_pool_handle()

        def cut() -> None:
            if self.graphs:
                self.graphs[-1].capture_end()
            self.graphs.append(torch.cuda.CUDAGraph())
            self.graphs[-1].capture_begin(pool=pool)

        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # of what is cached a graph's own pool can use nothing
        try:
            stream = torch.cuda.stream(capture_stream(device))
            with torch.cuda.device(device), stream, sequences.recorded(cut), uncollected():
                cut()
                try:
                    out = step()
                finally:
                    self.graphs[-1].capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"this model's step cannot be captured ({why}): leave captured_decoding") from error
        sequences.n_column = n_column
        return out

    def replay(self, inputs: dict[str, Tensor], cache: PolicyKVCache) -> Any:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        for graph in self.graphs:
            graph.replay()
        return self.kind(logits=self.logits.clone(), **dict.fromkeys(self.cache_names, cache))
