"""GGUF files: header, tensors, and the model and the tokenizer that they describe."""
