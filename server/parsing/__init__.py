"""What a model means by what it writes: reasoning, content and tool calls, in the format that its chat template has.

Pure: text in, parts of an answer out; never knows a request, HTTP, or the engine. Begin with `answer_parts` (what comes
out), `answer_format` (what a format is) and `derive_format` (how it is read off a template).
"""
