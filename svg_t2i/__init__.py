"""Stage 2: the SVG-DiT. Its face is `svg_t2i.pipeline`; the other modules beside it are commands."""
