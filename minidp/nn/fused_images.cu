// Windows that move over images, which lie as (channels, height, width, n): neighbours are the same pixel of other
// samples, so whatever a window does, loads and stores are coalesced.
//
// A thread takes one pixel (or one place of the window) of one sample. Where it is costs divisions, so it takes
// several channels, for which they are the same; four at once, so that four loads are under way. The grid is
// (blocks, fours of channels). No padded copy is made: a pixel of the padding is one that is not there.

// The images, the window (rows, columns), by how much it moves (down, along), how much padding is above and left
// of the image, and how many places the window takes (high, across): those are the images that come of it.
#define WINDOWS                                                                                                 \
    i64 channels, i64 height, i64 width, i64 n, i64 rows, i64 columns, i64 down, i64 along, i64 above, i64 left, \
        i64 high, i64 across
#define WINDOWS_GIVEN channels, height, width, n, rows, columns, down, along, above, left, high, across

const int AT_ONCE = 4;
#define EACH_FOUR(c) \
    for (i64 c = (i64)blockIdx.y * AT_ONCE; c < channels; c += (i64)gridDim.y * AT_ONCE)
#define EACH_CHANNEL(k) _Pragma("unroll") for (int k = 0; k < AT_ONCE; k++)
#define THERE(k) (c + k < channels)
// What is read for channel c + k. If it is not there, c: to read in vain is quicker than to ask each time.
#define CHANNEL(k) (THERE(k) ? k : 0)

// GPUs divide 64 bits in software, and 32 several times as fast.
__device__ i64 quotient(i64 a, i64 b) { return (a | b) >> 32 ? a / b : (i64)((u32)a / (u32)b); }

struct Place {
    i64 row, column, sample;
};

// Element i of images (height, width, n) of one channel.
__device__ Place place(i64 i, i64 width, i64 n) {
    const i64 pixel = quotient(i, n), row = quotient(pixel, width);
    return {row, pixel - row * width, i - pixel * n};
}

struct Range {
    i64 first, stop;
};

// Those of 0 … window − 1 that lie on the image if 0 lies at `start`.
__device__ Range inside(i64 start, i64 window, i64 size) {
    return {start < 0 ? -start : 0, start + window > size ? size - start : window};
}

// Those places among first … stop − 1 at which a window shows what is `at` after the beginning of the padding.
__device__ Range showing(i64 at, i64 window, i64 step, i64 first, i64 stop) {
    const i64 earliest = at < window ? 0 : quotient(at - window, step) + 1, end = quotient(at, step) + 1;
    return {earliest > first ? earliest : first, end < stop ? end : stop};
}

// --- convolution ---

// out[c, i, j, place, sample] = the pixel that is (i, j) in the window at that place, or 0; `count` places and
// samples, from row `first` of places on.
template <typename T>
__global__ void patches(i64 first, i64 count, WINDOWS, const T* __restrict__ image, T* __restrict__ out) {
    const i64 area = height * width * n, size = rows * columns * count;  // of a channel, here and there
    EACH(at, count) {
        const Place p = place(at, across, n);
        const i64 top = (first + p.row) * down - above, start = p.column * along - left;
        EACH_FOUR(c) {
            i64 to = c * size + at;
            for (i64 y = top; y < top + rows; y++) {
                i64 from = c * area + (y * width + start) * n + p.sample;
                for (i64 x = start; x < start + columns; x++, from += n, to += count) {
                    const bool there = 0 <= y && y < height && 0 <= x && x < width;
                    T pixel[AT_ONCE];
                    EACH_CHANNEL(k) pixel[k] = there ? image[from + CHANNEL(k) * area] : (T)0;
                    EACH_CHANNEL(k) if (THERE(k)) out[to + k * size] = pixel[k];
                }
            }
        }
    }
}

