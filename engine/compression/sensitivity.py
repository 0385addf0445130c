"""How much each unit of a model changes its answers when it alone is quantised.

What is measured is the mean Kullback-Leibler divergence of the next token's distribution from the model's own, over
the tokens of a calibration text, with one unit rounded to the fewest bits that it may get, and all others as they are.
With more bits it is scaled by the square of the rounding error: where the change is small the divergence is quadratic
in it (as in Frantar and Alistarh 2022, "Optimal Brain Compression", section 3). The model is transformers', in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from engine.compression.matrix_rounding import rounded_floats
from engine.compression.plain_checkpoint import PlainCheckpoint, PlainMatrix, layer_number
from engine.compression.weight_scheme import WeightScheme
from engine.models.checkpoint_config import BareConfig
from engine.models.model_error import FOREIGN_ERRORS, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Losses = dict[str, dict[int, float]]  # of each unit, by bits
_SAME = 1e-4  # of logits: that two ways to compute them agree


class Sensitivities:
    """Measures the units of a model, or goes on with what an earlier process of the same job had measured.

    units: the matrices of each, by its name; schemes: by bits, of which the fewest are measured
    record: a file that is read and written as measuring goes on
    """

    def __init__(
        self,
        plain: PlainCheckpoint,
        units: Mapping[str, Sequence[PlainMatrix]],
        schemes: Mapping[int, WeightScheme],
        record: Path,
    ) -> None:
        self._plain, self._units, self._schemes, self._record = plain, units, schemes, record

    @torch.no_grad()
    def measure(self, sequences: Sequence[Sequence[int]]) -> Losses:
        """sequences: token ids of the calibration text. ModelError for a model that this cannot be done with."""
        fewest = min(self._schemes)
        found = self._read()
        missing = [name for name in self._units if name not in found]
        if missing:
            model = load_reference(self._plain)
            with tqdm(total=len(self._units), initial=len(found), desc="sensitivity", unit="unit", disable=None) as bar:
                for name, losses in self._measure(model, missing, sequences, fewest):
                    found[name] = losses
                    self._write(found)
                    bar.update()
        return {name: {int(bits): loss for bits, loss in losses.items()} for name, losses in found.items()}

    def _measure(
        self, model: PreTrainedModel, names: Sequence[str], sequences: Sequence[Sequence[int]], fewest: int
    ) -> Iterator[tuple[str, dict[str, float]]]:
        modules = _modules_of(model, self._plain, [one for name in names for one in self._units[name]])
        passes = [ReferencePass(model, torch.tensor([ids])) for ids in sequences]
        for name in names:
            matrices = self._units[name]
            first = layer_number(name)
            errors = dict.fromkeys(self._schemes, 0.0)
            rounded: dict[str, Tensor] = {}
            for matrix in matrices:
                weight = modules[matrix.name].weight
                for bits, scheme in self._schemes.items():
                    values = rounded_floats(weight, scheme.for_inputs(matrix.shape[1]), scales=matrix.scales)
                    errors[bits] += float((values - weight).square().sum())
                    if bits == fewest:
                        rounded[matrix.name] = values
            with _exchanged({matrix.name: modules[matrix.name] for matrix in matrices}, rounded):
                losses = [one.divergence(first or 0) for one in passes]
            loss = sum(losses) / len(losses)
            scale = loss / errors[fewest] if errors[fewest] > 0 else 0.0
            yield name, {str(bits): scale * error for bits, error in errors.items()}

    def _read(self) -> dict[str, dict[str, float]]:
        """Of a file that something else has damaged, nothing."""
        try:
            content = json.loads(self._record.read_text(encoding="utf-8"))
            known = {name: content[name] for name in self._units if name in content}
            return {name: {str(bits): float(one[str(bits)]) for bits in self._schemes} for name, one in known.items()}
        except (OSError, ValueError, TypeError, LookupError):
            return {}

    def _write(self, found: Mapping[str, Mapping[str, float]]) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(self._record)


class ReferencePass:
    """A text that the model has read once, and reads again from some layer on.

    Layers below the first one that changed have the same states, so that those are kept where the model's layers can
    be entered in the middle: half of the work, on the average.
    """

    def __init__(self, model: PreTrainedModel, token_ids: Tensor) -> None:
        """token_ids: [1, length]"""
        self._model, self._token_ids = model, token_ids
        self._layers: nn.ModuleList | None = getattr(model.model, "layers", None)
        self._states: list[Tensor] = []
        self._log_probs = F.log_softmax(self._logits_and_states(), -1)
        if self._layers is not None and not self._can_be_entered():
            self._layers = None

    def divergence(self, first_layer: int) -> float:
        """Mean over the tokens, in nats; only layers from `first_layer` on may have changed."""
        other = F.log_softmax(self._from(first_layer), -1)
        each = (self._log_probs.exp() * (self._log_probs - other)).sum(-1)
        return max(0.0, float(each.mean()))

    def _logits_and_states(self) -> Tensor:
        """[length, vocab_size]"""
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: self._keep(args, kwargs), with_kwargs=True)
            for layer in self._layers or []
        ]
        try:
            return self._forward(input_ids=self._token_ids)
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        self._states.append((args[0] if args else kwargs["hidden_states"]).clone())

    def _from(self, layer: int) -> Tensor:
        if self._layers is None or layer == 0:
            return self._forward(input_ids=self._token_ids)
        with _cut_off(self._model, self._layers, layer):
            return self._forward(inputs_embeds=self._states[layer])

    def _can_be_entered(self) -> bool:
        """Whether the model does the same from the middle on; some scale what comes in."""
        assert self._layers is not None
        if len(self._states) != len(self._layers) or len(self._layers) < 2:
            return False
        try:
            other = F.log_softmax(self._from(len(self._layers) // 2), -1)
        except FOREIGN_ERRORS:
            return False
        return bool((other - self._log_probs).abs().max() < _SAME)

    def _forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self._model(**inputs, use_cache=False).logits[0].float()
        return logits


@contextmanager
def _cut_off(model: PreTrainedModel, layers: nn.ModuleList, first: int) -> Iterator[None]:
    model.model.layers = layers[first:]
    try:
        yield
    finally:
        model.model.layers = layers


@contextmanager
def _exchanged(modules: Mapping[str, nn.Linear], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The modules with other weights, for a while."""
    before = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight.data = weights[name]
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = before[name]


