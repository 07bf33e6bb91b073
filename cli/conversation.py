"""A chat's turns as token ids: what the model has to read for the next one.

The cache holds the conversation as it was read and written, so a turn reads only what is new: the end of the reply,
the user's text, the beginning of the next reply. Where the template writes earlier turns in another way than the
cache holds them (Qwen 3's leaves the reasoning of old replies out), the conversation is read anew, as the template
writes it: what the model sees is what transformers would show it, turn for turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cli.chat_template import ChatTemplate, Message
from common.errors import UserError
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """One turn to read. ids: its tokens; anew: whether they are to be read into an empty cache; after: the conversation
    with this turn."""

    ids: list[int]
    anew: bool
    after: Conversation


@dataclass(frozen=True)
class Conversation:
    """The turns of a chat so far. read: all text that the model had read before it wrote its last reply."""

    template: ChatTemplate
    tokenizer: Tokenizer
    system: str | None = None
    turns: tuple[Message, ...] = ()
    read: str = ""

    def begin(self) -> Conversation:
        """The same chat without a turn."""
        return replace(self, turns=(), read="")

    def turn(
        self, text: str, reply: str = "", pending: Sequence[int] = (), end_ids: frozenset[int] = frozenset()
    ) -> Turn:
        """The user's next turn.

        reply: what the model wrote last. pending: of that, what the cache has not read (its last token). An end token
        that the model wrote itself is not written again. Raises UserError where the template refuses it.
        """
        user = {"role": "user", "content": text}
        if self.turns:
            turns = (*self.turns, {"role": "assistant", "content": reply}, user)
        else:
            turns = (user,) if self.system is None else ({"role": "system", "content": self.system}, user)
        written = self.template.render(turns)
        after = replace(self, turns=turns, read=written)
        rest = following(self.read, reply, written) if self.turns else None
        if rest is None:
            return Turn(self._encode(written, begins=True), True, after)
        ids = self._encode(rest, begins=False)
        if pending and pending[-1] in end_ids and pending[-1] in ids:
            at = ids.index(pending[-1])
            if not self.tokenizer.decode(ids[:at]).strip():  # Llama 2's template has a blank before it
                ids = ids[at + 1 :]
        return Turn([*pending, *ids], False, after)

    def end_of_turn(self) -> frozenset[int]:
        """The special token that the template writes after a reply, which configs may not name as an end (Llama 3)."""
        try:
            written = self.template.render(
                [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Goodbye"}], reply=False
            )
        except UserError:  # a template that wants more than two turns is asked again with the real ones
            return frozenset()
        _, found, rest = written.rpartition("Goodbye")
        special = set(self.tokenizer.special_ids.values())
        # Nothing at all where a template marks no end; ids[0] may be a blank before the mark
        ids = self.tokenizer.encode(rest, bos=False, special=True, begins=False)[:2] if found else []
        return frozenset([token for token in ids if token in special][:1])

    def _encode(self, text: str, begins: bool) -> list[int]:
        ids = self.tokenizer.encode(text, bos=False, special=True, begins=begins)
        if not ids:
            raise UserError("the turn is no token at all for this tokenizer")
        return ids


def following(read: str, reply: str, written: str) -> str | None:
    """What follows in `written` after `read` and `reply`; None if it does not begin with those two.

    Blanks around the reply may differ: most templates trim it.
    """
    if not written.startswith(read):
        return None
    rest = written[len(read) :]
    if not reply.strip():
        return rest
    rest = rest.lstrip()
    for end in (reply.lstrip(), reply.strip()):
        if rest.startswith(end):
            return rest[len(end) :]
    return None
