"""One run of generate.py, from its flags to its report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from checkpoint import (
    Checkpoint,
    check_tokenizer,
    chosen_weights,
    end_ids,
    find_demo,
    load_model,
    open_checkpoint,
    parse_dtype,
)
from cli.chat_template import chat_template_of, template_variables
from cli.console import Printer, encode_prompt, read_prompts
from cli.context import conversation_room, new_tokens
from cli.conversation import Conversation
from cli.fidelity import KeyCheck
from cli.flags import chosen_knobs, sampling_of
from cli.interactive import converse
from cli.job import Job, Output
from cli.options import MOST_SEQUENCES
from cli.plan import choose_bits, make_plan, require_fit
from cli.provenance import FORMAT, made_from
from cli.ranks import make_profiler, memory_budget, rank_part, world_size
from cli.reading import ReadingBar
from cli.report import make_report, report_lines, startup
from cli.saving import Hook, Saving, call_each, start_saving
from common.errors import UserError
from common.files import require_writable, write_json
from common.messages import say
from common.phases import mark, marks, process_age
from common.program import interrupts_ignored
from engine import Engine, Sampling, Timing, chunk_size
from engine.link import Link
from engine.packing import most_at_once
from engine.parallel import connect, rank_device
from engine.precompile import Run, compiled_ahead, prompt_parts
from engine.saved import SavedCache
from kv_cache import ModelCache, make_policy
from selective_kv import KVCache, Shape
from tokenizer import Tokenizer


def chosen_policy(args: argparse.Namespace) -> KVCache:
    """The cache of the command line. Raises UserError."""
    return make_policy(args.cache, chosen_knobs(args))


def prepare(args: argparse.Namespace, policy: KVCache, link: Link | None = None) -> Job:
    """Read prompts, configs and headers; find every mistake that can be found without the weights."""
    n_rank = world_size(args, link)
    sampling = Sampling(**sampling_of(args))
    texts = read_prompts(args, pipe=link is None or link.rank == 0)  # of several ranks the first's count
    saved = None if args.load_cache is None else SavedCache(args.load_cache)
    if not texts and not args.interactive and saved is None:
        texts = ["16"] if args.random_weights else ["Once upon a time"]
    device = rank_device(args.device, link, elsewhere=args.dry_run)
    if len(texts) * args.num_samples > MOST_SEQUENCES:
        raise UserError(f"a batch has at most {MOST_SEQUENCES} sequences, not {len(texts) * args.num_samples}")
    checkpoint = open_checkpoint(None if args.random_weights else args.checkpoint_path or find_demo(), args.model)
    if n_rank > 1:
        checkpoint = checkpoint.share_of(0 if link is None else link.rank, n_rank)
    config = checkpoint.config
    tokenizer = checkpoint.tokenizer()
    if tokenizer is not None:
        check_tokenizer(config, tokenizer)
    elif args.interactive or args.chat:
        raise UserError(f"--{'interactive' if args.interactive else 'chat'} needs a checkpoint with a tokenizer")
    chat = start_chat(args, checkpoint, tokenizer)
    if chat is not None:
        ids = [chat.turn(text).ids for text in texts]
    elif args.interactive:  # lines of a conversation: a number is a text there
        ids = []
    else:
        name = "a model of random weights" if args.random_weights else str(checkpoint.path)
        ids = [encode_prompt(text, tokenizer, config.vocab_size, args.seed, name) for text in texts]
    ranks = None if link is None else connect(link, device)
    ids = ids if ranks is None else ranks.from_first(lambda: ids)  # a chat template may look at the clock
    ids = ids if texts or saved is None else saved.tokens
    prompts = [] if args.interactive else [p for p in ids for _ in range(args.num_samples)]
    longest = max(map(len, prompts), default=0)
    if args.interactive:
        capacity, n_new = conversation_room(args, policy, config), args.max_new_tokens
    else:
        n_new = new_tokens(args, policy, config, longest)
        capacity = longest + n_new
    ends = frozenset() if args.ignore_eos or tokenizer is None else end_ids(checkpoint, tokenizer)
    if chat is not None and not args.ignore_eos:
        ends |= chat.end_of_turn()
    random = tokenizer is not None and chat is None and not args.interactive
    for number in dict.fromkeys(text for text in texts if text.isdecimal() and random):
        say(f"--prompt {number} is {int(number):,} random tokens, not that text (a blank before it makes it one)")
    return Job(
        checkpoint,
        chosen_weights(checkpoint, args.weights),
        tokenizer,
        policy,
        Shape(
            max(1, len(prompts)),
            config.n_kv_head,
            config.head_dim,
            capacity,
            parse_dtype(args.dtype, checkpoint, device),
            device,
            config.reach or None,
        ),
        sampling,
        ends,
        prompts,
        n_new,
        most_at_once(map(len, prompts), args.prefill_chunk) if prompts else min(args.prefill_chunk, capacity),
        args.echo and chat is None and not all(text.isdecimal() for text in texts),
        chat,
        ranks,
        saved,
        args.interactive,
        args.prompt,
        args.system,
        args.random_weights,
        args.seed,
        args.reference,
        args.bits == "auto",
        memory_budget(args, device, ranks),
        args.dry_run,
        Output(
            args.json,
            args.profile,
            args.save_cache,
            ["generate.py", *getattr(args, "argv", [])],
            [args.prompt_file, args.plugin, args.load_cache],
        ),
    )


def start_chat(args: argparse.Namespace, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Conversation | None:
    """A chat without a turn yet, where one is asked for."""
    if not args.chat:
        return None
    assert tokenizer is not None
    return Conversation(chat_template_of(checkpoint, template_variables(args.template_vars)), tokenizer, args.system)


def build(job: Job, hooks: Sequence[Hook] = (), saving: Saving | None = None) -> tuple[Engine, float]:
    """Take the memory: weights, cache, and the captured step where there is one. Also: seconds of loading weights."""
    device, dtype = job.shape.device, job.shape.dtype
    began = time.perf_counter()
    config = job.checkpoint.config
    lengths, kept = list(map(len, job.prompts)), saving.kept if saving is not None else ()
    chunk = chunk_size(job.policy, config.context, job.chunk)
    parts = prompt_parts(lengths or [job.shape.capacity], chunk, kept)  # nothing is known of a conversation's prompts
    kernels = compiled_ahead(config, [Run(job.policy, job.shape, parts, job.weights)], job.sampling, job.ranks)
    with nullcontext() if job.reference else kernels:
        model = load_model(
            job.checkpoint, device, dtype, job.random_weights, job.seed, weights=job.weights, ranks=job.ranks
        )
        loading = time.perf_counter() - began
        mark("weights")
    cache = ModelCache(job.policy, config.n_layer, job.shape)
    mark("kernels")
    if job.reference:
        for layer in cache.layers:
            layer.use_reference()
    lag = 0 if job.interactive else -1  # a conversation's cache must not run ahead of its end token
    engine = Engine(model, cache, job.sampling, job.end_ids, job.chunk, lag=lag, ranks=job.ranks, hook=call_each(hooks))
    if saving is not None:
        saving.load(engine)
    mark("engine")
    return engine, loading


def run(job: Job, link: Link | None) -> None:
    """Plan, load, generate and report. Raises UserError."""
    output, budget = job.output, job.budget
    share = job.checkpoint.share
    config = job.checkpoint.config if share is None else replace(share, rank=0).config  # the first has the most
    if job.any_bits:
        policy = choose_bits(config, job.policy, job.shape, job.chunk, budget, job.weights, job.sampling)
        job = replace(job, policy=policy)
    plan = (config, job.policy, job.shape, job.chunk)
    try:
        planned = make_plan(*plan, job.weights, job.sampling)
    except ValueError as error:
        raise UserError(str(error)) from None
    mark("plan")
    first = link is None or link.rank == 0
    if output.json not in (None, "-") and first:
        require_writable(Path(output.json), "--json")
    if job.dry_run:
        n_rank = 1 if share is None else share.n_rank
        print("\n".join(planned.lines(n_rank)))
        if output.json and first:
            every = {} if n_rank == 1 else {"world_size": n_rank, "sum": n_rank * planned.total}
            write_json(output.json, {"plan": asdict(planned) | {"total": planned.total} | every})
    require_fit(*plan, budget, job.weights, job.sampling)
    saving, transcript = start_saving(job)
    if job.dry_run:
        return
    profiler = make_profiler(output.profile, job.shape.device, link)
    bar, check = ReadingBar(), KeyCheck(job.policy)
    hooks = [*([] if profiler is None else [profiler.hook]), saving.hook, bar.hook, check.hook]
    engine, loading = build(job, hooks, saving)
    bar.watch(engine)
    check.watch(engine)
    if link is not None:
        link.answer = lambda: rank_part(engine)
    printer = Printer(job.tokenizer, job.prompts, job.echo)
    timing, turns, interrupted, age = Timing(), [], False, process_age()
    try:
        if job.interactive:
            assert job.tokenizer is not None
            for turn, text in converse(engine, job.tokenizer, transcript, job.given, job.n_new):
                timing += turn
                turns.append(text)
        else:
            for row in engine.generate(saving.rest(job.prompts), job.n_new):
                printer.push(row, job.end_ids)
            printer.finish()
    except KeyboardInterrupt:
        interrupted = True
        print()
    with interrupts_ignored():
        if job.interactive:
            saving.finish(transcript, interrupted)
        timing = timing if job.interactive else engine.timing
        report = make_report(engine, job.checkpoint.name, timing, str(job.weights or 16))
        report |= startup(age, loading, timing) | {"start_s": marks()}
        report |= saving.report | ({"score_error": check.report} if check.report else {})
        report |= {"finished": not interrupted, "texts": turns or printer.texts, "command": output.command}
        if link is not None and first:
            report["ranks"] = link.reports()
        say("", *report_lines(report))
        if output.json and first:  # after the run: hashing all weights takes seconds
            sources = made_from(job.checkpoint.path, output.files, job.shape.dtype, job.shape.device)
            report |= {"format": FORMAT, "made_from": sources}
        if profiler is not None:
            say(*profiler.write(report))
        if output.json and first:
            write_json(output.json, report)
    if interrupted:
        sys.exit(130)
    if link is not None:
        link.finish()
