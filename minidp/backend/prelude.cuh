// What all kernels of minidp begin with. Types: i64 counts elements. Kernels are templates over T, the type of
// their numbers; `double` arguments are numbers of the host, rounded to T where they are used, as NumPy does.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;

// The elements i of 0 … n − 1 that are this thread's: neighbours take neighbours, so that loads are coalesced.
#define EACH(i, n)                                                                                               \
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (i64)gridDim.x * blockDim.x)

const int WARP = 32;

// Σ of `value` over the threads of a block, in one fixed tree: the same bits in every run. All threads must come,
// and all get it; blockDim.x is a multiple of 32, at most 1024.
template <typename T>
__device__ T block_sum(T value) {
    __shared__ T parts[WARP];
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    __syncthreads();  // parts may still be read from the call before
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    const int warps = blockDim.x / WARP;
    T total = parts[0];
    for (int i = 1; i < warps; i++) total += parts[i];
    return total;
}

// The largest `value` in a block, likewise; NaN wins, as in NumPy.
template <typename T>
__device__ T block_max(T value) {
    __shared__ T parts[WARP];
    for (int step = WARP / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(0xffffffffu, value, step);
        if (other > value || other != other) value = other;
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    const int warps = blockDim.x / WARP;
    T largest = parts[0];
    for (int i = 1; i < warps; i++)
        if (parts[i] > largest || parts[i] != parts[i]) largest = parts[i];
    return largest;
}
