"""What drafters are trained on, as token ids: conversations of our own, or texts of the user's.

Never runs a model. Begin with `training_prompts`; `chat_prompts` is what the model is asked.
"""
