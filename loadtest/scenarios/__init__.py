"""Load as services see it: scenarios, which are YAML files, and recorded traces, known by times and lengths alone.

Begin with `scenario_file.py`, or `trace_file.py`. Sends nothing.
"""
