"""The DiT on disk: every kind of folder that holds one is read here.

run: checkpoints of a training run, saved and resumed. index: what one of them holds, read without trust. weights: a
model from any kind of folder; exports. published: the release's folders.
"""
