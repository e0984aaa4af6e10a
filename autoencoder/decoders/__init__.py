"""From latents to pixels.

convolutional: the published decoder. hy: its hyconfig variant. striped: decoding large images in stripes, in little
memory.
"""
