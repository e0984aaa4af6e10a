"""Statistics of latents: mean and standard deviation per channel, and how far two of them are apart.

statistics: `LatentStats`, their files, their measurement. drift: the distance between two statistics, and a plot.
"""
