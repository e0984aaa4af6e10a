"""Measuring a text-to-image model.

evaluate: metrics of sampled images. distances, clip_score, shapes: single metrics. suites, suite_images: images for
GenEval and DPG-Bench. sweep: metrics over sampling settings. settings: what is sampled and measured.
"""
