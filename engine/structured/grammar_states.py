"""The grammars of the sequences that live: masks for their rows, drafts that they allow, and ends of their texts.

A step with such rows begins with masks in the making: a thread fills them while the model computes, since what was
accepted before is all that they depend on. Behind a draft, the mask is that of the text with the drafts on its path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from engine.batch.grammar_masks import GrammarMasks
from engine.grammar_compiler import GrammarCompiler
from engine.structured.compiled_grammars import CompiledGrammars
from engine.structured.grammar_state import GrammarState
from engine.types import Sampled, Scheduled, Sequence

_ALL = np.uint32(0xFFFFFFFF)


class _Rows(NamedTuple):
    """The masks to fill of one sequence: of its root, and behind each of its drafts."""

    state: GrammarState
    first: int  # row of the masks
    drafts: list[int]
    parents: list[int]


class GrammarStates:
    """Made once per engine; does nothing until a request comes with a grammar. Runs in the engine's thread."""

    def __init__(self, open_compiler: Callable[[], GrammarCompiler]) -> None:
        self._compiled = CompiledGrammars(open_compiler)
        self._states: WeakKeyDictionary[Sequence, GrammarState] = WeakKeyDictionary()
        self._opening: dict[Sequence, GrammarState] = {}  # those that must not be sampled yet
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._filling: Future[None] | None = None
        self._executor: object | None = None

    @property
    def has_any(self) -> bool:
        """Whether a sequence that lives has a grammar."""
        return bool(self._states)

    # --- requests that come ---

    def open(self, seq: Sequence) -> None:
        """Begins to compile the grammar of a new sequence, if it has one; `is_ready` says when it may be sampled."""
        spec = seq.params.grammar
        if spec is None:
            return
        output = seq.token_ids[seq.num_prompt_tokens :]
        self._states[seq] = self._opening[seq] = GrammarState(seq, self._compiled.follow(spec, output))

    def is_ready(self, seq: Sequence) -> bool:
        """Whether the sequence has no grammar, or one that was compiled when `take_failed` was called last."""
        return seq not in self._opening

    def take_failed(self) -> list[tuple[Sequence, str]]:
        """The sequences whose grammars have turned out to be impossible since the last call, and why: never ready."""
        failed: list[tuple[Sequence, str]] = []
        for seq, state in [one for one in self._opening.items() if one[1].is_open]:
            del self._opening[seq]
            failure = state.failure()
            if failure is not None:
                failed.append((seq, str(failure)))
            else:
                state.bans_eos = not set(self._compiled.compiler.eos_token_ids) <= seq.stop_token_ids
        return failed

    def wait(self, seconds: float) -> None:
        """Waits for the oldest grammar that is being compiled, but no longer than this."""
        for state in self._opening.values():
            state.wait(seconds)
            break

    # --- steps ---

    def masks(self, batch: list[Scheduled]) -> GrammarMasks | None:
        """The masks of the plan's sampled rows that follow a grammar, in the making; None where there are none."""
        if not self._states:
            return None
        self._settle()
        jobs: list[_Rows] = []
        rows: list[int] = []
        row = 0
        for item in batch:
            num_rows = item.num_sampled_rows
            if num_rows and item.seq.params.grammar is not None:
                drafts, parents = item.seq.draft_token_ids, item.seq.draft_parents
                num_drafts = item.num_drafts
                jobs.append(_Rows(self._state_of(item.seq), len(rows), drafts[:num_drafts], parents[:num_drafts]))
                rows += range(row, row + num_rows)
            row += num_rows
        if not jobs:
            return None
        words = np.full((len(rows), self._compiled.compiler.num_words), _ALL, dtype=np.uint32)
        self._filling = self._thread.submit(self._fill_or_raise, jobs, words)
        return GrammarMasks(np.array(rows, dtype=np.int64), words, self._filling)

    def follow(self, batch: list[Scheduled], sampled: list[Sampled]) -> None:
        """Takes in what a step has sampled, before the scheduler does: it may be less, or the end."""
        if not self._states:
            return
        self._settle()
        for item, result in zip(batch, sampled, strict=True):
            if item.samples and item.seq.params.grammar is not None:
                self._states[item.seq].follow(result)
                if result.error is not None:
                    self._compiled.forget(item.seq.params.grammar)

    def constrain(self, seqs: Iterable[Sequence]) -> None:
        """Takes the drafts from sequences that their grammars do not allow, with all that follow these."""
        if not self._states:
            return
        for seq in seqs:
            if seq.draft_token_ids and seq.params.grammar is not None:
                _keep_valid(seq, self._state_of(seq))

    def forced(self, seq: Sequence) -> list[int]:
        """The tokens that a sequence's grammar leaves no choice about; none without a grammar."""
        if not self._states or seq.params.grammar is None:
            return []
        return self._state_of(seq).forced()

    def _state_of(self, seq: Sequence) -> GrammarState:
        state = self._states[seq]
        assert state.num_followed == seq.num_output_tokens, "a grammar's state is that of the accepted tokens"
        return state

    def _settle(self) -> None:
        """Waits for masks of a step that may have failed: nobody else may use their states meanwhile."""
        filling, self._filling = self._filling, None
        if filling is not None:
            filling.exception()

    def _fill_or_raise(self, jobs: list[_Rows], words: NDArray[np.uint32]) -> None:
        try:
            self._fill(jobs, words)
        except BaseException as error:  # a panic of the library's is no Exception, and would end the engine
            raise RuntimeError(f"masks could not be computed: {error}") from error

    def _fill(self, jobs: list[_Rows], words: NDArray[np.uint32]) -> None:
        from llguidance import LLExecutor  # which those without grammars need not load

        if self._executor is None:
            self._executor = LLExecutor(num_threads=max(1, min(4, (os.cpu_count() or 1) // 4)))
        assert isinstance(self._executor, LLExecutor)
        memory = (words.ctypes.data, words.shape[1] * words.itemsize, len(words))
        roots = [(job.state.matcher, job.first) for job in jobs if not job.drafts]
        if roots:
            self._executor.unsafe_compute_mask_ptr(roots, *memory)
        for job in jobs:
            if job.drafts:
                _fill_tree(job, words)
            if job.state.bans_eos:
                _ban(self._compiled.compiler.eos_token_ids, words[job.first : job.first + 1 + len(job.drafts)])


def _fill_tree(job: _Rows, words: NDArray[np.uint32]) -> None:
    """One path after the other: the state goes down by its drafts, and is taken back up."""
    matcher = job.state.matcher
    path: list[int] = []  # drafts that the state has consumed
    for draft in range(-1, len(job.drafts)):
        wanted = _path_to(draft, job.parents)
        num_shared = next((i for i, pair in enumerate(zip(path, wanted, strict=False)) if pair[0] != pair[1]), None)
        num_shared = min(len(path), len(wanted)) if num_shared is None else num_shared
        if len(path) > num_shared:
            matcher.rollback(len(path) - num_shared)
        matcher.consume_tokens([job.drafts[one] for one in wanted[num_shared:]])
        path = wanted
        row = words[job.first + 1 + draft]
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    matcher.rollback(len(path))


def _path_to(draft: int, parents: list[int]) -> list[int]:
    path: list[int] = []
    while draft >= 0:
        path.append(draft)
        draft = parents[draft]
    return path[::-1]


def _keep_valid(seq: Sequence, state: GrammarState) -> None:
    tokens, parents = seq.draft_token_ids, seq.draft_parents
    is_valid: list[bool] = [False] * len(tokens)
    has_child = set(parents)
    for leaf in range(len(tokens)):
        if leaf in has_child:
            continue
        path = _path_to(leaf, parents)
        for one in path[: state.num_valid([tokens[draft] for draft in path])]:
            is_valid[one] = True
    seq.keep_drafts([index for index, keeps in enumerate(is_valid) if keeps])


def _ban(token_ids: Iterable[int], words: NDArray[np.uint32]) -> None:
    """words: [rows, num_words]"""
    for token in token_ids:
        words[:, token // 32] &= ~np.uint32(1 << (token % 32))
