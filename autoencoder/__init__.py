"""Stage 1: the SVG autoencoder, and the ground that `svg_t2i` stands on. Its face is `autoencoder.model`."""
