"""A CUDA device without a GPU: tensors that have a shape and a dtype, and no values.

    python tests/fake_cuda.py …        # only in a process of its own: what it replaces stays replaced

`pretend` makes torch believe in GPUs, over a process group of any size whose peers do not exist. Inside the mode
`FakeCuda` every tensor on "cuda" is a fake one (`FakeTensorMode`), while tensors on the CPU are real: the host's share
of the work is done as always. The mode counts the bytes that live on the device, by phase, and looks at every copy:

- From the device to the host: there are no values, so what depends on them fails; other copies are noted.
- From the host to the device: noted unless it comes from pinned memory and does not wait.

Replaced, so nothing is shown about them: streams, events, pinning itself, the choice of kernels for dense attention and
convolutions, `torch.tensor` with data, `trunc_normal_`. Figures are tensors alone; a real device adds its context (0.5
GB), NCCL (1 to 2 GB), workspaces and fragmentation.

A CUDA build of torch asks the driver in every backward pass. Two small libraries answer in its place; they are compiled
with the system's C compiler and have to be loaded before torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import traceback
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

COMPILER = shutil.which("cc") or shutil.which("gcc")
STUBS = "SVG_T2I_FAKE_CUDA"  # environment: folder of the two libraries
COUNT = "_ZN3c104cuda12device_countEv"  # c10::cuda::device_count()
DRIVER = (
    "CtxGetCurrent CtxSetCurrent DeviceGet DeviceGetAttribute DevicePrimaryCtxRetain FuncGetAttribute FuncSetAttribute "
    "FuncSetCacheConfig GetErrorString LaunchCooperativeKernel LaunchKernel LinkAddData_v2 LinkComplete LinkCreate_v2 "
    "ModuleGetFunction ModuleLoad ModuleLoadData ModuleLoadDataEx ModuleUnload PointerGetAttribute "
    "OccupancyMaxActiveBlocksPerMultiprocessor TensorMapEncodeTiled"
).split()


def compile_stubs(folder: Path) -> None:
    """libcuda.so.1, whose devices have no context, and count.so, which says how many devices there are."""
    driver = "\n".join(f"int cu{name}(void) {{ return 0; }}" for name in DRIVER)
    context = "int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { *f = 0; *a = 0; return 0; }"
    count = f"signed char pretended = 0; signed char {COUNT}(void) {{ return pretended; }}"
    for name, source, soname in (("libcuda.so.1", f"{driver}\n{context}\n", True), ("count.so", f"{count}\n", False)):
        path = folder / f"{name}.c"
        path.write_text(source)
        options = [f"-Wl,-soname,{name}"] if soname else []
        subprocess.run([COMPILER, "-shared", "-fPIC", *options, path, "-o", folder / name], check=True)


def run(script: Path, *arguments: object, stubs: Path, timeout: float = 280) -> subprocess.CompletedProcess:
    """A script that pretends, in a process of its own."""
    environment = os.environ | {STUBS: str(stubs), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


_count = None
if STUBS in os.environ:
    ctypes.CDLL(os.path.join(os.environ[STUBS], "libcuda.so.1"), ctypes.RTLD_GLOBAL)
    _count = ctypes.CDLL(os.path.join(os.environ[STUBS], "count.so"), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.distributed.tensor._sharding_prop import ShardingPropagator  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

GB = 1e9
BLOCK = 512  # bytes; what the allocator rounds up to


class Moment:
    """An event or a stream that has nothing to wait for."""

    device, device_type, device_index, stream_id = torch.device("cuda", 0), 1, 0, 0

    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, *_: Any) -> Moment:
        return self

    record_event = record

    def wait(self, *_: Any) -> None:
        pass

    wait_event = wait_stream = synchronize = wait

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def pretend(devices: int = 8, processes: int = 1) -> None:
    """From here on this process has GPUs of the kind H100, and is rank 0 of so many processes."""
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing, which is made only while there is no device
    ctypes.c_int8.in_dll(_count, "pretended").value = 127
    stream = Moment()
    answers: dict[str, Any] = {
        "is_available": True, "device_count": devices, "current_device": 0, "is_initialized": False, "init": None,
        "_lazy_init": None, "set_device": None, "synchronize": None, "empty_cache": None, "current_stream": stream,
        "default_stream": stream, "get_device_capability": (9, 0), "get_device_name": "NVIDIA H100 80GB HBM3",
        "is_bf16_supported": True, "max_memory_allocated": 0, "reset_peak_memory_stats": None,
        "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Event = torch.cuda.Stream = Moment
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda *_: None
    torch._C._get_accelerator = lambda *_: torch.device("cuda", 0)
    torch.autograd.set_multithreading_enabled(False)
    torch.nn.Module._apply = _replaced
    torch.nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor  # looks at what it drew
    torch.nn.functional.scaled_dot_product_attention = _dense_attention
    torch._C._select_conv_backend = lambda *_, **__: torch._C._ConvBackend.Cudnn
    torch._C._conv_determine_backend_memory_format = _convolution_format
    data = torch.tensor
    torch.tensor = lambda values, *, device=None, **options: _with_data(data, values, device, options)
    shapes = ShardingPropagator._propagate_tensor_meta_non_cached
    ShardingPropagator._propagate_tensor_meta_non_cached = lambda *given: _aside(shapes, *given)
    if processes > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)


def _aside(function: Any, *arguments: Any) -> Any:
    """DTensor works out shapes on fake tensors of its own, of whole size: they are no memory of this process."""
    with _disable_current_modes():
        return function(*arguments)


def _with_data(make: Any, values: Any, device: Any, options: dict[str, Any]) -> torch.Tensor:
    device = torch.empty(0).device if device is None else torch.device(device)
    made = make(values, device="cpu", **options)
    return (
        made if device.type == "cpu" else PINNED.add(made).to(device, non_blocking=True)
    )  # the driver copies a scalar


def _dense_attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    if not q.is_cuda:
        arguments = attn_mask, dropout_p, is_causal
        return torch._C._nn.scaled_dot_product_attention(q, k, v, *arguments, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if q.dtype != torch.float32 and attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, False, 0.0, is_causal)[0]


def _convolution_format(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.memory_format:
    last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


class _Pinned:
    """Which tensors on the host pass for pinned. Tensors of one storage do together."""

    def __init__(self) -> None:
        self.storages: set[int] = set()

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            weakref.finalize(storage, self.storages.discard, storage._cdata)
        return tensor

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages


PINNED = _Pinned()


class FakeCuda(TorchDispatchMode):
    """See the top.

    Attributes:
        phase: what is going on; set it.
        peaks: most bytes on the device by phase. now: bytes on the device.
        down: copies to the host, with where they come from. waiting: copies from it that wait.
        kernels: how often operators whose name has "attention" or "attn" in it ran; "own heads" are calls of the
            variable-length kernel with a key/value head for each query head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        type(self.fake).avoid_device_init = property(lambda _: True)  # else constants are computed on the device
        self.phase, self.now = "start", 0
        self.peaks: Counter[str] = Counter()
        self.down: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}

    def clear(self) -> None:
        """Forget what was noted so far."""
        for counter in (self.peaks, self.down, self.waiting, self.kernels):
            counter.clear()

    def report(self) -> dict[str, Any]:
        """What was noted, in GB, ready for JSON."""
        peaks = {phase: round(size / GB, 2) for phase, size in self.peaks.items()}
        return {
            "peaks": peaks, "peak": max(peaks.values()), "down": dict(self.down), "waiting": dict(self.waiting),
            "kernels": dict(self.kernels),
        }  # fmt: skip

    def __enter__(self) -> FakeCuda:
        self._replaced = torch.UntypedStorage.resize_, torch.Tensor.pin_memory
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(storage, size)
        torch.Tensor.pin_memory = lambda tensor, *_: PINNED.add(tensor.clone())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_, torch.Tensor.pin_memory = self._replaced
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with the tensors inside
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = kwargs.get("device")
        made = device is not None and torch.device(device).type == "cuda"
        if not made and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        self._look(func, tensors, args, kwargs)
        with self.fake:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda":
                self._count(leaf.untyped_storage())
        return result

    def _look(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> None:
        name = func._schema.name
        if "attention" in name or "attn" in name:
            self.kernels[name] += 1
        if name.endswith("_varlen_attn"):
            self.kernels["own heads"] += tensors[0].shape[1] == tensors[1].shape[1]
        if name == "aten::_to_copy":
            source, target = tensors[0], kwargs.get("device") or tensors[0].device
            direct = kwargs.get("non_blocking", False)
        elif name == "aten::copy_":
            target, source = tensors[0].device, tensors[-1]
            direct = kwargs.get("non_blocking", len(args) > 2 and args[2])
        else:
            return
        target = torch.device(target).type
        if (source.device.type, target) == ("cuda", "cpu"):
            self.down[_place()] += 1
        elif (source.device.type, target) == ("cpu", "cuda") and not (direct and source in PINNED):
            self.waiting[_place()] += 1

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._freed, key)
            self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        size = -(-size // BLOCK) * BLOCK
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        self._replaced[0](storage, size)
        if storage._cdata in self._sizes:
            self._set(storage._cdata, size)
        return storage


def _place() -> str:
    """The two innermost lines of this project, or of transformers, on the stack."""
    ours = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if any(part in frame.filename for part in ("/svg_t2i/", "/autoencoder/", "/transformers/", "/optim/"))
    ]
    return " ".join(ours[-2:])


def on_device(module: torch.nn.Module) -> torch.nn.Module:
    """A module of the CPU with fake tensors of the device in place of its own. Inside the mode."""
    return _replaced(module, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda"))


def _replaced(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """`module._apply`, which does not know fake tensors: new parameters in place of the old."""
    for part in module.modules() if recurse else [module]:
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    new = function(tensor)
                    if isinstance(tensor, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, tensor.requires_grad)
                    table[name] = new
    return module
