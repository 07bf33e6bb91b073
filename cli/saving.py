"""`--save_cache` and `--load_cache`: what a run starts from, what it leaves, and what its report says of both."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoint import Share
from cli.conversation import Conversation
from cli.job import Job
from common.errors import UserError
from common.files import is_special, require_writable
from common.messages import say
from engine import BAD, Engine
from engine.saved import SavedCache, Talk, require_saveable, save_cache

Hook = Callable[[str], None]  # told of an engine's events


def call_each(hooks: Sequence[Hook]) -> Hook:
    """One hook that calls several, in order."""

    def tell(event: str) -> None:
        for hook in hooks:
            hook(event)

    return tell


@dataclass
class Transcript:
    """What a conversation's cache has read, and the last token that was written, which the cache has not read.

    chat, reply: the chat so far, where it is one, and what the model wrote last. whole: False while a reply is being
    written: the cache is then ahead of this.
    """

    ids: array[int] = field(default_factory=lambda: array("i"))  # four bytes a token: it may grow without end
    pending: list[int] = field(default_factory=list)
    chat: Conversation | None = None
    reply: str = ""
    whole: bool = True

    def forget(self) -> None:
        self.ids, self.pending, self.reply = array("i"), [], ""
        self.chat = None if self.chat is None else self.chat.begin()

    def talk(self) -> Talk:
        if self.chat is None:
            return Talk(tuple(self.pending))
        return Talk(tuple(self.pending), self.chat.turns, self.chat.read, self.reply)


def transcript_of(saved: SavedCache, chat: Conversation | None, system: str | None, capacity: int) -> Transcript:
    """The conversation of a saved cache, to be continued. chat: an empty one, for a chat. Raises UserError."""
    talk = saved.talk
    chats = talk is not None and bool(talk.turns)
    if chat is not None and not chats:
        raise UserError(f"{saved.path}: it holds no chat to go on with: no --chat, or another file")
    if chat is None and chats:
        raise UserError(f"{saved.path}: it holds a chat: give --chat too")
    if chat is not None and system is not None:
        raise UserError("--system stands at the beginning of a chat, and --load_cache goes on with one")
    ids = saved.tokens[0]
    if len(ids) >= capacity:
        raise UserError(f"{saved.path}: it holds {len(ids)} tokens, and there is room for {capacity}: see --context")
    if talk is None:
        return Transcript(array("i", ids))
    if chat is not None:
        chat = replace(chat, turns=talk.turns, read=talk.read)
    return Transcript(array("i", ids), list(talk.pending), chat, talk.reply)


def start_saving(job: Job) -> tuple[Saving, Transcript]:
    """The `Saving` for --load_cache and --save_cache, and the conversation so far. Raises UserError if a file belongs
    to something else.
    """
    path, saved = job.output.save_cache, job.saved
    share = job.checkpoint.share
    if path is not None:
        if share is None or share.rank == 0:
            require_writable(path, "--save_cache")
        if is_special(path):  # the file that takes its place would end a device or a pipe
            raise UserError(f"--save_cache {path}: not a plain file")
        require_saveable(job.policy)
    if saved is None:
        return Saving(path, None, [0] * len(job.prompts), share), Transcript(chat=job.chat)
    saved.require(job.checkpoint.config if share is None else share.whole, job.policy, job.shape)
    if job.interactive:
        transcript = transcript_of(saved, job.chat, job.system, job.shape.capacity)
        return Saving(path, saved, [len(transcript.ids)], share), transcript
    return Saving(path, saved, saved.kept(job.prompts, job.policy, job.shape), share), Transcript()


class Saving:
    """What one run saves and loads. `hook` is told of an engine's events, and saves when prompts have been read."""

    def __init__(
        self, path: Path | None, saved: SavedCache | None, kept: Sequence[int], share: Share | None = None
    ) -> None:
        """kept: tokens of each sequence that come from `saved`. share: of the model, where several ranks hold it."""
        self.path, self.saved, self.kept, self.share = path, saved, list(kept), share
        self.engine: Engine | None = None
        self.prompts: Sequence[Sequence[int]] = ()
        self.report: dict[str, Any] = {}

    def load(self, engine: Engine) -> None:
        self.engine = engine
        if self.saved is None:
            return
        began = time.perf_counter()
        self.saved.load(engine, self.kept, self.share)
        engine.synchronize()
        seconds = time.perf_counter() - began
        self.report["load_cache"] = {"file": self.saved.path.name, "tokens": self.kept, "seconds": seconds}
        for b, (n, saved) in enumerate(zip(self.kept, self.saved.tokens, strict=True)):
            if n < len(saved):
                which = f"prompt {b + 1}" if len(self.kept) > 1 else "the prompt"
                how = f"from token {n} on" if n else "anew, for what the cache no longer holds cannot come back"
                say(f"{self.saved.path}: {which} parts from the saved text of {len(saved)} tokens, and is read {how}")

    def rest(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The part of each prompt that is still to be read."""
        self.prompts = prompts
        return [list(prompt[n:]) for prompt, n in zip(prompts, self.kept, strict=True)]

    def hook(self, event: str) -> None:
        if event == "read" and self.prompts and self.engine is not None and BAD not in self.engine.picked.tolist():
            self._save(self.prompts, None)

    def finish(self, transcript: Transcript, interrupted: bool = False) -> None:
        """Save a conversation at its end. interrupted: by a Ctrl-C, which of several ranks only the first has seen."""
        if self.path is None:
            return
        if interrupted and self.share is not None:
            say(f"--save_cache {self.path}: not written, for at a Ctrl-C ranks do not end together (Ctrl-D saves)")
            return
        if not transcript.ids or not transcript.whole:
            why = "nothing has been read" if transcript.whole else "the last reply was interrupted"
            say(f"--save_cache {self.path}: not written, for {why}")
            return
        self._save([transcript.ids], transcript.talk())

    def _save(self, tokens: Sequence[Sequence[int]], talk: Talk | None) -> None:
        if self.path is None or self.engine is None:
            return
        began = time.perf_counter()
        n_byte = save_cache(self.path, self.engine, tokens, talk, self.share)
        seconds = time.perf_counter() - began
        self.report["save_cache"] = {"file": self.path.name, "bytes": n_byte, "seconds": seconds}
