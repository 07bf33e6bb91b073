"""`--interactive`: a line in, an answer out, and the cache keeps the conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from cli.console import Printer
from cli.conversation import Conversation, Turn
from cli.saving import Transcript
from common.errors import UserError
from common.messages import say
from common.program import first_interrupt_noted
from engine import Engine, Timing
from engine.parallel import Parallel
from tokenizer import Tokenizer


def read_line() -> str:
    """The user's next line; "" at the end."""
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def next_turn(
    chat: Conversation, ranks: Parallel | None, text: str, reply: str, pending: Sequence[int], end_ids: frozenset[int]
) -> Turn:
    """`Conversation.turn`, which of several ranks the first alone asks: a template may look at the clock, and has a
    time limit. Raises UserError, everywhere.
    """
    if ranks is None:
        return chat.turn(text, reply, pending, end_ids)
    mine: list[Turn] = []

    def take() -> tuple[list[int], bool]:
        mine.append(chat.turn(text, reply, pending, end_ids))
        return mine[0].ids, mine[0].anew

    ids, anew = ranks.from_first(take)
    return mine[0] if mine else Turn(ids, anew, chat)


def converse(
    engine: Engine, tokenizer: Tokenizer, transcript: Transcript, given: Sequence[str], n_new: int
) -> Iterator[tuple[Timing, str]]:
    """A line in, a continuation of at most n_new tokens out; the cache keeps it all, and each turn reads only what is
    new to it, unless a chat's template now writes the earlier ones in another way.

    transcript: the conversation so far, which is kept up to date; given: the first lines, before those of standard
    input. Yields what each turn took, and what was written. Of several ranks the first reads standard input and makes
    the ids of a turn.
    """
    endless, capacity, ranks = engine.cache.endless, engine.cache.shape.capacity, engine.ranks
    say("Type a line; /reset forgets, Ctrl-D ends.")
    told = False
    first = iter(given)
    while True:
        text = next(first, None)
        if text is None:
            text = read_line() if ranks is None else ranks.from_first(read_line)
            if not text:
                return
        text = text.strip("\n")
        if any("\ud800" <= character <= "\udfff" for character in text):
            say("not read: the line is not UTF-8")
            continue
        if text == "/reset":
            engine.reset()
            transcript.forget()
        if not text.strip() or text == "/reset":
            continue
        chat, n_seen = transcript.chat, len(transcript.ids)
        after, held = chat, n_seen
        try:
            if chat is not None:
                turn = next_turn(chat, ranks, text, transcript.reply, transcript.pending, engine.end_ids)
                ids, after = turn.ids, turn.after
                held = 0 if turn.anew else n_seen
            else:
                ids = transcript.pending + tokenizer.encode(text, bos=n_seen == 0)
        except UserError as error:  # of this line: the conversation goes on
            say(f"not read: {error}")
            continue
        if not ids:
            say("not read: the line is no token at all for this model's tokenizer")
            continue
        room = n_new if endless else capacity - held - len(ids) + 1
        if room < 1:
            say(f"no room: that is {1 - room} tokens past the context of {capacity}; /reset starts anew")
            continue
        if held < n_seen:
            if not told:
                say("(the chat template writes earlier turns in another way than they were: each turn reads all anew)")
            told = True
            engine.reset()
        transcript.chat, transcript.ids = after, transcript.ids[:held]
        printer = Printer(tokenizer, [ids], echo=False)
        written: list[int] = []
        transcript.whole = False
        try:
            # An answer stops between two steps, so that the cache is whole. Of several ranks the others would go on:
            # there a Ctrl-C ends the conversation.
            with first_interrupt_noted(engine.ranks is None) as stopped:
                for row in engine.generate([ids], min(n_new, room)):
                    printer.push(row, engine.end_ids)
                    written += [token for token in row if token is not None]
                    if stopped:
                        break
        except KeyboardInterrupt:
            yield engine.timing, printer.texts[0]  # what was done of this turn belongs to the report
            raise
        printer.finish()
        if stopped:
            say("(stopped; Ctrl-C at the prompt, or Ctrl-D, ends the conversation)")
        transcript.ids.extend(ids + written[:-1])
        transcript.pending, transcript.reply, transcript.whole = written[-1:], printer.texts[0], True
        yield engine.timing, transcript.reply
