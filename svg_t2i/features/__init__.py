"""The frozen networks of training: images to latents, captions to text features.

frozen: both networks, and a cache of caption features. sharded_at_rest: their weights split over processes.
preparation: statistics and text encoders that a run makes for itself. settings: their sections of the YAML file.
"""
