/* Vectors, the kinds of weights, and how LANES of them are loaded. A part of kernels.c. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__APPLE__) /* whose compiler comes without OpenMP's header */
int omp_get_thread_num(void);
#else
#include <omp.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__aarch64__)
#define LANES 4
#else
#define LANES 8
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float floats_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves_at __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__aarch64__)
#include "arm.h"
#endif

/* How the weights of a matrix are stored. Rows are outputs. */
enum { F32, BF16, F16, INT8, INT4, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, AFFINE4, AFFINE5, Q6_K, Q2_K, Q3_K, IQ4_NL, IQ4_XS };

enum {
    ROWS = 16,  /* rows of weights that are worked on together, and interleaved in blocks of few bits */
    LINE = 64,  /* bytes that come from memory together */
    GROUP = 32, /* columns whose inputs share a scale */
    APART = 16, /* words between rows of inputs, so that they do not share places in the fastest cache */
    AHEAD = 1536, /* bytes of a row that are asked for before they are wanted */
    KEYS = 8,   /* keys, and VALUES values, of all heads that are worked on together */
    VALUES = 16,
    PART = 128, /* positions that one thread takes at a time, or a multiple where a query would have more than PARTS + 1 such */
    PARTS = 32,
    TEAM = 8, /* rows of a sequence whose queries meet a key or value together */
};

typedef struct {
    const void *data;  /* [n, k] of the kind; INT8 and after: see blocks.h */
    const void *scale; /* INT8, and kinds with supers (blocks.h): what lies apart */
    int64_t kind, n, k;
} Matrix;

typedef struct {
    Matrix w1, w2, w3;
} Expert;

typedef struct {
    Matrix wq, wk, wv, wo, w1, w2, w3;
    const float *attention_norm, *ffn_norm;
    char *keys, *values; /* [B, capacity, K, D] of kind `kept`: position p in slot p % capacity */
    int64_t capacity, window; /* window 0: none */
    float *key_scales, *value_scales; /* [B, capacity, K], where `kept` is INT8 */
    int64_t kept, overflows; /* whether the last step had a key or value that is finite and does not fit */
    Matrix gate;              /* a mixture of experts: its router; w1, w2 and w3 are then those of the first expert */
    const Expert *experts;    /* [gate.n]; NULL: no mixture */
} Layer;

typedef struct {
    Layer *layers;
    const float *norm;
    int64_t n_layers, dim, hidden_dim, n_heads, n_kv_heads, head_dim;
    double eps;
    int64_t chosen; /* experts of a token; 0 without mixtures */
    int64_t overflows; /* whether one of the layers has such a key */
} Model;

/* ---- loading LANES weights as floats */

INLINE floats load_floats(const float *p) { return (floats) * (const floats_at *)p; }

INLINE floats load_bf16(const uint16_t *p) {
#if defined(__AVX512BW__) /* one instruction where GCC 12 takes two */
    typedef int16_t shorts __attribute__((vector_size(64)));
    shorts at = {0};
    UNROLL for (int i = 0; i < LANES; i++) at[2 * i + 1] = i;
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
    return (floats)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)at, low);
#endif
    words w = __builtin_convertvector((halves) * (const halves_at *)p, words) << 16;
    return (floats)w;
}

INLINE floats load_f16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    return neon_load_f16(p);
#else
    floats out;
    for (int i = 0; i < LANES; i++) {
        uint32_t h = p[i], sign = (h & 0x8000) << 16, rest = h & 0x7fff, bits;
        float f;
        if (rest >= 0x7c00) /* inf and nan */
            bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
        else if (rest >= 0x400)
            bits = sign | ((rest << 13) + 0x38000000);
        else { /* subnormal: rest * 2^-24 */
            f = (float)rest * 5.9604644775390625e-8f;
            memcpy(&bits, &f, 4);
            bits |= sign;
        }
        memcpy(&f, &bits, 4);
        out[i] = f;
    }
    return out;
#endif
}

INLINE int64_t size_of(int kind) { return kind == F32 ? 4 : 2; }

INLINE floats load(int kind, const char *p) {
    switch (kind) {
    case F32: return load_floats((const float *)p);
    case BF16: return load_bf16((const uint16_t *)p);
    default: return load_f16((const uint16_t *)p);
    }
}

/* The same numbers, in a register from here on: GCC loads what is used several times anew for each use, and loads are
   what limits then. */
INLINE floats held(floats v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__AVX__)
    __asm__("" : "+x"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#endif
    return v;
}

/* a * b + c, rounded once where the machine can. Said outright, and nowhere else (-ffp-contract=off): a compiler that is
   free to choose chooses differently from loop to loop, and a row's bits would depend on its company. */
INLINE floats multiply_add(floats a, floats b, floats c) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return neon_multiply_add(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE float sum(floats v) {
    float s[LANES];
    memcpy(s, &v, sizeof s);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
}

/* Of each 2 n lanes of a, then of b, the first n (half 0) or the last (half 1). */
INLINE floats halves_of(floats a, floats b, int n, int half) {
    ints pick;
    UNROLL for (int i = 0; i < LANES; i++) {
        const int at = i % (LANES / 2);
        pick[i] = at / n * 2 * n + half * n + at % n + i / (LANES / 2) * LANES;
    }
#if defined(__clang__)
    floats out;
    UNROLL for (int i = 0; i < LANES; i++) out[i] = pick[i] < LANES ? a[pick[i]] : b[pick[i] - LANES];
    return out;
#else
    return __builtin_shuffle(a, b, pick);
#endif
}

#if defined(__AVX512F__)
/* What is added to what: of each vector the halves, then the halves of these, .., and two vectors become one. */
#define BLOCKS(a, b, low, high) (floats)_mm512_shuffle_f32x4((__m512)(a), (__m512)(b), low) + (floats)_mm512_shuffle_f32x4((__m512)(a), (__m512)(b), high)
#define WITHIN(a, b, low, high) (floats)_mm512_shuffle_ps((__m512)(a), (__m512)(b), low) + (floats)_mm512_shuffle_ps((__m512)(a), (__m512)(b), high)

/* The `sum` of each of LANES vectors, added up in the same order. */
INLINE floats sums_of(floats *v) {
    floats four[4], two[2];
    UNROLL for (int i = 0; i < 4; i++) {
        const floats a = BLOCKS(v[i], v[4 + i], 0x44, 0xee), b = BLOCKS(v[8 + i], v[12 + i], 0x44, 0xee);
        four[i] = BLOCKS(a, b, 0x88, 0xdd);
    }
    UNROLL for (int i = 0; i < 2; i++) two[i] = WITHIN(four[2 * i], four[2 * i + 1], 0x44, 0xee);
    return WITHIN(two[0], two[1], 0x88, 0xdd);
}
#else
/* The `sum` of each of LANES vectors, added up in the same order. */
INLINE floats sums_of(floats *v) {
    UNROLL for (int n = LANES / 2; n; n /= 2)
        UNROLL for (int i = 0; i < n; i++)
            v[i] = halves_of(v[2 * i], v[2 * i + 1], n, 0) + halves_of(v[2 * i], v[2 * i + 1], n, 1);
    return v[0];
}
#endif
