"""The host as a GPU: kernels compute what they should, and what CUDA leaves undefined is refused."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from tests import host_cuda
from tests.device_double import DeviceArray
from tests.host_cuda import CompileError, LaunchError, RawModule

pytestmark = pytest.mark.skipif(host_cuda.available() is not None, reason=str(host_cuda.available()))

CODE = r"""
#include <cuda_fp16.h>
template <class T> __global__ void saxpy(T a, const T* __restrict__ x, T* __restrict__ y, long long n) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    for (; i < n; i += (long long)gridDim.x * blockDim.x) y[i] = a * x[i] + y[i];
}
template <class T> __device__ __forceinline__ T warp_sum(T value) {
    #pragma unroll
    for (int d = 16; d; d /= 2) value += __shfl_down_sync(0xffffffffu, value, d);
    return value;
}
template <class T> __global__ void __launch_bounds__(1024) block_sum(const T* x, T* out, int n) {
    __shared__ T parts[32];
    T sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = warp_sum(threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : T(0));
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
extern "C" __global__ void transpose(const double* x, double* y, int rows, int columns) {
    __shared__ double tile[8][9];
    int row = blockIdx.y * 8 + threadIdx.y, column = blockIdx.x * 8 + threadIdx.x;
    if (row < rows && column < columns) tile[threadIdx.y][threadIdx.x] = x[row * columns + column];
    __syncthreads();
    row = blockIdx.y * 8 + threadIdx.x, column = blockIdx.x * 8 + threadIdx.y;
    if (row < rows && column < columns) y[column * rows + row] = tile[threadIdx.x][threadIdx.y];
}
extern "C" __global__ void to_half(const float* x, __half* y, long long n) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] = __float2half_rn(x[i]);
}
extern "C" __global__ void to_float(const __half* x, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = __half2float(x[i]);
}
extern "C" __global__ void extremes(const int* x, int* least, long long* most, unsigned long long* bits) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicMin(least, x[i]);
    atomicMax(most, x[i]);
    atomicOr(bits, 1ull << (i % 64));
    atomicAdd(bits + 1, 1);
}
extern "C" __global__ void neighbours(const float* x, float* y, bool wait) {
    extern __shared__ float shared[];
    shared[threadIdx.x] = x[threadIdx.x];
    if (wait) __syncthreads();
    y[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}
extern "C" __global__ void divergent(int how) {
    if (how == 0 && threadIdx.x == 0) return;
    if (how == 1 && threadIdx.x < 4) __syncthreads();
    if (how == 2 && threadIdx.x < 4) __syncwarp();
    if (how == 3) __syncwarp(0xf);
    if (how == 4) __trap();
    __syncthreads();
}
extern "C" __global__ void of_warp(unsigned* out) {
    unsigned lane = threadIdx.x % 32, *mine = out + 6 * threadIdx.x;
    mine[0] = __ballot_sync(0xffffffffu, lane % 3 == 0);
    mine[1] = __any_sync(0xffffffffu, threadIdx.x == 40);
    mine[2] = __shfl_xor_sync(0xffffffffu, lane, 5);
    mine[3] = __shfl_sync(0xffffffffu, threadIdx.x, 7);
    mine[4] = __shfl_down_sync(0xffffffffu, lane, 3, 8);
    if (lane < 16) mine[5] = __shfl_xor_sync(0x0000ffffu, threadIdx.x, 1);
    else mine[5] = __all_sync(0xffff0000u, lane > 15);
}
extern "C" __global__ void high(const unsigned long long* a, const unsigned long long* b,
                                unsigned long long* out) {
    out[threadIdx.x] = __umul64hi(a[threadIdx.x], b[threadIdx.x]);
}
extern "C" __global__ void apart(float a, float b, float c, float* out) {
    out[0] = a * b + c;
    out[1] = fmaf(a, b, c);
    out[2] = fmaxf(-0.0f, 0.0f);
    out[3] = fminf(__int_as_float(0x7fffffff), 1.0f);
    out[4] = max(1.0f, isfinite(a) && !isnan(b) ? sqrtf(4.0f) : 0.0f);
}
extern "C" __global__ void overstep(float* x, const float* read, int at) { x[at] = read[0] == read[0]; }
extern "C" __global__ void last_block(int* order) { order[0] = blockIdx.x; order[1] = threadIdx.x; }
extern "C" __global__ void of_all(const void* x, const unsigned char* y, bool z, unsigned char* out) {
    out[0] = static_cast<const unsigned char*>(x)[0] + y[0] + z;
}
"""
NAMES = ["saxpy<float>", "saxpy<double>", "block_sum<float>", "block_sum<long long>"]
module = RawModule(code=CODE, options=("--fmad=false",), name_expressions=NAMES)
random = np.random.default_rng(0)


def launch(name: str, grid: Any, block: Any, *args: Any, shared_mem: int = 0) -> None:
    args = tuple(DeviceArray(a) if isinstance(a, np.ndarray) else a for a in args)
    module.get_function(name)(grid, block, args, shared_mem=shared_mem)


def one(code: str, name: str = "k", options: tuple[str, ...] = ("--fmad=false",)) -> Any:
    return RawModule(code=code, options=options).get_function(name)


@pytest.mark.parametrize(("name", "dtype"), [("saxpy<float>", np.float32), ("saxpy<double>", np.float64)])
@pytest.mark.parametrize("grid", [1, 3, 40])
def test_elementwise(name: str, dtype: Any, grid: int) -> None:
    x, y = random.standard_normal((2, 10_001)).astype(dtype)
    expected = dtype(0.3) * x + y
    launch(name, (grid,), (256,), dtype(0.3), x, y, len(x))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_sum_of_blocks(order: str) -> None:
    for dtype, name in ((np.float32, "block_sum<float>"), (np.int64, "block_sum<long long>")):
        x, out = random.integers(-50, 50, 5000).astype(dtype), np.zeros(7, dtype)
        with host_cuda.order(order):
            launch(name, (7,), (256,), x, out, np.int32(len(x)))
        assert out.sum() == x.sum()


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_two_dimensions(order: str) -> None:
    x, y = random.standard_normal((13, 21)), np.zeros((21, 13))
    with host_cuda.order(order, seed=5):
        launch("transpose", (3, 2), (8, 8), x, y, np.int32(13), np.int32(21))
    np.testing.assert_array_equal(y, x.T)


def test_all_halves_as_floats() -> None:
    halves, floats = np.arange(65536, dtype=np.uint16).view(np.float16), np.zeros(65536, np.float32)
    launch("to_float", (256,), (256,), halves, floats)
    np.testing.assert_array_equal(floats, halves.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(floats)[floats == 0], np.signbit(halves)[floats == 0])


def test_floats_rounded_to_halves() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    ties = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(s)) for s in (-np.inf, np.inf)]
    special = np.array([65504, 65519.996, 65520, 1e9, -1e9, np.inf, -np.inf, np.nan, 1e-8, -1e-30], np.float32)
    some = random.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([halves, ties, *beside, special, some])
    y = np.zeros(len(x), np.float16)
    launch("to_half", (len(x) // 1024 + 1,), (1024,), x, y, len(x))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(y[~nan].view(np.uint16), expected[~nan].view(np.uint16))
    assert set(y[nan].view(np.uint16)) == {0x7FFF}


def test_atomics_and_64_bits() -> None:
    x = random.integers(-(2**31), 2**31, 1024).astype(np.int32)
    least, most, bits = np.zeros(1, np.int32), np.zeros(1, np.int64), np.zeros(2, np.uint64)
    launch("extremes", (4,), (256,), x, least, most, bits)
    assert (least[0], most[0], bits.tolist()) == (x.min(), x.max(), [2**64 - 1, 1024])
    a, b = random.integers(0, 2**64, (2, 64), dtype=np.uint64)
    out = np.zeros(64, np.uint64)
    launch("high", (1,), (64,), a, b, out)
    assert out.tolist() == [int(p) * int(q) >> 64 for p, q in zip(a, b)]


def test_operations_of_a_warp() -> None:
    out = np.zeros((64, 6), np.uint32)
    launch("of_warp", (1,), (64,), out)
    lane = np.arange(64) % 32
    assert set(out[:, 0]) == {sum(1 << i for i in range(0, 32, 3))}
    np.testing.assert_array_equal(out[:, 1], np.arange(64) >= 32)
    np.testing.assert_array_equal(out[:, 2], lane ^ 5)
    np.testing.assert_array_equal(out[:, 3], np.arange(64) // 32 * 32 + 7)
    np.testing.assert_array_equal(out[:, 4], np.where(lane % 8 < 5, lane + 3, lane))
    np.testing.assert_array_equal(out[:, 5], np.where(lane < 16, np.arange(64) ^ 1, 1))
    launch("of_warp", (1,), (56,), out)  # the second warp is not full
    assert out[32, 2] == 5
    assert out[32 + 20, 2] == 17
    assert out[32 + 23, 2] == 18
    assert out[32 + 18, 2] == 23
    assert out[32 + 21, 4] == 21
    assert out[32 + 31 - 8, 3] == 39


def test_no_product_is_fused_with_a_sum() -> None:
    a, c, out = np.float32(1 + 2**-12), np.float32(-1 - 2**-11), np.ones(5, np.float32)
    launch("apart", (1,), (1,), a, a, c, out)
    assert out.tolist() == [0, 2.0**-24, 0, 1, 2]
    assert not np.signbit(out[2])


def test_missing_wait_shows() -> None:
    """Forward, all but the last thread read what nobody wrote yet, which is NaN and not what a block left."""
    x, results = np.arange(64, dtype=np.float32), []
    for wait in (True, False):
        for order in ("forward", "reverse", "shuffle"):
            y = np.zeros_like(x)
            with host_cuda.order(order):
                launch("neighbours", (2,), (64,), x, y, wait, shared_mem=256)
            results.append(y)
    for y in results[:3]:
        np.testing.assert_array_equal(y, np.roll(x, -1))
    assert np.isnan(results[3][:-1]).all()
    assert np.isnan(results[4]).sum() == 1
    assert 1 < np.isnan(results[5]).sum() < 63


def test_dynamic_shared_memory_has_an_end() -> None:
    x = np.zeros(64, np.float32)
    with pytest.raises(LaunchError, match="beyond the 252 bytes of dynamic shared memory"):
        launch("neighbours", (1,), (64,), x, x.copy(), True, shared_mem=252)
    with pytest.raises(LaunchError, match="49153"):
        launch("neighbours", (1,), (64,), x, x.copy(), True, shared_mem=49153)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (0, r"divergent .* threads: 1 ended, 63 waiting in __syncthreads of line \d+$"),
        (1, r"divergent .* threads: 4 waiting in __syncthreads of line \d+, 60 waiting in __syncthreads of line"),
        (2, r"divergent .* threads: 60 waiting in __syncthreads of line \d+, 4 waiting in __syncwarp of line"),
        (3, r"mask that lacks the caller, by thread \(4, 0, 0\) of block \(0, 0, 0\)"),
        (4, r"__trap by thread \(0, 0, 0\)"),
    ],
)
def test_divergence_is_an_error_and_does_not_hang(how: int, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        launch("divergent", (2,), (64,), np.int32(how))
    launch("divergent", (2,), (64,), np.int32(9))  # and the next launch is a fresh one


def test_order_of_blocks_and_threads() -> None:
    ends = set()
    for order, seed in [("forward", 0), ("reverse", 0), ("shuffle", 1), ("shuffle", 2)]:
        out = np.zeros(2, np.int32)
        with host_cuda.order(order, seed):
            launch("last_block", (100,), (50,), out)
        ends.add(tuple(out.tolist()))
    assert len(ends) == 4
    assert {(99, 49), (0, 0)} < ends


@pytest.mark.parametrize(("at", "side"), [(8, "beyond"), (-1, "before")])
def test_writes_outside_are_found(at: int, side: str) -> None:
    x = np.zeros(16, np.float32)[4:12]
    launch("overstep", (1,), (1,), x, x, np.int32(7))
    assert x.tolist() == [0] * 7 + [1]
    with pytest.raises(LaunchError, match=rf"overstep wrote {side} the memory of argument \[0\]"):
        launch("overstep", (1,), (1,), x, np.ones(0, np.float32), np.int32(at))


def test_overlapping_arguments_stay_so() -> None:
    x = np.arange(20, dtype=np.float64)
    launch("saxpy<double>", (1,), (1,), 1.0, x[:10], x[5:15], 5)  # reads what lies before the part it writes
    assert x[5:15].tolist() == [5, 7, 9, 11, 13, 10, 11, 12, 13, 14]


def test_what_fits_is_taken() -> None:
    out = np.zeros(1, np.bool_)
    launch("of_all", (1,), (1,), np.zeros(3), np.ones(2, np.bool_), False, out)
    assert out[0]
    launch("of_all", (1,), (1,), np.zeros(3, np.int16), np.ones(2, np.uint8), np.False_, out)


X, D = np.zeros(4, np.float32), np.zeros(4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((2.0, X, X, 4), r"saxpy<float>, argument 0: float was given float \(float64\)"),
        ((np.float32(2), D, X, 4), r"argument 1: float\* was given an array of float64"),
        ((np.float32(2), X, X, np.int32(4)), r"argument 3: long long was given int32"),
        ((np.float32(2), X, X, True), r"argument 3: long long was given bool \(bool\)"),
        ((np.float32(2), X, X, np.uint64(4)), r"argument 3: long long was given uint64"),
        ((X, X, X, 4), r"argument 0: float was given an array"),
        ((np.float32(2), X, 7, 4), r"argument 2: float\* was given int \(int64\)"),
        ((np.float32(2), X, None, 4), r"argument 2: float\* was given NoneType"),
        ((np.float32(2), X[::2], X, 4), r"argument 1: the array is not contiguous"),
        ((np.float32(2), X, X), r"saxpy<float> wants 4 arguments, not 3"),
    ],
)
def test_what_does_not_fit_is_refused(args: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        launch("saxpy<float>", (1,), (1,), *args)
    with pytest.raises(TypeError, match="was given ndarray"):
        module.get_function("to_float")((1,), (1,), (X, DeviceArray(X)))


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((0,), (1,)),
        ((1,), (0,)),
        ((1,), (1025,)),
        ((1,), (32, 33)),
        ((1, 65536), (1,)),
        ((2**31,), (1,)),
        ((), (1,)),
    ],
)
def test_impossible_launches(grid: Any, block: Any) -> None:
    with pytest.raises(LaunchError, match="no launch has a grid of"):
        launch("last_block", grid, block, np.zeros(2, np.int32))


def test_options_and_names() -> None:
    with pytest.raises(AssertionError, match="bits would differ"):
        RawModule(code="")
    with pytest.raises(AssertionError, match="no meaning on the host: --use_fast_math"):
        RawModule(code="", options=("--fmad=false", "--use_fast_math"))
    with pytest.raises(KeyError, match="neither a name expression nor"):
        module.get_function("saxpy<int>")
    out = DeviceArray(np.zeros(1, np.int32))
    one('extern "C" __global__ void k(int* x) { *x = N; }', options=("-DN=5", "--fmad=false"))((1,), (1,), (out,))
    assert out.item() == 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("\n  *x = undeclared;", r"kernel.cu:2:.*undeclared"),
        ("*x = std::max(1, 2);", 'poisoned "std"'),
        ("*x = uint8_t(1);", 'poisoned "uint8_t"'),
        ("*x = INFINITY;", "INFINITY"),
        ("long long y = 0; atomicAdd(&y, 1);", "CUDA has no atomicAdd for this type"),
        ("*x = __half(1.0f);", "__half"),  # without its header
        ("}\n#include <math.h>\nvoid g() {", "NVRTC has no <math.h>"),
    ],
)
def test_compile_errors_are_told(body: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        one('extern "C" __global__ void k(int* x) { ' + body + " }")


def test_a_half_has_no_arithmetic() -> None:
    code = '#include <cuda_fp16.h>\nextern "C" __global__ void k(__half* x) { *x = *x + *x; }'
    with pytest.raises(CompileError, match="deleted function"):
        one(code)


def test_compiled_code_is_kept_and_folder_is_private(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(host_cuda.tempfile, "gettempdir", lambda: str(tmp_path))
    code = 'extern "C" __global__ void k() {}'
    one(code)((1,), (1,), ())
    folder = host_cuda.cache_folder()
    files = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    one(code)
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == files
    assert len(files) == 2
    folder.chmod(0o755)
    with pytest.raises(PermissionError):
        one(code)


def test_the_interpreter_stays_locked() -> None:
    """All state of the fibers is the library's: two launches at once would ruin each other."""
    assert isinstance(module.get_function("saxpy<float>").library, ctypes.PyDLL)