// image[c, y, x, sample] = Σ of what `patches`, of rows first … stop − 1 of places, has for that pixel, added to
// what is there if `more`. A pixel asks for it: nobody adds to what somebody else may write. It is about `count`
// pixels and samples of each channel, from row `top` on.
template <typename T>
__global__ void pixels(i64 first, i64 stop, i64 top, i64 count, i64 more, WINDOWS, const T* __restrict__ patches,
                       T* __restrict__ image) {
    const i64 area = height * width * n, place_count = (stop - first) * across * n;
    const i64 size = rows * columns * place_count;
    EACH(at, count) {
        const Place p = place(at, width, n);
        const i64 y = top + p.row + above, x = p.column + left;
        const Range vertical = showing(y, rows, down, first, stop);
        const Range horizontal = showing(x, columns, along, 0, across);
        // The pixel's place in the first window that shows it. In the next one it lies further left, or up.
        const i64 i = y - vertical.first * down, j = x - horizontal.first * along;
        const i64 shown = ((vertical.first - first) * across + horizontal.first) * n + p.sample;
        EACH_FOUR(c) {
            const i64 to = c * area + top * width * n + at;
            i64 row_from = c * size + (i * columns + j) * place_count + shown;
            T sum[AT_ONCE];
            EACH_CHANNEL(k) sum[k] = more ? image[to + CHANNEL(k) * area] : (T)0;
            for (i64 row = vertical.first; row < vertical.stop; row++) {
                i64 from = row_from;
                for (i64 column = horizontal.first; column < horizontal.stop; column++) {
                    EACH_CHANNEL(k) sum[k] += patches[from + CHANNEL(k) * size];
                    from += n - along * place_count;
                }
                row_from += across * n - down * columns * place_count;
            }
            EACH_CHANNEL(k) if (THERE(k)) image[to + k * area] = sum[k];
        }
    }
}

// y[c, at …] = part[c] + bias[c]: `count` of the `size` elements of a channel. `part` may be what it is put into.
template <typename T>
__global__ void put_with_bias(i64 count, i64 size, i64 at, i64 channels, const T* part, const T* bias, T* y) {
    EACH(i, count) {
        EACH_FOUR(c) {
            T sum[AT_ONCE];
            EACH_CHANNEL(k) sum[k] = part[(c + CHANNEL(k)) * count + i] + bias[c + CHANNEL(k)];
            EACH_CHANNEL(k) if (THERE(k)) y[(c + k) * size + at + i] = sum[k];
        }
    }
}

// --- pooling ---

// out = the largest pixel of each window, winner = which of them it is, the first of equals. A NaN wins over all,
// but is no winner. The padding is −∞: it can win only at the first place of a window, against nothing larger.
template <typename T, typename Winner>
__device__ void largest(WINDOWS, const T* __restrict__ image, T* __restrict__ out, Winner* __restrict__ winner,
                        i64 record) {
    const i64 area = height * width * n, size = high * across * n;
    EACH(at, size) {
        const Place p = place(at, across, n);
        const i64 top = p.row * down - above, start = p.column * along - left;
        const Range vertical = inside(top, rows, height), horizontal = inside(start, columns, width);
        EACH_FOUR(c) {
            T best[AT_ONCE];
            i64 found[AT_ONCE];
            EACH_CHANNEL(k) best[k] = (T)__longlong_as_double(0xfff0000000000000ll), found[k] = 0;
            for (i64 i = vertical.first; i < vertical.stop; i++) {
                i64 from = c * area + ((top + i) * width + start + horizontal.first) * n + p.sample;
                for (i64 j = horizontal.first; j < horizontal.stop; j++, from += n) {
                    EACH_CHANNEL(k) {
                        const T pixel = image[from + CHANNEL(k) * area];
                        if (pixel > best[k]) found[k] = i * columns + j;
                        if (pixel > best[k] || pixel != pixel) best[k] = pixel;
                    }
                }
            }
            EACH_CHANNEL(k) if (THERE(k)) {
                out[(c + k) * size + at] = best[k];
                if (record) winner[(c + k) * size + at] = (Winner)found[k];
            }
        }
    }
}

