"""Drafts copied from all that a tenant's requests have said lately: what mostly followed the longest matching suffix.

SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975, section 4): texts repeat themselves and each other, most of all
those of agents and of code that is edited; the longer the match and the more often it went on that way, the longer the
draft. A suffix is found by its last tokens in an index of texts, which is as good as a suffix tree for suffixes of some
tokens and up, and takes a tenth of its memory.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection
from weakref import WeakKeyDictionary

from engine.config import SpeculationConfig
from engine.speculation.proposer import ProposerContext, ProposerNeeds, TargetShape, draft_budget, most_drafts
from engine.speculation.verified_step import VerifiedStep
from engine.types import Sequence

ANCHOR = 2  # tokens by which places are found: of shorter suffixes there is no guess
NUM_PLACES = 12  # of an anchor that are looked at, the newest
LONGEST_MATCH = 32  # tokens; longer ones say no more
MAX_TOKENS = 1 << 17  # of a tenant's texts: some 30 MB
MAX_TOKENS_OF_ALL = 1 << 19  # of all tenants' texts
MAX_IDLE_TENANTS = 64  # none of whose requests runs
MAX_INDEXED_PER_STEP = 4096  # tokens of all sequences together: about five milliseconds
LENGTH_OF_MATCH = 2  # drafts for each token that matches


class Text:
    """The tokens of one request, as far as they are indexed.

    is_gone: it has made room, and is neither looked at nor indexed any further; its places leave a few at a time
    """

    __slots__ = ("is_gone", "num_indexed", "num_left", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.num_indexed, self.num_left, self.is_gone = 0, 0, False  # num_left: tokens whose places have left


class SuffixIndex:
    """Where pairs of tokens occur in a tenant's texts, the newest places last. Oldest texts make room for new ones.

    num_tokens: that take room, those of texts that are about to leave among them
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._places: dict[tuple[int, int], list[tuple[Text, int]]] = {}
        self._texts: OrderedDict[int, Text] = OrderedDict()  # by id, the one that grew last at the end
        self._leaving: deque[Text] = deque()
        self._max_tokens = max_tokens
        self.num_tokens = 0

    def extend(self, text: Text, token_ids: list[int], max_num_tokens: int) -> int:
        """Indexes a text as far as it is known now, by at most so many tokens more; returns by how many.

        For each token that is indexed, at most one has to leave: no long text ever leaves at once.

        token_ids: what was given the last time, and any number of tokens more
        """
        first, last = len(text.token_ids), min(len(token_ids), len(text.token_ids) + max(max_num_tokens, 0))
        if first == last or text.is_gone:
            return 0
        self._make_room(last - first, text)
        text.token_ids += token_ids[first:last]
        for end in range(max(text.num_indexed, ANCHOR), last):
            places = self._places.setdefault((token_ids[end - 2], token_ids[end - 1]), [])
            places.append((text, end))
            if len(places) > 2 * NUM_PLACES:
                del places[:NUM_PLACES]
        text.num_indexed = last
        self._texts[id(text)] = text
        self._texts.move_to_end(id(text))
        self.num_tokens += last - first
        return last - first

    def has(self, text: Text) -> bool:
        return id(text) in self._texts

    def forget(self, text: Text) -> None:
        """Looks at a text no more; its places leave as room is needed."""
        if self.has(text):
            del self._texts[id(text)]
            text.is_gone = True
            self._leaving.append(text)

    def let_leave(self, num_tokens: int, staying: Collection[Text] = ()) -> int:
        """Frees the room of so many tokens, or less where only texts are left that are staying; returns of how many."""
        num_left = 0
        while num_left < num_tokens:
            if not self._leaving:
                oldest = next((one for one in self._texts.values() if one not in staying), None)
                if oldest is None:
                    break
                self.forget(oldest)
            num_left += self._let_one_leave(self._leaving[0], num_tokens - num_left)
        self.num_tokens -= num_left
        return num_left

    def continuation(self, own: Text, token_ids: list[int], most: int) -> tuple[list[int], list[float]]:
        """What followed the longest suffix that was seen before, and how often each token did, given those before it.

        token_ids: a text whose newest tokens are the suffix; own: what is indexed of it; most: tokens of what follows
        """
        if len(token_ids) < ANCHOR:
            return [], []
        longest = 0
        places: list[tuple[Text, int]] = []
        for text, end in reversed(self._places.get((token_ids[-2], token_ids[-1]), ())[-NUM_PLACES:]):
            length = 0 if text.is_gone else _match(text.token_ids, end, token_ids)
            if length > longest:
                longest, places = length, []
            if length == longest:
                places.append((text, end))
        drafts: list[int] = []
        shares: list[float] = []
        most = min(most, LENGTH_OF_MATCH * longest)
        while len(drafts) < most:
            # where a copy of the text itself reaches its end, it goes on with what it has copied: a period
            places = [(text, end) for text, end in places if end < len(text.token_ids) or text is own]
            following = [
                text.token_ids[end] if end < len(text.token_ids) else drafts[end - len(text.token_ids)]
                for text, end in places
            ]
            if not following:
                break
            token_id, count = Counter(following).most_common(1)[0]  # of equals, the newest
            drafts.append(token_id)
            shares.append(_share(count, len(places), longest))
            places = [(t, end + 1) for (t, end), one in zip(places, following, strict=True) if one == token_id]
        return drafts, shares

    def _make_room(self, num_tokens: int, text: Text) -> None:
        """For so many tokens of this text, which itself stays: a text that fills the index alone may grow."""
        self.let_leave(self.num_tokens + num_tokens - self._max_tokens, (text,))

    def _let_one_leave(self, text: Text, most: int) -> int:
        """Takes out the places of the next tokens of a text; returns of how many."""
        first, last = text.num_left, min(text.num_left + most, len(text.token_ids))
        token_ids = text.token_ids
        for end in range(max(first, ANCHOR), min(last, text.num_indexed)):
            anchor = token_ids[end - 2], token_ids[end - 1]
            places = [place for place in self._places.get(anchor, ()) if place != (text, end)]
            if places:
                self._places[anchor] = places
            else:
                self._places.pop(anchor, None)
        text.num_left = last
        if last == len(token_ids):
            self._leaving.popleft()
        return last - first


