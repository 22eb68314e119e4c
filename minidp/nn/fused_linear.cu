// What stands around a product of matrices: biases added to its columns, and sums of columns.

// y += bias, row by row. A thread's column moves on by the same number at each step: one division, not one each.
template <typename T>
__global__ void add_bias(i64 n, T* y, const T* bias, i64 columns) {
    const i64 threads = (i64)gridDim.x * blockDim.x;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 column = i % columns;
    for (const i64 step = threads % columns; i < n; i += threads) {
        y[i] += bias[column];
        column += step;
        if (column >= columns) column -= columns;
    }
}

// Sums of columns. A block takes 32 columns, one a lane, so that a warp reads one line of memory, and a piece of
// the rows, which its eight warps take in turn. Then the eight are added in order, whoever came first.
const int WARPS = 8;

struct Piece {
    i64 column, first, last;  // rows first … last − 1
};

__device__ Piece piece(i64 rows) {
    return {(i64)blockIdx.x * WARP + threadIdx.x % WARP, rows * blockIdx.y / gridDim.y,
            rows * (blockIdx.y + 1) / gridDim.y};
}

template <typename T>
__device__ T sum_of_warps(T value) {
    __shared__ T parts[WARPS][WARP];
    const int lane = threadIdx.x % WARP;
    __syncthreads();  // parts may still be read from the call before
    parts[threadIdx.x / WARP][lane] = value;
    __syncthreads();
    T total = parts[0][lane];
    for (int i = 1; i < WARPS; i++) total += parts[i][lane];
    return total;
}

// out[k, c] = Σ x[r, c] over the rows r of piece k.
template <typename T>
__global__ void column_sum(i64 rows, i64 columns, const T* x, T* out) {
    const Piece mine = piece(rows);
    T total = 0;
    if (mine.column < columns)
        for (i64 row = mine.first + threadIdx.x / WARP; row < mine.last; row += WARPS)
            total += x[row * columns + mine.column];
    total = sum_of_warps(total);
    if (threadIdx.x < WARP && mine.column < columns) out[blockIdx.y * columns + mine.column] = total;
}

// The same of x·y, and of x, in one pass.
template <typename T>
__global__ void column_sums(i64 rows, i64 columns, const T* x, const T* y, T* products, T* out) {
    const Piece mine = piece(rows);
    T product = 0, total = 0;
    if (mine.column < columns)
        for (i64 row = mine.first + threadIdx.x / WARP; row < mine.last; row += WARPS) {
            const i64 i = row * columns + mine.column;
            product += x[i] * y[i];
            total += x[i];
        }
    product = sum_of_warps(product);
    total = sum_of_warps(total);
    if (threadIdx.x < WARP && mine.column < columns) {
        products[blockIdx.y * columns + mine.column] = product;
        out[blockIdx.y * columns + mine.column] = total;
    }
}
