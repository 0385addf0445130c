"""What do settings that round cost in quality? `python -m loadtest.micro.perplexity --text FILE... SETTINGS...`

SETTINGS: `model.dtype=bfloat16,kv_cache.dtype=float32`, or `auto` for none; an engine is built for each, one after the
other, and scores the first tokens of every text, each of which is one prompt. Perplexities, and how far the tokens'
log-probabilities are from those under the first of the SETTINGS. Numbers only depend on the model, the texts and the
vector instructions; an hour of quiet is not needed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import yaml
from tabulate import tabulate
from tokenizers import Tokenizer

from engine.build import build_engine
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.engine import Engine
from engine.types import Request, SamplingParams

Scores = list[list[float]]  # of each text: the log-probability of each token after the first


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--skip", type=int, default=0, help="characters of each text")
    parser.add_argument("--tokens", type=int, default=2000, help="of each text")
    options = parser.parse_args(arguments)
    texts = [path.read_text()[options.skip :] for path in options.text]
    scores = {settings: score(options.model, settings, texts, options.tokens) for settings in options.settings}
    rows = compare(scores, [path.name for path in options.text])
    print(tabulate(rows, headers="keys", disable_numparse=True, tablefmt="plain"))


def score(path: str, settings: str, texts: list[str], num_tokens: int) -> Scores:
    engine, model = build_engine(parse(path, settings), lambda phase, detail: None)
    tokenizer = Tokenizer.from_str(model.tokenizer.tokenizer_json)
    return [score_text(engine, tokenizer.encode(text).ids[:num_tokens]) for text in texts]


def parse(path: str, settings: str) -> EngineConfig:
    sections: dict[str, dict[str, object]] = {"model": {"path": path}}
    for setting in settings.split(",") if settings != "auto" else []:
        name, _, value = setting.partition("=")
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = yaml.safe_load(value)
    return EngineConfig.model_validate(sections)


def score_text(engine: Engine, token_ids: list[int]) -> list[float]:
    params = SamplingParams(seed=0, max_tokens=1, temperature=0.0, prompt_logprobs=0)
    engine.add(Request(request_id="text", prompt_token_ids=token_ids, params=params))
    scored: list[float] = []
    while engine.has_work:
        for output in engine.step()[0]:
            assert output.error is None, output.error
            scored += [logprob.logprob for logprob in output.prompt_logprobs or []]
    assert len(scored) == len(token_ids) - 1
    return scored


def compare(scores: dict[str, Scores], names: list[str]) -> list[dict[str, str]]:
    rows = []
    first = next(iter(scores.values()))
    for settings, texts in scores.items():
        row = {"settings": settings}
        distances = [
            abs(a - b) for text, base in zip(texts, first, strict=True) for a, b in zip(text, base, strict=True)
        ]
        for name, text, base in zip(names, texts, first, strict=True):
            row[name] = f"{perplexity(text):.4f}"
            row[f"{name}, %"] = f"{100 * (perplexity(text) / perplexity(base) - 1):+.3f}"
        row["largest"], row["mean"] = f"{max(distances):.3f}", f"{sum(distances) / len(distances):.5f}"
        rows.append(row)
    return rows


def perplexity(scored: list[float]) -> float:
    return math.exp(-sum(scored) / len(scored))


if __name__ == "__main__":
    main()
