"""What a server's `/metrics` counts of speculative decoding, under the names of vLLM or of Peregrine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from loadtest.client.client import Target

_DRAFTS = {"vllm:spec_decode_num_drafts_total", "peregrine_drafts_total"}
_TOKENS = {"vllm:spec_decode_num_draft_tokens_total", "peregrine_draft_tokens_total"}
_ACCEPTED = {"vllm:spec_decode_num_accepted_tokens_per_pos_total", "peregrine_accepted_draft_tokens_total"}


@dataclass(frozen=True)
class DraftCounters:
    """num_drafts: times that a sequence carried drafts into a step; num_tokens: draft tokens that were verified;
    num_accepted: those that were accepted, by their position in the draft"""

    num_drafts: int
    num_tokens: int
    num_accepted: tuple[int, ...]

    def since(self, earlier: DraftCounters) -> DraftCounters:
        pairs = zip_longest(self.num_accepted, earlier.num_accepted, fillvalue=0)
        return DraftCounters(
            self.num_drafts - earlier.num_drafts,
            self.num_tokens - earlier.num_tokens,
            tuple(now - before for now, before in pairs),
        )


async def read_draft_counters(target: Target) -> DraftCounters | None:
    """None where the server has no such metrics, or does not answer."""
    try:
        async with httpx.AsyncClient(headers=target.authorization, timeout=30.0) as http:
            response = await http.get(f"{target.base_url}/metrics")
        samples = list(_samples(response.text)) if response.status_code == 200 else []
    except (httpx.TransportError, ValueError):  # ValueError: no text of this format
        return None
    totals: Counter[str] = Counter()
    accepted: Counter[int] = Counter()
    for sample in samples:
        totals[sample.name] += int(sample.value)
        if sample.name in _ACCEPTED and sample.labels.get("position", "").isdecimal():
            accepted[int(sample.labels["position"])] += int(sample.value)
    if not totals.keys() & _DRAFTS:
        return None
    num_drafts, num_tokens = (max(totals[name] for name in names) for names in (_DRAFTS, _TOKENS))
    return DraftCounters(num_drafts, num_tokens, tuple(accepted[i] for i in range(max(accepted, default=-1) + 1)))


def _samples(text: str) -> Iterator[Sample]:
    names = _DRAFTS | _TOKENS | _ACCEPTED
    for family in text_string_to_metric_families(text):
        yield from (sample for sample in family.samples if sample.name in names)
