"""Answers that clients may ask for again: the newest, bounded in number and in bytes, each tenant's its own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

OVERHEAD = 512  # bytes of an entry beside its texts, about


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """answer: in the words of its API. inputs: what it answers, likewise; messages: the whole conversation as a chat
    has it, its own included. All in JSON, as bytes: parsed they would take ten times the memory."""

    answer: bytes
    inputs: bytes
    messages: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.answer) + len(self.inputs) + len(self.messages) + OVERHEAD


class AnswerStore:
    """The oldest answer goes first, whoever's it is. Another tenant's id is another id, whatever it looks like.

    Long answers are kept from another thread than that of the event loop.
    """

    def __init__(self, *, max_answers: int, max_bytes: int) -> None:
        self._max_answers, self._max_bytes = max_answers, max_bytes
        self._answers: OrderedDict[tuple[str, str], StoredAnswer] = OrderedDict()  # by tenant and id
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def is_off(self) -> bool:
        return self._max_answers == 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def keep(self, tenant: str, answer_id: str, answer: StoredAnswer) -> bool:
        """Keeps an answer, in the place of one with the same id. False if it is larger than all may be."""
        self.delete(tenant, answer_id)
        if self.is_off or answer.num_bytes > self._max_bytes:
            return False
        with self._lock:
            self._answers[tenant, answer_id] = answer
            self._num_bytes += answer.num_bytes
            while len(self._answers) > self._max_answers or self._num_bytes > self._max_bytes:
                _, oldest = self._answers.popitem(last=False)
                self._num_bytes -= oldest.num_bytes
        return True

    def find(self, tenant: str, answer_id: str) -> StoredAnswer | None:
        return self._answers.get((tenant, answer_id))

    def delete(self, tenant: str, answer_id: str) -> bool:
        """Whether there was one."""
        with self._lock:
            answer = self._answers.pop((tenant, answer_id), None)
            if answer is not None:
                self._num_bytes -= answer.num_bytes
        return answer is not None
