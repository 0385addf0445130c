"""Measures any server with an OpenAI-compatible API over HTTP.

Begin with `cli.py`; README.md says what the figures mean.

workload    what is asked: when requests arrive, how long they are, what they say
client      one request, timed: connections, the stream's events, what became of it
report      from outcomes to figures, result files, tables and pages
scenarios   what is asked as services see it: traffic in YAML files, recorded traces
compare     servers in turns: starting, pausing and measuring them
operation   a server of ours under overload and faults, with an account of every request
micro, gpu  the only rooms that know Peregrine: inside the engine on this machine, and everything about a GPU
"""
