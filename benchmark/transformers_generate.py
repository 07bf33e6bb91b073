"""transformers' generate() with its own caches and with ours: speed of decoding, memory, start.

  python scripts/bench_transformers.py                                               the bundled model, this machine
  python scripts/bench_transformers.py --random_weights --model llama-3.1-8b --context 16384 --json plugin.json

The model is transformers', on this project's weights. A gate comes first: our full cache must give DynamicCache's
logits in every mode that is timed, or nothing is. Then each cache reads a random prompt and writes on, batch 1, greedy,
as a user calls it; what is timed is the second call, with the cache forgotten, between the first new token and the
last. Eager: a cache that grows, and nothing else; captured: the same within captured_decoding; compiled: a cache of one
size, which `generate` compiles by itself. `first` is the first call's whole time less the second's: compiling and
capturing. Bytes are what the device holds more after a call than before the cache was made, and at most while it
decodes.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark import peers
from checkpoint import DTYPES, find_demo, load_model, open_checkpoint, parse_device
from cli.options import Parser, positive, require_weights
from common.errors import UserError
from common.files import require_writable, to_json, write_whole
from common.program import program

GATE_PROMPT, GATE_NEW = 300, 12
ROUNDING = 0.1  # of bfloat16 through random layers: 0.05 was seen, 0.2 and more with a wrong attention


MODES = ("eager", "captured", "compiled", "compiled, modules unguarded")


@dataclass
class Contender:
    """A cache and how it is used. implementation: the attention that it needs; mode: of MODES, the last one compiled
    without guards on the model's modules, which are 6,000 comparisons a step for 32 layers.
    """

    cache: str
    make: Callable[[], Any]
    implementation: str
    mode: str = "eager"

    @property
    def name(self) -> str:
        return f"{self.cache}, {self.mode}"

    @property
    def compiled(self) -> bool:
        return self.mode.startswith("compiled")

    def around(self, model: Any) -> AbstractContextManager[None]:
        from selective_kv.transformers import captured_decoding

        return captured_decoding(model) if self.mode == "captured" else nullcontext()


@dataclass
class Row:
    """One contender's figures. Seconds; bytes over what the weights take."""

    name: str
    tokens_per_second: float
    first_seconds: float
    prefill_seconds: float
    held_bytes: int
    peak_bytes: int


