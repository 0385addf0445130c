"""Training of drafters on the target's own outputs: what it answers and its hidden states, and heads that guess them.

Runs in a process of its own (`python -m engine.training`), and never while a model is served. Knows token ids and no
text: prompts come as ids. Begin with `heads_job.HeadsJob` (what is asked for) and `heads_run.run` (the stages);
`collector` lets the engine answer, `transcripts` keeps what it said, `trainable_heads` and `heads_trainer` learn.
"""
