"""From files to images, and the order in which samples are visited.

files, colours: one image file as RGB, aspect buckets, crops, grids. order: the seeded, resumable order of training
samples.
"""
