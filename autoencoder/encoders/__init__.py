"""Frozen vision foundation models as encoders of latents, and the optional residual branch.

encoder: images to patch features for DINOv3, DINOv2, SigLIP2 and MAE. table: names and families of the models.
residual, mixed_rotary: the residual ViT. positions: rotary and learned position embeddings. published_keys: names in
the published weights.
"""
