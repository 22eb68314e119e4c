// Dropout by the draws of NumPy's default generator, PCG64 (O'Neill 2014; XSL RR 128/64), each where it is used.
//
// Its state s is a number of 128 bits that goes s ← s·m + c. k such steps are one of the same form, so a thread
// finds its place in the stream in log k steps (Brown 1994), and goes on in strides as wide as there are threads.

struct u128 {
    u64 high, low;
};

__device__ u128 operator+(u128 a, u128 b) {
    const u64 low = a.low + b.low;
    return {a.high + b.high + (low < a.low), low};
}

__device__ u128 operator*(u128 a, u128 b) {
    return {__umul64hi(a.low, b.low) + a.high * b.low + a.low * b.high, a.low * b.low};
}

struct Step {
    u128 factor, shift;
    __device__ u128 of(u128 state) const { return state * factor + shift; }
    __device__ Step then(Step next) const { return {factor * next.factor, next.of(shift)}; }
};

__device__ Step repeated(Step step, u64 times) {
    Step all = {{0, 1}, {0, 0}};
    for (; times; times >>= 1) {
        if (times & 1) all = all.then(step);
        step = step.then(step);
    }
    return all;
}

__device__ u64 output(u128 state) {
    const u64 mixed = state.high ^ state.low;
    const int turn = state.high >> 58;
    return mixed >> turn | mixed << (-turn & 63);
}

// A float32 in [0, 1): 24 bits, of which an output gives two, its low half first.
__device__ float draw(u32 half) { return (half >> 8) * (1.0f / 16777216.0f); }

// out = x · mask, mask = `scale` where the draw is ≥ p, else 0; drawn anew for backward, which is cheaper than
// keeping it. n elements; grid and block as one likes: element i has draw i.
template <typename T>
__global__ void dropout(i64 n, const T* x, T* out, double p, double scale, i64 state_high, i64 state_low,
                        i64 c_high, i64 c_low) {
    const i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x, threads = (i64)gridDim.x * blockDim.x;
    const Step one = {{0x2360ED051FC65DA4ull, 0x4385DF649FCCF645ull}, {(u64)c_high, (u64)c_low}};
    const Step stride = repeated(one, threads);
    u128 state = repeated(one, thread + 1).of({(u64)state_high, (u64)state_low});
    const float least = (float)p;
    for (i64 i = 2 * thread; i < n; i += 2 * threads) {
        const u64 both = output(state);
        out[i] = x[i] * (draw((u32)both) >= least ? (T)scale : (T)0);
        if (i + 1 < n) out[i + 1] = x[i + 1] * (draw((u32)(both >> 32)) >= least ? (T)scale : (T)0);
        state = stride.of(state);
    }
}
