"""Runs a recorded step again: `python -m engine.replay FILE`.

With `supervision.record_steps`, an engine process leaves the inputs of the step that ended it in a file. This loads the
same model, runs that step alone, and says what came of it: a crash that depends on shapes comes again, in a debugger or
under `compute-sanitizer`. The KV cache is empty, so the tokens are not those of the request.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from engine.batch.step_file import StepFile
from engine.batch.step_inputs import StepInputs
from engine.build import build_engine
from engine.config import EngineConfig
from engine.types import Sampled


def main(arguments: list[str]) -> int:
    """0: the step ran; 1: it raised what it raised before, or something else; 2: it could not be tried."""
    parser = argparse.ArgumentParser(prog="python -m engine.replay", description=__doc__)
    parser.add_argument("file", type=Path, help="what the log of the server named when the engine process ended")
    parser.add_argument("--model", help="another path of the model than that of the recorded config")
    parser.add_argument("--times", type=int, default=1, help="how often it is run")
    options = parser.parse_args(arguments)
    try:
        recorded = StepFile.read(options.file)
        config = EngineConfig.model_validate_json(recorded.config_json)
        if options.model:
            config = config.model_copy(update={"model": config.model.model_copy(update={"path": options.model})})
        engine, _ = build_engine(config, lambda phase, detail: print(f"{phase}: {detail}" if detail else phase))
    except (ValueError, OSError) as error:
        print(f"{options.file} cannot be run again: {error}", file=sys.stderr)
        return 2
    print(describe(recorded.inputs, has_contents=recorded.has_contents))
    for _ in range(options.times):
        started_at = time.perf_counter()
        result = engine.executor.run(recorded.inputs)  # whatever it raises is what we came for
        print(f"ran in {1e3 * (time.perf_counter() - started_at):.1f} ms: {outcome(result.sampled)}")
    return 0


def describe(inputs: StepInputs, *, has_contents: bool) -> str:
    contents = "real tokens" if has_contents else "token 0 for every token"
    lengths = ", ".join(
        f"{end - start} of {length}"
        for start, end, length in zip(inputs.query_starts, inputs.query_starts[1:], inputs.seq_lens, strict=False)
    )
    return (
        f"a step of {inputs.num_tokens} tokens of {inputs.num_seqs} sequences (new tokens of context: {lengths}), "
        f"{len(inputs.logits_rows)} rows of logits, {inputs.sampling.num_rows} sampled; {contents}"
    )


def outcome(sampled: list[Sampled]) -> str:
    errors = [one.error for one in sampled if one.error is not None]
    if errors:
        return f"{len(errors)} of {len(sampled)} sequences failed, the first with: {errors[0]}"
    return f"{sum(len(one.token_ids) for one in sampled)} tokens for {len(sampled)} sequences"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
