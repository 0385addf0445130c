"""Compiled grammars, made in a thread beside the steps and kept for those who ask for the same again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING

from engine.grammar import GrammarSpec
from engine.grammar_compiler import GrammarCompiler

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_KEPT = 32  # grammars; texts that follow one share what was found out about it
MAX_KEPT_BYTES = 8 << 20  # of their texts


class CompiledGrammars:
    """A bounded cache of compiled grammars, of which those leave first that nobody has asked for lately.

    open_compiler: makes the compiler, which takes a while: called in the thread, when the first grammar comes
    """

    def __init__(self, open_compiler: Callable[[], GrammarCompiler]) -> None:
        self._open_compiler = open_compiler
        self._compiler: GrammarCompiler | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-compiler")
        self._lock = Lock()  # of what follows
        self._kept: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()
        self._num_kept_bytes = 0

    @property
    def compiler(self) -> GrammarCompiler:
        """Once a grammar was compiled."""
        assert self._compiler is not None, "no grammar was compiled yet"
        return self._compiler

    def follow(self, spec: GrammarSpec, token_ids: list[int]) -> Future[LLMatcher]:
        """The grammar after a text of these tokens, which is there at once if it was kept and the text is empty.

        The future raises GrammarError where it cannot be compiled, ValueError where the text does not follow it.
        """
        if not token_ids and (kept := self._find(spec)) is not None:
            done: Future[LLMatcher] = Future()
            done.set_result(kept.deep_copy())
            return done
        return self._thread.submit(self._follow, spec, list(token_ids))

    def forget(self, spec: GrammarSpec) -> None:
        """Compiles it anew for the next who asks: what its texts share has become too much."""
        with self._lock:
            if self._kept.pop(spec, None) is not None:
                self._num_kept_bytes -= len(spec.text)

    def _follow(self, spec: GrammarSpec, token_ids: list[int]) -> LLMatcher:
        if self._compiler is None:
            self._compiler = self._open_compiler()
        compiled = self._find(spec)
        if compiled is None:
            compiled = self._compiler.compile(spec)
            self._keep(spec, compiled)
        followed = compiled.deep_copy()
        if not followed.consume_tokens(token_ids):
            raise ValueError("the tokens so far do not follow the request's grammar")
        return followed

    def _find(self, spec: GrammarSpec) -> LLMatcher | None:
        with self._lock:
            kept = self._kept.get(spec)
            if kept is not None:
                self._kept.move_to_end(spec)
            return kept

    def _keep(self, spec: GrammarSpec, compiled: LLMatcher) -> None:
        if len(spec.text) > MAX_KEPT_BYTES:
            return
        with self._lock:
            self._kept[spec] = compiled
            self._num_kept_bytes += len(spec.text)
            while len(self._kept) > MAX_KEPT or self._num_kept_bytes > MAX_KEPT_BYTES:
                left, _ = self._kept.popitem(last=False)
                self._num_kept_bytes -= len(left.text)
