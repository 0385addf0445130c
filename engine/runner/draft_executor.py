"""A second model beside the target: an executor and the inputs of its own steps (`speculation.proposer.DraftModel`)."""

from __future__ import annotations

from dataclasses import replace

import torch
from tokenizers import Tokenizer

from engine.config import EngineConfig
from engine.kv_cache.codec import make_codec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.storage import KVCache
from engine.loading.loader import LoadedModel, load_model
from engine.models.model_error import ModelError
from engine.planning.engine_plan import MemoryPlan
from engine.planning.machine import freeing_at_once
from engine.runner.executor import Executor, ModelExecutor
from engine.runner.kernel_backend import KernelBackend
from engine.runner.model_runner import ModelRunner
from engine.runner.step_builder import StepBuilder
from engine.speculation.token_map import TokenMap, map_tokens
from engine.types import Sampled, Scheduled


class DraftExecutor:
    """Runs the draft model's steps, at once and on its own sequences."""

    def __init__(
        self,
        executor: Executor,
        builder: StepBuilder,
        tokens: TokenMap,
        *,
        max_model_len: int,
        max_num_tokens: int,
    ) -> None:
        self._executor, self._builder, self.tokens = executor, builder, tokens
        self.vocab_size, self.block_size = executor.vocab_size, builder.block_size
        self.num_groups = builder.tables.num_groups
        self.max_model_len, self.max_num_tokens = max_model_len, max_num_tokens

    @torch.inference_mode()
    def run(self, batch: list[Scheduled]) -> list[Sampled]:
        try:
            step = self._executor.launch(self._builder.build(batch))
            self._builder.launched()
            return step.finish().sampled
        except Exception:
            self._builder.failed(batch)
            raise


def open_draft_model(config: EngineConfig, plan: MemoryPlan, target: LoadedModel, beside: ModelRunner) -> DraftExecutor:
    """The draft model that the plan has room for, with a cache in the target's blocks.

    beside: the target's runner. ModelError where it cannot be loaded, or has another vocabulary.
    """
    draft = plan.draft
    assert draft is not None
    num_threads = torch.get_num_threads()  # as the target's layers need them
    back_end = KernelBackend(draft, is_strict=config.device.is_strict, is_torch_only=config.device.kernels == "torch")
    if draft.kernels == "numba":
        back_end.compile()
        torch.set_num_threads(draft.num_threads)  # which pack
    with freeing_at_once(), torch.device(draft.device):
        loaded = load_model(draft.model_config, dtype=draft.dtype, seed=config.seed, methods=back_end.linear_methods)
    has_independent_rows = back_end.prepare(loaded.model)
    torch.set_num_threads(num_threads)
    try:
        tokens = map_tokens(_vocabulary(target), _vocabulary(loaded), loaded.vocab_size, target_size=target.vocab_size)
    except ValueError as error:
        raise ModelError(f"speculation.model is {draft.facts.path}, but {error}") from None
    cache = KVCache(
        # of one group: a sequence has one block table here, which all groups of layers read, so none may share places
        [replace(layer, group=0) for layer in loaded.model.attention_layers],
        num_blocks=plan.num_blocks + 1,
        block_size=plan.block_size,
        codec=make_codec(draft.kv_codec, keys_as_columns=back_end.has_compiled_attention(loaded.model)),
        device=draft.device,
    )
    own = back_end.make_runner(loaded.model, cache, has_independent_rows=has_independent_rows, beside=beside)
    sampler = back_end.make_sampler(loaded.vocab_size)
    builder = StepBuilder(
        plan.block_size,
        loaded.vocab_size,
        num_groups=len(windows_of(loaded.model.attention_layers)),
        counts_on_device=sampler.keeps_token_counts,
    )
    executor = ModelExecutor(own, sampler)
    return DraftExecutor(
        executor, builder, tokens, max_model_len=draft.max_model_len, max_num_tokens=draft.max_num_batched_tokens
    )


def _vocabulary(loaded: LoadedModel) -> dict[str, int]:
    """Each token's text, as the tokeniser has it."""
    vocabulary: dict[str, int] = Tokenizer.from_str(loaded.tokenizer.tokenizer_json).get_vocab()
    return vocabulary
