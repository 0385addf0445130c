"""Which layers share block tables: those of one window, in groups of about one size."""

import random

import pytest

from engine.kv_cache.layer_spec import MAX_GROUPS, MAX_PADDING, AttentionLayer, group_layers, windows_of


def _layers(windows: list[int | None], num_kv_heads: list[int] | None = None) -> list[AttentionLayer]:
    heads = num_kv_heads or [1] * len(windows)
    return [AttentionLayer(i, 4, heads[i], 16, 1.0, window) for i, window in enumerate(windows)]


def _every(period: int, num_layers: int) -> list[int | None]:
    """Every so many layers, one that sees the whole text."""
    return [None if i % period == period - 1 else 512 for i in range(num_layers)]


@pytest.mark.parametrize(
    ("windows", "num_groups", "num_full", "lost"),
    [
        ([None] * 32, 1, 1, 0.0),
        ([4096] * 32, 1, 0, 0.0),
        (_every(2, 24), 2, 1, 0.0),  # gpt-oss 20B
        (_every(2, 26), 2, 1, 0.0),  # Gemma 2 2B
        (_every(6, 18), 6, 1, 0.0),  # Gemma 3 270M
        (_every(6, 26), 7, 1, 0.08),  # Gemma 3 1B
        (_every(6, 34), 7, 1, 0.03),
        (_every(6, 48), 6, 1, 0.0),
        (_every(6, 62), 5, 1, 0.05),
        (_every(31, 31), 7, 1, 0.13),
        ([8, None, 16, None], 4, 2, 0.0),
        ([8] + [None] * 40, 1, 1, 0.0),  # groups of a few are too many, larger ones lose too much
    ],
)
def test_layers_of_models_are_grouped(windows: list[int | None], num_groups: int, num_full: int, lost: float) -> None:
    layers = group_layers(_layers(windows))
    found = windows_of(layers)
    assert (len(found), found.count(None)) == (num_groups, num_full)
    largest = max(sum(layer.group == group for layer in layers) for group in range(num_groups))
    assert num_groups * largest / len(windows) - 1 == pytest.approx(lost, abs=0.01)


def test_layers_of_any_kinds_keep_what_they_see_and_waste_little() -> None:
    rng = random.Random(0)
    for _ in range(300):
        num_layers = rng.randrange(1, 40)
        kinds = rng.sample([None, 4, 128, 1024], rng.randrange(1, 4))
        num_kv_heads = [rng.choice([1, 2]) for _ in range(num_layers)]
        layers = group_layers(_layers([rng.choice(kinds) for _ in range(num_layers)], num_kv_heads))
        windows = windows_of(layers)
        assert [layer.index for layer in layers] == list(range(num_layers))
        assert len(windows) <= MAX_GROUPS
        for layer in layers:
            window = windows[layer.group]
            assert window is None or (layer.window is not None and layer.window <= window)
        sizes = [sum(layer.num_kv_heads for layer in layers if layer.group == group) for group in range(len(windows))]
        assert all(sizes)
        if len(windows) > 1:
            assert all(layer.window == windows[layer.group] for layer in layers)
            assert len(sizes) * max(sizes) <= (1 + MAX_PADDING) * sum(sizes)
