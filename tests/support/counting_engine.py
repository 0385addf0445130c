"""`peregrine serve` and `peregrine run-batch` with an engine that has no model: answers count upwards, failures are on
order in the model's path.

Run as a script with the arguments of `peregrine serve`, or with `run-batch` and its own; the engine process loads this
file again, for `build`.
Options stand in MODEL, as in "counting?delay=0.01&fail=memory"; steps obey `tests.support.fault_orders`. As many
requests run at once as `scheduler.max_num_seqs` says, the oldest ones.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.client.client import EngineClient
from engine.config import EngineConfig
from engine.ipc.messages import ModelInfo, Setting, TokenizerAssets
from engine.types import Request, StepOutput

VOCABULARY = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
MAX_NUM_SEQS = 1024  # where the settings do not say
DIGITS = [VOCABULARY[digit] for digit in "0123456789"]


class OrderedError(ValueError):
    def __init__(self, kind: str) -> None:
        super().__init__(f"a failure of the {kind} was ordered;\nuse another MODEL")
        self.kind = kind


class CountingEngine:
    def __init__(self, delay: float, max_num_seqs: int) -> None:
        self.on_batch: Callable[[list[object]], None] = lambda batch: None
        from tests.support.fault_orders import FaultOrders  # the server's process, a script, does not find it

        self._delay, self._max_num_seqs = delay, max_num_seqs
        self._orders = FaultOrders.from_environment()
        self._requests: dict[str, Request] = {}
        self._num_tokens: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._num_tokens[request.request_id] = len(request.output_token_ids)

    def abort(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def step(self) -> tuple[list[StepOutput], list[str], None]:
        time.sleep(self._delay)
        self._orders.obey()
        if self._orders.goes_in_circles:
            return [], [], None
        outputs = []
        for name, request in list(self._requests.items())[: self._max_num_seqs]:
            position = self._num_tokens[name]
            self._num_tokens[name] += 1
            is_last = self._num_tokens[name] >= request.params.max_tokens
            outputs.append(
                StepOutput(
                    request_id=name,
                    token_ids=[DIGITS[position % 10]],
                    finish_reason="length" if is_last else None,
                )
            )
            if is_last:
                del self._requests[name]
        return outputs, [output.request_id for output in outputs if self._num_tokens[output.request_id] == 1], None


def build(config: EngineConfig, report: Callable[[str, str], None]) -> tuple[CountingEngine, ModelInfo]:
    options = {name: values[0] for name, values in parse_qs(config.model.path.partition("?")[2]).items()}
    report("weights", "none at all")
    while "load_until" in options and not Path(options["load_until"]).exists():
        time.sleep(0.02)
    if options.get("fail") == "crash":
        os._exit(9)
    if "fail" in options:
        raise OrderedError(options["fail"])
    asked = config.scheduler.max_num_seqs
    max_num_seqs = asked if isinstance(asked, int) else MAX_NUM_SEQS
    backend = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    model = ModelInfo(
        path=config.model.path, architecture="Counting", num_parameters=0, vocab_size=len(VOCABULARY),
        trained_context=4096, max_model_len=4096, num_kv_tokens=4096, eos_token_ids=[], generation_defaults={},
        tokenizer=TokenizerAssets(tokenizer_json=backend.to_str(), chat_template=None, special_tokens={}),
        fingerprint="fp_counting",
        settings={"scheduler.max_num_seqs": Setting(max_num_seqs, "config")},
        phase_seconds={"weights": 0.0}, bytes_per_second=0, flops_per_second=0,
    )  # fmt: skip
    return CountingEngine(float(options.get("delay", "0.005")), max_num_seqs), model


if __name__ == "__main__":
    from server.cli.main import layers, make_parser
    from server.cli.serve import serve
    from server.settings import load_config

    make_engine = partial(EngineClient, factory=f"{__file__}:build")
    if sys.argv[1:2] == ["run-batch"]:
        from server.cli.batch_work import work

        parsed = make_parser().parse_fully(sys.argv[1:])
        sys.exit(work(load_config(layers(parsed)), parsed, make_engine=make_engine))
    loaded = load_config(layers(make_parser().parse_fully(["serve", *sys.argv[1:]])))
    sys.exit(serve(loaded, make_engine=make_engine))
