"""Results as text: all of it for a terminal, and the goals as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tabulate import tabulate

from loadtest.gpu.records import Ceilings, Check, Problem, Record, SectionResult, Session, Timing, Tuned

NOT_MEASURED = "not measured yet"
_NUM_PROBLEMS = 8  # shown of each section; the file has all


@dataclass(frozen=True)
class Goal:
    """What is wanted of a GPU. timing: the name that its section gives it; fraction: of the floor; peer: whom it has
    to be as fast as"""

    title: str
    timing: str
    fraction: float
    peer: str


GOALS = [
    Goal("decode attention, 32 x 4,096 tokens", "decode attention, 32 x 4096", 0.90, "FlashAttention-3"),
    Goal("decode attention, 128 x 1,024 tokens", "decode attention, 128 x 1024", 0.90, "FlashAttention-3"),
    Goal("prefill attention, 4,096 tokens", "prefill attention, 1 x 4096", 0.75, "FlashAttention-3"),
    *(
        Goal(
            f"decode attention, 32 x 4,096 tokens, a cache of {codes}",
            f"decode attention, 32 x 4096, a cache of {codes}",
            0.85,
            "bfloat16 cache",
        )
        for codes in ("int8", "float8_e4m3fn")
    ),
    *(
        Goal(
            f"products with {kind}, {rows} row{'' if rows == 1 else 's'}",
            f"{kind}, gate and up, {rows} rows",
            goal,
            peer,
        )
        for kind, peer in (
            ("int4, groups of 128", "Humming"),
            ("int8, groups of 128", "torch, bfloat16"),
            ("FP8 by FP8", "torch, bfloat16"),
            ("int8 by int8", "torch, bfloat16"),
        )
        for rows, goal in ((1, 0.80), (16, 0.80), (256, 0.60))
    ),
    *(
        Goal(
            f"{name}, decode, batch {batch}, context {length:,}",
            f"decode, {name}, {batch} x {length}",
            goal,
            "transformers",
        )
        for name in ("Llama-3.1-8B", "Qwen3-0.6B")
        for batch, goal in ((1, 0.85), (8, 0.85), (32, 0.80), (128, 0.80))
        for length in (1024, 4096)
    ),
    Goal("Llama-3.1-8B, prefill of 4,096 tokens", "prefill, Llama-3.1-8B, 1 x 4096", 0.80, "transformers"),
    Goal("Qwen3-0.6B, prefill of 4,096 tokens", "prefill, Qwen3-0.6B, 1 x 4096", 0.80, "transformers"),
]


def terminal_text(section: SectionResult) -> str:
    """A section in lines: checks are counted, and told one by one only where they failed."""
    lines = [f"{section.name} ({section.seconds:.0f} s)"]
    checks = [record for record in section.records if isinstance(record, Check)]
    if checks:
        lines.append(f"  {sum(check.is_ok for check in checks)} of {len(checks)} checks are within their bounds")
    lines += [f"  {line}" for record in section.records for line in _lines(record)]
    timings = [_timing_row(record) for record in section.records if isinstance(record, Timing)]
    if timings:
        headers = ["", "time", "of the floor", "tokens/s", "speed against others, notes"]
        lines.append(tabulate(timings, headers, disable_numparse=True))
    problems = [record for record in section.records if isinstance(record, Problem)]
    lines += [f"  NOT MEASURED {problem.job}: {problem.text}" for problem in problems[:_NUM_PROBLEMS]]
    if len(problems) > _NUM_PROBLEMS:
        lines.append(f"  ... and {len(problems) - _NUM_PROBLEMS} more that were not measured")
    return "\n".join(lines)


def _lines(record: Record) -> Iterator[str]:
    match record:
        case Ceilings():
            rates = f"{record.bytes_per_second / 1e12:.3g} TB/s copied, {record.flops_per_second / 1e12:.3g} TFLOP/s"
            yield f"{rates}, {record.l2_bytes / 2**20:.3g} MiB of second-level cache"
        case Check() if not record.is_ok:
            yield f"WRONG {record.name}: {record.error:.3g}, and {record.bound:.3g} is allowed"
        case Tuned():
            gain = f"{record.before / max(record.after, 1e-12):.2f}x of {record.num_tried} tried"
            yield f"tuned {record.kernel} {record.key}: {gain}: {record.config}"


def _timing_row(timing: Timing) -> list[str]:
    notes = ", ".join(part for part in (_speeds(timing.seconds, timing.peers), timing.note) if part)
    return [timing.name, duration(timing.seconds), _fraction(timing), _rate(timing), notes]


def goal_table(session: Session | None, *, form: str = "simple") -> str:
    """A row for each goal; where there is no figure, the cell says so. form: of tabulate's"""
    rows = []
    for goal in GOALS:
        timing = None if session is None else session.timings.get(goal.timing)
        if session is None or timing is None:
            rows.append([goal.title, NOT_MEASURED, "", NOT_MEASURED, f"{goal.fraction:.2f}", ""])
            continue
        apart = session.timings.get(f"{goal.timing}, {goal.peer}")
        peers = timing.peers | ({} if apart is None else {goal.peer: apart.seconds})
        fraction = _fraction(timing) or NOT_MEASURED
        speeds = _speeds(timing.seconds, peers)
        rows.append([goal.title, duration(timing.seconds), _rate(timing), fraction, f"{goal.fraction:.2f}", speeds])
    headers = ["bfloat16", "time", "tokens/s", "of the floor", "goal", "speed against others in the same run"]
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True)


def markdown(session: Session | None) -> str:
    """The table of the documents."""
    return f"{goal_table(session, form='github')}\n\n{_source(session)}"


def _source(session: Session | None) -> str:
    if session is None:
        return f"On a GPU: {NOT_MEASURED}."
    if session.is_rehearsal:
        return "A rehearsal without a GPU: its times mean nothing."
    ceilings = next((record for record in session.records if isinstance(record, Ceilings)), None)
    facts = [session.device, session.environment.date[:10], f"commit {session.environment.commit}"]
    facts += [f"{name} {version}" for name, version in session.packages.items()]
    text = f"Measured on {', '.join(facts)}; random weights."
    if ceilings is not None:
        bandwidth, rate = ceilings.bytes_per_second / 1e12, ceilings.flops_per_second / 1e12
        text += f" The floor: a copy at {bandwidth:.2f} TB/s, bfloat16 products at {rate:.0f} TFLOP/s, in the same run."
    return text


def _fraction(timing: Timing) -> str:
    return "" if timing.fraction is None else f"{timing.fraction:.2f}"


def _rate(timing: Timing) -> str:
    return f"{timing.num_tokens / timing.seconds:,.0f}" if timing.num_tokens else ""


def _speeds(ours: float, peers: dict[str, float]) -> str:
    """The ratios of others' times to ours: above 1, ours is faster."""
    return ", ".join(f"{f'{theirs / ours:.2f}x' if ours else '-'} {name}" for name, theirs in peers.items())


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.1f} us"
    return f"{1e3 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
