// What is taken together are the elements of a channel. An array lies as (outer, channels, inner): images
// (n, c, h, w) as (n, c, h·w), as convolutions leave them (c, h, w, n) as (1, c, h·w·n), rows (n, c) as (n, c, 1).
//
// A block takes `wide` channels, a power of two, so that its threads read neighbours: one where a channel's
// elements lie side by side, up to 32 where those of the next channel do. Along y the grid cuts the elements of
// each channel into pieces, which are added up by a second round: the same bits in every run.
#define LYING i64 outer, i64 channels, i64 inner, i64 wide

const int AT_ONCE = 4;
#define EACH_OF_FOUR(k) _Pragma("unroll") for (int k = 0; k < AT_ONCE; k++)

// Four elements of a thread, so that four loads are under way. In place of one that is not there stands element 0:
// to read in vain is quicker than to ask first.
struct Four {
    i64 at[AT_ONCE];
    bool there[AT_ONCE];
};

// A thread's way over elements of its channel: it moves on by the same number at each step, so it divides but once.
struct Walk {
    i64 channel;
    bool writes;  // whether it writes what comes of the channel's piece

    __device__ Walk(LYING) : inner(inner), skip((channels - 1) * inner), step(blockDim.x / wide) {
        const i64 elements = outer * inner, mine = blockIdx.x * wide + threadIdx.x % wide;
        channel = mine < channels ? mine : channels - 1;  // with nothing to do, but safe to read numbers of
        writes = threadIdx.x < wide && mine < channels;
        element = elements * blockIdx.y / gridDim.y + threadIdx.x / wide;
        end = mine < channels ? elements * (blockIdx.y + 1) / gridDim.y : 0;
        const i64 row = element / inner, rows = step / inner;
        column = element % inner;
        columns = step % inner;
        i = (row * channels + channel) * inner + column;
        jump = rows * channels * inner + columns;
    }

    __device__ bool there() const { return element < end; }

    __device__ Four four() {
        Four found;
        EACH_OF_FOUR(k) {
            found.there[k] = there();
            found.at[k] = there() ? i : 0;
            next();
        }
        return found;
    }

   private:
    i64 inner, skip, step, element, end, column, columns, i, jump;

    __device__ void next() {
        element += step;
        column += columns;
        i += jump;
        if (column >= inner) {
            column -= inner;
            i += skip;
        }
    }
};

