"""`peregrine plan`: what fits, before anything is loaded."""

from __future__ import annotations

from engine.messages import EXIT_CODES
from server.complain import complain
from server.settings import LoadedConfig

DOES_NOT_FIT = 2


def plan(loaded: LoadedConfig) -> int:
    """Prints the memory plan. Exit code 2 and the one change that helps, if it does not fit."""
    from engine.ceilings import with_ceilings
    from engine.machine import read_machine
    from engine.models.loader import read_model_facts
    from engine.plan_settings import resolve_device
    from engine.planner import PlanError, plan_memory, render_plan

    config = loaded.config.engine_config()
    try:
        machine = read_machine()
        machine = with_ceilings(machine, resolve_device(config, machine).value)
        print(render_plan(plan_memory(read_model_facts(config.model), config, machine)))
    except PlanError as error:
        complain(f"does not fit: {error}")
        return DOES_NOT_FIT
    except ValueError as error:
        kind = str(getattr(error, "kind", "config"))
        complain(f"{kind}: {error}")
        return EXIT_CODES[kind]
    return 0