class SuffixProposer:
    """Looks each sequence's newest tokens up among the texts of its tenant: never among those of another."""

    def __init__(
        self, *, num_drafts: int, max_tokens: int = MAX_TOKENS, max_tokens_of_all: int = MAX_TOKENS_OF_ALL
    ) -> None:
        self.needs = ProposerNeeds(num_drafts=num_drafts)
        self._num_drafts, self._max_tokens, self._max_tokens_of_all = num_drafts, max_tokens, max_tokens_of_all
        self._tenants: OrderedDict[str, SuffixIndex] = OrderedDict()  # by cache salt, the one asked last at the end
        self._leaving: list[SuffixIndex] = []  # of tenants that are forgotten
        self._texts: WeakKeyDictionary[Sequence, Text] = WeakKeyDictionary()

    @classmethod
    def from_config(cls, config: SpeculationConfig, context: ProposerContext) -> SuffixProposer:
        return cls(num_drafts=most_drafts(config))

    @classmethod
    def needs_of(cls, config: SpeculationConfig, target: TargetShape) -> ProposerNeeds:
        return ProposerNeeds(num_drafts=most_drafts(config))

    def propose(self, step: VerifiedStep) -> None:
        num_drafts = min(self._num_drafts, step.max_depth)
        wanted = [seq for seq in step.drafting if draft_budget(seq, self._num_drafts) > 0]
        wanted += [seq for seq in step.ended if seq in self._texts]
        num_left = self._make_room(min(sum(map(self._num_behind, wanted)), MAX_INDEXED_PER_STEP))
        for seq in sorted(wanted, key=self._num_behind):  # a long prompt keeps nobody waiting
            num_left -= self._index_of(seq).extend(self._text_of(seq), seq.token_ids, num_left)
        for seq in step.drafting:
            budget = draft_budget(seq, num_drafts)
            text = self._text_of(seq)
            drafts, shares = self._index_of(seq).continuation(text, seq.token_ids, budget) if budget > 0 else ([], [])
            seq.draft_run(drafts, shares)

    def _num_behind(self, seq: Sequence) -> int:
        text = self._text_of(seq)
        return 0 if text.is_gone else seq.num_tokens - len(text.token_ids)

    def _index_of(self, seq: Sequence) -> SuffixIndex:
        salt = seq.request.cache_salt
        index = self._tenants.get(salt)
        if index is None:
            index = self._tenants[salt] = SuffixIndex(self._max_tokens)
        self._tenants.move_to_end(salt)
        return index

    def _make_room(self, num_tokens: int) -> int:
        """How many of so many tokens may be indexed now: of requests that run, nothing is forgotten for another tenant.

        Tenants of whom no request runs leave first, those asked longest ago, then texts of the others.
        """
        indices = [*self._leaving, *self._tenants.values()]
        num_lacking = num_tokens - (self._max_tokens_of_all - sum(index.num_tokens for index in indices))
        if num_lacking <= 0 and len(self._tenants) <= MAX_IDLE_TENANTS and not self._leaving:
            return num_tokens
        running = {seq.request.cache_salt for seq in self._texts}
        idle = deque(salt for salt in self._tenants if salt not in running)
        while idle and (len(idle) > MAX_IDLE_TENANTS or num_lacking > sum(one.num_tokens for one in self._leaving)):
            self._leaving.append(self._tenants.pop(idle.popleft()))
        num_left = 0
        for index in self._leaving:
            num_left += index.let_leave(MAX_INDEXED_PER_STEP - num_left)
        num_lacking -= num_left
        self._leaving = [index for index in self._leaving if index.num_tokens]
        staying = set(self._texts.values())
        for index in self._tenants.values():
            num_lacking -= index.let_leave(num_lacking, staying)
        return num_tokens - max(num_lacking, 0)

    def _text_of(self, seq: Sequence) -> Text:
        text = self._texts.get(seq)
        if text is not None and len(text.token_ids) > seq.num_tokens:  # tokens were taken back
            self._index_of(seq).forget(text)
            text = None
        if text is None:
            text = self._texts[seq] = Text()
        return text


def _match(text: list[int], end: int, token_ids: list[int]) -> int:
    """How many tokens before `end` are the newest ones of `token_ids`."""
    most = min(LONGEST_MATCH, end, len(token_ids))
    length = ANCHOR
    while length < most and text[end - 1 - length] == token_ids[-1 - length]:
        length += 1
    return length


def _share(count: int, num_places: int, length: int) -> float:
    """The estimated chance of a continuation that `count` of so many places have, after a match of so many tokens.

    As if, of a match of that length, one place in 1 + length had gone on otherwise.
    """
    return count / (num_places + 1.0 / (1.0 + length / 4))
