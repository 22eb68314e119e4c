// Sums over ranks, and a look at what came of them.

// out = (p0 + p1 + … ) / divisor, from left to right: `count` parts, at most 8, in one pass over all of them.
// out may be any of the parts: each thread has read an element of all before it writes it.
template <typename T>
__global__ void sum_in_order(i64 n, T* out, i64 count, double divisor, const T* p0, const T* p1, const T* p2,
                             const T* p3, const T* p4, const T* p5, const T* p6, const T* p7) {
    const T* const parts[8] = {p0, p1, p2, p3, p4, p5, p6, p7};
    EACH(i, n) {
        T total = p0[i];
#pragma unroll
        for (int part = 1; part < 8; part++)
            if (part < count) total += parts[part][i];
        out[i] = divisor == 1 ? total : total / (T)divisor;
    }
}

// If a sum is NaN or infinite: *found = the smallest code of such an element, unless a smaller one is there. A code
// is (offset + i) · 4096 + rank · 4 + kind: rank `first` + k if part k is the first that is not finite either, 1023
// if none of the `count` is; kind 1 for NaN, 2 for ∞, 3 for −∞, of the part, or of the sum if no part has it.
// The only atomic in the house: the smallest of some numbers is the same in whatever order they come.
template <typename T>
__global__ void look(i64 n, const T* sum, i64 offset, i64* found, i64 first, i64 count, const T* p0, const T* p1,
                     const T* p2, const T* p3, const T* p4, const T* p5, const T* p6, const T* p7) {
    const T* const parts[8] = {p0, p1, p2, p3, p4, p5, p6, p7};
    EACH(i, n) {
        if (isfinite(sum[i])) continue;
        T value = sum[i];
        i64 rank = 1023;
        for (i64 part = count - 1; part >= 0; part--)
            if (!isfinite(parts[part][i])) {
                value = parts[part][i];
                rank = first + part;
            }
        const i64 kind = isnan(value) ? 1 : value > 0 ? 2 : 3;
        atomicMin(found, (offset + i) * 4096 + rank * 4 + kind);
    }
}

// out[place] = Σ of the values of equal places, in their order. `sorted` are the places, smallest first, `order` where
// in `values` each is: a thread that begins a run of equal ones adds all of it, so no two write to one place.
template <typename T>
__global__ void sum_runs(i64 n, const i64* sorted, const i64* order, const T* values, T* out) {
    EACH(first, n) {
        const i64 place = sorted[first];
        if (first > 0 && sorted[first - 1] == place) continue;
        T total = 0;
        for (i64 k = first; k < n && sorted[k] == place; k++) total += values[order[k]];
        out[place] = total;
    }
}

// squares[places[k]] = Σ x² of piece k, in double: elements starts[k] … stops[k] − 1, each piece by one block.
template <typename T>
__global__ void sum_squares(const T* x, const i64* starts, const i64* stops, const i64* places, double* squares) {
    double mine = 0;
    for (i64 i = starts[blockIdx.x] + threadIdx.x; i < stops[blockIdx.x]; i += blockDim.x)
        mine += (double)x[i] * (double)x[i];
    mine = block_sum(mine);
    if (threadIdx.x == 0) squares[places[blockIdx.x]] = mine;
}
