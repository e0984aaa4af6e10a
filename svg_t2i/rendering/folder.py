"""Rendering many images into a folder: split over processes, resumable, with a record of every image.

    OUTPUT/settings.json                                what all images of the folder have in common, weights included
    OUTPUT/images/{solver}_{steps}_{index}_{WxH}.png    or .webp, .jpg; the parameters of each image are in it
    OUTPUT/data.json                                    one record an image, rewritten as the run goes on
    OUTPUT/failed.json                                  only if images failed: which, and why
    OUTPUT/grid.png                                     the first images, a row a prompt
    OUTPUT/index.html                                   all images with their prompts and seeds, for a browser

The images are cut into batches before they are split over the processes, and a half-done batch is made again:
pixels depend neither on the number of processes nor on interruptions. Every file appears by one rename.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from autoencoder.common.weights import replacing, write_json
from autoencoder.images.files import image_grid, save_png
from autoencoder.images.saving import read_parameters, save_image
from svg_t2i.rendering.contact_sheet import contact_sheet

log = logging.getLogger(__name__)

MAX_GRID_IMAGES = 64
SETTINGS = "settings.json"
ONCE = {"format": "png", "step_cache": 0.0}  # what settings were before they had a name
NOT_OF_AN_IMAGE = ("model", "format")
RECORD_EVERY = 5.0  # seconds between two versions of data.json
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Job:
    """One image to make: its running index, prompt, size (width, height) in pixels, seed, and what is its own."""

    index: int
    prompt: str
    size: tuple[int, int]
    seed: int
    own: Mapping[str, Any] = field(default_factory=dict)


Maker = Callable[[Sequence[Job]], Sequence[Image.Image]]


def plan_jobs(
    prompts: Sequence[tuple[str, Mapping[str, Any]]],
    sizes: Sequence[tuple[int, int]],
    images_per_prompt: int,
    seed: int,
) -> list[Job]:
    """All images of a run in order: prompt by prompt, size by size. Image i of a prompt has seed `seed + i`.

    prompts: each with what is its own; a `seed` among that takes the place of the shared one.
    """
    jobs: list[Job] = []
    for prompt, settings in prompts:
        own = dict(settings)
        first = own.pop("seed", seed)
        for size, i in itertools.product(sizes, range(images_per_prompt)):
            jobs.append(Job(len(jobs), prompt, size, first + i, own))
    return jobs


class RunFolder:
    """The output folder of one run.

    Args:
        settings: what all its images share: sampling options and model, JSON-able.
        command: how the model was named. It is recorded, and free to change from one start to the next.

    Raises:
        UserError: (from `prepare`) the folder holds something else, or images made with other settings; a full disk.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], command: Mapping[str, Any] | None = None):
        self.folder = folder
        self.settings, self.command = json.loads(json.dumps([settings, command or {}]))
        self._recorded_at = float("-inf")

    def prepare(self) -> None:
        """Create the folder, or make sure that it is a run with these settings, to go on with."""
        check_folder(self.folder, self.settings)
        with full_disk(self.folder):
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            for leftover in (self.folder / "images").glob(".*.tmp"):
                leftover.unlink()
            write_json({**self.settings, "command": self.command}, self.folder / SETTINGS)

    def path(self, job: Job) -> Path:
        width, height = job.size
        solver, steps, suffix = (self.settings[name] for name in ("solver", "num_inference_steps", "format"))
        return self.folder / "images" / f"{solver}_{steps}_{job.index}_{width}x{height}.{suffix}"

    def record(self, job: Job) -> dict[str, Any]:
        """What data.json and the image itself say about it."""
        return {
            "caption": job.prompt,
            "image_url": str(self.path(job)),
            "resolution": f"{job.size[0]}x{job.size[1]}",
            "solver": self.settings["solver"],
            "num_sampling_steps": self.settings["num_inference_steps"],
            "seed": job.seed,
            **{name: value for name, value in self.settings.items() if name not in NOT_OF_AN_IMAGE},
            **job.own,
        }

    def is_done(self, job: Job) -> bool:
        """Whether this very image is there. UserError if another one has its name."""
        path = self.path(job)
        if not path.is_file():
            return False
        if difference := self._difference(job):
            raise UserError(f"{path} is another image ({difference}); choose another --output")
        return True

    def has_all(self, jobs: Sequence[Job]) -> bool:
        """Whether all of these very images are there, made by a command that named the same model."""
        path = self.folder / SETTINGS
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if recorded.get("command") != self.command:
            return False
        return all(self.path(job).is_file() and not self._difference(job) for job in jobs)

    def _difference(self, job: Job) -> str:
        """In what the image under the job's name is another one; empty where it is this one."""
        found, wanted = {**ONCE, **read_parameters(self.path(job))}, json.loads(json.dumps(self.record(job)))
        different = [name for name in wanted if name != "image_url" and found.get(name) != wanted[name]]
        return f"{different[0]} {found.get(different[0])!r}" if different else ""

    def save(self, job: Job, image: Image.Image) -> None:
        save_image(image, self.path(job), self.record(job))

    def write_records(self, jobs: Sequence[Job], now: bool = True) -> None:
        """data.json and index.html with all images that are there; unless `now`, at most every few seconds."""
        if not now and time.monotonic() < self._recorded_at + RECORD_EVERY:
            return
        self._recorded_at = time.monotonic()
        records = [self.record(job) for job in jobs if self.path(job).is_file()]
        write_json(records, self.folder / "data.json")
        with replacing(self.folder / "index.html") as partial:
            partial.write_text(contact_sheet(self.folder.name, records), encoding="utf-8")

    def write_failed(self, failed: Mapping[int, str]) -> None:
        """failed.json: index → reason. Without failures there is no such file."""
        (self.folder / "failed.json").unlink(missing_ok=True)
        if failed:
            write_json(dict(sorted(failed.items())), self.folder / "failed.json")

    def write_grid(self, jobs: Sequence[Job], columns: int) -> None:
        """The first images, whole rows of `columns` at most; with 0 none."""
        (self.folder / "grid.png").unlink(missing_ok=True)
        if columns == 0:
            return
        rows = max(1, MAX_GRID_IMAGES // columns) * columns
        shown = [job for job in jobs[:rows] if self.path(job).is_file()]
        if not shown:
            return
        images = [Image.open(self.path(job)).convert("RGB") for job in shown]
        grid = image_grid(images, columns, [job.prompt for job in shown])
        save_png(grid, self.folder / "grid.png")


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """UserError if `folder` holds anything but a run with these settings; `settings` may be only some of a run's."""
    path = folder / SETTINGS
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output {folder} is not empty; nothing was overwritten. Choose another folder")
        return
    try:
        before = {**ONCE, **json.loads(path.read_text(encoding="utf-8"))}
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}); choose another --output") from error
    now = json.loads(json.dumps(settings))
    other = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]]
    if other:
        raise UserError(f"--output {folder} holds images with other settings ({'; '.join(other)}); choose another")


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Say of a disk that fills up inside what became of `folder`: every file in it is whole or not there."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(
            f"the disk of {folder} is full; its finished images and records are whole. Free some space and "
            "run the same command again: it goes on where it stopped"
        ) from error


