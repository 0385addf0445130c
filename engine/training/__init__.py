"""Training of drafters on the target's own outputs: heads that guess from its hidden states, and small draft models.

Runs in a process of its own (`python -m engine.training`), and never while a model is served. Knows token ids and no
text: prompts come as ids. Begin with `training_job` (what is asked for), `heads_run.run` and `draft_run.run_draft`
(the stages); `collector` lets the engine answer, `transcripts` keeps what it said, `trainable_heads` and `pruned_model`
learn.
"""
