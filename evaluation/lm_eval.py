"""lm-evaluation-harness through the caches: `--model selective_kv`, with that package's own command line.

  python scripts/lm_eval.py --model selective_kv --tasks lambada_openai --batch_size 8 \\
      --model_args checkpoint_path=model.gguf,cache=quantize_kv:k_bits=4,v_bits=4,window_size=128

Log-likelihoods of other backends are prefill only and never read a cache. Here every token of a context and of a
continuation is scored as token-by-token decoding would have left the cache (evaluation/scoring.py: the exact parallel
form, or `sequential=true`), a sequence at a time. Generated text comes from the real cache: prompts are read whole,
`batch_size` of them, and decoded together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from checkpoint import check_tokenizer, end_ids, find_demo, load_model, open_checkpoint, parse_device, parse_dtype
from cli.chat_template import ChatTemplate, chat_template_of
from common.errors import UserError
from common.program import program
from engine import Engine, Sampling
from evaluation import scoring
from kv_cache import ModelCache, format_policy, make_policy
from selective_kv import KVCache, Shape
from tokenizer import StreamDecoder

ROOM = 1024  # tokens that a cache grows by from one batch to the next: engines are kept as long as they fit
GREEDY = {"num_beams": 1, "repetition_penalty": 1.0}  # arguments that may be given, at the values that we have


def policy_of(text: str, knobs: dict[str, Any]) -> KVCache:
    """A cache as evaluate.py names it; further knobs apart, for lm-eval cuts its arguments at every comma."""
    name, _, rest = text.partition(":")
    first = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    return make_policy(name, first | {k: str(v).lower() if isinstance(v, bool) else v for k, v in knobs.items()})


@register_model("selective_kv")
class SelectiveLM(TemplateLM):
    """A checkpoint of this project's with one of its caches.

    checkpoint_path: as generate.py takes it (default: the bundled model). cache: "full",
    "quantize_kv:window_size=128"; its further knobs as arguments of their own. max_length: of context and continuation
    together (default: the model's). sequential: score token by token through the real cache. prefix_token_id: what
    a text without context follows (default: the begin token, or an end token).
    """

    def __init__(
        self,
        checkpoint_path: str | None = None,
        cache: str = "full",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        sequential: bool = False,
        prefix_token_id: int | None = None,
        seed: int = 1234,
        **knobs: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: give a number")
        self.policy = policy_of(cache, knobs)
        self._device = parse_device(device or "auto")
        checkpoint = open_checkpoint(Path(checkpoint_path) if checkpoint_path else find_demo())
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise UserError(f"{checkpoint.path}: no tokenizer with the weights")
        check_tokenizer(checkpoint.config, tokenizer)
        self.checkpoint, self.text_tokenizer = checkpoint, tokenizer
        self.dtype = parse_dtype(dtype, checkpoint, self._device)
        self.model = load_model(checkpoint, self._device, self.dtype)
        self.batch_size, self.sequential, self.seed = int(batch_size), sequential, seed
        context = checkpoint.config.context
        self.max_length = context if max_length is None else int(max_length)
        if not 2 <= self.max_length <= context:
            raise UserError(f"max_length {self.max_length} is not between 2 and the model's context of {context}")
        self.max_gen_toks = int(max_gen_toks)
        self.ends = end_ids(checkpoint, tokenizer)
        self._prefix = prefix_token_id
        self._template: ChatTemplate | None = None
        self._engine: Engine | None = None
        self.read = scoring.reader(self.policy, sequential)

    # --- Text ----------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        if not self.ends:
            raise UserError(f"{self.checkpoint.path}: no end token is known: give prefix_token_id")
        eos = self.text_tokenizer.eos_ids
        return eos[0] if eos else min(self.ends)

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is not None:
            return self._prefix
        bos = self.text_tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Names of special tokens become those tokens, as chat templates need it and as transformers does."""
        bos = self.text_tokenizer.bos_id
        if add_special_tokens is None and bos is not None:
            begin = next((name for name, n in self.text_tokenizer.special_ids.items() if n == bos), None)
            add_special_tokens = begin is None or not string.startswith(begin)
        return self.text_tokenizer.encode(string, bos=add_special_tokens is not False, special=True)

    @property
    def template(self) -> ChatTemplate:
        if self._template is None:
            self._template = chat_template_of(self.checkpoint)
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.template.render(chat_history, reply=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str) and chat_template != "default":
            raise UserError(f"--apply_chat_template {chat_template}: only the checkpoint's default template is used")
        return self.template.source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return f"{self.checkpoint.name} {self.checkpoint.path}".replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {"model": self.checkpoint.name, "cache": format_policy(self.policy), "dtype": str(self.dtype)}

    # --- Scores --------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Requests that read the same tokens (choices of one token) share a pass. What is too long loses its start."""
        reads: dict[tuple[int, ...], list[int]] = {}
        for n, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError("a continuation of no tokens has no likelihood")
            if len(continuation) > self.max_length:
                raise UserError(f"a continuation of {len(continuation)} tokens is past max_length {self.max_length}")
            tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
            reads.setdefault(tuple(tokens), []).append(n)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for ids, numbers in tqdm(reads.items(), disable=disable_tqdm, desc="loglikelihood"):
            longest = max(len(requests[n][2]) for n in numbers)
            log_p = self._log_probabilities(ids, longest)
            for n in numbers:
                target = torch.tensor(requests[n][2], device=log_p.device)
                own = log_p[-len(target) :]
                greedy = bool((own.argmax(-1) == target).all())
                found[n] = (float(own.gather(1, target[:, None]).sum()), greedy)
        return found

    @torch.inference_mode()
    def _log_probabilities(self, ids: Sequence[int], n_last: int) -> torch.Tensor:
        """float32 [n_last, n_vocab] of what follows each of the last tokens, as decoding would have left the cache."""
        tokens = torch.tensor(ids, device=self._device)
        states = self.read(self.model, self.policy, tokens)[-n_last:]
        return torch.cat([self.model.head(part).float().log_softmax(-1) for part in states.split(scoring.HEAD_TOKENS)])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """A text in windows of max_length tokens: each token once, with as much before it as there is room for."""
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="rolling"):
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            scored = self._loglikelihood_tokens([(None, *window) for window in windows], disable_tqdm=True)
            totals.append(sum(score for score, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    # --- Generation ----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Batches of requests with equal settings, the longest prompts first."""
        found = [""] * len(requests)
        groups: dict[str, list[tuple[int, list[int]]]] = {}
        for n, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append((n, self.tok_encode(request.args[0])))
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until")
        for group in groups.values():
            settings = normalize_gen_kwargs(requests[group[0][0]].args[1], self.max_gen_toks)
            group.sort(key=lambda pair: -len(pair[1]))
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                for (n, _), text in zip(batch, self._generate([ids for _, ids in batch], dict(settings)), strict=True):
                    found[n] = text
                    self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    bar.update()
        bar.close()
        return found

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> Iterable[str]:
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        n_new, sampled = settings.pop("max_gen_toks"), settings.pop("do_sample", False)
        temperature = settings.pop("temperature", 0.0)
        sampling = Sampling(
            temperature if sampled else 0.0, settings.pop("top_k", 0), settings.pop("top_p", 1.0), self.seed
        )
        for name, value in settings.items():
            if GREEDY.get(name) != value:
                raise UserError(f"generation_kwargs {name}={value} is not supported")
        room = self.max_length - n_new
        if room < 1:
            raise UserError(f"max_gen_toks {n_new} leaves no room for a prompt in max_length {self.max_length}")
        prompts = [ids[-room:] or [self.prefix_token_id] for ids in prompts]
        engine = self._engine_for(len(prompts), max(map(len, prompts)) + n_new, sampling)
        texts, streams = [""] * len(prompts), [StreamDecoder(self.text_tokenizer) for _ in prompts]
        done = [False] * len(prompts)
        for row in engine.generate(prompts, n_new):
            for b, token in enumerate(row):
                if token is None or token in self.ends:
                    done[b] = True
                elif not done[b]:
                    texts[b] += streams[b].push(token)
                    done[b] = any(stop in texts[b] for stop in until)
            if all(done):
                break
        whole = [text + stream.flush() for text, stream in zip(texts, streams, strict=True)]
        return [_before(text, until) for text in whole]

    def _engine_for(self, batch: int, n_token: int, sampling: Sampling) -> Engine:
        """The last engine, forgetful of what it read, where it fits; else another."""
        last = self._engine
        if last is not None and last.sampling == sampling:
            held = last.cache.shape
            if held.batch == batch and held.capacity >= n_token:
                last.reset()
                return last
        c = self.checkpoint.config
        capacity = min(-(-n_token // ROOM) * ROOM, max(self.max_length, n_token))
        shape = Shape(batch, c.n_kv_head, c.head_dim, capacity, self.dtype, self._device)
        self._engine = last = None  # its memory is free before the next one's is taken
        self._engine = Engine(self.model, ModelCache(self.policy, c.n_layer, shape), sampling, self.ends)
        return self._engine


def _before(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.partition(stop)[0]
    return text


def main() -> None:
    """lm-eval's own command line, with our model known to it."""
    from lm_eval.__main__ import cli_evaluate

    with program("lm_eval.py"):
        cli_evaluate()
