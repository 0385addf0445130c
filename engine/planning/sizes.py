"""The arithmetic of a memory plan: the bytes of one model on one machine, and the KV tokens that fit beside it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.kv_cache.codec import make_codec
from engine.kv_cache.groups import most_blocks, span_of_step
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.storage import bytes_per_block
from engine.loading.loading_peak import OTHER_BYTES, READ_BYTES, Matrix, WeightSizes, loading_peak
from engine.loading.model_facts import ModelFacts
from engine.planning.machine import Machine
from engine.planning.resolve import Resolved, SettingError, parse_cache_size
from engine.quantization.method import WeightFormat, formats_of, most_stored
from engine.speculation.proposer import ProposerNeeds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_GPU_FRACTION = 0.9  # of the device, weights included
_CPU_SHARE = 0.5  # of what is free beside the weights: the machine is not the server's alone
_CPU_TOKENS_PER_SEQ = 384  # of cache for each of max_num_seqs: a short chat, its cached prefix and its answer

SCORED_ROWS = 256  # of prompts, whose logits a step may hold beside all that are sampled: at 150k tokens, 150 MB

MAX_NUM_GRAPHS = 48  # CUDA graphs that are kept at once
MAX_GRAPH_ROWS = 512  # of a CUDA graph: a larger step computes for longer than its launches take
_GRAPH_CONTEXTS = 1 << 20  # tokens, of all contexts that one graph attends to; steps with more run eagerly
_SPLIT_TOKENS = 256  # of a context per split of split-KV; with a chip's smaller splits, fewer tokens have room
_GRAPH_ALLOWANCE = 8 << 20  # bytes that the driver keeps for each graph, assumed: not measured yet


class PlanError(ValueError):
    """The model does not fit; the text has the numbers and the one change that helps."""

    kind = "memory"


@dataclass(frozen=True, slots=True)
class GraphDemand:
    """The bytes that CUDA graphs take: two buffers that all share, and what each adds."""

    attention: int = 0  # partial results of split-KV
    others: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.others


@dataclass(frozen=True, slots=True)
class Demand:
    """The bytes that are needed besides the KV cache, and those that each token of it takes."""

    linear: int
    embedding: int  # and everything else that is no linear layer
    experts: int  # of the embedding's
    loading: int  # at the peak while the weights are loaded and packed; nothing of the rest is there then
    workspace: int
    speculation: int  # weights of the proposer, and the workspace of its own steps
    num_logits: int  # rows of a step, for which the workspace has room
    graphs: GraphDemand
    kv_per_token: int  # with all layers, none of whose windows has passed it
    span: int  # tokens that a sequence holds past a window, at most
    read_per_token: int  # to lay one layer's context out in order, beside the cache

    @property
    def fixed(self) -> int:
        return self.linear + self.embedding + self.workspace + self.speculation + self.graphs.total

    @property
    def per_token(self) -> int:
        return self.kv_per_token + self.read_per_token


@dataclass(frozen=True, slots=True)
class Sizer:
    """Computes the sizes for one model on one machine.

    device, kernels, quantization: what "auto" became. measured_workspace: the bytes that a largest step took, where one
    was run; without it they are estimated.
    """

    facts: ModelFacts
    config: EngineConfig
    machine: Machine
    device: str
    kernels: str
    quantization: str
    needs: ProposerNeeds
    num_threads: int
    measured_workspace: int | None = None

    @property
    def block_size(self) -> int:
        return self.config.kv_cache.block_size

    @property
    def num_lookahead(self) -> int:
        """Tokens past a sequence's newest one that may be stored: drafts, and what proposing them writes."""
        return self.needs.num_drafts + self.needs.num_lookahead_tokens

    @property
    def windows(self) -> list[int | None]:
        """Of each group of layers."""
        return windows_of(self.facts.attention_layers)

    @property
    def num_groups(self) -> int:
        return len(self.windows)

    def num_blocks_for(self, num_tokens: int, demand: Demand) -> int:
        """Blocks that one sequence of so many tokens and its look-ahead owns at once, at most."""
        num_tokens += self.num_lookahead
        return most_blocks(self.windows, num_tokens, span=demand.span, block_size=self.block_size)

    def demand(self, dtype: str, kv_dtype: str, *, max_num_seqs: int, max_num_batched_tokens: int) -> Demand:
        facts, size = self.facts, DTYPES[dtype].itemsize
        linear, embedding, experts = self._weights(size)
        codec = make_codec(kv_dtype)
        code_size = codec.dtype.itemsize
        kv_per_block = bytes_per_block(facts.attention_layers, self.block_size, codec)
        of_proposer = self.needs.kv_bytes_per_token * self.num_groups  # it has a block for each block of each group
        kv_per_token = -(-kv_per_block * self.num_groups // self.block_size) + of_proposer
        num_sampled = min(max_num_seqs * (1 + self.needs.num_drafts), max_num_batched_tokens)
        num_logits = min(num_sampled + SCORED_ROWS, max_num_batched_tokens)
        # float32: as computed and as laid out; of sampled rows, processed, sorted and noise
        logits = (2 * num_logits + 3 * num_sampled) * facts.vocab_size * 4
        activations = max_num_batched_tokens * (2 * facts.widest + 8 * facts.hidden_size) * 4
        estimated = logits + activations + self._rotations()
        return Demand(
            linear=linear,
            embedding=embedding,
            experts=experts,
            loading=self._loading(linear + embedding, size),
            workspace=estimated if self.measured_workspace is None else self.measured_workspace,
            speculation=self.needs.num_bytes,
            num_logits=num_logits,
            graphs=self._graphs(size, max_num_seqs) if self._has_triton else GraphDemand(),
            kv_per_token=kv_per_token,
            span=span_of_step(max_num_batched_tokens, self.block_size, self.num_lookahead),
            read_per_token=0 if self._reads_in_place else self._read_per_token(kv_per_token, size, code_size),
        )

    def _read_per_token(self, kv_per_token: int, size: int, code_size: int) -> int:
        """Bytes of a token in one layer that was laid out in order: as it is kept, and as numbers to multiply.

        size: bytes of a number in the model's dtype; code_size: of one in the cache
        """
        copies = 2 if code_size > 1 else 1 + size
        return -(-copies * kv_per_token // len(self.facts.attention_layers))

    @property
    def format(self) -> WeightFormat:
        return formats_of(self.kernels)[self.quantization]

    def _weights(self, size: int) -> tuple[int, int, int]:
        """(bytes of linear layers, of everything else, of experts among that), at most.

        size: bytes of a weight in the model's dtype
        """
        facts = self.facts
        is_packed = self.quantization != "none" or self.device == "cpu"  # a packed output layer shares no matrix
        output = facts.num_embedding_parameters if facts.ties_output and is_packed else 0
        in_layers = facts.num_linear_parameters
        if not facts.ties_output:  # those of the output layer, which may be kept in another format
            output = min(in_layers, facts.vocab_size * facts.hidden_size)
            in_layers -= output
        linear = in_layers * (self.format.num_bytes or size) + output * (self.format.output or size)
        others: float = (facts.num_parameters - facts.num_linear_parameters) * size
        others -= facts.experts.num_parameters * size
        experts = facts.experts.num_parameters * (self.format.experts or size)
        if self.kernels == "numba":  # which keeps what files have in few bits as it is
            others -= facts.num_embedding_parameters * (size - self._table_bytes(size))
        for matrix in facts.matrices:
            saved = self._saved(matrix, size)
            experts -= saved if matrix.is_of_experts else 0
            linear -= 0 if matrix.is_of_experts else saved
        return int(linear), int(others + experts), int(experts)

    def _table_bytes(self, size: int) -> float:
        """Of a weight of the embedding under compiled layers, beside the output layer's, if that shares it."""
        facts, exact = self.facts, self.facts.embedding_bytes
        if exact is None or exact >= size:
            return size
        is_output_s = facts.ties_output and self._keeps(exact) and exact <= most_stored(self.format.output or size)
        return 0 if is_output_s else exact

    def _keeps(self, exact: float) -> bool:
        """Whether matrices that a file has in so many bytes a weight may stay so: "none" knows floats only."""
        return self.format.num_bytes is not None or exact == 2

    def _saved(self, matrix: Matrix, size: int) -> float:
        """Bytes of a matrix that is kept in fewer than its format has for floats; below 0 of one in a few more."""
        fmt, exact = self.format, matrix.exact_bytes
        if self.quantization == "stored":
            return 0 if matrix.code_bytes is None else matrix.num_weights * max(0.0, size - matrix.code_bytes)
        planned = (fmt.output if matrix.is_output else fmt.num_bytes) or size
        if self.kernels != "numba" or exact is None or not self._keeps(exact) or exact > most_stored(planned):
            return 0
        return matrix.num_weights * (planned - exact)

    def _loading(self, stays: int, size: int) -> int:
        """The peak while the weights are loaded and packed. size: bytes of a weight in the model's dtype"""
        facts, is_random = self.facts, self.config.model.load_format == "dummy"
        if is_random:
            return loading_peak(stays, self._packed, WeightSizes(size, self.format.scratch))
        table = Matrix(facts.num_embedding_parameters, exact_bytes=facts.embedding_bytes)  # is read like any other
        whole = [*self._packed, table]
        if self.kernels == "numba":  # rows of others are read out of the file, some at a time
            whole = [one for one in whole if one.exact_bytes is None]
        peak = loading_peak(stays, whole, WeightSizes(READ_BYTES, self.format.scratch))
        return max(peak, facts.num_parameters * size + OTHER_BYTES) if facts.loads_whole else peak

    @property
    def _packed(self) -> list[Matrix]:
        """Those that are floats first, and then something else."""
        return [one for one in self.facts.matrices if not one.is_of_experts or self.format.experts is not None]

    @property
    def _has_triton(self) -> bool:
        """Whether the kernels are Triton's, whose steps can be captured into CUDA graphs."""
        return self.device == "cuda" and self.kernels == "triton"

    @property
    def _reads_in_place(self) -> bool:
        """Whether attention reads the paged cache in place, without a gather."""
        return self._has_triton or self.kernels == "numba"

    def _rotations(self) -> int:
        """Bytes of the tables of compiled layers (`RotationTable`), once a text of the longest length was there."""
        if self.kernels != "numba":
            return 0
        layers = self.facts.attention_layers
        num_rotations = len({layer.window for layer in layers})  # windowed layers may have one of their own
        return self._wanted_length() * 5 // 4 * num_rotations * 8 * max(layer.head_dim for layer in layers)

    def _graphs(self, size: int, max_num_seqs: int) -> GraphDemand:
        """size: bytes of an activation"""
        facts, rows_per_seq = self.facts, 1 + self.needs.num_drafts
        num_rows = min(MAX_GRAPH_ROWS, max_num_seqs * rows_per_seq)
        layers = facts.attention_layers
        num_pieces = _GRAPH_CONTEXTS // _SPLIT_TOKENS + max_num_seqs
        item = max(layer.num_heads * (layer.head_dim + 1) for layer in layers) * 4
        num_blocks = num_blocks_for(self._wanted_length() + self.num_lookahead, self.block_size)
        tables = 2 * max_num_seqs * num_blocks * self.num_groups * 8
        activations = num_rows * (2 * facts.widest + 8 * facts.hidden_size) * size
        each = num_rows * facts.hidden_size * size + _GRAPH_ALLOWANCE
        return GraphDemand(num_pieces * rows_per_seq * item, tables + activations + MAX_NUM_GRAPHS * each)

    def cache_tokens(self, demand: Demand, max_num_seqs: int) -> Resolved[int]:
        """The tokens of the KV cache. PlanError where the memory for them is not free."""
        size = parse_cache_size(self.config.kv_cache.memory)
        free = self.machine.available_bytes - demand.fixed
        if free < demand.per_token * self.block_size:
            raise PlanError(self._too_large(demand))
        if size.num_bytes is not None:
            return self._as_asked(size.num_bytes // demand.kv_per_token, demand, free)
        if size.num_tokens is not None:
            return self._as_asked(size.num_tokens, demand, free)
        if size.fraction is not None:
            return self._share_of_device(size.fraction, demand, free, "config")
        if self.device == "cuda":
            return self._share_of_device(_GPU_FRACTION, demand, free, "default")
        return self._modest(demand, free, max_num_seqs)

    def length(self, demand: Demand, num_blocks: int) -> Resolved[int]:
        """max_model_len, for which one sequence and its look-ahead must fit; PlanError where they do not."""
        wanted, is_auto = self._wanted_length(), self.config.model.max_model_len == "auto"
        room = num_blocks // self.num_groups * self.block_size
        needed = self.num_blocks_for(wanted, demand)
        if needed <= num_blocks:
            return Resolved(wanted, "model", "the trained context") if is_auto else Resolved(wanted, "config")
        fits = bisect_right(range(wanted), num_blocks, key=lambda length: self.num_blocks_for(length, demand)) - 1
        if fits < 1:
            raise PlanError(
                f"the KV cache holds {room} tokens, no more than the look-ahead of {self.num_lookahead}; "
                f'set kv_cache.memory to "{self._tokens_of(needed)}tokens"'
            )
        if is_auto:
            return Resolved(fits, "measured", f"trained for {wanted}, but the KV cache holds {room} tokens")
        raise PlanError(
            f"one sequence of model.max_model_len = {wanted} tokens and {self.num_lookahead} of look-ahead needs "
            f"{needed} KV blocks ({gib(self._tokens_of(needed) * demand.kv_per_token)}), but there is room for "
            f"{num_blocks}; set model.max_model_len to {fits} or less"
        )

    def _wanted_length(self) -> int:
        """max_model_len as set, or as trained."""
        wanted, trained = self.config.model.max_model_len, self.facts.trained_context
        longest = max(trained, self.facts.longest_context)
        if wanted == "auto":
            return trained
        if wanted > longest:
            stretched = f" (its rope scaling stretches that to {longest} at most)" if longest > trained else ""
            raise SettingError(
                f"model.max_model_len is {wanted}, but the model was trained for {trained} tokens{stretched} and "
                f"answers nonsense beyond; set it to {longest} or less"
            )
        return wanted

    def _as_asked(self, num_tokens: int, demand: Demand, free: int) -> Resolved[int]:
        if num_tokens * demand.per_token <= free:
            return Resolved(num_tokens, "config")
        raise PlanError(
            f"kv_cache.memory is {self.config.kv_cache.memory}: {num_tokens} tokens take "
            f"{gib(num_tokens * demand.per_token)}, reading them included, but {gib(free)} are free beside the model; "
            f'set it to "{free // demand.per_token}tokens" or less'
        )

    def _share_of_device(self, fraction: float, demand: Demand, free: int, source: str) -> Resolved[int]:
        total = self.machine.total_bytes
        room = min(free, int(total * fraction) - demand.fixed)
        if room < demand.per_token * self.block_size:
            raise PlanError(
                f"kv_cache.memory is {fraction:g} of {gib(total)}, but the weights and the workspace alone take "
                f"{gib(demand.fixed)}; set it to {min(1.0, demand.fixed / total + 0.1):.2f} or more"
            )
        return Resolved(room // demand.per_token, source, f"{fraction:g} of {gib(total)}, less weights and workspace")

    def _modest(self, demand: Demand, free: int, max_num_seqs: int) -> Resolved[int]:
        """A CPU's default: as much as the requests are likely to use, of a memory that other programs use too."""
        longest = self._tokens_of(self.num_blocks_for(self._wanted_length(), demand))
        wanted = max(longest, num_blocks_for(max_num_seqs * _CPU_TOKENS_PER_SEQ, self.block_size) * self.block_size)
        affordable = int(free * _CPU_SHARE) // demand.per_token
        if wanted <= affordable:
            reason = f"one longest sequence, or {_CPU_TOKENS_PER_SEQ} tokens for each of max_num_seqs"
            return Resolved(wanted, "default", reason)
        reason = f"{_CPU_SHARE:g} of the {gib(free)} that are free beside the model"
        return Resolved(max(affordable, self.block_size), "measured", reason)

    def _tokens_of(self, num_blocks: int) -> int:
        """Tokens of the smallest cache with so many blocks, counted as kept by all layers."""
        return num_blocks_for(num_blocks, self.num_groups) * self.block_size

    def _too_large(self, demand: Demand) -> str:
        fix = "name a smaller model in model.path"
        if demand.linear + demand.embedding < self.machine.available_bytes // 2:
            fix = "lower scheduler.max_num_batched_tokens"
        if (self.format.num_bytes or 2) > 1.5 and self._fits_with(demand, bytes_per_weight=1):
            fix = "set model.quantization to int8"
        elif self.config.model.dtype == "float32" and self._fits_with(demand, bytes_per_weight=2):
            fix = "set model.dtype to bfloat16"
        return (
            f"{self.facts.path} needs {gib(demand.linear + demand.embedding)} for its weights and "
            f"{gib(demand.workspace + demand.graphs.total)} to work in, but {gib(self.machine.available_bytes)} of "
            f"{gib(self.machine.total_bytes)} are free; {fix}"
        )

    def _fits_with(self, demand: Demand, *, bytes_per_weight: int) -> bool:
        smaller = (
            demand.workspace
            + demand.graphs.total
            + demand.embedding
            + self.facts.num_linear_parameters * bytes_per_weight
        )
        return bool(smaller < self.machine.available_bytes)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def gib(num_bytes: int) -> str:
    """A size for people: GiB, or MiB below half of one."""
    return f"{num_bytes / 2**30:,.2f} GiB" if abs(num_bytes) >= 2**29 else f"{num_bytes / 2**20:,.1f} MiB"
