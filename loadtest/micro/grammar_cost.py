"""What does a grammar cost a step? `python -m loadtest.micro.grammar_cost [--num-seqs 16] [--temperature 0.7]`

Milliseconds of a decoding step in which so many sequences decode a token each: without grammars, with one that allows
any text, and with a JSON Schema of long strings, in alternating rounds of one process. In every round as many tokens
come in a step, since drafts of what a grammar leaves no choice about are off; the ratio is of the medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics

from engine.grammar import GrammarSpec
from engine.types import Request, SamplingParams
from loadtest.micro.measure import Row, print_table
from loadtest.micro.steady import NUM_WARMUP_STEPS, State, SteadyEngine, add_engine_options, build_steady, timed_step

STRINGS = {"type": "array", "items": {"type": "string", "minLength": 200}, "minItems": 100}
GRAMMARS: dict[str, GrammarSpec | None] = {
    "none": None,
    "any text": GrammarSpec("regex", "(?s:.*)"),
    "strings by a schema": GrammarSpec("json_schema", json.dumps(STRINGS)),
}
CONTEXT = 256


def round_of(steady: SteadyEngine, grammar: GrammarSpec | None, options: argparse.Namespace) -> float:
    """The median seconds of a step."""
    engine = steady.engine
    for number in range(options.num_seqs):
        params = SamplingParams(
            seed=number, max_tokens=CONTEXT, temperature=options.temperature, grammar=grammar, num_drafts=0
        )
        prompt = [100 + number] * (CONTEXT // 2)
        engine.add(Request(request_id=f"request-{number}", prompt_token_ids=prompt, params=params))
    begun: set[str] = set()
    while len(begun) < options.num_seqs:
        begun |= {output.request_id for output in engine.step()[0] if output.token_ids}
    for _ in range(NUM_WARMUP_STEPS):
        engine.step()
    seconds = [timed_step(engine).seconds for _ in range(options.steps)]
    for number in range(options.num_seqs):
        engine.abort(f"request-{number}")
    engine.step()
    return statistics.median(seconds)


def measure(options: argparse.Namespace) -> list[Row]:
    steady = build_steady(options, [State(options.num_seqs, 2 * CONTEXT)])
    times: dict[str, list[float]] = {name: [] for name in GRAMMARS}
    for _ in range(options.rounds):
        for name, grammar in GRAMMARS.items():
            times[name].append(round_of(steady, grammar, options))
    plain = statistics.median(times["none"])
    return [
        {
            "grammar": name,
            "seqs": options.num_seqs,
            "step ms": 1e3 * statistics.median(seconds),
            "fastest ms": 1e3 * min(seconds),
            "percent of none": 100 * statistics.median(seconds) / plain,
        }
        for name, seconds in times.items()
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--num-seqs", type=int, default=16, help="sequences that decode")
    parser.add_argument("--temperature", type=float, default=0.7, help="of all of them; 0 is greedy")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=7, help="of each grammar")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print_table(measure(parse()))
