"""Results as text: all of it for a terminal, the goals as markdown for the README."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loadtest.gpu.goals import GOALS, Goal
from loadtest.gpu.records import Ceilings, Check, Problem, Record, SectionResult, Session, Timing, Tuned

NOT_MEASURED = "not measured yet"
_NAME_WIDTH = 58
_NUM_PROBLEMS = 8  # shown of each section; the file has all


@dataclass(frozen=True)
class _Measured:
    """A timing with the times of its peers, whichever record they were in."""

    timing: Timing
    peers: dict[str, float]


def terminal_text(section: SectionResult) -> str:
    """A section in lines: checks are counted, and told one by one only where they failed."""
    lines = [f"{section.name} ({section.seconds:.0f} s)"]
    checks = [record for record in section.records if isinstance(record, Check)]
    if checks:
        lines.append(f"  {sum(check.is_ok for check in checks)} of {len(checks)} checks are within their bounds")
    problems = [record for record in section.records if isinstance(record, Problem)]
    others = [record for record in section.records if not isinstance(record, Problem)]
    lines += [f"  {line}" for record in others for line in _lines(record)]
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
        case Timing():
            peers = "".join(f"  {ratio(seconds, record.seconds)} {name}" for name, seconds in record.peers.items())
            fraction = "    " if record.fraction is None else f"{record.fraction:4.2f}"
            rate = f"  {record.num_tokens / record.seconds:,.0f} tok/s" if record.num_tokens else ""
            note = f"  ({record.note})" if record.note else ""
            yield f"{record.name:<{_NAME_WIDTH}}{duration(record.seconds):>10}  {fraction}{peers}{rate}{note}"
        case Tuned():
            gain = f"{record.before / max(record.after, 1e-12):.2f}x of {record.num_tried} tried"
            yield f"tuned {record.kernel} {record.key}: {gain}: {record.config}"


def goal_lines(session: Session | None) -> list[str]:
    """The goals, for the end of the output."""
    lines = [f"{'':<{_NAME_WIDTH}}{'time':>10}  floor  goal  speed of ours / peer's"]
    for goal in GOALS:
        found = _find(goal, session)
        if found is None or found.timing.fraction is None:
            lines.append(f"{goal.title:<{_NAME_WIDTH}}{NOT_MEASURED:>18}   {goal.fraction:.2f}")
            continue
        mark = "  " if found.timing.fraction >= goal.fraction else " <"
        time = duration(found.timing.seconds)
        row = f"{goal.title:<{_NAME_WIDTH}}{time:>10}   {found.timing.fraction:.2f}{mark} {goal.fraction:.2f}"
        lines.append(f"{row}  {_peer_text(found)}")
    return lines


def markdown(session: Session | None) -> str:
    """The README's table. Without a session, or where it has no figure, the cell says so."""
    lines = [
        "| bfloat16 | time | tokens/s | of the floor | goal | speed against others in the same run |",
        "|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        found = _find(goal, session)
        if found is None:
            lines.append(f"| {goal.title} | {NOT_MEASURED} | | {NOT_MEASURED} | {goal.fraction:.2f} | |")
            continue
        timing = found.timing
        rate = f"{timing.num_tokens / timing.seconds:,.0f}" if timing.num_tokens else ""
        fraction = NOT_MEASURED if timing.fraction is None else f"{timing.fraction:.2f}"
        cells = [goal.title, duration(timing.seconds), rate, fraction, f"{goal.fraction:.2f}", _peer_text(found)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(session)])


def _source(session: Session | None) -> str:
    if session is None:
        return f"On a GPU: {NOT_MEASURED}."
    ceilings = next((record for record in session.records if isinstance(record, Ceilings)), None)
    facts = [session.device, session.environment.date[:10], f"commit {session.environment.commit}"]
    facts += [f"{name} {version}" for name, version in session.packages.items()]
    text = f"Measured on {', '.join(facts)}; random weights."
    if ceilings is not None:
        bandwidth, rate = ceilings.bytes_per_second / 1e12, ceilings.flops_per_second / 1e12
        text += f" The floor: a copy at {bandwidth:.2f} TB/s, bfloat16 products at {rate:.0f} TFLOP/s, in the same run."
    return "A rehearsal without a GPU: its times mean nothing." if session.is_rehearsal else text


def _find(goal: Goal, session: Session | None) -> _Measured | None:
    if session is None:
        return None
    timing = session.timings.get(goal.timing)
    if timing is None:
        return None
    apart = session.timings.get(f"{goal.timing}, {goal.peer}")
    peers = timing.peers | ({} if apart is None else {str(goal.peer): apart.seconds})
    return _Measured(timing, peers)


def _peer_text(found: _Measured) -> str:
    return ", ".join(f"{ratio(seconds, found.timing.seconds)} {name}" for name, seconds in found.peers.items())


def ratio(theirs: float, ours: float) -> str:
    """Above 1: we are faster."""
    return f"{theirs / ours:.2f}x" if ours else "-"


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.1f} us"
    return f"{1e3 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
