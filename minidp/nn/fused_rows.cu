// Rows: what is taken together are the elements of a row, by the threads of one block. grid = (rows).

#define EACH_OF_ROW(j, n) for (i64 j = threadIdx.x; j < (n); j += blockDim.x)

template <typename T>
__device__ T infinite() {
    return (T)__longlong_as_double(0x7ff0000000000000ll);
}

template <typename T>
__device__ T not_a_number() {
    return (T)__longlong_as_double(0x7ff8000000000000ll);
}

template <typename T>
__device__ T* row_of(T* x, i64 size) {
    return x + blockIdx.x * size;
}

// Largest of a row, NaN if there is one.
template <typename T>
__device__ T row_max(const T* x, i64 size) {
    T largest = -infinite<T>();
    EACH_OF_ROW(j, size) {
        if (x[j] > largest || x[j] != x[j]) largest = x[j];
    }
    return block_max(largest);
}

// --- normalisation ---

// x̂ = (x − μ) / √(σ² + ε), y = x̂·w + b, scale = 1 / √(σ² + ε). σ² is the mean of (x − μ)²: nothing cancels.
template <typename T>
__global__ void layer_norm(i64 size, const T* x, const T* weight, const T* bias, double eps, T* normal, T* scale,
                           T* y) {
    x = row_of(x, size), normal = row_of(normal, size), y = row_of(y, size);
    T sum = 0, squares = 0;
    EACH_OF_ROW(j, size) sum += x[j];
    const T mean = block_sum(sum) / (T)size;
    EACH_OF_ROW(j, size) {
        const T difference = x[j] - mean;
        squares += difference * difference;
    }
    const T factor = 1 / sqrt(block_sum(squares) / (T)size + (T)eps);
    EACH_OF_ROW(j, size) {
        normal[j] = (x[j] - mean) * factor;
        y[j] = normal[j] * weight[j] + bias[j];
    }
    if (threadIdx.x == 0) scale[blockIdx.x] = factor;
}

// ∂x = (∂x̂ − mean(∂x̂) − x̂·mean(∂x̂·x̂)) / √(σ² + ε), with ∂x̂ = ∂y·w.
template <typename T>
__global__ void layer_norm_backward(i64 size, const T* grad, const T* weight, const T* normal, const T* scale,
                                    T* out) {
    grad = row_of(grad, size), normal = row_of(normal, size), out = row_of(out, size);
    T sum = 0, product = 0;
    EACH_OF_ROW(j, size) {
        const T g = grad[j] * weight[j];
        sum += g;
        product += g * normal[j];
    }
    const T mean = block_sum(sum) / (T)size, slope = block_sum(product) / (T)size, factor = scale[blockIdx.x];
    EACH_OF_ROW(j, size) out[j] = (grad[j] * weight[j] - mean - normal[j] * slope) * factor;
}

// --- softmax ---

// y = softmax(x·factor), y may be x. Where `places` > 0, row i is place i mod `places` of a sequence and sees the
// elements 0 … i mod `places` alone: to the others −∞ is added, so that a NaN among them is not hidden.
template <typename T>
__global__ void softmax(i64 size, const T* x, T* y, double factor, i64 places) {
    x = row_of(x, size), y = row_of(y, size);
    const i64 seen = places > 0 ? blockIdx.x % places : size;
    T largest = -infinite<T>(), sum = 0;
    EACH_OF_ROW(j, size) {
        y[j] = x[j] * (T)factor + (j > seen ? -infinite<T>() : (T)0);
        if (y[j] > largest || y[j] != y[j]) largest = y[j];
    }
    largest = block_max(largest);
    EACH_OF_ROW(j, size) {
        y[j] = exp(y[j] - largest);
        sum += y[j];
    }
    sum = block_sum(sum);
    EACH_OF_ROW(j, size) y[j] /= sum;
}

// out = y·(∂y − Σ ∂y·y)·factor, out may be ∂y.
template <typename T>
__global__ void softmax_backward(i64 size, const T* y, const T* grad, T* out, double factor) {
    y = row_of(y, size), grad = row_of(grad, size), out = row_of(out, size);
    T sum = 0;
    EACH_OF_ROW(j, size) sum += grad[j] * y[j];
    sum = block_sum(sum);
    EACH_OF_ROW(j, size) out[j] = y[j] * (grad[j] - sum) * (T)factor;
}

template <typename T>
__global__ void log_softmax(i64 size, const T* x, T* y) {
    x = row_of(x, size), y = row_of(y, size);
    const T largest = row_max(x, size);
    T sum = 0;
    EACH_OF_ROW(j, size) sum += exp(x[j] - largest);
    const T shift = log(block_sum(sum));
    EACH_OF_ROW(j, size) y[j] = x[j] - largest - shift;
}

template <typename T>
__global__ void log_softmax_backward(i64 size, const T* y, const T* grad, T* out) {
    y = row_of(y, size), grad = row_of(grad, size), out = row_of(out, size);
    T sum = 0;
    EACH_OF_ROW(j, size) sum += grad[j];
    sum = block_sum(sum);
    EACH_OF_ROW(j, size) out[j] = grad[j] - exp(y[j]) * sum;
}

// --- cross entropy ---

// p = softmax(x), losses[row] = −log p[label]; both NaN, and nothing is read, where the label is no class.
template <typename T>
__global__ void cross_entropy(i64 classes, const T* x, const i64* labels, T* p, T* losses) {
    x = row_of(x, classes), p = row_of(p, classes);
    const i64 label = labels[blockIdx.x];
    const bool known = 0 <= label && label < classes;
    const T largest = row_max(x, classes);
    T sum = 0;
    EACH_OF_ROW(j, classes) {
        p[j] = exp(x[j] - largest);
        sum += p[j];
    }
    sum = block_sum(sum);
    EACH_OF_ROW(j, classes) p[j] = known ? p[j] / sum : not_a_number<T>();
    if (threadIdx.x == 0) losses[blockIdx.x] = known ? log(sum) - (x[label] - largest) : not_a_number<T>();
}

// p ← (p − onehot(label)) · ∂loss / rows. ∂loss is read where it lies: the host has not seen it.
template <typename T>
__global__ void cross_entropy_backward(i64 classes, T* p, const i64* labels, const T* grad) {
    p = row_of(p, classes);
    const i64 label = labels[blockIdx.x];
    const T factor = *grad / (T)gridDim.x;
    EACH_OF_ROW(j, classes) p[j] = (p[j] - (T)(j == label)) * factor;
}

// *out = Σ x / n, by one block.
template <typename T>
__global__ void mean(i64 n, const T* x, T* out) {
    T sum = 0;
    EACH_OF_ROW(i, n) sum += x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = sum / (T)n;
}
