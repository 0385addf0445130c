"""What fits: the machine, the settings that "auto" stands for, and the memory plan, all before anything is loaded.

Never allocates. Begin with `engine_plan.plan_memory`; `machine` reads what there is, `resolve` and `sizes` decide.
"""
