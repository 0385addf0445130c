"""What speculation may change in answers, because somebody asked for it, and which other settings contradict that."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.planning.resolve import SettingError


def check_lossy(config: EngineConfig) -> None:
    """SettingError where a promise and what breaks it are both asked for, or nothing would come of it."""
    lossy = config.lossy_speculation
    if lossy.acceptance == "exact":
        return
    if config.device.is_strict:
        raise SettingError(
            "lossy_speculation.acceptance is typical, which makes tokens depend on drafts and on what else runs, but "
            "device.determinism is strict, which promises that they do not: leave one of them out"
        )
    if config.speculation.method == "none":
        raise SettingError(
            "lossy_speculation.acceptance is typical, but speculation.method is none, so there are no drafts; "
            "set a method, or leave it out"
        )


def lossy_notes(config: EngineConfig) -> list[str]:
    lossy = config.lossy_speculation
    if lossy.acceptance == "exact":
        return []
    return [
        "LOSSY (lossy_speculation.acceptance): drafts are kept where their probability is above "
        f"min({lossy.posterior_threshold:g}, {lossy.posterior_alpha:g} * exp(-entropy)), so sampled answers are no "
        "samples of the model"
    ]
