"""Heads learn text that repeats itself, and an interrupted training ends as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.speculation.medusa_heads import MedusaHeads
from engine.training import trainer as trainer_module
from engine.training.heads_accuracy import HeadsAccuracy, measure_accuracy
from engine.training.heads_data import HeadsData, frequent_tokens, make_data
from engine.training.heads_trainer import HeadsTrainer, choose_rows
from engine.training.trainable_heads import TrainableHeads
from engine.training.transcripts import Transcripts

VOCAB, HIDDEN, PERIOD = 40, 24, 8


def make_transcripts(num_sequences: int = 80) -> tuple[Transcripts, Tensor]:
    """Sequences that walk around a circle of `PERIOD` tokens, as a target would that is sure of them; its matrix."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(VOCAB, HIDDEN, generator=generator)
    circle = torch.randperm(VOCAB, generator=generator)[:PERIOD]
    length = 3 * PERIOD
    tokens = torch.cat([circle[(torch.arange(length) + start) % PERIOD] for start in range(num_sequences)])
    states = output[tokens] + 0.1 * torch.randn(len(tokens), HIDDEN, generator=generator)
    lengths = torch.full((num_sequences,), length)
    return Transcripts(torch.arange(num_sequences), lengths, tokens.int(), states.half()), output


def make_heads(num_known: int = 16, rank: int = 4) -> tuple[TrainableHeads, HeadsData, Tensor]:
    transcripts, output = make_transcripts()
    known = frequent_tokens(transcripts, count=num_known, vocab_size=VOCAB)
    torch.manual_seed(0)
    heads = TrainableHeads(output[known], num_heads=2, markov_rank=rank)
    return heads, make_data(transcripts, known, output[known], vocab_size=VOCAB), output


def make_trainer(heads: TrainableHeads, data: HeadsData, *, num_epochs: int = 10) -> HeadsTrainer:
    return HeadsTrainer(heads, data, batch_size=64, num_epochs=num_epochs, learning_rate=1e-2, seed=1)


def measure(heads: TrainableHeads, data: HeadsData, output: Tensor, folder: Path) -> HeadsAccuracy:
    heads.save(folder, known=data.known, vocab_size=VOCAB, fields={})
    read = MedusaHeads.load(
        folder,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        output_rows=lambda ids: output if ids is None else output[ids],
    )
    return measure_accuracy(read, data)


@pytest.mark.parametrize("rank", [0, 4])
def test_heads_learn_a_text_that_repeats_itself(tmp_path: Path, rank: int) -> None:
    heads, data, output = make_heads(rank=rank)
    before = measure(heads, data, output, tmp_path / "before")
    assert (
        max(row[0] for row in before.by_rank) < 0.2
    )  # they guess what the target says next, which is the token before
    trainer = make_trainer(heads, data)
    trainer.train(tmp_path / "state.pt")
    after = measure(heads, data, output, tmp_path / "after")
    assert trainer.mean_loss < 1.0
    assert min(row[0] for row in after.by_rank) > 0.9
    assert after.accepted > 1.8
    assert after.num_positions == len(data.held_out) > 0
    assert "top-4" in after.table()


def test_held_out_sequences_are_not_learned_from() -> None:
    _, data, _ = make_heads()
    assert not set(data.learned.tolist()) & set(data.held_out.tolist())
    sequences = {position // (3 * PERIOD) for position in data.held_out.tolist()}
    assert sequences == {38, 39, 78, 79}  # of each pair, one is greedy


def test_positions_know_how_much_of_their_sequence_is_left() -> None:
    _, data, _ = make_heads()
    end = 3 * PERIOD - 1
    batch = data.batch(torch.tensor([0, end - 2, end - 1]), 2)
    assert batch.is_there.tolist() == [[True, True], [True, True], [True, False]]
    assert batch.previous[:, 1].tolist() == batch.targets[:, 0].tolist()
    assert batch.previous[:, 0].tolist() == data.tokens[[0, end - 2, end - 1]].tolist()
    assert end not in data.learned.tolist()


def test_labels_are_the_target_s_own_distribution() -> None:
    _, data, output = make_heads()
    scores = data.states[5].float() @ output[data.known].T
    best = scores.softmax(0).topk(16)
    assert data.label_rows[5].tolist() == best.indices.tolist()
    torch.testing.assert_close(data.label_probs[5].float(), best.values, atol=1e-3, rtol=1e-2)


def test_rare_tokens_are_left_out_and_count_as_wrong(tmp_path: Path) -> None:
    heads, data, output = make_heads(num_known=PERIOD // 2)
    make_trainer(heads, data).train(tmp_path / "state.pt")
    accuracy = measure(heads, data, output, tmp_path / "heads")
    assert all(sum(row) < 0.6 for row in accuracy.by_rank)


def test_an_interrupted_training_ends_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, data, _ = make_heads()
    make_trainer(whole, data).train(tmp_path / "whole.pt")
    monkeypatch.setattr(trainer_module, "_SAVE_INTERVAL", 0.0)
    begun, data, _ = make_heads()
    trainer = make_trainer(begun, data)
    learn, num_learned = trainer._learn, 0

    def learn_until_killed(batch: object) -> float:
        nonlocal num_learned
        num_learned += 1
        if num_learned == 33:
            raise KeyboardInterrupt
        return learn(batch)

    monkeypatch.setattr(trainer, "_learn", learn_until_killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tmp_path / "state.pt")
    resumed, data, _ = make_heads()
    torch.nn.init.normal_(resumed.weight)
    make_trainer(resumed, data).train(tmp_path / "state.pt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    heads, data, _ = make_heads()
    make_trainer(heads, data, num_epochs=1).train(tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"(?s)state.pt cannot be gone on with: .* delete it"):
        make_trainer(heads, data, num_epochs=2).train(tmp_path / "state.pt")
    other, data, _ = make_heads(rank=8)
    with pytest.raises(ValueError, match=r"(?s)state.pt cannot be gone on with: .* delete it"):
        make_trainer(other, data, num_epochs=1).train(tmp_path / "state.pt")


def test_the_rows_of_a_step_stand_for_all_of_them() -> None:
    generator = torch.Generator().manual_seed(5)
    num_known = 6000
    labels = torch.randint(0, num_known, (7, 2, 3), generator=generator)
    scores = torch.randn(num_known, generator=generator)
    estimates = []
    for _ in range(20):
        chosen = choose_rows(labels, num_known, generator)
        assert len(set(chosen.rows.tolist())) == len(chosen.rows) < num_known
        assert torch.equal(chosen.rows[chosen.labels], labels)
        estimates.append((scores[chosen.rows] + chosen.weights).logsumexp(0))
    assert float(torch.stack(estimates).mean()) == pytest.approx(float(scores.logsumexp(0)), abs=0.02)
    few = choose_rows(torch.tensor([[[3, 1]]]), 10, generator)
    assert few.rows.tolist() == list(range(10))
    assert few.weights.tolist() == [0.0] * 10
