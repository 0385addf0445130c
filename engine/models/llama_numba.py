"""The Llama family on a CPU: its layers as one program of compiled operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.attention.numba_backend import NumbaAttention
from engine.batch.device_inputs import ForwardBatch
from engine.models.llama import MLP, Attention, Block, Llama, TokenTable
from engine.models.model import Decoder, DecoderOutput
from engine.models.moe import SparseMLP
from engine.models.moe_numba import ExpertProgram
from engine.models.products import Products, packed, product_scratch
from engine.models.rope import RotaryEmbedding, RotationTable
from engine.quantization.linear import Linear
from engine.quantization.numba_cpu import PackedTable
from kernels.numba.core.formats import FORMAT_OF
from kernels.numba.core.lanes import LANES
from kernels.numba.ops.linear import BLOCK_ROWS
from kernels.numba.ops.tables import row_address
from kernels.numba.packing.packing import Stack
from kernels.numba.program.program import NUM_STEP_FIELDS, Operation, Step
from kernels.numba.program.team import Program, Team, operation


class NumbaLlama(Decoder):
    """Runs a `Llama` whose matrices are packed. Everything between embedding and logits is float32.

    dtype: bfloat16 to round rows to it where they meet matrices of bfloat16, which some processors multiply several
    times as fast; else those are widened, exactly. Sums are float32.

    Each operation names the memory that it reads and writes, so a program is written once for a number of rows; more
    rows than ever before make new buffers and a new program. A step is one program, from its ids to its logits.
    """

    def __init__(
        self, model: Llama, attention: NumbaAttention, team: Team, *, dtype: torch.dtype = torch.float32
    ) -> None:
        self.attention_layers = model.attention_layers
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size
        self.hidden_layers = model.hidden_layers
        self._model, self._attention, self._team = model, attention, team
        self._products = Products(team.num_threads, rounds_to_bfloat16=dtype == torch.bfloat16)
        self._rotations = [RotationTable(rope) for rope in model.ropes if isinstance(rope, RotaryEmbedding)]
        self._num_positions = 0  # that they have
        self._layers: _Layers | None = None
        self._head: OutputProgram | None = None
        self._whole: _Whole | None = None

    @property
    def product_kind(self) -> int:
        """What the products of its layers are, of `kernels.numba.core.formats`: as the first layer's first."""
        block = next(iter(self._model.blocks()))
        return self._products.kind_with(packed(block.self_attn.qkv_proj).parts[0].kind)

    def forward(self, batch: ForwardBatch, attention: object) -> Tensor:
        """As `Decoder.forward`, valid until the next call; the attention is the one that the program was made for."""
        return self.compute_step(batch, attention).hidden

    def compute_step(self, batch: ForwardBatch, attention: object) -> DecoderOutput:
        num_logits = batch.logits_rows.shape[0]
        layers, head = self._layers_for(batch, attention), self._head_for(num_logits)
        whole = self._whole
        if whole is None or whole.layers is not layers or whole.head is not head:
            whole = self._whole = _Whole(layers, head, self._attention.step)
        self._team.run(whole.program)
        hidden = layers.hidden(batch.positions.shape[0])
        if not self.hidden_layers:
            return DecoderOutput(hidden, head.hidden[:num_logits], self._own_logits(head, num_logits))
        return DecoderOutput(hidden, hidden.index_select(0, batch.logits_rows), self._own_logits(head, num_logits))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.compute_logits`; valid until the next call."""
        num_rows = hidden.shape[0]
        head = self._head_for(num_rows)
        head.multiply(hidden, self._team)
        return self._own_logits(head, num_rows)

    def _layers_for(self, batch: ForwardBatch, attention: object) -> _Layers:
        """The layers with room for the batch, whose numbers stand in the attention's step."""
        assert attention is self._attention, "a program has one KV cache"
        num_rows = batch.positions.shape[0]
        layers = self._layers
        if layers is None or num_rows > layers.num_rows:
            num_rows = -(-num_rows // BLOCK_ROWS) * BLOCK_ROWS
            layers = self._layers = _Layers(self._model, self._attention, num_rows, self._products)
        self._attention.step[Step.PAIRS] = batch.positions.shape[0] * layers.num_pairs_of_row
        layer = self.attention_layers[0]
        self._attention.cut_tiles(batch, group=layer.num_heads // layer.num_kv_heads)
        longest = max(batch.seq_lens_list)
        if longest > self._num_positions:
            for table in self._rotations:
                table.reach(longest)
            self._attention.set_rotations([(table.cos, table.sin) for table in self._rotations])
            self._num_positions = min((len(table.cos) for table in self._rotations), default=longest)
        return layers

    def _head_for(self, num_rows: int) -> OutputProgram:
        head = self._head
        if head is None or num_rows > head.num_rows:
            head = self._head = OutputProgram(packed(self._model.lm_head), num_rows, self._products)
        return head

    def _own_logits(self, head: OutputProgram, num_rows: int) -> Tensor:
        """Without the columns that fill the last panel up."""
        logits = head.logits[:num_rows]
        return logits if logits.shape[1] == self.vocab_size else logits[:, : self.vocab_size].contiguous()


class _Layers:
    """The operations of a model's layers, and the buffers that they name, for up to `num_rows` rows.

    One object, and complete before anybody has it: a program whose buffers are gone writes into memory of others.
    """

    def __init__(self, model: Llama, attention: NumbaAttention, num_rows: int, products: Products) -> None:
        self.num_rows, self.buffers = num_rows, _Buffers(model, num_rows)
        self._model, self._attention, self._products = model, attention, products
        self._keeps: list[Tensor] = []
        mixtures = [block.mlp for block in model.blocks() if isinstance(block.mlp, SparseMLP)]
        self._experts = ExpertProgram(mixtures, num_rows, products) if mixtures else None
        self.num_pairs_of_row = 0 if self._experts is None else self._experts.top_k
        self.operations = self._operations()

    def hidden(self, num_rows: int) -> Tensor:
        """What they leave, as of `Decoder.forward`."""
        buffers = self.buffers
        hidden = buffers.normed[:num_rows]
        inputs = [buffers.inputs[layer][:num_rows] for layer in self._model.hidden_layers]
        return torch.cat((hidden, *inputs), dim=1) if inputs else hidden

    def _operations(self) -> list[list[int]]:
        model, buffers = self._model, self.buffers
        operations = [self._embed(model.embed_tokens, buffers.residual)]
        for index, block in enumerate(model.blocks()):
            operations += [*self._keep_input(index), *self._block(block)]
        return [*operations, self._normalise(model.norm.weight, model.norm.eps)]

    def _embed(self, tokens: TokenTable, out: Tensor) -> list[int]:
        if tokens.table is None:
            where = (tokens.weight.data_ptr(), FORMAT_OF[tokens.weight.dtype], out.data_ptr())
            self._keeps.append(tokens.weight)
            gather: list[int] = operation(Operation.GATHER, *where, out.shape[1], Step.INPUT_IDS)
            return gather
        assert isinstance(tokens.table, PackedTable)
        packed = tokens.table.packed
        where = (row_address(packed.kind), packed.values.data_ptr(), packed.scales.data_ptr())
        self._keeps += [packed.values, packed.scales]
        look_up: list[int] = operation(Operation.GATHER_PACKED, *where, out.data_ptr(), out.shape[1], Step.INPUT_IDS)
        return look_up  # typed

    def _keep_input(self, layer: int) -> list[list[int]]:
        """Copies the residual stream, where somebody wants it."""
        kept, residual = self.buffers.inputs.get(layer), self.buffers.residual
        if kept is None:
            return []
        return [operation(Operation.COPY, residual.data_ptr(), kept.data_ptr(), residual.shape[1])]

    def _block(self, block: Block) -> list[list[int]]:
        buffers, attention = self.buffers, block.self_attn
        rope = None
        if block.rope_index is not None:
            rotation = self._model.ropes[block.rope_index]
            assert isinstance(rotation, RotaryEmbedding)
            rope = (block.rope_index, 2 * rotation.inverse_frequencies.shape[0])
        qkv, out = packed(attention.qkv_proj), packed(attention.o_proj)
        norms, of_heads = self._norms(attention)
        return [
            self._normalise(block.input_layernorm.weight, block.input_layernorm.eps),
            *self._multiply(buffers.normed, qkv, attention.qkv_proj.bias, buffers.qkv),
            *norms,
            *self._attention.store_and_attend(
                attention.layer, buffers.qkv, buffers.attended, rope=rope, norms=of_heads
            ),
            *self._multiply(buffers.attended, out, attention.o_proj.bias, buffers.residual, adds=True),
            self._normalise(block.post_attention_layernorm.weight, block.post_attention_layernorm.eps),
            *self._add_mlp(block.mlp),
        ]

    def _norms(self, attention: Attention) -> tuple[list[list[int]], tuple[int, int, float]]:
        """(operations that normalise a row's queries, and its keys, as a vector each; what `store_and_attend` knows of
        those of each head)"""
        q_norm, k_norm, layer = attention.q_norm, attention.k_norm, attention.layer
        if q_norm is None or k_norm is None:
            return [], (0, 0, 0.0)
        weights = self._floats(q_norm.weight), self._floats(k_norm.weight)
        if q_norm.weight.shape[0] == layer.head_dim:
            return [], (*weights, q_norm.eps)
        qkv, num_queries = self.buffers.qkv, layer.num_heads * layer.head_dim
        parts = zip((0, num_queries), weights, (num_queries, layer.num_kv_heads * layer.head_dim), strict=True)
        where = [(qkv.data_ptr() + 4 * first, weight, size, qkv.shape[1]) for first, weight, size in parts]
        return [operation(Operation.NORMALISE_PARTS, *one, factors=(q_norm.eps, 0.0)) for one in where], (0, 0, 0.0)

    def _add_mlp(self, mlp: nn.Module) -> list[list[int]]:
        """The residual stream, and what comes of the normalised one."""
        normed, residual = self.buffers.normed, self.buffers.residual
        if isinstance(mlp, MLP):
            return self._multiply_mlp(mlp, residual, adds=True)
        assert isinstance(mlp, SparseMLP)
        assert self._experts is not None
        operations = self._experts.add_mixture(mlp, normed, residual)
        if mlp.shared_expert is None:
            return operations
        shared = self.buffers.shared
        return [
            *operations,
            *self._multiply_mlp(mlp.shared_expert, shared, adds=False),
            *self._experts.add_shared(mlp, normed, shared, residual),
        ]

    def _multiply_mlp(self, mlp: MLP, out: Tensor, *, adds: bool) -> list[list[int]]:
        buffers, up, down = self.buffers, packed(mlp.gate_up_proj), packed(mlp.down_proj)
        gate_up, activated = buffers.of_mlp[down.depth]
        where = (gate_up.data_ptr(), activated.data_ptr(), activated.shape[1])
        return [
            *self._multiply(buffers.normed, up, mlp.gate_up_proj.bias, gate_up),
            operation(Operation.SILU_AND_MULTIPLY, *where),
            *self._multiply(activated, down, mlp.down_proj.bias, out, adds=adds),
        ]

    def _normalise(self, weight: Tensor, eps: float) -> list[int]:
        x, out = self.buffers.residual, self.buffers.normed
        fields = (x.data_ptr(), self._floats(weight), out.data_ptr(), x.shape[1])
        normalise: list[int] = operation(Operation.NORMALISE, *fields, factors=(eps, 0.0))
        return normalise

    def _multiply(
        self, x: Tensor, matrix: Stack, bias: Tensor | None, out: Tensor, *, adds: bool = False
    ) -> list[list[int]]:
        """out = x @ matrix.T + bias, or added to out."""
        filled = []
        if bias is not None:
            values = self._floats(bias)
            filled = [operation(Operation.FILL, values, out.data_ptr(), out.shape[1], int(adds))]
            adds = True
        return [*filled, *self._products.operations(x, matrix, out, self.buffers.scratch, adds=adds)]

    def _floats(self, parameter: Tensor) -> int:
        """Address of a parameter's values as float32."""
        values = parameter.float().contiguous()
        self._keeps.append(values)
        return values.data_ptr()


class OutputProgram:
    """The program of the output layer, and what it reads and writes, for up to `num_rows` rows."""

    def __init__(self, matrix: Stack, num_rows: int, products: Products) -> None:
        self.num_rows, depth = num_rows, matrix.depth
        self.hidden = torch.empty(num_rows, depth)
        self.logits = torch.empty(num_rows, matrix.num_panels * LANES)
        self.step = torch.zeros(NUM_STEP_FIELDS, dtype=torch.int64)
        scratch = product_scratch(num_rows, depth, [matrix])
        self.operations = products.operations(
            self.hidden, matrix, self.logits, scratch, adds=False, rows=Step.NUM_LOGITS
        )
        self.program = Program(self.operations, self.step, keeps=scratch)

    def multiply(self, hidden: Tensor, team: Team) -> Tensor:
        """The logits of these rows, with the columns that fill the last panel up; valid until the next call."""
        num_rows = hidden.shape[0]
        if num_rows:
            self.hidden[:num_rows] = hidden
            self.step[Step.NUM_LOGITS] = num_rows
            team.run(self.program)
        return self.logits[:num_rows]


class _Whole:
    """The program of a step: of the layers, then of the output layer, for the rows for which somebody wants logits."""

    def __init__(self, layers: _Layers, head: OutputProgram, step: Tensor) -> None:
        self.layers, self.head = layers, head
        normed, wanted = layers.buffers.normed, head.hidden
        where = (normed.data_ptr(), FORMAT_OF[normed.dtype], wanted.data_ptr(), wanted.shape[1])
        select = operation(Operation.GATHER, *where, Step.LOGITS_ROWS, rows=Step.NUM_LOGITS)
        self.program = Program([*layers.operations, select, *head.operations], step)


class _Buffers:
    """What the operations of a step write, for up to `num_rows` rows. All layers share them."""

    def __init__(self, model: Llama, num_rows: int) -> None:
        a, layer = model.architecture, model.attention_layers[0]
        heads = layer.num_heads * layer.head_dim
        self.num_rows = num_rows
        self.residual = torch.empty(num_rows, a.hidden_size)
        self.inputs = {index: torch.empty(num_rows, a.hidden_size) for index in model.hidden_layers}  # of layers
        self.normed = torch.empty(num_rows, a.hidden_size)
        self.qkv = torch.empty(num_rows, heads + 2 * layer.num_kv_heads * layer.head_dim)
        self.attended = torch.empty(num_rows, heads)
        widths = {mlp.down_proj.in_features for mlp in model.modules() if isinstance(mlp, MLP)}
        # by width: gate and up side by side, and what comes of them
        self.of_mlp = {n: (torch.empty(num_rows, 2 * n), torch.empty(num_rows, n)) for n in widths}
        has_shared = any(isinstance(mlp, SparseMLP) and mlp.shared_expert is not None for mlp in model.modules())
        self.shared = torch.empty(num_rows if has_shared else 0, a.hidden_size)
        stacks = [layer.weight for layer in model.modules() if isinstance(layer, Linear)]
        depth = max(a.hidden_size, heads, *widths)
        self.scratch = product_scratch(num_rows, depth, [one for one in stacks if isinstance(one, Stack)])
