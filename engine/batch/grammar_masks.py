"""The tokens that grammars allow in a step's rows, one bit per token, while a thread is still finding them."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from engine.arrays import Bools, Ints


class GrammarMasks:
    """Packed masks of some sampled rows. Immutable, once it is filled.

    rows: [num_masked] the sampled rows that follow a grammar, ascending
    """

    def __init__(self, rows: Ints, words: NDArray[np.uint32], filling: Future[None] | None = None) -> None:
        """words: [num_masked, num_words]; filling: who still writes them"""
        self.rows = rows
        self._words, self._filling = words, filling

    def words(self) -> NDArray[np.uint32]:
        """Waits until they are filled. [num_masked, num_words]: bit i of word j says whether token 32 j + i may come.

        There may be more bits than the model has tokens.
        """
        if self._filling is not None:
            self._filling.result()
        return self._words

    def forbidden(self, vocab_size: int) -> Bools:
        """The tokens that must not come. [num_masked, vocab_size]"""
        bits = np.unpackbits(self.words().view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        forbidden: Bools = bits == 0
        return forbidden
