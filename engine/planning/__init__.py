"""The memory plan: what the machine has, what each "auto" becomes, and what fits, before anything is loaded.

Never allocates. Begin with `engine_plan.plan_memory`; `machine` reads what there is, `resolve` and `sizes` decide.
"""
