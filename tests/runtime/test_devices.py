import warnings
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from itarflow.runtime import devices
from itarflow.runtime.devices import (
    asked_dtype,
    check_own_gpu,
    in_batches,
    is_out_of_memory,
    on_cpu,
    sampling_dtype,
    tf32_products,
    usable_device,
    usable_memory,
)
from itarflow.runtime.recording import Recordings

GIB = 2**30
NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
"""Whether torch has the settings of version 2.9."""


def limited(limit, message="CUDA out of memory."):
    """make(part) for at most so many, and the sizes that were tried."""
    tried = []

    def make(part):
        size = part.stop - part.start
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError(message)
        return list(range(part.start, part.stop))

    return make, tried


@pytest.mark.parametrize(("count", "limit"), [(1, 1), (7, 3), (8, 100), (20, 3), (20, 1)])
@pytest.mark.filterwarnings("ignore:making")
def test_everything_is_made_once_and_in_order(count, limit):
    make, tried = limited(limit)
    parts, size = in_batches(make, count, 8, "making", "batch_size")
    assert [index for part in parts for index in part] == list(range(count))
    assert size == max(len(part) for part in parts) <= limit
    assert sum(tried) - sum(map(len, parts)) == sum(size for size in tried if size > limit)


def test_a_short_last_part_is_halved_itself():
    limits, tried = iter([8]), []  # the first fits, then there is less room

    def shrinking(part):
        tried.append(part.stop - part.start)
        return limited(next(limits, 4))[0](part)

    with pytest.warns(UserWarning, match="making 6 images .*3"):
        parts, _ = in_batches(shrinking, 14, 8, "making", "batch_size")
    assert [index for part in parts for index in part] == list(range(14))
    assert tried == [8, 6, 3, 3]


def test_each_halving_is_said():
    make, tried = limited(2)
    with pytest.warns(UserWarning, match="making") as said:
        in_batches(make, 16, 8, "making", "batch_size")
    assert tried == [8, 4, *8 * [2]]
    assert [str(warning.message).split(";")[0] for warning in said] == [
        f"making {size} images at a time does not fit the memory" for size in (8, 4)
    ]
    assert "batch_size" in str(said[0].message)


def test_nothing_is_said_where_all_fits_and_none_asks_for_an_empty_part():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_batches(*limited(8)[:1], 8, 8, "making", "batch_size") == ([list(range(8))], 8)
        assert in_batches(*limited(8)[:1], 0, 8, "making", "batch_size") == ([[]], 1)


@pytest.mark.filterwarnings("ignore:making")
def test_what_halving_does_not_help_is_raised():
    with pytest.raises(torch.OutOfMemoryError):
        in_batches(*limited(0)[:1], 4, 4, "making", "batch_size")

    def wrong(part):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches(wrong, 4, 4, "making", "batch_size")


# -- memory -----------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."),
    "kernels and graphs": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously ..."),
    "driver": RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuDNN frontend": RuntimeError("GPU ran out of memory outside PyTorch's allocator"),
    "cuDNN, as Accelerate knows it": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may ..."),
    "NCCL": RuntimeError("NCCL error ...: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    "CPU on Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "Python": MemoryError(),
    "C++": RuntimeError("std::bad_alloc"),
    "system": OSError(12, "Cannot allocate memory"),
}


