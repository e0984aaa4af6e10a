"""Checkpoints of a training run: written in the background; the newest complete one fills a state.

    results_dir/
      config.yaml                     the run's configuration
      tensorboard/                    scalars
      checkpoints/
        0001000/                      named after the step; appears by one rename, so it is whole or it is not there
          .metadata  __0_0.distcp …   shards (torch.distributed.checkpoint): model.*, ema.*, optimizer.*, guard.*
          meta.json                   step, configuration, model, fingerprints, code; size and SHA-256 of every file
          COMMITTED                   SHA-256 of meta.json, written last
        .tmp-0002000/                 a save that was interrupted; removed at the next start

Data order and noise are functions of the seed and the step, so these are all the generator state there is. A state of
any world size and sharding is filled from a checkpoint of any other. No file is trusted: nothing unpickles into an
arbitrary object.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from autoencoder.common.config import UserError, first_line
from autoencoder.common.durable import NO_SPACE, digests, no_space, require_space, sha256, sync_folder, write_durably
from svg_t2i.checkpoints.index import SafeReader, read_index

log = logging.getLogger(__name__)

FORMAT = 1
META, COMMITTED = "meta.json", "COMMITTED"

# ------------------------------------------------------------------------------------------------------------ writing


class Saver:
    """Writes checkpoints of one run, one at a time, from all ranks, while training goes on.

    A replicated state is copied to the host and written by rank 0 alone; of a sharded one every rank does its share.

    Args:
        root: the run's `checkpoints` folder, on storage that all ranks share. It is made.
        background: False writes before `save` returns.
        keep_last, keep_every: after each save all but the newest `keep_last` checkpoints are removed, except where
            `keep_every` divides the step; None keeps all.
    """

    def __init__(
        self, root: Path, *, background: bool = True, keep_last: int | None = None, keep_every: int | None = None
    ):
        self.root, self.background = root, background
        self.keep_last, self.keep_every = keep_last, keep_every
        if _is_main():
            root.mkdir(parents=True, exist_ok=True)
        self._host: dict[str, Any] | None = None  # copies of a GPU's tensors in pinned memory, used again
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_choose_device())
        self._writing: Future | None = None
        self._group: dist.ProcessGroup | None = None

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Begin to write `root/{step:07d}`; waits for the save before, and until the state may change again.

        Args:
            state: nested mapping of tensors.
            meta: JSON-able facts; `step`, `format` and `files` are added.

        Raises:
            UserError: the save before failed, the folder is gone, or there is no space for this one.
        """
        self.wait()
        tensors = [tensor for part in state.values() for tensor in part.values()]
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors)
        if sharded and self._group is None:
            # its own group: collectives of two threads on one group would meet in different orders on different ranks
            self._group = dist.new_group(backend="gloo")
        if not sharded and not _is_main():
            return
        self._check(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        staged, copied = self._staged(state) if self.background else (dict(state), None)
        self._writing = self._thread.submit(self._write, step, staged, copied, dict(meta), self._group)
        if not self.background:
            self.wait()

    def _check(self, size: int) -> None:
        """UserError where `size` bytes cannot be written. Every rank looks; it is one file system."""
        if not self.root.is_dir():
            raise _gone(self.root)
        require_space(self.root, size, "a checkpoint")

    def _staged(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        """A copy in host memory, and what tells when it is complete: the host does not wait for the device."""
        if not torch.cuda.is_available():
            # torch's function copies sharded tensors in Python, piece by piece: seconds for a thousand of them
            return {part: {name: x.detach().clone() for name, x in xs.items()} for part, xs in state.items()}, None
        if self._host is None:
            host = _create_cpu_state_dict(dict(state), pin_memory=True)
            for tensors in host.values():  # torch does not pin single numbers; a copy of each would be waited for
                tensors |= {name: x.pin_memory() for name, x in tensors.items() if x.ndim == 0}
            self._host = host
        staged = _copy_state_dict(dict(state), self._host, non_blocking=True)  # behind the step on the same stream
        copied = torch.cuda.Event()
        copied.record()
        return staged, copied

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            UserError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, CheckpointException) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if getattr(cause, "errno", None) in NO_SPACE:
                raise no_space(self.root, "a checkpoint") from error
            if not self.root.is_dir():
                raise _gone(self.root) from error
            raise UserError(f"{self.root}: a checkpoint could not be written: {first_line(cause)}") from error

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(
        self,
        step: int,
        state: dict[str, Any],
        copied: torch.cuda.Event | None,
        meta: dict[str, Any],
        group: dist.ProcessGroup | None,
    ) -> None:
        if copied is not None:
            copied.synchronize()
        temporary = self.root / f".tmp-{step:07d}"
        if _is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        if group is not None:
            dist.barrier(group)
        with _quiet():
            writer = dcp.FileSystemWriter(temporary, per_thread_copy_ahead=0)  # the tensors are on the host already
            dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
        own = [path for path in temporary.iterdir() if group is None or path.name.startswith(f"__{dist.get_rank()}_")]
        files = digests(own)
        if group is not None:
            shares: list[Any] = [None] * dist.get_world_size() if _is_main() else []
            dist.gather_object(files, shares or None, group=group)
            files = {name: entry for share in shares for name, entry in share.items()}
        if _is_main():
            files |= digests(path for path in temporary.iterdir() if path.name not in files)  # the index
            self._commit(step, {"format": FORMAT, "step": step, **meta, "files": dict(sorted(files.items()))})

    def _commit(self, step: int, meta: dict[str, Any]) -> None:
        final, temporary = self.root / f"{step:07d}", self.root / f".tmp-{step:07d}"
        write_durably(temporary / META, json.dumps(meta, indent=1))
        write_durably(temporary / COMMITTED, sha256(temporary / META) + "\n")
        sync_folder(temporary)
        if final.exists():  # a broken one, or the run was wound back: moved away so that the rename stays atomic
            final.rename(self.root / f".tmp-replaced-{step:07d}")
        os.replace(temporary, final)
        sync_folder(self.root)
        clean(self.root)
        self._prune(step)
        log.info("saved %s", final)

    def _prune(self, newest: int) -> None:
        if self.keep_last is None:
            return
        steps = [step for step in sorted(_folders(self.root)) if step <= newest]  # later ones: the run was wound back
        for step in steps[: -self.keep_last]:
            if self.keep_every is None or step % self.keep_every:
                doomed = self.root / f".tmp-pruned-{step:07d}"
                _folders(self.root)[step].rename(doomed)  # renamed first, so that a half-deleted one is not found
                shutil.rmtree(doomed, ignore_errors=True)


def save_checkpoint(root: Path, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """Write `root/{step:07d}` and return it: `Saver.save`, waiting for the end."""
    saver = Saver(root, background=False)
    saver.save(step, state, meta)
    saver.close()
    if dist.is_initialized():
        dist.barrier()
    return root / f"{step:07d}"


def clean(root: Path) -> None:
    """Remove what interrupted saves left behind."""
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ finding


def newest_checkpoint(root: Path, verify: bool = False) -> Path | None:
    """The folder with the highest step that is whole, or None where there is no checkpoint at all.

    Broken ones are passed over with a warning.

    Args:
        verify: read every file and compare its SHA-256, besides all names and sizes.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    folders = sorted(_folders(root).items(), reverse=True)
    for _, folder in folders:
        try:
            read_checkpoint_meta(folder, verify)
        except UserError as error:
            log.warning("%s; trying an older checkpoint", error)
        else:
            return folder
    if folders:
        names = ", ".join(folder.name for _, folder in folders)
        raise UserError(
            f"{root}: none of the checkpoints there is whole ({names}), so nothing was started that would replace "
            "them; bring back a copy of one, move them away to begin anew, or choose another results folder"
        )
    return None


def _folders(root: Path) -> dict[int, Path]:
    named = (path for path in root.glob("*") if re.fullmatch(r"\d{7,}", path.name) and path.is_dir())
    return {int(path.name): path for path in named}


def read_checkpoint_meta(folder: Path, verify: bool = False) -> dict[str, Any]:
    """`meta.json` of a checkpoint, after checking that it was committed and that every file it lists is there in full.

    Raises:
        UserError: naming what is wrong.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if (folder / COMMITTED).read_text(encoding="utf-8").strip() != sha256(folder / META):
            raise ValueError(f"{META} is not what was committed")
        if meta.get("format") != FORMAT:
            raise UserError(
                f"{folder / META}: format {meta.get('format')!r}, this version reads {FORMAT}; update svg_t2i"
            )
        files: dict[str, dict[str, Any]] = meta["files"]
        broken = [name for name, entry in files.items() if (folder / name).stat().st_size != entry["size"]]
        if verify and not broken:
            found = digests(folder / name for name in files)
            broken = [name for name in files if found[name] != files[name]]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from error
    if broken:
        raise UserError(f"{folder}: not a whole checkpoint (damaged: {', '.join(broken)})")
    return meta


# ------------------------------------------------------------------------------------------------------------ reading


def load_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Fill the tensors of `state`, whole or sharded, in place from a checkpoint of any world size and sharding.

    Raises:
        UserError: names missing in the checkpoint, or other shapes.
    """
    with readable(folder):
        dcp.load(dict(state), storage_reader=SafeReader(folder), no_dist=not dist.is_initialized())


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Name, shape and dtype of everything in a checkpoint.

    Raises:
        UserError: its index is damaged or names more than tensors.
    """
    with readable(folder):
        return read_index(folder).state_dict_metadata


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """A checkpoint that does not hold what is asked for becomes a `UserError` with the first cause."""
    try:
        with _quiet():
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()), error)
        raise UserError(f"{folder}: cannot be loaded here: {first_line(cause)}") from error
    except (pickle.UnpicklingError, AttributeError, EOFError, LookupError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder / '.metadata'}: cannot be loaded here: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is no process group: one process is a normal way to train."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _choose_device() -> Callable[[], None]:
    """What lets another thread work on the GPU of this one: CUDA's current device belongs to the thread."""
    if not torch.cuda.is_available():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def _gone(root: Path) -> UserError:
    return UserError(f"{root} is gone: the results folder was removed while the run was using it")


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