class Clock:
    """A stopping criterion that stops nothing: when each token was there, and the peak of memory after the first."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, [time.perf_counter()]
        self.go_on = torch.zeros(1, dtype=torch.bool, device=device)

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.device.type == "cuda" and len(self.times) == 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())
        return self.go_on


def is_run(mode: str) -> bool:
    return mode != "captured" or torch.cuda.is_available()


def contenders(config: Any, length: int, only: list[str] | None) -> list[Contender]:
    """The caches to time, transformers' and ours, for `length` tokens. only: names; None: all of them."""
    from transformers import DynamicCache, QuantizedCache, StaticCache

    from selective_kv.transformers import NAME, FullKVCache, SelectiveKVCache

    def full(fixed: bool) -> Any:
        return FullKVCache(config, max_cache_len=length if fixed else None)

    def selective(bits: int, fixed: bool) -> Any:
        settings = dict(sink_size=16, window_size=128, k_bits=bits, v_bits=bits)
        return SelectiveKVCache(config, max_cache_len=length if fixed else None, **settings)

    made = [
        Contender("transformers dynamic", lambda: DynamicCache(config=config), "sdpa"),
        Contender("transformers static", lambda: StaticCache(config, max_cache_len=length), "sdpa", "compiled"),
    ]
    ours: dict[str, Callable[[bool], Any]] = {
        "full": full,
        "int8": partial(selective, 8),
        "K4V4": partial(selective, 4),
    }
    for name, make in ours.items():
        made += [Contender(name, partial(make, m.startswith("compiled")), NAME, m) for m in MODES if is_run(m)]
    for backend, bits in (("hqq", 8), ("hqq", 4), ("quanto", 4)):
        try:
            QuantizedCache(backend, config, nbits=bits)
        except (ImportError, ValueError) as error:
            print(f"transformers {backend} {bits} bits left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue

        def quantized(backend: str = backend, bits: int = bits) -> Any:
            return QuantizedCache(backend, config, nbits=bits)

        made.append(Contender(f"transformers {backend} {bits} bits", quantized, "sdpa"))
    unknown = set(only or ()) - {c.name for c in made}
    if unknown:
        raise UserError(f"--only: there is no {sorted(unknown)[0]!r} (there are {', '.join(c.name for c in made)})")
    return made


@torch.no_grad()
def write(
    model: Any, ids: Tensor, contender: Contender, cache: Any, n: int, **settings: Any
) -> tuple[Any, list[float]]:
    """Greedy. Returns what `generate` does, and when the call began and each token was there."""
    model.set_attn_implementation(contender.implementation)
    from transformers import CompileConfig

    clock = Clock(ids.device)
    if contender.mode == MODES[-1]:
        options = {"triton.cudagraphs": True, "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        settings["compile_config"] = CompileConfig(mode=None, options=options)  # type: ignore[arg-type]
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0,
        stopping_criteria=[clock], disable_compile=not contender.compiled, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    if ids.is_cuda:
        torch.cuda.synchronize()
        clock.times[-1] = time.perf_counter()
    return out, clock.times


def gate(model: Any, everyone: list[Contender], modes: set[str]) -> dict[str, float]:
    """The relative distance of our full cache's logits from DynamicCache's, over the tokens that both wrote alike.

    Raises UserError unless it is rounding.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, GATE_PROMPT), generator=generator).to(model.device)

    def logits(c: Contender) -> tuple[list[int], Tensor]:
        with c.around(model):
            out, _ = write(model, ids, c, c.make(), GATE_NEW, output_logits=True)
        return out.sequences[0, GATE_PROMPT:].tolist(), torch.stack(out.logits).float()

    expected_ids, expected = logits(next(c for c in everyone if c.name == "transformers dynamic, eager"))
    errors = {}
    for c in everyone:
        if c.cache == "full" and c.mode in modes:
            ids_of, found = logits(c)
            alike = next((i for i in range(GATE_NEW) if ids_of[i] != expected_ids[i]), GATE_NEW - 1) + 1
            errors[c.name] = ((found[:alike] - expected[:alike]).norm() / expected[:alike].norm()).item()
            print(f"gate: {c.name}: logits of {alike} tokens differ by {errors[c.name]:.2g}", file=sys.stderr)
            if not (errors[c.name] < ROUNDING and alike > 1):
                raise UserError(f"{c.name}: logits are {errors[c.name]:.2g} from DynamicCache's over {alike} tokens")
    return errors


def measure(model: Any, contender: Contender, ids: Tensor, n_new: int) -> Row:
    """Raises what the contender raises."""
    torch._dynamo.reset()  # what one compiled is no head start for the next
    gc.collect()
    cuda = ids.is_cuda
    before = torch.cuda.memory_allocated() if cuda else 0
    with contender.around(model):
        cache = contender.make()
        first = write(model, ids, contender, cache, n_new)[1]
        if contender.mode == "eager":
            del cache
            gc.collect()
            cache = contender.make()
        else:
            cache.reset()
        out, times = write(model, ids, contender, cache, n_new)
        held = peak = 0
        if cuda:
            peak = torch.cuda.max_memory_allocated() - before
            del out
            held = torch.cuda.memory_allocated() - before
    speed = (n_new - 1) / (times[-1] - times[1])
    return Row(contender.name, speed, (first[-1] - first[0]) - (times[-1] - times[0]), times[1] - times[0], held, peak)


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """Time `generate` with every cache in turn. Returns the record; prints rows as they are measured."""
    import transformers

    p = Parser("bench_transformers.py", description=__doc__.splitlines()[0])
    p.add_argument("--checkpoint_path", type=Path)
    p.add_argument("--model", help="shape, where weights are random")
    p.add_argument("--random_weights", action="store_true")
    p.add_argument("--device", type=parse_device, default=None)
    p.add_argument("--dtype", choices=tuple(DTYPES), default=None)
    p.add_argument("--context", type=positive, default=1024, help="tokens of the prompt")
    p.add_argument("--new", type=positive, default=64, help="tokens written")
    p.add_argument("--only", nargs="+", help="names of contenders, as the table has them")
    p.add_argument("--json", type=Path)
    args = p.parse(sys.argv[1:] if argv is None else argv)
    if args.json:
        require_writable(args.json, "--json")
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.dtype] if args.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    require_weights(args)
    where = None if args.random_weights else args.checkpoint_path or find_demo()
    ours = load_model(open_checkpoint(where, args.model), device, dtype, random_weights=args.random_weights)
    model = peers.transformers_model(ours)
    longest = max(args.context + args.new, GATE_PROMPT + GATE_NEW)
    everyone = contenders(model.config, longest, args.only)
    timed = [c for c in everyone if not args.only or c.name in args.only]
    report: dict[str, Any] = {
        "command": ["scripts/bench_transformers.py", *(sys.argv[1:] if argv is None else argv)],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(dtype).split(".")[-1],
        "gate": gate(model, everyone, {c.mode for c in timed if c.implementation != "sdpa"}), "rows": [],
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, args.context), generator=generator).to(device)
    print(f"{'cache':32} {'tokens/s':>9} {'first':>7} {'prefill':>8} {'held':>9} {'peak':>9}")
    for contender in timed:
        try:
            row = measure(model, contender, ids, args.new)
        except (RuntimeError, ImportError, AttributeError) as error:  # of transformers' own or a missing back end
            if not contender.name.startswith("transformers"):
                raise
            print(f"{contender.name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        report["rows"].append(asdict(row))
        print(
            f"{row.name:32} {row.tokens_per_second:9.1f} {row.first_seconds:6.1f}s {row.prefill_seconds:7.2f}s "
            f"{row.held_bytes / 1e6:7.0f}MB {row.peak_bytes / 1e6:7.0f}MB",
            flush=True,
        )
        if args.json:
            write_whole(args.json, to_json(report) + "\n")
    return report


def main() -> None:
    with program("bench_transformers.py"):
        run()
