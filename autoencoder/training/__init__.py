"""Training of the autoencoder with Lightning.

settings: the YAML schema. batches: images in batches of one size. losses: L1, LPIPS, PatchGAN. module: the Lightning
module and data module. callbacks: console, learning rate, image grids, EMA. checkpoints: saved, found, kept. guards:
requests to stop, the watchdog. run: one run, from its first weights to its last step.
"""
