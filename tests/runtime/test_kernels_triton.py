"""The Triton kernels: interpreted, they give what PyTorch's functions give; what is wrong or slow is left out."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from itarflow.inverse.decoding import PackedLayer, Window, run_layers
from itarflow.runtime.kernels import (
    Rotation,
    decode_attention,
    has_decode_attention,
    pack,
    proof,
    rotated,
    rotation_of,
    thin,
)
from itarflow.runtime.kernels import cpu as cpu_kernels
from itarflow.runtime.kernels.norm import layer_norm
from itarflow.runtime.kernels.packed import Norm, PackedLinear
from itarflow.runtime.kernels.thin import MOST_ROWS, has_thin_product, thin_product

pytest.importorskip("triton")
from triton_interpreter import interpreted, relative

NEAR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "PLAIN", False)
    monkeypatch.setattr(thin, "_LEAST", 1)
    with interpreted() as module:
        yield module
        monkeypatch.undo()  # what a test has changed on top of it


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


# -- attention to a cache ---------------------------------------------------------------------------------------


def decode_case(rows, heads, tokens, width, dtype, position, tempered=False, rotary=False):
    """A part of the cache of three layers, never written from the position on, and what the kernel makes of it."""
    generator = torch.Generator().manual_seed(0)
    layers = torch.randn(3, 2, rows, heads, tokens, width, generator=generator).to(dtype)
    layers[..., position:, :] = torch.nan
    qkv = torch.randn(rows, 1, 3 * heads * width, generator=generator).to(dtype)
    temperature = torch.rand(rows, generator=generator) + 0.5 if tempered else None
    rotation = rotation_of(torch.rand(1, width // 2, generator=generator) * 32) if rotary else None
    expected = layers.clone()
    q, k, v = qkv.view(rows, 3, heads, width).transpose(0, 1)
    found = decode_attention(qkv, layers[1], torch.tensor([position]), temperature, rotation)
    if rotary:  # to its own rounding
        q, k = (rotated(given[:, :, None].double(), rotation)[:, :, 0] for given in (q, k))
        torch.testing.assert_close(layers[1, 0, :, :, position].double(), k, rtol=NEAR[dtype], atol=NEAR[dtype])
        k = layers[1, 0, :, :, position]
    expected[1, 0, :, :, position], expected[1, 1, :, :, position] = k, v
    assert found.shape == (rows, 1, heads * width)
    assert found.dtype == dtype
    q = q.double() if temperature is None else q.double() / temperature.double()[:, None, None]
    exact = F.scaled_dot_product_attention(q[:, :, None], *expected[1, ..., : position + 1, :].double())
    return found, exact.transpose(1, 2).reshape(found.shape), layers, expected


@pytest.mark.parametrize("position", [0, 1, 63, 64, 65, 256, 299])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_a_token_attends_to_all_before_it_and_is_appended(kernels, dtype, position):
    found, exact, layers, expected = decode_case(2, 1, 300, 64, dtype, position)
    assert relative(found, exact) < NEAR[dtype]
    assert torch.equal(layers.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("rows", [1, 3, 9])  # split over four programs, two, and none
@pytest.mark.parametrize(("heads", "width"), [(1, 8), (2, 32), (1, 128)])
def test_other_shapes_and_temperatures(kernels, rows, heads, width):
    for position in (0, 77, 259):
        found, exact, layers, expected = decode_case(rows, heads, 260, width, torch.float32, position, tempered=True)
        assert relative(found, exact) < 1e-6
        assert torch.equal(layers.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("position", [0, 65, 299])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_queries_and_keys_are_rotated_on_the_way(kernels, dtype, position):
    found, exact, layers, expected = decode_case(2, 2, 300, 32, dtype, position, tempered=True, rotary=True)
    assert relative(found, exact) < NEAR[dtype]
    assert torch.equal(layers.view(torch.uint8), expected.view(torch.uint8))


def test_rotation_has_a_proof_of_its_own(kernels, monkeypatch):
    own = kernels.decode_attention

    def other_way(qkv, cache, position, temperature, pairs, splits):
        return own(qkv, cache, position, temperature, None if pairs is None else -pairs, splits)

    monkeypatch.setattr(kernels, "decode_attention", other_way)
    cache = torch.zeros(2, 2, 1, 70, 16)
    assert has_decode_attention(cache)
    with pytest.warns(UserWarning, match="with the key of the token at position 69 of 70 a number is off"):
        assert not has_decode_attention(cache, rotary=True)
    monkeypatch.setattr(kernels, "decode_attention", own)
    proof._VERDICTS.clear()
    assert has_decode_attention(cache, rotary=True)


def test_how_the_keys_are_split():
    from itarflow.runtime.kernels.decode import _splits

    device = torch.device("cpu")  # stands for 132 multiprocessors
    assert [_splits(pairs, 1024, device) for pairs in (1, 40, 66, 132, 133, 5000)] == [4, 4, 4, 2, 1, 1]
    assert [_splits(1, tokens, device) for tokens in (1, 256, 257, 4096)] == [1, 1, 2, 16]


def test_all_positions_of_a_recording_take_one_kernel():
    """They lie 8 bytes apart, and Triton would tell those at 16 bytes from the others, in the midst of a recording."""
    kernel = proof.triton_kernels()._decode
    (position,) = (parameter for parameter in kernel.params if parameter.name == "position")
    assert position.do_not_specialize


def test_the_same_input_gives_the_same_bits(kernels):
    first, _, _, _ = decode_case(2, 2, 300, 64, torch.bfloat16, 280)
    again, _, _, _ = decode_case(2, 2, 300, 64, torch.bfloat16, 280)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(2, 1, 2, 16, 24),
        torch.zeros(2, 1, 2, 16, 4),
        torch.zeros(2, 1, 2, 16, 64, dtype=torch.float64),
        torch.zeros(2, 1, 2, 64, 16).transpose(3, 4),
        torch.zeros(2, 0, 2, 16, 64),
    ],
    ids=["width 24", "width 4", "float64", "other order", "no rows"],
)
def test_caches_that_the_kernel_does_not_know_are_left_to_pytorch(kernels, cache):
    assert not has_decode_attention(cache)


# -- thin products ----------------------------------------------------------------------------------------------


def thin_case(rows, inputs, outputs, dtype, normed, gelu, added):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weight, bias = (normal(outputs, inputs) * inputs**-0.5).to(dtype), normal(outputs).to(dtype)
    x = normal(rows, inputs) * 2 + 5 if normed else normal(rows, inputs).to(dtype)
    norm = (1 + normal(inputs), normal(inputs), 1e-5) if normed else None
    residual = normal(rows, outputs) if added else None
    wide = F.layer_norm(x.double(), (inputs,), norm[0].double(), norm[1].double(), 1e-5) if normed else x.double()
    exact = F.linear(wide, weight.double(), bias.double())
    exact = F.gelu(exact) if gelu else exact
    return (x, weight, bias, norm, gelu, residual), exact if residual is None else exact + residual.double()


@pytest.mark.parametrize(
    ("normed", "gelu", "added"), [(True, False, False), (True, True, False), (False, False, True)]
)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_norm_product_gelu_and_residual(kernels, rows, dtype, normed, gelu, added):
    given, exact = thin_case(rows, 304, 40, dtype, normed, gelu, added)
    found = thin_product(*given)
    assert found.dtype == (torch.float32 if added else dtype)
    assert relative(found, exact) < NEAR[dtype]


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 3), (528, 16), (80, 70)])
def test_other_sizes(kernels, monkeypatch, inputs, outputs):
    monkeypatch.setattr(kernels, "_MANY", 64)
    given, exact = thin_case(2, inputs, outputs, torch.float32, normed=True, gelu=False, added=False)
    assert relative(thin_product(*given), exact) < 2e-6


def test_a_row_does_not_depend_on_the_others(kernels):
    given, _ = thin_case(16, 80, 40, torch.bfloat16, normed=True, gelu=True, added=False)
    x, *rest = given
    together = thin_product(*given)
    assert torch.equal(thin_product(x[3:4], *rest), together[3:4])
    assert torch.equal(thin_product(x[None, :, None], *rest)[0, :, 0], together)


def test_packed_layers_take_the_kernel_where_it_is(kernels, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "ONEDNN", False)
    taken = []
    monkeypatch.setattr(
        kernels, "thin_product", lambda *given, own=kernels.thin_product: taken.append(1) or own(*given)
    )
    layer, norm = torch.nn.Linear(64, 32), torch.nn.LayerNorm(64).requires_grad_(False)
    x, residual = torch.randn(2, 1, 64), torch.randn(2, 1, 32)
    whole, bare = pack(layer, torch.float32, norm, torch.nn.GELU()), pack(layer, torch.float32)
    with torch.no_grad():
        whole(x), bare.plus(x, residual)  # proven, and so called many times
        taken.clear()
        expected = F.linear(x, bare.weight, bare.bias)
        torch.testing.assert_close(whole(x), F.gelu(F.linear(norm(x), bare.weight, bare.bias)))
        torch.testing.assert_close(bare.plus(x, residual), residual + expected)
        assert len(taken) == 2
        bare(torch.randn(MOST_ROWS + 1, 64))
        pack(layer, torch.float32, activation=torch.nn.SiLU())(x)
    assert not has_thin_product(x, bare.weight, False, False, residual[:1])  # which would be broadcast
    bare(x.requires_grad_()).sum().backward()
    assert len(taken) == 2
    assert x.grad is not None


@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 48), (torch.float16, 130)], ids=str)
def test_a_norm_and_the_cast_after_it(kernels, dtype, channels):
    x, norm = torch.randn(3, 2, channels) + 30, torch.nn.LayerNorm(channels).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    with Operators() as seen:
        found = layer_norm(x, norm.weight, norm.bias, norm.eps, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, norm(x).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    assert "itarflow.layer_norm.default" in seen.names
    with Operators() as seen:
        assert torch.equal(layer_norm(x, norm.weight, norm.bias, norm.eps, torch.float32), norm(x))
    assert "itarflow.layer_norm.default" not in seen.names


# -- proof ------------------------------------------------------------------------------------------------------


def has_it():
    return has_thin_product(torch.zeros(2, 64), torch.zeros(48, 64), False, False, None)


def spoil(kernels, monkeypatch, change):
    own = kernels.thin_product
    monkeypatch.setattr(kernels, "thin_product", lambda *given: change(own(*given)))


def fail(_):
    raise RuntimeError("Failed to find C compiler.\nPlease specify one")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found + 1e-3, "off by 0.00"),
        (lambda found: torch.where(torch.arange(48) == 7, torch.nan, found), "off by nan"),
        (fail, r"it can't be built or run \(RuntimeError: Failed to find C compiler.\)"),
    ],
    ids=["deviates", "NaN", "fails"],
)
def test_a_kernel_that_is_wrong_is_left_out_and_said_once(kernels, monkeypatch, change, reason):
    spoil(kernels, monkeypatch, change)
    with pytest.warns(UserWarning, match=f"kernel of thin products is not used: .*{reason}.*torch.*triton") as caught:
        found = [has_it(), has_it()]
    assert found == [False, False]
    assert len(caught) == 1


def test_a_decode_kernel_that_writes_elsewhere_is_left_out(kernels, monkeypatch):
    own = kernels.decode_attention

    def careless(qkv, cache, *rest):
        out = own(qkv, cache, *rest)
        cache[0, 0, 0, -1, 0] = 7
        return out

    cache = torch.zeros(2, 2, 1, 70, 16)
    assert has_decode_attention(cache)
    proof._VERDICTS.clear()
    monkeypatch.setattr(kernels, "decode_attention", careless)
    with pytest.warns(UserWarning, match="in the cache a number is off"):
        assert not has_decode_attention(cache)


@pytest.mark.filterwarnings("error")
def test_a_slower_kernel_is_left_out_in_silence_and_memory_that_ran_out_is_told(kernels, monkeypatch):
    times = iter([2.0, 1.0, 1.1, 1.0])
    monkeypatch.setattr(proof, "_milliseconds", lambda call: next(times))
    assert not has_it()
    proof._VERDICTS.clear()
    assert has_it()  # chance does not choose between equals
    proof._VERDICTS.clear()

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    spoil(kernels, monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):  # memory may be given back, and the question asked again
        has_it()
    assert not proof._VERDICTS


def test_the_time_of_a_call_is_the_median_of_the_device(monkeypatch):
    # The first turn warms up, and of the second the pause was too short.
    pauses, calls, events = [], [], iter([900, 7, 5, 600, 3, 4])
    too_short = iter([False, True, *[False] * 5])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")

        def query(self):
            return next(too_short)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 20.0 * next(events)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", pauses.append, raising=False)
    assert proof._milliseconds(calls.append) == 5
    assert calls == ["event", *range(20), "event"] * 7
    assert [pause // pauses[0] for pause in pauses] == [1, 1, 2, 2, 2, 2, 2]


def test_it_is_tried_once_by_all_threads(kernels, monkeypatch):
    tried = []
    monkeypatch.setattr(proof, "_milliseconds", lambda call: tried.append(1) or 1.0)
    threads = [threading.Thread(target=has_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tried) == 2  # the kernel and PyTorch's functions
    assert has_it()


@pytest.mark.filterwarnings("error")
def test_nothing_is_tried_where_it_can_not_be(kernels, monkeypatch):
    with FakeTensorMode():
        assert not has_it()
    for place, name, answer in ((torch.compiler, "is_compiling", True), (proof, "_has_triton", False)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda answer=answer: answer)
            assert not has_it()
    assert proof._VERDICTS == {}
    assert has_it()
    with FakeTensorMode():  # what is proven stays so
        assert has_it()


@pytest.mark.filterwarnings("error")
def test_the_environment_turns_them_off(kernels, monkeypatch):
    assert has_it()
    monkeypatch.setattr(cpu_kernels, "PLAIN", True)
    assert not has_it()


def test_an_old_gpu_is_said_once(monkeypatch):
    class Properties:
        name, major, minor = "Tesla T4", 7, 5

    monkeypatch.setattr(cpu_kernels, "PLAIN", False)
    monkeypatch.setattr(proof, "_WARNED", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    with pytest.warns(UserWarning, match=r"Tesla T4 is older than this package's kernels \(.* 7\.5") as caught:
        found = [proof.is_proven("a kernel", torch.device("cuda"), (torch.float32,), lambda: None) for _ in range(2)]
    assert found == [False, False]
    assert len(caught) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not proof._can_try(torch.device("cuda"))


# -- as operators -----------------------------------------------------------------------------------------------


def test_modes_see_one_operator_and_its_shapes():
    with FakeTensorMode(), Operators() as seen:
        cache = torch.empty(2, 6, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
        qkv = torch.empty(6, 1, 768, device="cuda", dtype=torch.bfloat16)
        seen.names.clear()
        out = decode_attention(qkv, cache, torch.empty(1, device="cuda", dtype=torch.int64))
        x, weight = torch.empty(6, 1, 256, device="cuda"), torch.empty(768, 256, device="cuda", dtype=torch.bfloat16)
        bias, norm = torch.empty(768, device="cuda", dtype=torch.bfloat16), torch.empty(256, device="cuda")
        product = thin_product(x, weight, bias, (norm, norm, 1e-5))
    assert (out.shape, out.dtype) == ((6, 1, 256), torch.bfloat16)
    assert (product.shape, product.dtype, product.device.type) == ((6, 1, 768), torch.bfloat16, "cuda")
    assert [name for name in seen.names if "itarflow" in name] == [
        "itarflow.decode_attention.default",
        "itarflow.thin_product.default",
    ]


VIEWS = {
    "aten.view",
    "aten.t",
    "aten._unsafe_view",
    "aten.reshape",
    "aten.detach",
    "aten.unbind",
    "aten.select",
    "aten.alias",
}


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("rows", "launches"), [(2, 5), (128, 10)])
def test_a_layer_of_the_inverse_is_five_launches_and_of_many_rows_ten(monkeypatch, rows, launches, rotary):
    """Of many rows: two norms, four products, attention, GELU and two sums. A rotation is none more."""

    class Proven(dict):
        def get(self, key, default=None):
            return True

    monkeypatch.setattr(cpu_kernels, "PLAIN", False)
    monkeypatch.setattr(proof, "_VERDICTS", Proven())
    with FakeTensorMode(), torch.device("cuda"):
        norm, half = Norm(torch.empty(512), torch.empty(512), 1e-5), {"dtype": torch.bfloat16}
        layer = PackedLayer(
            *(
                PackedLinear(torch.empty(outputs, inputs, **half), torch.empty(outputs, **half), before, after, False)
                for outputs, inputs, before, after in (
                    (1536, 512, norm, None),
                    (512, 512, None, None),
                    (2048, 512, norm, torch.nn.GELU()),
                    (512, 2048, None, None),
                )
            )
        )
        cache = torch.empty(1, 2, rows, 8, 64, 64, dtype=torch.bfloat16)
        window = Window(torch.empty(1, dtype=torch.int64), 64, None, False)
        x = torch.empty(rows, 1, 512)
        rotation = Rotation(torch.empty(1, 64)) if rotary else None
        with torch.no_grad(), Operators() as seen:
            out = run_layers((layer,), x, cache, window, None, rotation)
    assert (out.shape, out.dtype) == (x.shape, torch.float32)
    names = [name for name in seen.names if name.rsplit(".", 1)[0] not in VIEWS and not name.startswith("prim.")]
    assert len(names) == launches, names


@pytest.mark.slow
def test_all_kernels_can_be_compiled_for_gpus_that_are_not_here():
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
