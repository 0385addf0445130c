"""Is a word of a long text still found? `python -m loadtest.micro.needle --text FILE [--context 8000] SETTINGS...`

A sentence with a number is hidden at some depths of a text of so many tokens, and the model is asked for it at the end
(a needle in a haystack, Kamradt 2023). SETTINGS as of `loadtest.micro.perplexity`: `kv_cache.dtype=int8`, or `auto`.
For each depth: the answer, greedily, and the mean log-probability of the tokens of the right one, which says more of a
small model, that does not find it every time. Numbers do not depend on the machine's speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate
from tokenizers import Tokenizer

from engine.build import build_engine
from engine.config import DEFAULT_MODEL
from engine.engine import Engine
from engine.types import Request, SamplingParams, StepOutput
from loadtest.micro.measure import Row, save
from loadtest.micro.perplexity import parse

NEEDLE, QUESTION = " The secret code of the lighthouse is {}. ", "\nThe secret code of the lighthouse is"
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
CODES = (" 7391", " 4826", " 1507", " 9264", " 3085")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8000, help="tokens")
    parser.add_argument("--save", action="store_true", help="write the rows to loadtest/results")
    options = parser.parse_args(arguments)
    haystack = options.text.read_text()
    rows: list[Row] = []
    for settings in options.settings:
        engine, model = build_engine(parse(options.model, settings), lambda phase, detail: None)
        tokenizer = Tokenizer.from_str(model.tokenizer.tokenizer_json)
        for depth, code in zip(DEPTHS, CODES, strict=True):
            prompt = hide(tokenizer, haystack, code.strip(), depth, num_tokens=options.context)
            answer, logprob = ask(engine, prompt, tokenizer.encode(code, add_special_tokens=False).ids)
            found = tokenizer.decode(answer)
            rows.append(
                {
                    "settings": settings,
                    "depth": f"{depth:.0%}",
                    "tokens": len(prompt),
                    "is": code.strip(),
                    "answer": repr(found),
                    "found": found.strip().startswith(code.strip()),
                    "log-probability": f"{logprob:.4f}",
                }
            )
    print(tabulate(rows, headers="keys", disable_numparse=True, tablefmt="plain"))
    if options.save:
        print(f"\n{save('needle', rows)}")


def hide(tokenizer: Tokenizer, haystack: str, code: str, depth: float, *, num_tokens: int) -> list[int]:
    """A prompt of so many tokens, with the needle at that share of it, and the question at its end."""
    needle, question = (
        tokenizer.encode(text, add_special_tokens=False).ids for text in (NEEDLE.format(code), QUESTION)
    )
    num_hay = num_tokens - len(needle) - len(question)
    hay: list[int] = tokenizer.encode(haystack).ids
    hay = (hay * -(-num_hay // len(hay)))[:num_hay]
    place = int(depth * num_hay)
    return [*hay[:place], *needle, *hay[place:], *question]


def ask(engine: Engine, prompt: list[int], code: list[int]) -> tuple[list[int], float]:
    """What the model says, and the mean log-probability of the tokens of the code."""
    greedy = SamplingParams(seed=0, max_tokens=len(code), temperature=0.0)
    answer = [token_id for output in _outputs(engine, prompt, greedy) for token_id in output.token_ids]
    right: list[float] = []
    for index, token_id in enumerate(code):  # the text before it is in the prefix cache by now
        only = SamplingParams(seed=0, max_tokens=1, allowed_token_ids=[token_id], logprobs=0)
        for output in _outputs(engine, [*prompt, *code[:index]], only):
            right += [scored.logprob for scored in output.logprobs or []]
    return answer, sum(right) / len(right)


def _outputs(engine: Engine, prompt: list[int], params: SamplingParams) -> list[StepOutput]:
    engine.add(Request(request_id="needle", prompt_token_ids=prompt, params=params))
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()[0]
    assert not any(output.error for output in outputs), outputs[-1].error
    return outputs


if __name__ == "__main__":
    main()
