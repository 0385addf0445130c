"""Makes the sample traces that lie beside this file: `python -m loadtest.scenarios.sample_trace`.

They are invented, and no recording: arrivals of a rate that swings, lengths with long tails, and in the one with hash
ids four documents, whose blocks are shared by those who ask about them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from loadtest.scenarios.trace_file import TraceRequest, azure_lines, mooncake_lines
from loadtest.workload.arrivals import Phase, PhasedArrivals
from loadtest.workload.lengths import LogNormalLength

SEED = 20_240_601
ARRIVALS = PhasedArrivals([Phase(20, 0.3, 1.0), Phase(20, 1.0, 1.0, burst=4), Phase(20, 1.0, 0.2)])
PROMPTS, OUTPUTS = LogNormalLength(120, 0.9, 900), LogNormalLength(40, 0.6, 160)
NUM_DOCUMENTS, BLOCK, NUM_BLOCKS = 4, 512, 2


def plain_requests() -> list[TraceRequest]:
    random = np.random.default_rng(SEED)
    return [TraceRequest(at, PROMPTS.draw(random), OUTPUTS.draw(random)) for at in ARRIVALS.times(SEED)]


def requests_about_documents() -> list[TraceRequest]:
    """Two of three are about a document, whose blocks come first in the prompt."""
    random = np.random.default_rng(SEED + 1)
    requests = []
    next_id = NUM_DOCUMENTS * NUM_BLOCKS
    for at in ARRIVALS.times(SEED + 1):
        document = int(random.integers(3 * NUM_DOCUMENTS)) // 2
        shared = [document * NUM_BLOCKS + i for i in range(NUM_BLOCKS)] if document < NUM_DOCUMENTS else []
        num_own = PROMPTS.draw(random)
        own = range(next_id, next_id + -(-num_own // BLOCK))
        next_id = own.stop
        num_tokens = len(shared) * BLOCK + num_own
        requests.append(TraceRequest(round(at, 3), num_tokens, OUTPUTS.draw(random), (*shared, *own)))
    return requests


def files() -> dict[str, str]:
    """The text of each file, by its name."""
    started_at = datetime(2024, 6, 1, 9, 0, 0, tzinfo=UTC)
    return {
        "sample-azure.csv": "".join(azure_lines(plain_requests(), started_at)),
        "sample-mooncake.jsonl": "".join(mooncake_lines(requests_about_documents())),
    }


def main() -> None:
    for name, text in files().items():
        (Path(__file__).parent / name).write_text(text)


if __name__ == "__main__":
    main()
