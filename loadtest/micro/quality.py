"""What does each format of weights and caches cost in quality? `python -m loadtest.micro.quality FOLDER LABEL=MODEL...`

A row is a label and what is served: `bf16=DIRECTORY`, `int8 cache=MODEL,kv_cache.dtype=int8`. Each engine reads the
whole of `loadtest/texts/evaluation.txt`, in pieces of 2,048 tokens that each begin anew, and leaves the log-probability
of every token in FOLDER: rows may be measured one by one. Then the table of all that are there: perplexity, and how
much it rose over the first row's, with the standard error of that (of differences, token by token), and how far
log-probabilities moved. Numbers depend on model, text and vector instructions, and on no clock.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from tabulate import tabulate
from tokenizers import Tokenizer

from engine.arrays import Doubles
from engine.build import build_engine
from loadtest.micro.measure import RESULTS
from loadtest.micro.perplexity import parse, score_text
from loadtest.report.environment import Environment, read_environment
from loadtest.report.result_files import dated_path, load_result, save_result

TEXTS = Path(__file__).parent.parent / "texts"
WINDOW = 2048  # tokens


class Scored(msgspec.Struct, kw_only=True):
    """What a row read. file_bytes: of the model's weight files; kept: what matrices came to, and in how many layers

    scores: the log-probability of each token but the first of a piece
    """

    label: str
    model: str
    settings: str
    text: str
    num_tokens: int
    file_bytes: int
    kept: dict[str, int]
    environment: Environment
    scores: list[float]


class QualityRow(msgspec.Struct, kw_only=True):
    """rise, rise_error: of the perplexity, as a share of the baseline's; moved: mean distance of log-probabilities"""

    label: str
    model: str
    settings: str
    file_bytes: int
    kept: dict[str, int]
    perplexity: float
    rise: float
    rise_error: float
    moved: float


class QualityResult(msgspec.Struct, kw_only=True):
    environment: Environment
    text: str
    num_tokens: int
    window: int
    rows: list[QualityRow]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="*", metavar="LABEL=MODEL[,SETTING=VALUE...]")
    parser.add_argument("--text", type=Path, default=TEXTS / "evaluation.txt")
    parser.add_argument("--tokens", type=int, help="of the text (default: all)")
    parser.add_argument("--save", action="store_true", help="write the table to loadtest/results, as JSON")
    options = parser.parse_args(arguments)
    for row in options.rows:
        label, _, spec = row.partition("=")
        save_result(measure(label, spec, options.text, options.tokens), _place(options.folder, label))
    scored = read_rows(options.folder)
    if not scored:
        parser.error(f"{options.folder} has no rows yet; name some, such as bf16=DIRECTORY")
    result = compare(scored)
    print(markdown(result))
    if options.save:
        path = dated_path(RESULTS, "quality", result.environment)
        save_result(result, path)
        print(path)


def measure(label: str, spec: str, text: Path, num_tokens: int | None) -> Scored:
    """Scores a text. spec: the model, and settings after commas"""
    path, _, settings = spec.partition(",")
    engine, model = build_engine(parse(path, settings or "auto"), lambda phase, detail: None)
    tokenizer = Tokenizer.from_str(model.tokenizer.tokenizer_json)
    ids = tokenizer.encode(text.read_text(encoding="utf-8")).ids[:num_tokens]
    pieces = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    scores = [score for piece in pieces if len(piece) > 1 for score in score_text(engine, piece)]
    place = Path(path)
    files = [place] if place.is_file() else list(place.glob("*.safetensors")) if place.is_dir() else []
    kept: dict[str, int] = {}
    for formats in model.weights.values():
        for name, count in formats.items():
            kept[name] = kept.get(name, 0) + count
    return Scored(
        label=label,
        model=place.name,
        settings=settings,
        text=text.name,
        num_tokens=len(ids),
        file_bytes=sum(file.stat().st_size for file in files),
        kept=kept,
        environment=read_environment(),
        scores=scores,
    )


def read_rows(folder: Path) -> list[Scored]:
    """In the order in which they were measured first."""
    return [load_result(file, Scored, origin="loadtest.micro.quality") for file in sorted(folder.glob("*.json"))]


def _place(folder: Path, label: str) -> Path:
    """The file of a row: its own, if it was measured before."""
    name = re.sub(r"[^a-z0-9.]+", "-", label.lower())
    same = sorted(folder.glob(f"???-{name}.json"))
    return same[0] if same else folder / f"{len(list(folder.glob('*.json'))):03}-{name}.json"


def compare(scored: Sequence[Scored]) -> QualityResult:
    """ValueError where rows are of different texts."""
    first = scored[0]
    for other in scored:
        if (other.text, len(other.scores)) != (first.text, len(first.scores)):
            raise ValueError(f"{other.label} read another text than {first.label}; measure it again")
    base = np.array(first.scores)
    rows = [_row(one, np.array(one.scores), base) for one in scored]
    newest = max((one.environment for one in scored), key=lambda environment: environment.date)
    return QualityResult(environment=newest, text=first.text, num_tokens=first.num_tokens, window=WINDOW, rows=rows)


def _row(scored: Scored, scores: Doubles, base: Doubles) -> QualityRow:
    lost = base - scores  # nats, token by token
    rise = math.expm1(float(lost.mean()))
    return QualityRow(
        label=scored.label,
        model=scored.model,
        settings=scored.settings,
        file_bytes=scored.file_bytes,
        kept=scored.kept,
        perplexity=math.exp(-float(scores.mean())),
        rise=rise,
        rise_error=(1 + rise) * float(lost.std(ddof=1)) / math.sqrt(len(lost)),
        moved=float(np.abs(lost).mean()),
    )


def markdown(result: QualityResult) -> str:
    rows = []
    for index, row in enumerate(result.rows):
        rows.append(
            {
                "": row.label,
                "files, MB": f"{row.file_bytes / 1e6:,.0f}" if row.file_bytes else "",
                "perplexity": f"{row.perplexity:.3f}",
                "beside the first": f"{100 * row.rise:+.2f}% ± {100 * row.rise_error:.2f}" if index else "",
                "moved": f"{row.moved:.4f}" if index else "",
            }
        )
    table: str = tabulate(rows, headers="keys", disable_numparse=True, tablefmt="github")
    return f"{table}\n\n{result.num_tokens:,} tokens of {result.text}; {result.environment.line}"


if __name__ == "__main__":
    main()