@pytest.mark.parametrize("form", OUT_OF_MEMORY)
def test_every_form_of_out_of_memory_is_recognised(form):
    assert is_out_of_memory(OUT_OF_MEMORY[form])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("It is possible that dataloader's workers are out of shared memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        ValueError("the memory ran out of memory"),
        OSError(28, "No space left on device"),
        KeyboardInterrupt("out of memory"),
    ],
)
def test_other_errors_are_no_lack_of_memory(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("form", [form for form in OUT_OF_MEMORY if form != "system"])
def test_every_form_halves(form):
    tried = []

    def make(part):
        tried.append(part.stop - part.start)
        if tried[-1] > 4:
            raise OUT_OF_MEMORY[form]
        return list(range(part.start, part.stop))

    with pytest.warns(UserWarning, match="making 8 images"):
        parts, size = in_batches(make, 8, 8, "making", "batch_size")
    assert ([index for part in parts for index in part], size, tried) == (list(range(8)), 4, [8, 4, 4])


@pytest.mark.parametrize(("count", "held"), [(4, 4), (1, 4), (4, 5)])
def test_recordings_are_given_back_before_fewer_are_tried(count, held):
    """`held` entries take the room of as many images of 8."""
    recordings, tried = Recordings(), []
    with recordings.turn(torch.device("cpu")):
        for key in range(held):
            recordings.get(key, object)

    def make(part):
        tried.append((part.stop - part.start, len(recordings)))
        if len(recordings) + part.stop - part.start > 4:
            raise torch.OutOfMemoryError
        return part

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_batches(make, count, count, "making", "batch_size")
    assert tried == [(count, held), (count, 0)]


@pytest.mark.filterwarnings("ignore:making")
def test_what_is_recorded_anew_each_time_ends_in_halving():
    recordings, tried = Recordings(), []

    def make(part):
        with recordings.turn(torch.device("cpu")):
            recordings.get(0, object)
        tried.append(part.stop - part.start)
        if tried[-1] > 1:
            raise torch.OutOfMemoryError
        return part

    in_batches(make, 4, 4, "making", "batch_size")
    assert tried == [4, 4, 2, 2, 1, 1, 1, 1]


def test_free_memory_counts_and_not_that_of_the_whole_gpu(monkeypatch):
    """As of a slice of a GPU, or beside other programs."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    assert usable_memory(torch.device("cuda", 0)) == 6 * GIB
    assert usable_memory(torch.device("mps")) is None
    assert usable_memory(torch.device("cpu")) > 0


# -- precision --------------------------------------------------------------------------------------------------


def precisions():
    """All settings, as torch's getters give them; None = it raises, because the two interfaces disagree."""
    backends = torch.backends
    getters = [torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32]
    if NEW:
        operations = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
        getters += [lambda one=one: one.fp32_precision for one in (backends, backends.cudnn, *operations)]
    found = []
    for getter in getters:
        try:
            found.append(getter())
        except RuntimeError:
            found.append(None)
    return found


SETTINGS = {
    "as torch starts": lambda: None,
    "old: high": lambda: torch.set_float32_matmul_precision("high"),
    "old: medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old: no convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "new: products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "new: no convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "new: CUDA": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "new: all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture
def setting(request):
    """A setting of the user's, undone afterwards."""
    if request.param.startswith("new") and not NEW:
        pytest.skip("torch < 2.9 has no such interface")
    SETTINGS[request.param]()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    if NEW:
        torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("setting", SETTINGS, indirect=True)
@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.filterwarnings("error")
def test_tf32_is_set_inside_alone_however_it_was_set_before(setting, allowed):
    before = precisions()
    with tf32_products(allowed):
        with tf32_products(False):
            assert_tf32(False)
        assert_tf32(allowed)
    assert precisions() == before
    with pytest.raises(ZeroDivisionError):  # it is restored after an error, too
        tf32_products(allowed)(divmod)(1, 0)
    assert precisions() == before
    tf32_products()(lambda: assert_tf32(True))()
    assert precisions() == before


def assert_tf32(allowed):
    # Also by the old getters, which torch.compile calls.
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    if NEW:
        for operation in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            assert (operation.fp32_precision == "tf32") == allowed


@pytest.mark.parametrize("setting", [name for name in SETTINGS if not name.startswith("new")], indirect=True)
def test_torch_before_2_9_has_the_old_settings_alone(setting, monkeypatch):
    before = precisions()[:2]
    monkeypatch.setattr(devices, "_operations", tuple)
    with tf32_products():
        assert_tf32(True)
        with tf32_products(False):
            assert_tf32(False)
    assert precisions()[:2] == before


@pytest.mark.skipif(not NEW, reason="torch < 2.9 has no such interface")
@pytest.mark.parametrize("setting", ["new: all"], indirect=True)
def test_what_followed_a_general_setting_still_does(setting):
    with tf32_products(False):
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    ("device", "capability", "weights", "expected"),
    [
        ("cuda:0", (9, 0), torch.float32, torch.bfloat16),
        ("cuda:1", (8, 0), torch.float32, torch.bfloat16),
        ("cuda", (7, 5), torch.float32, None),
        ("cuda", (9, 0), torch.float64, None),
        ("cuda", (9, 0), torch.float16, None),
        ("cpu", None, torch.float32, None),
        ("mps", None, torch.float32, None),
    ],
)
def test_sampling_is_in_bf16_on_gpus_that_have_it(monkeypatch, device, capability, weights, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sampling_dtype(torch.device(device), weights) == expected


# -- devices that can't be used ---------------------------------------------------------------------------------


def gpus(monkeypatch, count, error=None, visible=None):
    """As if torch were built for CUDA and saw so many GPUs, on which computing fails."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def zeros(*_, device):
        if error is not None:
            raise error
        return torch.ones(1)

    monkeypatch.setattr(torch, "zeros", zeros)


NONE_SEEN = RuntimeError("No CUDA GPUs are available")
NO_DRIVER = RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and ...")
OLD_DRIVER = RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU")
NO_KERNELS = RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")
ORDINAL = RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    gpus(monkeypatch, 2)
    assert usable_device(None) == "cuda"
    assert usable_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("count", "error", "visible", "said"),
    [
        (0, NONE_SEEN, "7", r"No CUDA GPUs are available \(there is no GPU; CUDA_VISIBLE_DEVICES is '7'\)"),
        (0, OLD_DRIVER, None, r"too old \(found version 11040\)"),
        (1, NO_KERNELS, None, r"no kernel image is available .*there is 1 GPU, cuda:0"),
    ],
)
def test_the_cpu_computes_where_no_gpu_can_and_it_is_said(monkeypatch, count, error, visible, said):
    gpus(monkeypatch, count, error, visible)
    with pytest.warns(UserWarning, match=f"no GPU can be used, so the CPU computes: .*{said}"):
        assert usable_device(None) == "cpu"


def test_trainings_say_why_the_cpu_computes(monkeypatch):
    gpus(monkeypatch, 0, OLD_DRIVER)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.warns(UserWarning, match=r"so the CPU computes: The NVIDIA driver on your system is too old"):
        assert on_cpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert on_cpu()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("error", "visible"), [(NO_DRIVER, None), (NONE_SEEN, ""), (NONE_SEEN, "-1")])
def test_nothing_is_said_where_no_gpu_is_wanted(monkeypatch, error, visible):
    gpus(monkeypatch, 0, error, visible)
    assert usable_device(None) == "cpu"


@pytest.mark.parametrize(
    ("name", "count", "error", "visible", "said"),
    [
        ("cuda:3", 2, ORDINAL, "0,1", r"invalid device ordinal \(there are 2 GPUs, cuda:0 to cuda:1; CUDA_VIS.*'0,1'"),
        ("cuda", 0, NONE_SEEN, "7", r"No CUDA GPUs .*CUDA_VISIBLE_DEVICES is '7'\)\. Try cpu"),
        ("cuda", 0, OLD_DRIVER, None, "too old"),
        ("cuda:1", 1, ORDINAL, "MIG-6b8a", r"there is 1 GPU, cuda:0; CUDA_VISIBLE_DEVICES is 'MIG-6b8a'"),
        (None, 1, FULL, None, r"the GPU can't be used: CUDA out of memory.*nvidia-smi"),
    ],
)
def test_what_was_asked_for_is_refused_in_words(monkeypatch, name, count, error, visible, said):
    gpus(monkeypatch, count, error, visible)
    with pytest.raises(ValueError, match=said):
        usable_device(name)


class Process(NamedTuple):
    process_index: int
    device: torch.device


def test_a_gpu_that_fails_is_refused_before_work(monkeypatch):
    gpus(monkeypatch, 1, NO_KERNELS)
    with pytest.raises(ValueError, match=r"the GPU can't be used: CUDA error: no kernel image .*ACCELERATE_USE_CPU"):
        check_own_gpu(Process(0, torch.device("cuda", 0)))


def test_processes_that_share_a_gpu_are_refused(monkeypatch):
    store = dist.HashStore()
    gpus(monkeypatch, 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "cuda:nccl,cpu:gloo")
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device}"))
    first, other, shared = (Process(index, torch.device("cuda", index % 2)) for index in range(3))
    for _ in range(2):  # more than one part of a command may ask
        check_own_gpu(first)
        check_own_gpu(other)
    with pytest.raises(ValueError, match=r"processes 0 and 2 would share one GPU, NVIDIA L4.*2 here"):
        check_own_gpu(shared)
    check_own_gpu(Process(3, torch.device("cpu")))
    with monkeypatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda: "gloo")  # which can share one
        check_own_gpu(shared)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    check_own_gpu(shared)


def test_exact_and_half_precision_don_t_go_together():
    assert asked_dtype(None, exact=True) == asked_dtype("float32", exact=True) == torch.float32
    assert (asked_dtype(None), asked_dtype("bf16")) == (None, torch.bfloat16)
    with pytest.raises(ValueError, match="--exact inverts in float32, but --inverse-dtype is bf16"):
        asked_dtype("bf16", exact=True)
