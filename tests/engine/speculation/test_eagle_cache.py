"""What a sequence believes to be in an EAGLE head's cache is there, whatever became of its blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from engine.arrays import Ints
from engine.speculation.eagle_cache import EagleCache, KnownRows
from tests.support.eagle_files import open_tiny, random_eagle

SIZE, NUM_BLOCKS = 2, 9
CONFIG = open_tiny(random_eagle()).config


@dataclass
class Text:
    """A sequence of random tokens, of which the target has computed some."""

    tokens: list[int]
    known: KnownRows = field(default_factory=KnownRows)
    table: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def hashes(self) -> list[bytes]:
        return [bytes(self.tokens[:end]) for end in range(SIZE, len(self.tokens) + 1, SIZE)]


class World:
    """Texts that take blocks, compute, are shown or not, and lose their blocks again.

    rows, states: what lies in each place and as each block's last state: the text that it was made of
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.cache = EagleCache(
            CONFIG, num_blocks=NUM_BLOCKS, block_size=SIZE, dtype=torch.float32, device=torch.device("cpu")
        )
        self.rows: dict[tuple[int, int], tuple[int, ...]] = {}
        self.states: dict[int, tuple[int, ...]] = {}
        self.free = list(range(1, NUM_BLOCKS))
        self.texts = [Text([self.rng.randrange(2) for _ in range(8)]) for _ in range(6)]
        self.num_found = self.num_states_found = 0

    def start(self, text: Text) -> None:
        """Some of its beginning may be found, where blocks have it; the target need not know more than the head."""
        text.table, text.num_computed = [], 0
        while self.rng.random() < 0.8 and len(text.table) < 3:
            digest = text.hashes[len(text.table)]
            block = next((block for block in self.free if self.cache.holds(block, digest)), None)
            if block is None:
                break
            self.free.remove(block)
            text.table.append(block)
        text.num_computed = len(text.table) * SIZE

    def stop(self, text: Text) -> None:
        self.free += text.table
        self.rng.shuffle(self.free)
        text.table = []

    def compute(self, text: Text, *, is_shown: bool) -> None:
        end = min(text.num_computed + self.rng.randint(1, 3), len(text.tokens) - 1)
        while len(text.table) * SIZE < end:
            if not self.free:
                return
            text.table.append(self.free.pop())
        first, text.num_computed = text.num_computed, end
        if is_shown and first < end:
            self._show(text, first, end)

    def _show(self, text: Text, first: int, end: int) -> None:
        known, table, hashes = text.known, np.array(text.table), text.hashes
        known.follow(self.cache, table, hashes[: end // SIZE], first)
        self._check(text, first)
        state = known.state_before(self.cache, first)
        if state is not None and known.state_at != first - 1:
            self.num_states_found += 1
            assert self.states[text.table[first // SIZE - 1]] == tuple(text.tokens[:first])
        start = first + (state is None)
        if start < end:
            known.claim(self.cache, table, start, end)
            for token in range(start, end):
                self._write(text, table, token)
            known.keep(self.cache, hashes[: end // SIZE], start, end)
        known.state, known.state_at = torch.zeros(CONFIG.hidden_size), end - 1
        self._check(text, end)

    def _write(self, text: Text, table: Ints, token: int) -> None:
        block = int(table[token // SIZE])
        self.rows[block, token % SIZE] = tuple(text.tokens[: token + 1])
        if token % SIZE == SIZE - 1:
            self.states[block] = tuple(text.tokens[: token + 1])

    def _check(self, text: Text, num_tokens: int) -> None:
        assert not text.known.is_known[num_tokens:].any()
        for token in np.flatnonzero(text.known.is_known).tolist():
            assert token > 0
            place = text.table[token // SIZE], token % SIZE
            assert self.rows[place] == tuple(text.tokens[: token + 1])
            self.num_found += 1


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_are_believed_to_be_there_are_there(seed: int) -> None:
    world = World(seed)
    for _ in range(3000):
        text = world.rng.choice(world.texts)
        if not text.table and world.rng.random() < 0.5:
            world.start(text)
        world.compute(text, is_shown=world.rng.random() < 0.8)
        if world.rng.random() < 0.25:
            world.stop(text)
            text.num_computed = 0
        if world.rng.random() < 0.02:
            world.texts[world.texts.index(text)] = Text([world.rng.randrange(2) for _ in range(8)])
            world.stop(text)
    assert world.num_found > 1000
    assert world.num_states_found > 20


def test_a_sequence_that_goes_on_knows_all_but_the_first_token() -> None:
    world = World(0)
    text = world.texts[0]
    while text.num_computed < 7:
        world.compute(text, is_shown=True)
    assert text.known.is_known[:7].tolist() == [False] + [True] * 6
