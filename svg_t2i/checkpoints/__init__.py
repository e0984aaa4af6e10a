"""The DiT on disk: every kind of folder that holds one is read here.

run: checkpoints of a training run, saved and resumed. weights: a model from any kind of folder; exports. published: the
release's folders.
"""
