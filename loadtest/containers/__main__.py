"""`python -m loadtest.containers`: builds the CPU image, and tries it. Linux, as root or with user namespaces."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from loadtest.containers.building import Built, build, check_programs, pip_settings
from loadtest.containers.trial import Trial, try_image
from loadtest.report.environment import Environment, read_environment
from loadtest.report.result_files import dated_path, save_result


@dataclass(frozen=True)
class ImageResult:
    """A result file: kind tells it from others."""

    kind: str
    environment: Environment
    built: Built
    trial: Trial
    faults: list[str]


def main(arguments: list[str] | None = None) -> int:
    """0: the image is as it should be; 1: it is not, and what is wrong was printed; 2: it could not be tried."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.containers", description=__doc__)
    parser.add_argument("--results", type=Path, help="folder for a result file, as loadtest/results")
    options = parser.parse_args(arguments)
    environment = read_environment()
    try:
        check_programs("buildah", "podman")
        packages = pip_settings()
        built = build(packages)
        print(f"built in {built.seconds:g} s on {built.base}: {built.num_bytes / 1e9:.2f} GB")
        trial = try_image(packages)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"containers: {error}", file=sys.stderr)
        return 2
    faults = trial.faults(built.num_bytes)
    print(f"ready after {trial.first_start:g} s with an empty volume, {trial.second_start:g} s with that volume")
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    if options.results is not None:
        path = dated_path(options.results, "image", environment)
        save_result(ImageResult("image", environment, built, trial, faults), path)
        print(f"written: {path}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
