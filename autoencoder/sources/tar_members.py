"""Which members of a tar shard make a sample, by their names alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autoencoder.sources.source import IMAGE_SUFFIXES

CAPTION_SUFFIXES = (".json", ".txt", ".caption")


def split_group(names: Sequence[str]) -> list[list[str]]:
    """Members that share a name up to its first dot → those of each sample.

    They are one sample if they have one image, or one called by the shared name alone: 0.jpg, 0.seg.png, 0.txt. An
    image whose name goes on behind that dot is a sample of its own if a caption has its name, or if no image is called
    by the shared name: photo.0.jpg, photo.0.txt, photo.1.jpg, ….
    """
    images = [name for name in names if _last_suffix(name) in IMAGE_SUFFIXES]
    if len(images) <= 1:
        return [list(names)] if images else []
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(_stem(name), []).append(name)
    plain = any(_suffix(name) in IMAGE_SUFFIXES for name in images)
    samples = {}
    for name in images:
        own = stems[_stem(name)]
        captioned = any(_last_suffix(member) in CAPTION_SUFFIXES for member in own)
        if _suffix(name) in IMAGE_SUFFIXES or not plain or captioned:
            samples[_stem(name)] = own
    return list(samples.values()) if len(samples) > 1 else [list(names)]


def image_of(names: Iterable[str]) -> str | None:
    """Which member of a sample is the image: the first whose name has one dot, else the first image."""
    images = [name for name in names if _last_suffix(name) in IMAGE_SUFFIXES]
    return next((name for name in images if _suffix(name) in IMAGE_SUFFIXES), next(iter(images), None))


def caption_member(names: Iterable[str], image: str, suffix: str) -> str | None:
    """Which member of a sample has this suffix and the name of its image, or the part before the first dot."""
    found = {_stem(name): name for name in names if _last_suffix(name) == suffix}
    return found.get(_stem(image)) or found.get(key_of(image))


def key_of(name: str) -> str:
    """A member's name up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}" if folder else last.partition(".")[0]


def _suffix(name: str) -> str:
    """The rest of the name, in lower case: ".jpg", ".depth.png"."""
    return "." + name.rpartition("/")[2].partition(".")[2].lower()


def _stem(name: str) -> str:
    """A member's name up to its last dot."""
    return name[: name.rindex(".")] if _last_suffix(name) else name


def _last_suffix(name: str) -> str:
    """What begins with the last dot of a name, in lower case: ".png"."""
    last = name.rpartition("/")[2]
    return last[last.rindex(".") :].lower() if "." in last else ""