def render(make: Maker, jobs: Sequence[Job], run: RunFolder, batch_size: int, world: World) -> dict[int, str]:
    """Make this process's share of the images that are not there yet.

    Returns:
        index → reason of the images that failed, of all processes and on each. A batch that fails is tried again image
        by image, so that one bad image stops no other.

    Raises:
        UserError: the disk is full; what is finished stays, and the same command goes on from there.
    """
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    share = [batch for batch in batches[world.rank :: world.size] if not all(run.is_done(job) for job in batch)]
    failed: dict[int, str] = {}
    for batch in tqdm(share, desc="sampling", unit="batch", disable=not world.is_main):
        made = _make(make, batch, failed)
        with full_disk(run.folder):
            for job, image in made:
                if not run.path(job).is_file():
                    run.save(job, image)
            if world.is_main:
                run.write_records(jobs, now=False)
    shares = world.broadcast(world.gather(failed))  # waits for the other processes
    return {index: reason for share in shares for index, reason in share.items()}


def _make(make: Maker, batch: Sequence[Job], failed: dict[int, str]) -> list[tuple[Job, Image.Image]]:
    """The images of a batch; if that fails, of each member that can be made alone."""
    try:
        return list(zip(batch, make(batch), strict=True))
    except Exception as error:  # one bad image must not end a run of thousands; reported below and in the exit status
        reason = f"{type(error).__name__}: {error}"
        if len(batch) == 1:
            log.error("image %d failed (%r): %s", batch[0].index, batch[0].prompt, reason)
            failed[batch[0].index] = reason
            return []
        log.warning("a batch of %d images failed (%s); trying them one by one", len(batch), reason)
    return [made for job in batch for made in _make(make, [job], failed)]