def load_reference(plain: PlainCheckpoint) -> PreTrainedModel:
    """The model in transformers' layers, in float32. ModelError where transformers cannot make it of these files."""
    from transformers import AutoModelForCausalLM  # seconds

    config = plain.checkpoint.config
    try:
        if not plain.is_gguf:
            model = AutoModelForCausalLM.from_pretrained(plain.path, dtype=torch.float32, trust_remote_code=False)
            return model.eval()
        whole = config.of_family() if isinstance(config, BareConfig) else config
        model = AutoModelForCausalLM.from_config(whole, dtype=torch.float32)
        weights = {name: tensor.float() for name, tensor in plain.weights()}
        missing, unknown = model.load_state_dict(weights, strict=False)
        is_tied = whole.tie_word_embeddings
        missing = [name for name in missing if not (is_tied and name == "lm_head.weight")]
        if missing or unknown:
            raise ModelError(f"weights of the model are missing or not known: {', '.join([*missing, *unknown][:5])}")
        return model.eval()
    except ModelError:
        raise
    except (OSError, *FOREIGN_ERRORS) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{plain.path}: transformers cannot run it, so its layers cannot be measured: {reason}"
        ) from error


def _modules_of(
    model: PreTrainedModel, plain: PlainCheckpoint, matrices: Sequence[PlainMatrix]
) -> dict[str, nn.Linear]:
    """By the names of their tensors. ModelError where the layers are built otherwise than the files have them."""
    modules = dict(model.named_modules())
    found = {}
    for matrix in matrices:
        module = modules.get(matrix.module)
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != matrix.shape:
            raise ModelError(
                f"{plain.path}: transformers has no layer {matrix.module} as the files do, so that bits cannot be "
                "chosen by layer; leave --bits-per-layer out"
            )
        found[matrix.name] = module
    return found
