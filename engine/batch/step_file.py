"""One step's inputs in a file, so that a step that ended a process can be run again (`python -m engine.replay`).

The numbers of a step are its shapes: lengths, positions, slots, block tables, settings of sampling. Its contents, the
token ids, are left out unless somebody asks for them: zeros stand for them.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine.batch.grammar_masks import GrammarMasks
from engine.batch.step_inputs import (
    CountChanges,
    LogprobInputs,
    PenaltyInputs,
    RowEdits,
    StepInputs,
    TokenEdits,
    TypicalInputs,
)


class StepFile(msgspec.Struct, frozen=True, kw_only=True):
    """config_json: of the engine that ran the step; has_contents: whether the token ids are the real ones"""

    config_json: str
    has_contents: bool
    inputs: StepInputs

    def write(self, path: Path) -> None:
        """Atomically, and readable by its owner alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.msgpack.encode(self, enc_hook=_encode_array))
        os.replace(beside, path)

    @staticmethod
    def read(path: Path) -> StepFile:
        """ValueError for what is not such a file, OSError for what cannot be read."""
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=StepFile, dec_hook=_decode_array)
        except (msgspec.DecodeError, msgspec.ValidationError, TypeError) as error:
            raise ValueError(f"{path} is not a recorded step: {error}") from error


def without_contents(inputs: StepInputs) -> StepInputs:
    """The same shapes, with token 0 for every token."""
    sampling = inputs.sampling
    return replace(
        inputs,
        input_ids=np.zeros_like(inputs.input_ids),
        sampling=replace(
            sampling,
            edits=tuple(_edits_without_contents(one) for one in sampling.edits),
            counts=None if sampling.counts is None else _counts_without_contents(sampling.counts),
            logprobs=None if sampling.logprobs is None else _logprobs_without_contents(sampling.logprobs),
            typical=None if sampling.typical is None else _typical_without_contents(sampling.typical),
            masks=None if sampling.masks is None else _masks_without_contents(sampling.masks),
        ),
    )


def _edits_without_contents(edits: RowEdits) -> RowEdits:
    penalties, tokens = edits.penalties, edits.tokens
    return RowEdits(
        edits.row,
        None if penalties is None else _penalties_without_contents(penalties),
        TokenEdits(np.zeros_like(tokens.biased), np.zeros_like(tokens.biases), None),
        edits.banned[:0],
    )


def _penalties_without_contents(penalties: PenaltyInputs) -> PenaltyInputs:
    ids = penalties.token_ids
    return replace(penalties, token_ids=None if ids is None else np.zeros_like(ids))


def _counts_without_contents(counts: CountChanges) -> CountChanges:
    pairs = {name: getattr(counts, name) * np.array([1, 0]) for name in ("in_prompt", "in_output", "behind_drafts")}
    return replace(counts, **pairs)


def _typical_without_contents(typical: TypicalInputs) -> TypicalInputs:
    return replace(typical, tokens=np.zeros_like(typical.tokens))


def _masks_without_contents(masks: GrammarMasks) -> GrammarMasks:
    """That allow all tokens."""
    return GrammarMasks(masks.rows, ~np.zeros_like(masks.words()))


def _logprobs_without_contents(logprobs: LogprobInputs) -> LogprobInputs:
    return replace(logprobs, tokens=np.zeros_like(logprobs.tokens))


def _encode_array(array: object) -> object:
    if isinstance(array, GrammarMasks):
        return array.rows, array.words()
    if not isinstance(array, np.ndarray):
        raise NotImplementedError(f"a step's inputs are arrays and numbers, not {type(array).__name__}")
    return array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()


def _decode_array(kind: type, value: Any) -> Any:
    if kind is GrammarMasks:
        return GrammarMasks(*(_decode_array(np.ndarray, part) for part in value))
    dtype, shape, data = value
    return np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape).copy()
