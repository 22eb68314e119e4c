// The update rules of rules.py, each as one pass: what is read is read once, what is written is written once.
// The same operations in the same order, each rounded, so with the same bits as there. Outputs may be inputs.

template <typename T>
__global__ void sgd(i64 n, const T* w, const T* g, const T* m, T* w_out, T* m_out, double lr, double scale, double decay,
                    double momentum, i64 nesterov) {
    const bool plain = decay == 0 && momentum == 0;
    EACH(i, n) {
        if (plain) {
            w_out[i] = w[i] - g[i] * (T)(lr * scale);
            continue;
        }
        const T weight = w[i];
        T step = g[i] * (T)scale;
        if (decay != 0) step += weight * (T)decay;
        if (momentum != 0) {
            const T velocity = m[i] * (T)momentum + step;
            m_out[i] = velocity;
            step = nesterov ? step + velocity * (T)momentum : velocity;
        }
        w_out[i] = weight - step * (T)lr;
    }
}

// Also AdamW: `decay` is then 0, and `keep` is 1 − η λ in place of 1.
template <typename T>
__global__ void adam(i64 n, const T* w, const T* g, const T* m, const T* v, T* w_out, T* m_out, T* v_out, double scale,
                     double decay, double keep, double beta1, double beta2, double eps, double rate) {
    EACH(i, n) {
        const T weight = w[i];
        T gradient = g[i] * (T)scale;
        if (decay != 0) gradient += weight * (T)decay;
        const T mean = m[i] * (T)beta1 + gradient * (T)(1 - beta1);
        const T square = v[i] * (T)beta2 + gradient * gradient * (T)(1 - beta2);
        m_out[i] = mean;
        v_out[i] = square;
        w_out[i] = weight * (T)keep - mean / (sqrt(square) + (T)eps) * (T)rate;
    }
}
