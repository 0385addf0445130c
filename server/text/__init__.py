"""Text and token ids: the tokenizer, chat templates in processes of their own, text that comes token by token.

Never knows HTTP. Begin with `tokenizer.Tokenizer` and `detokenizer.Detokenizer`.
"""
