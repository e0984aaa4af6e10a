"""Weights of a run, and how far two of them are apart."""

from svg_t2i.checkpoints.weights import read_transformer


def weights(folder, step, ema=False):
    return read_transformer(folder / "checkpoints" / f"{step:07d}", ema=ema).state


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)
