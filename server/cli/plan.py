"""`peregrine plan`: what fits, before anything is loaded."""

from __future__ import annotations

from engine.ipc.messages import EXIT_CODES
from server.complain import complain
from server.settings import LoadedConfig

DOES_NOT_FIT = 2


def plan(loaded: LoadedConfig) -> int:
    """Prints the memory plan. Exit code 2 and the one change that helps, if it does not fit."""
    from engine.loading.loader import read_model_facts
    from engine.planning.ceilings import with_ceilings
    from engine.planning.engine_plan import PlanError, plan_memory, render_plan
    from engine.planning.machine import read_machine
    from engine.planning.resolve import resolve_device

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
