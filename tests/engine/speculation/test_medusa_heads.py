"""Medusa heads of every layout against the definition, and what is refused."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.speculation.medusa_heads import MedusaHeads
from tests.support.medusa_files import HIDDEN, NUM_HEADS, VOCAB, TinyHeads, reference_tensors, vllm_tensors, write

KNOWN = [7, 3, 29, 0, 12, 18, 4, 25, 9, 11]


def load(path: Path, tiny: TinyHeads, *, hidden_size: int = HIDDEN, vocab_size: int = VOCAB) -> MedusaHeads:
    return MedusaHeads.load(path, hidden_size=hidden_size, vocab_size=vocab_size, output_rows=tiny.output_rows)


def check(heads: MedusaHeads, tiny: TinyHeads) -> None:
    """That logits, the best by themselves and the best behind a token are what the definition says."""
    states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))
    newest = torch.tensor([3, 0, 29, 5, 7])  # among them one that no token map here knows
    known = torch.tensor(tiny.known_tokens())
    defined = torch.stack(
        [
            torch.stack([tiny.logits(h, s, int(n)) for h in range(NUM_HEADS)])
            for s, n in zip(states, newest, strict=True)
        ]
    )
    logits = heads.logits(states, newest)
    assert heads.num_heads == NUM_HEADS
    assert logits.shape == (5, NUM_HEADS, len(known))
    scale = defined.abs().amax(-1, keepdim=True)
    assert float(((logits - defined) / scale).abs().max()) < 0.03  # of int8
    previous = torch.tensor([11, 5, 3, 7, 29])
    ids, log_probs = heads.children(logits[:, 1], previous, 4)
    for row in range(5):
        check_best(ids[row], log_probs[row], logits[row, 1].double() + tiny.bias(int(previous[row])), known)
    ids, log_probs = heads.propose(states, newest, 4)
    assert ids.shape == log_probs.shape == (5, NUM_HEADS, 4)
    for row in range(5):
        for head in range(NUM_HEADS):
            scores = logits[row, head].double() + (tiny.bias(int(newest[row])) if head == 0 else 0)
            check_best(ids[row, head], log_probs[row, head], scores, known)


def check_best(ids: Tensor, log_probs: Tensor, scores: Tensor, known: Tensor) -> None:
    """That these are the four likeliest, within what int8 leaves of the Markov term."""
    defined = scores.log_softmax(0)
    rows = [known.tolist().index(token) for token in ids.tolist()]
    assert len(set(rows)) == 4
    torch.testing.assert_close(log_probs.double(), defined[rows], atol=0.1, rtol=0.02)
    torch.testing.assert_close(defined[rows], defined.topk(4).values, atol=0.1, rtol=0.02)
    assert log_probs.tolist() == sorted(log_probs.tolist(), reverse=True)


@pytest.mark.parametrize("prefix", ["", "medusa_heads.", "medusa_head."])
@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
def test_reference_checkpoints_keep_their_biases_whatever_their_config_counts(
    tmp_path: Path, name: str, prefix: str
) -> None:
    tiny = TinyHeads.random()
    path = write(tmp_path, reference_tensors(tiny, prefix), name=name, medusa_num_heads=5, medusa_num_layers=1)
    check(load(path, tiny), tiny)
    (tmp_path / "config.json").unlink()
    check(load(path / name, tiny), tiny)


def test_layers_that_are_one_module_may_be_stored_once(tmp_path: Path) -> None:
    tiny = TinyHeads.random(num_layers=3).tied()
    tensors = reference_tensors(tiny)
    check(load(write(tmp_path / "whole", tensors, name="medusa_lm_head.safetensors"), tiny), tiny)
    once = {name: tensor for name, tensor in tensors.items() if not re.match(r"\d\.[12]\.linear", name)}
    check(load(write(tmp_path / "once", once, name="medusa_lm_head.safetensors"), tiny), tiny)


def test_heads_beside_the_weights_of_their_model_are_found_also_in_several_files(tmp_path: Path) -> None:
    tiny = TinyHeads.random()
    tensors = reference_tensors(tiny, "medusa_head.")
    tensors |= {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN), "lm_head.weight": tiny.target.clone()}
    check(load(write(tmp_path / "whole", tensors, hidden_size=HIDDEN), tiny), tiny)
    folder = tmp_path / "parts"
    folder.mkdir()
    names = sorted(tensors)
    for part, some in (("a.safetensors", names[:6]), ("b.safetensors", names[6:])):
        save_file({name: tensors[name] for name in some}, folder / part)
    places = {name: "a.safetensors" if name in names[:6] else "b.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    check(load(folder, tiny), tiny)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_vllm_s_layout_with_output_matrices_of_its_own(
    tmp_path: Path, prefix: str, biases: bool, num_layers: int
) -> None:
    tiny = TinyHeads.random(num_layers=num_layers)
    tiny = tiny if biases else tiny.without_biases()
    path = write(tmp_path, vllm_tensors(tiny, prefix, biases=biases), num_heads=NUM_HEADS, medusa_fc_bias=biases)
    check(load(path, tiny), tiny)


def test_biases_that_are_there_count_even_where_the_config_forgets_them(tmp_path: Path) -> None:
    tiny = TinyHeads.random()
    check(load(write(tmp_path, vllm_tensors(tiny), num_heads=NUM_HEADS), tiny), tiny)


def test_a_token_map_names_the_rows_and_cuts_whole_matrices(tmp_path: Path) -> None:
    tiny = TinyHeads.random().with_token_map(KNOWN)
    sizes = {"vocab_size": VOCAB, "truncated_vocab_size": len(KNOWN)}
    heads = load(write(tmp_path / "cut", vllm_tensors(tiny), **sizes), tiny)
    check(heads, tiny)
    assert heads.num_known_tokens == len(KNOWN)
    whole = vllm_tensors(tiny) | {f"lm_heads.{h}.weight": TinyHeads.random().outputs[h] for h in range(NUM_HEADS)}
    check(load(write(tmp_path / "whole", whole, **sizes), tiny), tiny)


@pytest.mark.parametrize("stored", ["nothing", "lm_head.weight", "lm_heads.0.weight"])
@pytest.mark.parametrize("tokens", [None, KNOWN])
def test_heads_on_the_target_s_own_output_matrix(tmp_path: Path, tokens: list[int] | None, stored: str) -> None:
    tiny = TinyHeads.random().on_target_output()
    if tokens is not None:
        tiny = tiny.with_token_map(tokens)
    tensors = vllm_tensors(tiny)
    if stored != "nothing":
        tensors[stored] = tiny.target.clone()
    path = write(tmp_path, tensors, original_lm_head=True, truncated_vocab_size=len(tokens or range(VOCAB)))
    check(load(path, tiny), tiny)


@pytest.mark.parametrize("rank", [4, 32])  # of which compiled products need a multiple of 32
@pytest.mark.parametrize("rows", [None, VOCAB])
@pytest.mark.parametrize("tokens", [None, KNOWN])
def test_corrections_by_the_tokens_before(
    tmp_path: Path, tokens: list[int] | None, rows: int | None, rank: int
) -> None:
    tiny = TinyHeads.random().on_target_output()
    tiny = (tiny if tokens is None else tiny.with_token_map(tokens)).with_corrections(rank, rows=rows)
    heads = load(write(tmp_path, vllm_tensors(tiny), original_lm_head=True), tiny)
    assert heads.has_correction
    check(heads, tiny)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floats_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny = TinyHeads.random()
    path = write(tmp_path, {name: tensor.to(dtype) for name, tensor in reference_tensors(tiny).items()})
    check(load(path, tiny), tiny)


def test_no_rows_give_no_candidates_and_no_more_candidates_than_tokens(tmp_path: Path) -> None:
    tiny = TinyHeads.random().on_target_output().with_token_map(KNOWN).with_corrections()
    heads = load(write(tmp_path, vllm_tensors(tiny), original_lm_head=True), tiny)
    ids, log_probs = heads.propose(torch.empty(0, HIDDEN), torch.empty(0, dtype=torch.int64), 4)
    assert ids.shape == log_probs.shape == (0, NUM_HEADS, 4)
    ids, log_probs = heads.propose(torch.randn(1, HIDDEN), torch.tensor([1]), 50)
    assert sorted(ids[0, 0].tolist()) == sorted(KNOWN)
    assert float(log_probs[0, 0].exp().sum()) == pytest.approx(1, abs=1e-4)


def test_memory_and_accuracies_are_told(tmp_path: Path) -> None:
    tiny = TinyHeads.random().on_target_output()
    ranks = [[0.5, 0.2], [0.3, 0.1], [0.2, 0.1]]
    heads = load(write(tmp_path, vllm_tensors(tiny), original_lm_head=True, peregrine_accuracies=ranks), tiny)
    assert heads.accuracies == ((0.5, 0.2), (0.3, 0.1), (0.2, 0.1))
    num_weights = NUM_HEADS * HIDDEN * HIDDEN + VOCAB * HIDDEN
    assert num_weights < heads.num_bytes < 1.5 * num_weights  # of int8, with scales and biases


def _edit(change: Callable[[dict[str, Tensor]], object], **config: object) -> Callable[[Path], Path]:
    """A directory of good heads after a change."""

    def make(folder: Path) -> Path:
        tensors = vllm_tensors(TinyHeads.random().with_token_map(KNOWN).with_corrections())
        change(tensors)
        return write(folder, tensors, truncated_vocab_size=len(KNOWN), **config)

    return make


def _set(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


def _drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def _tokens(*tokens: int) -> Tensor:
    return torch.tensor([*tokens, *KNOWN[len(tokens) :]])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (_edit(_drop("blocks.1.layers.0.weight")), "blocks.1.layers.0.weight is missing"),
        (_edit(_drop("blocks.1.layers.0.bias"), medusa_fc_bias=True), "blocks.1.layers.0.bias is missing"),
        (_edit(_drop("lm_heads.2.weight")), "lm_heads.2.weight is missing"),
        (_edit(_drop("token_map")), "truncated_vocab_size 10, and the model has 30 tokens"),
        (_edit(_drop("markov_w1.weight")), "markov_w1.weight is missing"),
        (_edit(_drop("blocks.0.newest.weight")), "newest.weight, but not all"),
        (_edit(_set("blocks.0.layers.0.weight", torch.randn(32, 8))), r"shape \[32, 8\], but .* \[32, 32\]"),
        (_edit(_set("blocks.0.layers.0.weight", torch.randn(8, 8))), "states of 8 features, but the model's have 32"),
        (_edit(_set("blocks.0.layers.0.bias", torch.randn(4))), r"bias has shape \[4\]"),
        (_edit(_set("blocks.0.layers.0.weight", torch.full((32, 32), torch.nan))), "holds NaN or infinity"),
        (_edit(_set("blocks.0.layers.0.weight", torch.ones(32, 32, dtype=torch.int8))), "torch.int8"),
        (_edit(_set("lm_heads.0.weight", torch.randn(99, 32))), r"\[99, 32\], but the model has a vocabulary of 30"),
        (_edit(_set("lm_heads.0.weight", torch.randn(10, 8))), r"\[10, 8\], but the model asks for \[10, 32\]"),
        (_edit(_set("markov_w2.weight", torch.randn(9, 4))), "Markov term"),
        (_edit(_set("token_map", _tokens(30))), "tokens 0 to 30, but the model's vocabulary has 30"),
        (_edit(_set("token_map", _tokens(-1))), "tokens -1 to"),
        (_edit(_set("token_map", _tokens(3))), "names a token twice"),
        (_edit(_set("token_map", torch.rand(10))), "float32 where token ids should be"),
        (_edit(_set("token_map", torch.arange(9))), r"token_map has shape \[9\], but must name 10 of 30"),
        (_edit(_set("blocks.5.layers.0.weight", torch.randn(32, 32))), r"heads \[0, 1, 2, 5\], but they must be 0, 1"),
        (_edit(_set("blocks.0.layers.4.weight", torch.randn(32, 32))), r"layers \[0, 4\]"),
        (_edit(_set("blocks.0.gate.weight", torch.randn(32, 32))), "1 tensors are no part .* blocks.0.gate.weight"),
        (_edit(lambda tensors: tensors.clear() or tensors.update(a=torch.ones(1))), "no Medusa heads are in it"),
        (_edit(lambda _: None, medusa_fc_bias="yes"), "medusa_fc_bias 'yes'"),
        (_edit(lambda _: None, logit_scale=0), "logit_scale 0"),
        (_edit(lambda _: None, peregrine_accuracies=[[0.5]]), "not 3 lists of numbers"),
        (_edit(lambda _: None, peregrine_accuracies=[[2.0]] * 3), "not 3 lists of numbers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_numbers(
    tmp_path: Path, make: Callable[[Path], Path], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        load(make(tmp_path / "heads"), TinyHeads.random())


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny = TinyHeads.random()
    path = write(tmp_path, reference_tensors(tiny), name="medusa_lm_head.safetensors")
    with pytest.raises(ValueError, match="32 features, but the model's have 24: they belong to another model"):
        load(path, tiny, hidden_size=24)
    with pytest.raises(ValueError, match=r"\[30, 32\], but the model has a vocabulary of 31 tokens"):
        load(path, tiny, vocab_size=31)


@pytest.mark.parametrize("name", ["model.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize("kept", [0, 4, 100, 1000])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, name: str, kept: int) -> None:
    path = write(tmp_path, reference_tensors(TinyHeads.random()), name=name)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:kept])
    with pytest.raises(ValueError, match=re.escape(name)):
        load(path, TinyHeads.random())


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="cut short or damaged"):
        load(tmp_path, TinyHeads.random())


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


@pytest.mark.parametrize("content", [_Code(), {"0.0.linear.weight": _Code()}, [1, 2], {"a": 3}, {3: torch.ones(1)}])
def test_a_pickle_that_holds_anything_else_is_refused_and_not_run(
    tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"(no file of tensors alone|other things than tensors).*convert it"):
        load(tmp_path, TinyHeads.random())
    assert "code ran" not in capsys.readouterr().out


def test_pickles_of_old_torch_are_read(tmp_path: Path) -> None:
    tiny = TinyHeads.random()
    torch.save(reference_tensors(tiny), tmp_path / "medusa_lm_head.pt", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "medusa_lm_head.pt")
    check(load(tmp_path, tiny), tiny)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "has no drafter: none of medusa_lm_head.safetensors, medusa_lm_head.pt, model.safetensors is there"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "../../etc/passwd"}}'}, "does not map weights"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "gone.safetensors"}}'}, "is missing, cut short"),
        ({"config.json": "{"}, "config.json cannot be read"),
        ({"config.json": "[1]"}, "holds list where an object"),
        ({"config.json": "[" * 100_000}, "config.json cannot be read"),
    ],
)
def test_a_directory_without_heads_says_so(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path, TinyHeads.random())


def test_a_path_that_is_not_there_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nothing", TinyHeads.random())
    (tmp_path / "heads.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"neither a \.safetensors nor a \.pt file"):
        load(tmp_path / "heads.gguf", TinyHeads.random())
