"""The stages of `peregrine quantize`: choose a format for each matrix, round, write, and read it as the server will."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

from engine.compression.bit_allocation import Choice, allocate
from engine.compression.calibrated_rounding import CalibrationJob, computed_in
from engine.compression.calibration_environment import find_python
from engine.compression.checkpoint_writer import MAX_FILE_BYTES, CheckpointWriter, Written, write_companions
from engine.compression.output_folder import check_is_free, check_room, new_folder
from engine.compression.plain_checkpoint import PlainCheckpoint, PlainMatrix, open_plain_checkpoint
from engine.compression.sensitivity import Losses, Sensitivities
from engine.compression.weight_scheme import WIDTHS, WeightScheme
from engine.config import ModelConfig
from engine.ipc.messages import TokenizerAssets
from engine.loading.default_model import Report, cache_directory
from engine.loading.json_file import read_json_object
from engine.loading.loader import read_model_facts, read_tokenizer, silent
from engine.loading.source import digest_weights
from engine.models.model_error import ModelError
from engine.planning.machine import read_machine

RoundingMethod = Literal["rtn", "gptq", "awq"]
Schemes = Mapping[str, WeightScheme]  # by the names of tensors
_HEADER_BYTES = 160  # of a tensor, in a file


@dataclass(frozen=True, slots=True)
class Budget:
    """What a checkpoint may take: bytes of its weight files, or bits of a quantised weight, scales included."""

    num_bytes: int | None = None
    bits: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """scheme: of all matrices, as far as rows are made of its groups; None: bfloat16, which rounds GGUF files alone

    bits: those to choose among for each layer, within a `budget`; empty: the scheme's
    method: gptq and awq learn from `sequences`, token ids of a text; so does the choice of bits
    """

    model: ModelConfig
    output: Path
    scheme: WeightScheme | None
    method: RoundingMethod = "rtn"
    sequences: Sequence[Sequence[int]] = ()
    bits: tuple[int, ...] = ()
    budget: Budget | None = None
    seed: int = 0
    max_file_bytes: int = MAX_FILE_BYTES

    def run(self, report: Report = silent) -> Written:
        """Writes the checkpoint. ModelError for what the user can mend; nothing is left of `output` then."""
        check_is_free(self.output)
        python = None if self.method == "rtn" else find_python()  # first: what cannot be is said at once
        plain = open_plain_checkpoint(self.model, report)
        schemes = self._schemes(plain, report)
        writer = CheckpointWriter(plain, schemes, max_file_bytes=self.max_file_bytes)
        tokenizer = read_tokenizer(self.model) if plain.is_gguf else None
        with new_folder(self.output) as folder:
            report("writing", f"{self.output}, {writer.num_bytes / 1e6:,.0f} MB")
            if python is None:
                written = writer.write(folder, tokenizer)
            else:
                written = self._calibrated(plain, writer, folder, tokenizer, python)
            read_model_facts(ModelConfig(path=str(folder)))  # as the server will
        return written

    def _schemes(self, plain: PlainCheckpoint, report: Report) -> Schemes:
        if self.scheme is None:
            return {}
        if self.bits:
            return self._chosen(plain, self.scheme, report)
        return {name: self.scheme.for_inputs(matrix.shape[1]) for name, matrix in plain.matrices.items()}

    def _chosen(self, plain: PlainCheckpoint, scheme: WeightScheme, report: Report) -> Schemes:
        assert self.budget is not None
        units: dict[str, list[PlainMatrix]] = {}
        for matrix in plain.matrices.values():
            units.setdefault(matrix.unit, []).append(matrix)
        by_bits = {bits: replace(scheme, bits=bits) for bits in self.bits}
        sizes = {name: {bits: _num_bytes(unit, one) for bits, one in by_bits.items()} for name, unit in units.items()}
        budget = _budget_of_matrices(plain, self.budget)
        least = sum(min(one.values()) for one in sizes.values())
        if least > budget:
            raise ModelError(_too_small(plain, self.budget, least, budget))
        _check_memory(plain, "its layers are measured in float32", 4)
        report("measuring", f"{len(units)} units on {sum(map(len, self.sequences)):,} tokens")
        losses = self._losses(plain, units, by_bits)
        choices = {
            name: [Choice(bits, size, losses[name][bits]) for bits, size in one.items()] for name, one in sizes.items()
        }
        bits = allocate(choices, budget)
        return {name: by_bits[bits[one.unit]].for_inputs(one.shape[1]) for name, one in plain.matrices.items()}

    def _losses(
        self, plain: PlainCheckpoint, units: Mapping[str, Sequence[PlainMatrix]], schemes: Mapping[int, WeightScheme]
    ) -> Losses:
        """Measured once for each model, text and formats, whatever the budget: measuring takes long."""
        digest = digest_weights(plain.checkpoint.source)
        key = json.dumps([digest, [repr(one) for one in schemes.values()], [list(ids) for ids in self.sequences]])
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        record = cache_directory() / "sensitivities" / f"{name}.json"
        return Sensitivities(plain, units, schemes, record).measure(self.sequences)

    def _calibrated(
        self,
        plain: PlainCheckpoint,
        writer: CheckpointWriter,
        folder: Path,
        tokenizer: TokenizerAssets | None,
        python: Path,
    ) -> Written:
        assert self.method != "rtn"
        dtype = _dtype(plain)
        width = 4 if computed_in(dtype) == "float32" else 2
        _check_memory(plain, f"{self.method} has all of it in memory", width)
        work = folder / "work"
        model = plain.path
        if plain.is_gguf:
            model = work / "model"
            model.mkdir(parents=True)
            CheckpointWriter(plain, {}).write(model, tokenizer)
        work.mkdir(exist_ok=True)
        check_room(folder, writer.num_bytes)
        result = work / "result"
        CalibrationJob(
            model=model,
            output=result,
            method=self.method,
            sequences=self.sequences,
            config=writer.config,
            dtype=dtype,
            seed=self.seed,
        ).run(python)
        found = read_json_object(result / "config.json").get("quantization_config")
        if not isinstance(found, dict):
            raise ModelError(f"llmcompressor wrote no quantization_config for {plain.path}; nothing was quantised")
        _forget_scale_dtype(found)
        weights = [*result.glob("*.safetensors"), *result.glob("*.safetensors.index.json")]
        for file in weights:
            file.replace(folder / file.name)
        writer.write_config(folder, quantization=found)
        write_companions(plain, folder, tokenizer)
        shutil.rmtree(work)
        written = writer.summary()
        written.bytes_after = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return written


def _forget_scale_dtype(fields: dict[str, object]) -> None:
    """Of a quantization_config: the library was given it because of what it computes in; scales are the model's."""
    groups = fields.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        group["weights"].pop("scale_dtype", None)


