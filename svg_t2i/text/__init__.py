"""Text in: prompts and captions to features.

encoder: a causal language model as frozen text encoder; system prompts. files: prompt files. enhance: prompts rewritten
by the language model.
"""
