/* Keys and values as a cache keeps them (F32, BF16, F16, or INT8 with a scale for each head and position): loaded as floats,
   and rounded. The rounding is that of mistral/buffers.py, bit for bit. A part of kernels.c. */

INLINE int64_t kept_size(int kind) { return kind == INT8 ? 1 : size_of(kind); }

INLINE float *scale_at(float *scales, int64_t at) { return scales ? scales + at : scales; }

/* LANES of them as floats; of INT8 the whole numbers. */
INLINE floats load_kept(int kind, const char *p) {
    if (kind != INT8) return load(kind, p);
#if defined(__AVX512F__) /* which GCC 12 does not find by itself */
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    typedef int8_t bytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));
    return __builtin_convertvector(__builtin_convertvector((bytes) * (const bytes_at *)p, ints), floats);
#endif
}

INLINE float load_one(int kind, const char *p) {
    if (kind == INT8) return *(const int8_t *)p;
    char some[LANES * 4] = {0};
    memcpy(some, p, size_of(kind));
    return load(kind, some)[0];
}

/* To the nearest, ties to even. */
INLINE uint16_t to_half(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000, bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;  /* NaN */
    if (bits >= 0x477ff000) return sign | 0x7c00; /* would be 65,536 or more */
    if (bits < 0x38800000) { /* subnormal: a float between 0.5 and 1 has the same step, and rounds the sum */
        float near;
        memcpy(&near, &bits, 4);
        near += 0.5f;
        memcpy(&bits, &near, 4);
        return sign | (bits - 0x3f000000);
    }
    return sign | ((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}

INLINE uint16_t to_bf16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40; /* NaN stays one */
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* A head's key or value x [d] into a cache; returns whether it is finite and what is kept of it is not. */
int64_t keep(int64_t kind, const float *x, int64_t d, char *to, float *scale) {
    int overflows = 0;
    if (kind == F32) memcpy(to, x, d * 4);
    if (kind == BF16)
        for (int64_t i = 0; i < d; i++) ((uint16_t *)to)[i] = to_bf16_bits(x[i]);
    if (kind == F16)
        for (int64_t i = 0; i < d; i++) {
            const uint16_t half = ((uint16_t *)to)[i] = to_half(x[i]);
            overflows |= (half & 0x7fff) == 0x7c00 && fabsf(x[i]) < INFINITY;
        }
    if (kind == INT8) {
        float top = 0;
        int finite = 1;
        for (int64_t i = 0; i < d; i++) {
            finite &= fabsf(x[i]) < INFINITY;
            top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
        }
        *scale = finite ? top / 127 : NAN;
        const float step = *scale > 1e-30f ? *scale : 1e-30f;
        for (int64_t i = 0; i < d; i++) to[i] = finite ? (int8_t)rintf(x[i] / step) : 0;
    }
    return overflows;
}