def describe(written: Written) -> str:
    """What came of it, for people."""
    lines = []
    kinds: dict[str, int] = {}
    for scheme in written.schemes.values():
        kinds[scheme.label] = kinds.get(scheme.label, 0) + 1
    lines += [f"{label}: {count} matrices" for label, count in sorted(kinds.items())]
    share = written.num_quantized / max(1, written.num_weights)
    lines.append(f"{written.num_quantized:,} of {written.num_weights:,} weights are quantised ({share:.0%})")
    if written.bits is not None:
        lines.append(f"{written.bits:.2f} bits a quantised weight, scales included")
    if written.error.total:
        lines.append(f"root mean square of the rounding: {written.error.relative:.2%} of that of the weights")
    lines.append(f"{written.bytes_before / 1e6:,.1f} MB became {written.bytes_after / 1e6:,.1f} MB")
    return "\n".join(lines)


def _num_bytes(unit: Sequence[PlainMatrix], scheme: WeightScheme) -> int:
    return sum(scheme.for_inputs(one.shape[1]).num_bytes(one.shape, one.scales) for one in unit)


def _budget_of_matrices(plain: PlainCheckpoint, budget: Budget) -> int:
    if budget.bits is not None:
        return int(budget.bits * sum(prod(one.shape) for one in plain.matrices.values()) / 8)
    assert budget.num_bytes is not None
    return budget.num_bytes - _rest(plain)


def _rest(plain: PlainCheckpoint) -> int:
    """Bytes of tensors that stay as they are, and of headers."""
    kept = [WIDTHS[dtype] * prod(shape) for name, (dtype, shape) in plain.tensors.items() if name not in plain.matrices]
    return sum(kept) + _HEADER_BYTES * (len(plain.tensors) + 3 * len(plain.matrices))


def _too_small(plain: PlainCheckpoint, budget: Budget, least: int, left: int) -> str:
    num_weights = sum(prod(one.shape) for one in plain.matrices.values())
    if budget.bits is not None:
        return (
            f"--size-budget bits={budget.bits} is less than the {8 * least / num_weights:.2f} bits that the fewest "
            "take, scales included; raise it, or let fewer bits be chosen with --bits-per-layer"
        )
    assert budget.num_bytes is not None
    rest = _rest(plain)
    return (
        f"--size-budget of {budget.num_bytes / 2**30:.3f} GiB is less than the {(least + rest) / 2**30:.3f} GiB that "
        f"the fewest bits take, of which {rest / 2**30:.3f} GiB are what is not quantised; raise it, or let fewer bits "
        "be chosen with --bits-per-layer"
    )


def _check_memory(plain: PlainCheckpoint, why: str, width: int) -> None:
    wanted = int(1.1 * width * sum(prod(shape) for _, shape in plain.tensors.values()))
    there = read_machine().available_bytes
    if wanted > there:
        raise ModelError(
            f"{plain.path} takes {wanted / 2**30:.1f} GiB of memory, since {why}, and {there / 2**30:.1f} GiB are "
            "free; use --method rtn without --bits-per-layer, which takes one matrix at a time"
        )


def _dtype(plain: PlainCheckpoint) -> str:
    """That most weights have."""
    counts: dict[str, int] = {}
    for dtype, shape in plain.tensors.values():
        counts[dtype] = counts.get(dtype, 0) + prod(shape)
    most = max(counts, key=lambda dtype: counts[dtype])
    return {"F16": "float16", "F32": "float32"}.get(most, "bfloat16")
