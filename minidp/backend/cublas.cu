// half = x · scale as bfloat16, float32's upper 16 bits: to nearest, ties to even; NaN stays NaN.
template <typename T>
__global__ void to_bfloat16(i64 n, const T* x, unsigned short* half, double scale) {
    EACH(i, n) {
        const float value = (float)(x[i] * (T)scale);
        const u32 bits = __float_as_uint(value);
        const u32 odd = (bits >> 16) & 1;
        half[i] = isnan(value) ? 0x7fc0 : (unsigned short)((bits + 0x7fff + odd) >> 16);
    }
}
