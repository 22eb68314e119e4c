// Activations: one pass each way. What is arithmetic alone has the bits of the plain code in activations.py.

// max(x, 0); NaN stays NaN, −0 becomes 0, as in NumPy.
template <typename T>
__device__ T rectified(T x) {
    return x > 0 || x != x ? x : (T)0;
}

template <typename T>
__global__ void relu(i64 n, const T* x, T* y) {
    EACH(i, n) y[i] = rectified(x[i]);
}

// A product, not a choice: an infinite gradient times 0 is NaN, and has to be seen.
template <typename T>
__global__ void relu_backward(i64 n, const T* y, const T* grad, T* out) {
    EACH(i, n) out[i] = grad[i] * (T)(y[i] > 0);
}

template <typename T>
__global__ void tanh_forward(i64 n, const T* x, T* y) {
    EACH(i, n) y[i] = tanh(x[i]);
}

template <typename T>
__global__ void tanh_backward(i64 n, const T* y, const T* grad, T* out) {
    EACH(i, n) out[i] = grad[i] * (1 - y[i] * y[i]);
}

// y = x·Φ(x) = max(x, 0) − |x|·tail(|x|) and slope = Φ(x) + x·φ(x): the tail alone is accurate far from 0.
template <typename T>
__global__ void gelu(i64 n, const T* x, T* y, T* slope) {
    EACH(i, n) {
        const T a = fabs(x[i]);
        const T tail = (T)0.5 * erfc(a * (T)0.70710678118654752440);
        const T density = exp(a * a * (T)-0.5) * (T)0.39894228040143267794;
        y[i] = rectified(x[i]) - a * tail;
        slope[i] = copysign(density * a - tail + (T)0.5, x[i]) + (T)0.5;
    }
}

// Φ(x) ≈ (1 + tanh u) / 2 with u = √(2/π) (x + 0.044715 x³).
template <typename T>
__global__ void gelu_tanh(i64 n, const T* x, T* y, T* slope) {
    const double root = 0.79788456080286535588;
    EACH(i, n) {
        const T square = x[i] * x[i];
        const T t = tanh((square * (T)(0.044715 * root) + (T)root) * x[i]);
        const T along = square * (T)(3 * 0.044715 * root) + (T)root;  // u'
        const T cdf = t * (T)0.5 + (T)0.5;
        const T value = x[i] * cdf;
        y[i] = value;
        slope[i] = (1 - t) * value * along + cdf;
    }
}