// image = Σ of the gradients of those windows in which the pixel is the winner, in the order of the plain code:
// the last window comes first, for the pixel's place in it is the first. A product, not a choice: an infinite
// gradient times 0 is NaN, and has to be seen.
template <typename T, typename Winner>
__device__ void to_winners(WINDOWS, const T* __restrict__ grad, const Winner* __restrict__ winner,
                           T* __restrict__ image) {
    const i64 area = height * width * n, size = high * across * n;
    EACH(at, area) {
        const Place p = place(at, width, n);
        const i64 y = p.row + above, x = p.column + left;
        const Range vertical = showing(y, rows, down, 0, high);
        const Range horizontal = showing(x, columns, along, 0, across);
        EACH_FOUR(c) {
            T sum[AT_ONCE];
            EACH_CHANNEL(k) sum[k] = 0;
            for (i64 row = vertical.stop - 1; row >= vertical.first; row--) {
                i64 from = c * size + (row * across + horizontal.stop - 1) * n + p.sample;
                i64 mine = (y - row * down) * columns + x - (horizontal.stop - 1) * along;
                for (i64 column = horizontal.stop - 1; column >= horizontal.first; column--) {
                    EACH_CHANNEL(k) {
                        const i64 window = from + CHANNEL(k) * size;
                        sum[k] += grad[window] * (T)(winner[window] == mine);
                    }
                    from -= n;
                    mine += along;
                }
            }
            EACH_CHANNEL(k) if (THERE(k)) image[(c + k) * area + at] = sum[k];
        }
    }
}

template <typename T>
__global__ void max_pool(WINDOWS, const T* image, T* out, unsigned char* winner, i64 record) {
    largest(WINDOWS_GIVEN, image, out, winner, record);
}

template <typename T>
__global__ void max_pool_backward(WINDOWS, const T* grad, const unsigned char* winner, T* image) {
    to_winners(WINDOWS_GIVEN, grad, winner, image);
}

// The same for windows of more pixels than a byte has numbers.
template <typename T>
__global__ void max_pool_wide(WINDOWS, const T* image, T* out, int* winner, i64 record) {
    largest(WINDOWS_GIVEN, image, out, winner, record);
}

template <typename T>
__global__ void max_pool_wide_backward(WINDOWS, const T* grad, const int* winner, T* image) {
    to_winners(WINDOWS_GIVEN, grad, winner, image);
}

// out = Σ of a window / its pixels, those of the padding counted as 0.
template <typename T>
__global__ void avg_pool(WINDOWS, const T* __restrict__ image, T* __restrict__ out) {
    const i64 area = height * width * n, size = high * across * n;
    EACH(at, size) {
        const Place p = place(at, across, n);
        const i64 top = p.row * down - above, start = p.column * along - left;
        const Range vertical = inside(top, rows, height), horizontal = inside(start, columns, width);
        EACH_FOUR(c) {
            T sum[AT_ONCE];
            EACH_CHANNEL(k) sum[k] = 0;
            for (i64 i = vertical.first; i < vertical.stop; i++) {
                i64 from = c * area + ((top + i) * width + start + horizontal.first) * n + p.sample;
                for (i64 j = horizontal.first; j < horizontal.stop; j++, from += n) {
                    EACH_CHANNEL(k) sum[k] += image[from + CHANNEL(k) * area];
                }
            }
            EACH_CHANNEL(k) if (THERE(k)) out[(c + k) * size + at] = sum[k] / (T)(rows * columns);
        }
    }
}

// image = Σ of the shares of all windows that show the pixel, in the order of the plain code.
template <typename T>
__global__ void avg_pool_backward(WINDOWS, const T* __restrict__ grad, T* __restrict__ image) {
    const i64 area = height * width * n, size = high * across * n;
    EACH(at, area) {
        const Place p = place(at, width, n);
        const Range vertical = showing(p.row + above, rows, down, 0, high);
        const Range horizontal = showing(p.column + left, columns, along, 0, across);
        EACH_FOUR(c) {
            T sum[AT_ONCE];
            EACH_CHANNEL(k) sum[k] = 0;
            for (i64 row = vertical.stop - 1; row >= vertical.first; row--) {
                i64 from = c * size + (row * across + horizontal.stop - 1) * n + p.sample;
                for (i64 column = horizontal.stop - 1; column >= horizontal.first; column--, from -= n) {
                    EACH_CHANNEL(k) sum[k] += grad[from + CHANNEL(k) * size] / (T)(rows * columns);
                }
            }
            EACH_CHANNEL(k) if (THERE(k)) image[(c + k) * area + at] = sum[k];
        }
    }
}
