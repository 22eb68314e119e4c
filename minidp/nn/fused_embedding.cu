// Rows of a table by number, and back. A block of threads takes a place; grid = (places).

#define EACH_OF_ROW(j, n) for (i64 j = threadIdx.x; j < (n); j += blockDim.x)

// out[i] = weight[tokens[i]]. Of a token that no row has nothing is read: its row is NaN, and it is kept as 0.
template <typename T>
__global__ void embedding(i64 size, const T* weight, i64 count, const i64* tokens, i64* kept, T* out) {
    const i64 token = tokens[blockIdx.x];
    const bool known = 0 <= token && token < count;
    const T* row = weight + (known ? token : 0) * size;
    out += blockIdx.x * size;
    EACH_OF_ROW(j, size) out[j] = known ? row[j] : (T)__longlong_as_double(0x7ff8000000000000ll);
    if (threadIdx.x == 0) kept[blockIdx.x] = known ? token : 0;
}

// out[token] = Σ of the gradients of its places, in their order. `order` are the places sorted by token, `sorted`
// their tokens: a block that begins a run of equal ones adds all of the run, so no two blocks write to one row. It
// reads eight places at once where the eighth is still of the run: else each read would wait for the one before.
template <typename T>
__global__ void embedding_backward(i64 size, i64 places, const i64* sorted, const i64* order, const T* grad,
                                   T* out) {
    const int AT_ONCE = 8;
    const i64 first = blockIdx.x, token = sorted[first];
    if (first > 0 && sorted[first - 1] == token) return;
    EACH_OF_ROW(j, size) {
        T total = 0;
        i64 k = first;
        while (k + AT_ONCE <= places && sorted[k + AT_ONCE - 1] == token) {
            T some[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) some[i] = grad[order[k + i] * size + j];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) total += some[i];
            k += AT_ONCE;
        }
        for (; k < places && sorted[k] == token; k++) total += grad[order[k] * size + j];
        out[token * size + j] = total;
    }
}
