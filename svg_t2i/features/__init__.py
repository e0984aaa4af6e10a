"""The frozen networks of training: images to latents, captions to text features."""
