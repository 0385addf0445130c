"""How the pieces of an answer become one."""

from __future__ import annotations

import random

from server.generation.choice import Delta, DeltaCollector


class CountedText(str):
    """Text that counts the characters that are copied when it is added to other text."""

    num_copied = 0

    def __radd__(self, other: str) -> str:
        CountedText.num_copied += len(other) + len(self)
        return str(other) + str(self)


def test_the_whole_of_an_answer_is_its_pieces_in_order() -> None:
    chance = random.Random(2)
    for _ in range(100):
        texts = [
            "".join(chance.choices("a\r\n\u2028é🙂\ud800", k=chance.randrange(4))) for _ in range(chance.randrange(9))
        ]
        collector = DeltaCollector(3)
        for number, text in enumerate(texts):
            collector.add(Delta(index=3, text=text, token_ids=[number], offsets=[number, number]))
        collector.add(Delta(index=3, finish_reason="stop", stop_reason="x"))
        whole = collector.collected()
        assert whole.text == "".join(texts)
        assert whole.token_ids == list(range(len(texts)))
        assert whole.offsets == [number for number in range(len(texts)) for _ in range(2)]
        assert (whole.index, whole.is_first, whole.finish_reason, whole.stop_reason) == (3, True, "stop", "x")


def test_a_long_answer_is_not_copied_for_each_of_its_tokens() -> None:
    collector = DeltaCollector(0)
    num_pieces = 131072
    for number in range(num_pieces):
        collector.add(Delta(index=0, text=CountedText("abcd"), token_ids=[number], offsets=[4 * number]))
    assert len(collector.collected().text) == 4 * num_pieces
    assert CountedText.num_copied <= 10 * 4 * num_pieces
