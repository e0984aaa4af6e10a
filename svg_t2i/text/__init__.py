"""Text in: prompts and captions to features.

encoder: a causal language model as frozen text encoder; system prompts. loading: it and its tokenizer, of a folder or
of the Hub. toy: a small random one. files: prompt files. enhance: prompts rewritten by the language model.
"""