// Σ of the values of a block's threads for each of its channels, in one fixed tree; blockDim.x is 256. Called by
// all threads; it is for those that write.
template <typename T>
__device__ T sum_of_channel(T value, i64 wide) {
    __shared__ T parts[256];
    __syncthreads();  // parts may still be read from the call before
    parts[threadIdx.x] = value;
    for (i64 half = blockDim.x / 2; half >= wide; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    return parts[threadIdx.x];
}

// out[piece, c] = Σ x / divisor.
template <typename T>
__global__ void channel_sum(LYING, double divisor, const T* __restrict__ x, T* __restrict__ out) {
    Walk walk(outer, channels, inner, wide);
    T sum = 0;
    while (walk.there()) {
        const Four four = walk.four();
        EACH_OF_FOUR(k) {
            const T value = x[four.at[k]];
            sum += four.there[k] ? value : (T)0;
        }
    }
    sum = sum_of_channel(sum, wide);
    if (walk.writes) out[blockIdx.y * channels + walk.channel] = sum / (T)divisor;
}

// out[piece, c] = Σ (x − μ)² / divisor.
template <typename T>
__global__ void channel_squares(LYING, double divisor, const T* __restrict__ x, const T* mean, T* __restrict__ out) {
    Walk walk(outer, channels, inner, wide);
    const T center = mean[walk.channel];
    T sum = 0;
    while (walk.there()) {
        const Four four = walk.four();
        EACH_OF_FOUR(k) {
            const T difference = x[four.at[k]] - center;
            sum += four.there[k] ? difference * difference : (T)0;
        }
    }
    sum = sum_of_channel(sum, wide);
    if (walk.writes) out[blockIdx.y * channels + walk.channel] = sum / (T)divisor;
}

// x̂ = (x − μ) · scale, made again wherever it is needed: to read it would cost as much as to read x.
template <typename T>
struct Normal {
    T mean, scale;
    __device__ Normal(const T* means, const T* vars, double eps, i64 channel)
        : mean(means[channel]), scale(1 / sqrt(vars[channel] + (T)eps)) {}
    __device__ T of(T x) const { return (x - mean) * scale; }
};

// y = x̂·w + b.
template <typename T>
__global__ void normalize(LYING, const T* __restrict__ x, const T* mean, const T* var, double eps, const T* weight,
                          const T* bias, T* __restrict__ y) {
    Walk walk(outer, channels, inner, wide);
    const Normal<T> normal(mean, var, eps, walk.channel);
    const T w = weight[walk.channel], b = bias[walk.channel];
    while (walk.there()) {
        const Four four = walk.four();
        EACH_OF_FOUR(k) {
            const T value = normal.of(x[four.at[k]]) * w + b;
            if (four.there[k]) y[four.at[k]] = value;
        }
    }
}

// along[piece, c] = Σ ∂y / divisor, across[piece, c] = Σ ∂y·x̂ / divisor.
template <typename T>
__global__ void channel_slopes(LYING, double divisor, const T* __restrict__ grad, const T* __restrict__ x,
                               const T* mean, const T* var, double eps, T* along, T* across) {
    Walk walk(outer, channels, inner, wide);
    const Normal<T> normal(mean, var, eps, walk.channel);
    T sum = 0, product = 0;
    while (walk.there()) {
        const Four four = walk.four();
        EACH_OF_FOUR(k) {
            const T slope = grad[four.at[k]], value = normal.of(x[four.at[k]]);
            sum += four.there[k] ? slope : (T)0;
            product += four.there[k] ? slope * value : (T)0;
        }
    }
    sum = sum_of_channel(sum, wide);
    product = sum_of_channel(product, wide);
    if (!walk.writes) return;
    along[blockIdx.y * channels + walk.channel] = sum / (T)divisor;
    across[blockIdx.y * channels + walk.channel] = product / (T)divisor;
}

// ∂x = (∂y − Σ∂y / count − x̂ · Σ(∂y·x̂) / count) · scale · w.
template <typename T>
__global__ void normalize_backward(LYING, const T* __restrict__ grad, const T* __restrict__ x, const T* mean,
                                   const T* var, double eps, const T* weight, const T* along, const T* across,
                                   i64 count, T* __restrict__ out) {
    Walk walk(outer, channels, inner, wide);
    const Normal<T> normal(mean, var, eps, walk.channel);
    const T shift = along[walk.channel] / (T)count, slope = across[walk.channel] / (T)count;
    const T factor = normal.scale * weight[walk.channel];
    while (walk.there()) {
        const Four four = walk.four();
        EACH_OF_FOUR(k) {
            const T value = (grad[four.at[k]] - shift - normal.of(x[four.at[k]]) * slope) * factor;
            if (four.there[k]) out[four.at[k]] = value;
        }
    }
}

// ∂x = ∂y · scale · w: with constant μ and σ².
template <typename T>
__global__ void rescale(LYING, const T* __restrict__ grad, const T* mean, const T* var, double eps,
                        const T* weight, T* __restrict__ out) {
    Walk walk(outer, channels, inner, wide);
    const T factor = Normal<T>(mean, var, eps, walk.channel).scale * weight[walk.channel];
    while (walk.there()) {
        const Four four = walk.four();
        EACH_OF_FOUR(k) {
            const T value = grad[four.at[k]] * factor;
            if (four.there[k]) out[four.at[k]] = value;
        }
    }
}
