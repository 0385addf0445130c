"""The model runner of a GPU: Triton's attention, and decoding steps as CUDA graphs."""

from __future__ import annotations

from engine.attention_triton import TritonAttention, make_graph_space
from engine.block_tables import BlockTables
from engine.graph_runner import GraphDevice, GraphLimits, GraphRunner
from engine.kv_cache import KVCache
from engine.model_runner import ModelRunner
from engine.models.model import Model
from engine.planner import MemoryPlan


def make_gpu_runner(
    model: Model, cache: KVCache, plan: MemoryPlan, graph_device: GraphDevice, *, one_path: bool = False
) -> ModelRunner:
    """Graphs are captured while requests are served; here, they get the memory that the plan has for them.

    one_path: as of `TritonAttention`
    """
    device = cache.kv[0].device
    space = make_graph_space(
        model.attention_layers,
        plan.dtype,
        device,
        max_context=plan.max_model_len + plan.num_lookahead_tokens,
        num_bytes=plan.graphs.attention,
    )
    attention, tables = TritonAttention(cache, graph_space=space, one_path=one_path), BlockTables()
    limits = GraphLimits(
        max_num_seqs=plan.max_num_seqs,
        max_rows_per_seq=1 + plan.num_lookahead_tokens,
        max_num_blocks=-(-space.max_context // plan.block_size),
        block_size=plan.block_size,
    )
    graphs = GraphRunner(model, attention, tables, limits=limits, graph_device=graph_device, device=device)
    return ModelRunner(model, cache, attention, block_size=plan.block_size, tables=tables, graphs=graphs)
