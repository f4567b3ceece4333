/* Products of few rows with many weights, and a whole decode step, on a CPU.

   Built once by fast/kernels.py, with whatever compiler is there, for the machine it runs on; called through
   ctypes. Plain C with the vector types that GCC and Clang share, so every instruction set is the
   compiler's affair. The arithmetic is that of model.py; tests compare the two.

   Every output is summed in one order, whatever the number of rows and of threads: LANES partial sums
   over the columns, then the sum of these. So a row's bits do not depend on what else is in the batch. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
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

/* How the weights of a matrix are stored. Rows are outputs. */
enum { F32, BF16, F16, INT8, INT4, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, AFFINE4, AFFINE5, Q6_K };

enum {
    ROWS = 16,  /* rows of weights that are worked on together, and interleaved in blocks of few bits */
    LINE = 64,  /* bytes that come from memory together */
    GROUP = 32, /* columns whose inputs share a scale */
    AHEAD = 1536, /* bytes of a row that are asked for before they are wanted */
    KEYS = 8,   /* keys, and VALUES values, of all heads that are worked on together */
    VALUES = 16,
    PART = 128, /* positions of a query that one thread takes, or a PARTS-th of all where that is more */
    PARTS = 32,
};

typedef struct {
    const void *data;  /* [n, k] of the kind; INT8 and after: see blocks.h */
    const void *scale; /* INT8, AFFINE4, AFFINE5, Q6_K: what lies apart */
    int64_t kind, n, k;
} Matrix;

typedef struct {
    Matrix wq, wk, wv, wo, w1, w2, w3;
    const float *attention_norm, *ffn_norm;
    float *keys, *values; /* [B, capacity, K, D]: position p in slot p % capacity */
    int64_t capacity, window; /* window 0: none */
} Layer;

typedef struct {
    const Layer *layers;
    const float *norm;
    int64_t n_layers, dim, hidden_dim, n_heads, n_kv_heads, head_dim;
    double eps;
} Model;

/* ---- loading LANES weights as floats */

INLINE floats load_floats(const float *p) { return (floats) * (const floats_at *)p; }

INLINE floats load_bf16(const uint16_t *p) {
    words w = __builtin_convertvector((halves) * (const halves_at *)p, words) << 16;
    return (floats)w;
}

INLINE floats load_f16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
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

/* a * b + c, rounded once where the machine can. Said outright, and nowhere else (-ffp-contract=off): a compiler that is
   free to choose chooses differently from loop to loop, and a row's bits would depend on its company. */
INLINE floats multiply_add(floats a, floats b, floats c) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA)
    UNROLL for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
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

/* ---- products: y[r, j] = w[j] . x[r] */

/* Adds to the J x R sums of a tile what `whole` columns bring (a multiple of a LINE's), and asks for the weights `ahead`
   bytes further on: the machine's own guess at what comes next is too late. */
INLINE void dot_tile(int kind, int J, int R, const char *w, int64_t row, int64_t whole, const float *x, int64_t ldx,
                     int64_t ahead, floats (*sums)[8]) {
    floats acc[8][8]; /* J x R of them are used, and stay in registers */
    UNROLL for (int j = 0; j < J; j++)
        UNROLL for (int r = 0; r < R; r++) acc[j][r] = sums[j][r];
    for (int64_t i = 0; i < whole; i += LINE / size_of(kind)) {
        /* Beyond a row's end come the rows of the next tile. */
        const char *next = w + i * size_of(kind) + ahead + (R < 4 && i * size_of(kind) + ahead >= row ? (J - 1) * row : 0);
        UNROLL for (int j = 0; j < J; j++) __builtin_prefetch(next + j * row, 0, 2);
        UNROLL for (int64_t c = i; c < i + LINE / size_of(kind); c += LANES) {
            floats ws[8];
            UNROLL for (int j = 0; j < J; j++) ws[j] = load(kind, w + j * row + c * size_of(kind));
            UNROLL for (int r = 0; r < R; r++) {
                floats v = load_floats(x + r * ldx + c);
                UNROLL for (int j = 0; j < J; j++) acc[j][r] = multiply_add(ws[j], v, acc[j][r]);
            }
        }
    }
    UNROLL for (int j = 0; j < J; j++)
        UNROLL for (int r = 0; r < R; r++) sums[j][r] = acc[j][r];
}

/* n <= ROWS rows of weights times R rows of x, J rows of weights at a time, `chunk` columns at a time: as many as
   leave x in the fastest cache. */
INLINE void stripe(int kind, int J, int R, int64_t chunk, const char *w, int64_t n, int64_t k, const float *x,
                   int64_t ldx, float *out) {
    const int64_t row = k * size_of(kind), line = LINE / size_of(kind), whole = k - k % line;
    floats sums[ROWS][8];
    for (int64_t j = 0; j < n; j++)
        UNROLL for (int r = 0; r < R; r++) sums[j][r] = (floats){0};
    for (int64_t i = 0; i < whole; i += chunk) {
        const int64_t columns = whole - i < chunk ? whole - i : chunk;
        const char *from = w + i * size_of(kind);
        const int64_t ahead = R < 4 ? AHEAD : (i + chunk < whole ? chunk : ROWS * k - i) * size_of(kind);
        int64_t j = 0;
        for (; j + J <= n; j += J) dot_tile(kind, J, R, from + j * row, row, columns, x + i, ldx, ahead, sums + j);
        for (; j < n; j++) dot_tile(kind, 1, R, from + j * row, row, columns, x + i, ldx, ahead, sums + j);
    }
    if (whole < k) { /* the last columns, with zeros after them */
        float end[8][LINE] = {{0}};
        for (int r = 0; r < R; r++) memcpy(end[r], x + r * ldx + whole, (k - whole) * 4);
        for (int64_t j = 0; j < n; j++) {
            char last[LINE] = {0};
            memcpy(last, w + j * row + whole * size_of(kind), (k - whole) * size_of(kind));
            dot_tile(kind, 1, R, last, 0, line, end[0], LINE, 0, sums + j);
        }
    }
    for (int64_t j = 0; j < n; j++)
        UNROLL for (int r = 0; r < R; r++) out[r * ROWS + j] = sum(sums[j][r]);
}

INLINE void stripes(int kind, const char *w, int64_t n, int64_t k, const float *x, int64_t ldx, int64_t rows,
                    float *out) {
    while (rows) {
        int64_t done;
#if LANES == 16 /* 32 registers */
        if (rows >= 8) stripe(kind, 2, done = 8, 512, w, n, k, x, ldx, out);
        else if (rows >= 4) stripe(kind, 4, done = 4, 1024, w, n, k, x, ldx, out);
#else /* 16 registers */
        if (rows >= 8) stripe(kind, 1, done = 8, 512, w, n, k, x, ldx, out);
        else if (rows >= 4) stripe(kind, 2, done = 4, 1024, w, n, k, x, ldx, out);
#endif
        else if (rows >= 2) stripe(kind, 4, done = 2, k, w, n, k, x, ldx, out);
        else stripe(kind, 8, done = 1, k, w, n, k, x, ldx, out);
        x += done * ldx, out += done * ROWS, rows -= done;
    }
}

#include "blocks.h"

INLINE int is_quantized(const Matrix *m) { return is_blocks(m->kind); }

/* out[r, 0..n) for the block of rows first .. first + n of a matrix, n <= ROWS; out is [rows, ROWS]. Weights in few
   bits are multiplied with the inputs that were rounded from x instead of x. */
static void block(const Matrix *m, int64_t first, int64_t n, const float *x, int64_t ldx, const Inputs *rounded,
                  int64_t rows, float *out) {
    const char *w = m->data;
    switch (m->kind) {
    case F32: stripes(F32, w + first * m->k * 4, n, m->k, x, ldx, rows, out); break;
    case BF16: stripes(BF16, w + first * m->k * 2, n, m->k, x, ldx, rows, out); break;
    case F16: stripes(F16, w + first * m->k * 2, n, m->k, x, ldx, rows, out); break;
    default: few_bits_block(m, first / ROWS, rounded, rows, out);
    }
}

static int64_t blocks_of(const Matrix *m) { return (m->n + ROWS - 1) / ROWS; }

int64_t inputs_bytes(void) { return sizeof(Inputs); }

/* Whether products of many rows with quantized weights are best made here too. */
int64_t takes_many(void) { return VNNI; }

/* y [rows, n] = x [rows, ldx] times a matrix. Quantized weights want columns padded to whole groups, and room for
   rounded inputs. A thread takes STRIP blocks at a time through all rows of inputs, some after the others: so the weights
   stay in a cache. */
void product(const Matrix *m, const float *x, int64_t ldx, int64_t rows, Inputs *rounded, float *y, int64_t threads) {
    const int64_t groups = groups_of(m->k), few = rows <= ROWS ? 1 : STRIP, together = rows <= ROWS ? rows : ROWS;
#pragma omp parallel num_threads(threads)
    {
        if (is_quantized(m))
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) round_inputs(m->kind, x + r * ldx, groups, rounded + r * groups);
#pragma omp for schedule(guided, 4)
        for (int64_t strip = 0; strip < blocks_of(m); strip += few) {
            float out[ROWS * ROWS];
            for (int64_t at = 0; at < rows; at += together) {
                const int64_t count = rows - at < together ? rows - at : together;
                for (int64_t b = strip; b < strip + few && b < blocks_of(m); b++) {
                    const int64_t first = b * ROWS, n = m->n - first < ROWS ? m->n - first : ROWS;
                    block(m, first, n, x + at * ldx, ldx, rounded + at * groups, count, out);
                    for (int64_t r = 0; r < count; r++) memcpy(y + (at + r) * m->n + first, out + r * ROWS, n * 4);
                }
            }
        }
    }
}

/* x [rows, k] as a product with quantized weights sees it, for products of many rows by somebody else: each span of
   columns rounded to 16 bits, and widened again. */
void through_16_bits(const float *x, int64_t k, int64_t rows, int64_t span, float *out, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t first = r * k; first < (r + 1) * k; first += span) {
            const int64_t n = (r + 1) * k - first < span ? (r + 1) * k - first : span;
            const float scale = largest(x + first, n) / INPUT, step = scale > 1e-30f ? scale : 1e-30f;
            for (int64_t i = first; i < first + n; i++) out[i] = rintf(x[i] / step) * scale;
        }
    }
}

/* Rows of a quantized matrix as floats: row ids[i] to out + i * k. */
void rows_of(const Matrix *m, const int64_t *ids, int64_t count, float *out, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
#define CALL(kind) row_of_blocks(kind, m, ids[i], out + i * m->k)
        FOR_KIND(m->kind, CALL)
#undef CALL
    }
}

/* Rows first .. first + n of a quantized matrix as floats and transposed, [k, n]: for products of many rows, by somebody
   else. first begins a block. */
void widen(const Matrix *m, int64_t first, int64_t n, float *out, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < n; b += ROWS) {
        const int64_t count = n - b < ROWS ? n - b : ROWS;
#define CALL(kind) widen_block(kind, m, (first + b) / ROWS, count, out + b, n)
        FOR_KIND(m->kind, CALL)
#undef CALL
    }
}

#include "repack.h"

/* ---- quantization, as quant/rounding.py has it */

INLINE void row_of(int kind, const char *w, int64_t k, float *out) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) *(floats_at *)(out + i) = load(kind, w + i * size_of(kind));
    if (i < k) {
        char last[4 * LANES] = {0};
        float end[LANES];
        memcpy(last, w + i * size_of(kind), (k - i) * size_of(kind));
        *(floats_at *)end = load(kind, last);
        memcpy(out + i, end, (k - i) * 4);
    }
}

static void any_row(const Matrix *m, int64_t j, float *out) {
    const char *w = (const char *)m->data + j * m->k * size_of(m->kind);
    if (m->kind == F32) row_of(F32, w, m->k, out);
    else if (m->kind == BF16) row_of(BF16, w, m->k, out);
    else row_of(F16, w, m->k, out);
}

/* Blocks of INT8, and scale [n], of a matrix of floats of some kind. */
void to_int8(const Matrix *m, int8_t *packed, float *scale, int64_t threads) {
    const int64_t size = groups_of(m->k) * group_bytes(INT8);
#pragma omp parallel for schedule(dynamic, 2) num_threads(threads)
    for (int64_t b = 0; b < blocks_of(m); b++) {
        int8_t *to = packed + b * size;
        memset(to, 0, size);
        for (int lane = 0; lane < ROWS && b * ROWS + lane < m->n; lane++) {
            float row[m->k], top = 0;
            any_row(m, b * ROWS + lane, row);
            for (int64_t i = 0; i < m->k; i++) top = fabsf(row[i]) > top ? fabsf(row[i]) : top;
            scale[b * ROWS + lane] = top / 127;
            const float step = top / 127 > 1e-30f ? top / 127 : 1e-30f;
            for (int64_t i = 0; i < m->k; i++) to[(i / 2 * ROWS + lane) * 2 + i % 2] = (int8_t)rintf(row[i] / step);
        }
    }
}

INLINE float to_bf16(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}

/* Blocks of INT4, of a matrix of floats of some kind. */
void to_int4(const Matrix *m, const float *shares, int64_t n_shares, char *packed, int64_t threads) {
    const int64_t groups = groups_of(m->k);
#pragma omp parallel for schedule(dynamic, 2) num_threads(threads)
    for (int64_t b = 0; b < blocks_of(m); b++) {
        char *to = packed + b * groups * group_bytes(INT4);
        for (int64_t g = 0; g < groups; g++) { /* what is filled up is 0, that is 8 */
            memset(to + g * group_bytes(INT4), 0x88, 4 * ROWS * 4);
            memset(to + g * group_bytes(INT4) + 4 * ROWS * 4, 0, 2 * ROWS);
        }
        for (int lane = 0; lane < ROWS && b * ROWS + lane < m->n; lane++) {
            float row[groups * GROUP];
            memset(row, 0, sizeof row);
            any_row(m, b * ROWS + lane, row);
            for (int64_t g = 0; g < groups; g++) {
                const float *x = row + g * GROUP;
                float largest = x[0], least = INFINITY, scale = 0;
                for (int i = 1; i < GROUP; i++) largest = fabsf(x[i]) > fabsf(largest) ? x[i] : largest;
                for (int64_t s = 0; s < n_shares; s++) {
                    const float step = to_bf16(largest * (shares[s] / -8)), over = step == 0 ? 1 : step;
                    float error = 0;
                    for (int i = 0; i < GROUP; i++) {
                        float q = rintf(x[i] / over);
                        q = q > 7 ? 7 : q < -8 ? -8 : q;
                        error += (q * step - x[i]) * (q * step - x[i]);
                    }
                    if (error < least) least = error, scale = step;
                }
                char *at = to + g * group_bytes(INT4);
                uint32_t bits;
                memcpy(&bits, &scale, 4);
                ((uint16_t *)(at + 4 * ROWS * 4))[lane] = bits >> 16;
                for (int i = 0; i < GROUP; i++) {
                    float q = rintf(x[i] / (scale == 0 ? 1 : scale));
                    q = q > 7 ? 7 : q < -8 ? -8 : q;
                    ((uint32_t *)at)[i / 8 * ROWS + lane] ^= (((uint32_t)(int)q + 8) ^ 8) << (4 * (i % 8));
                }
            }
        }
    }
}

#include "affine.h"

/* ---- a decode step */

INLINE floats all(float x) { return (floats){0} + x; }

/* Lane by lane the larger one. */
INLINE floats larger(floats a, floats b) {
    const ints first = a > b;
    return (floats)(((ints)a & first) | ((ints)b & ~first));
}

/* exp for x <= 0, to a few units in the last place; below about -87 it is 0. */
INLINE floats exp_of(floats x) {
    const floats low = (floats){0} - 87.0f;
    const ints keep = x > low;
    x = larger(x, low);
    ints n = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, ints); /* rounds to nearest: x <= 0 */
    floats f = __builtin_convertvector(n, floats);
    floats r = multiply_add(f, all(2.12194440e-4f), multiply_add(f, all(-0.693359375f), x));
    floats p = multiply_add(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
    p = multiply_add(p, r, all(8.3334519073e-3f));
    p = multiply_add(p, r, all(4.1665795894e-2f));
    p = multiply_add(p, r, all(1.6666665459e-1f));
    p = multiply_add(p, r, all(5.0000001201e-1f));
    p = multiply_add(p * r, r, r) + 1.0f;
    return (floats)((ints)(p * (floats)((n + 127) << 23)) & keep);
}

INLINE floats sigmoid(floats x) {
    ints negative = x < 0;
    floats e = exp_of((floats)((ints)x | (int32_t)0x80000000)); /* of -|x| */
    floats top = (floats)(((ints)e & negative) | ((ints)((floats){0} + 1) & ~negative));
    return top / (1 + e);
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    floats s = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) s = multiply_add(load_floats(a + i), load_floats(b + i), s);
    float last = 0;
    for (; i < n; i++) last += a[i] * b[i];
    return sum(s) + last;
}

static void rms_norm(const float *x, const float *weight, int64_t n, double eps, float *out) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + (float)eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void rotate(float *x, const float *cos, const float *sin, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim / 2; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = even * sin[i] + odd * cos[i];
    }
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

/* The `sum` of each of LANES vectors, added up in the same order. */
INLINE floats sums_of(floats *v) {
    UNROLL for (int n = LANES / 2; n; n /= 2)
        UNROLL for (int i = 0; i < n; i++)
            v[i] = halves_of(v[2 * i], v[2 * i + 1], n, 0) + halves_of(v[2 * i], v[2 * i + 1], n, 1);
    return v[0];
}

/* The `dot`, times scale, of H queries with LANES / H keys, and a word to memory about the keys KEYS further on. Each key
   is loaded once: keys are so far apart that they share a few places in the fastest cache, and do not stay there. */
INLINE void dots(int H, const float *q, const float *keys, int64_t stride, int64_t d, float scale, float *out,
                 int64_t ldo) {
    const int K = LANES / H;
    floats acc[LANES], last = {0};
    UNROLL for (int i = 0; i < LANES; i++) acc[i] = (floats){0};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES)
        UNROLL for (int i = 0; i < K; i++) {
            const floats k = load_floats(keys + i * stride + c);
            __builtin_prefetch(keys + (KEYS + i) * stride + c);
            UNROLL for (int h = 0; h < H; h++)
                acc[h * K + i] = multiply_add(load_floats(q + h * d + c), k, acc[h * K + i]);
        }
    for (; c < d; c++)
        UNROLL for (int i = 0; i < LANES; i++) last[i] += q[i / K * d + c] * keys[i % K * stride + c];
    last = scale * (sums_of(acc) + last);
    UNROLL for (int h = 0; h < H; h++) memcpy(out + h * ldo, (float *)&last + h * K, K * sizeof *out);
}

/* To V vectors of the results of H heads, what n values bring; p is [heads, ldp]. */
INLINE void weigh(int H, int V, const float *p, int64_t ldp, const float *values, int64_t stride, int64_t n, float *out,
                  int64_t d) {
    floats acc[4][LANES];
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int u = 0; u < V; u++) acc[h][u] = load_floats(out + h * d + u * LANES);
    for (int64_t i = 0; i < n; i++, values += stride) {
        floats v[LANES];
        UNROLL for (int u = 0; u < V; u++) v[u] = load_floats(values + u * LANES);
        UNROLL for (int h = 0; h < H; h++)
            UNROLL for (int u = 0; u < V; u++) acc[h][u] = multiply_add(all(p[h * ldp + i]), v[u], acc[h][u]);
    }
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int u = 0; u < V; u++) *(floats_at *)(out + h * d + u * LANES) = acc[h][u];
}

/* What `run` keys score with H queries of theirs, and what `run` values bring to the results of H heads. */
INLINE void score(int H, const float *q, const float *k, int64_t stride, int64_t run, int64_t d, float scale, float *to,
                  int64_t ldt) {
    int64_t j = 0;
    for (; j + LANES / H <= run; j += LANES / H) dots(H, q, k + j * stride, stride, d, scale, to + j, ldt);
    for (; j < run; j++)
        for (int h = 0; h < H; h++) to[h * ldt + j] = scale * dot(q + h * d, k + j * stride, d);
}

INLINE void bring(int H, const float *p, int64_t ldp, const float *v, int64_t stride, int64_t run, float *out, int64_t d) {
    const int V = LANES / H;
    int64_t c = 0;
    for (; c + V * LANES <= d; c += V * LANES) weigh(H, V, p, ldp, v + c, stride, run, out + c, d);
    for (; c + LANES <= d; c += LANES) weigh(H, 1, p, ldp, v + c, stride, run, out + c, d);
    for (; c < d; c++)
        for (int h = 0; h < H; h++)
            for (int64_t j = 0; j < run; j++) out[h * d + c] += p[h * ldp + j] * v[j * stride + c];
}

/* How many parts a query's n positions are divided into, and how long they are at most: by n alone, so that its bits depend on
   nothing else. A part is all key heads of a stretch of positions, which is one stretch of memory. */
static int64_t parts_of(int64_t n) {
    const int64_t parts = (n + PART - 1) / PART;
    return parts < PARTS ? parts : PARTS;
}

static int64_t span_of(int64_t n) { return n ? (n + parts_of(n) - 1) / parts_of(n) : 0; }

/* What is said of a part: for each query head the weighted sum of its values [D], the largest score, the weights' sum. */
static int64_t part_floats(int64_t key_heads, int64_t heads, int64_t d) { return key_heads * heads * (d + 2); }

/* The positions first .. first + n of a sequence, seen by one query; q is [K, heads, D], scores has room for one float a
   position and query head. */
static void attend(const float *q, int64_t key_heads, int64_t heads, const float *keys, const float *values,
                   int64_t capacity, int64_t first, int64_t n, int64_t d, float *scores, float *out) {
    const int64_t stride = key_heads * d, padded = (n + LANES - 1) / LANES * LANES;
    const float scale = 1 / sqrtf(d);
    for (int64_t i = 0, slot = first % capacity, run; i < n; i += run, slot = slot + run == capacity ? 0 : slot + run) {
        run = n - i < capacity - slot ? n - i : capacity - slot;
        run = run < KEYS ? run : KEYS;
        for (int64_t g = 0; g < key_heads; g++) {
            const float *k = keys + slot * stride + g * d, *mine = q + g * heads * d;
            float *to = scores + g * heads * padded + i;
            int64_t h = 0;
            for (; h + 4 <= heads; h += 4) score(4, mine + h * d, k, stride, run, d, scale, to + h * padded, padded);
            for (; h + 2 <= heads; h += 2) score(2, mine + h * d, k, stride, run, d, scale, to + h * padded, padded);
            for (; h < heads; h++) score(1, mine + h * d, k, stride, run, d, scale, to + h * padded, padded);
        }
    }
    float *tops = out + key_heads * heads * d, *totals = tops + key_heads * heads;
    for (int64_t h = 0; h < key_heads * heads; h++) {
        float *s = scores + h * padded;
        for (int64_t i = n; i < padded; i++) s[i] = -INFINITY;
        floats total = {0}, most = load_floats(s);
        for (int64_t i = LANES; i < padded; i += LANES) most = larger(most, load_floats(s + i));
        tops[h] = most[0];
        for (int i = 1; i < LANES; i++) tops[h] = most[i] > tops[h] ? most[i] : tops[h];
        for (int64_t i = 0; i < padded; i += LANES) {
            const floats p = exp_of(load_floats(s + i) - tops[h]);
            *(floats_at *)(s + i) = p;
            total += p;
        }
        totals[h] = sum(total);
    }
    memset(out, 0, key_heads * heads * d * sizeof *out);
    for (int64_t i = 0, slot = first % capacity, run; i < n; i += run, slot = slot + run == capacity ? 0 : slot + run) {
        run = n - i < capacity - slot ? n - i : capacity - slot;
        run = run < VALUES ? run : VALUES;
        for (int64_t g = 0; g < key_heads; g++) {
            const float *v = values + slot * stride + g * d, *p = scores + g * heads * padded + i;
            float *mine = out + g * heads * d;
            int64_t h = 0;
            for (; h + 4 <= heads; h += 4) bring(4, p + h * padded, padded, v, stride, run, mine + h * d, d);
            for (; h + 2 <= heads; h += 2) bring(2, p + h * padded, padded, v, stride, run, mine + h * d, d);
            for (; h < heads; h++) bring(1, p + h * padded, padded, v, stride, run, mine + h * d, d);
        }
    }
}

/* The attention of query head h of so many, by what was said of its parts. */
static void merge(const float *said, int64_t parts, int64_t h, int64_t heads, int64_t d, float *out) {
    const int64_t size = heads * (d + 2), tops = heads * d + h, totals = tops + heads;
    float top = said[tops], total = 0;
    for (int64_t i = 1; i < parts; i++) top = said[i * size + tops] > top ? said[i * size + tops] : top;
    memset(out, 0, d * sizeof *out);
    for (int64_t i = 0; i < parts; i++) {
        const float *part = said + i * size, weight = exp_of(all(part[tops] - top))[0];
        total += weight * part[totals];
        for (int64_t c = 0; c < d; c++) out[c] += weight * part[h * d + c];
    }
    for (int64_t c = 0; c < d; c++) out[c] /= total;
}

static int64_t padded(int64_t n) { return groups_of(n) * GROUP; }

/* Floats for the scores of all heads in a part, and what decode wants as scratch: for `rows` tokens, each of which sees up
   to `keys` positions. */
static int64_t scores_of(const Model *m, int64_t keys) {
    const int64_t span = (keys + PARTS - 1) / PARTS;
    return m->n_heads * ((span < PART ? PART : span) + LANES);
}

int64_t scratch_floats(const Model *m, int64_t rows, int64_t keys, int64_t threads) {
    const int64_t q = padded(m->n_heads * m->head_dim), kv = m->n_kv_heads * m->head_dim;
    return rows * (padded(m->dim) + q + 2 * kv + padded(m->hidden_dim)) + threads * scores_of(m, keys) +
           rows * parts_of(keys) * part_floats(m->n_kv_heads, m->n_heads / m->n_kv_heads, m->head_dim);
}

/* How many positions the one at `last` sees. */
static int64_t seen(int64_t window, int64_t origin, int64_t last) {
    return window && last - window + 1 > origin ? window : last - origin + 1;
}

/* The kind that a layer's inputs are rounded for: INT8 is alone in a layer, and all others take the same. */
static int inputs_for(const Layer *l) {
    const Matrix *all[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->w1, &l->w2, &l->w3};
    for (int i = 0; i < 7; i++)
        if (is_quantized(all[i])) return all[i]->kind;
    return F32;
}

/* `rows` tokens, of as many sequences or fewer, through all layers. Those of one sequence must not be so many that one
   takes the slot of a key that another sees.
   which: the row of the cache that each has; positions, origins: where each is and where it began;
   cos, sin: [rows, D / 2]; h: [rows, dim], embeddings in, hidden states out, normalised if the model has a last norm;
   rounded: room for the widest inputs, where weights are quantized. */
void decode(const Model *m, int64_t rows, const int64_t *which, const int64_t *positions, const int64_t *origins,
            const float *cos, const float *sin, int64_t most_keys, float *h, float *scratch, Inputs *rounded,
            int64_t threads) {
    const int64_t dim = m->dim, d = m->head_dim, kv_heads = m->n_kv_heads, heads = m->n_heads / kv_heads;
    const int64_t ldd = padded(dim), ldq = padded(m->n_heads * d), ldkv = kv_heads * d, ldw = padded(m->hidden_dim);
    float *x = scratch, *q = x + rows * ldd, *k = q + rows * ldq, *v = k + rows * ldkv, *wide = v + rows * ldkv;
    const int64_t most_parts = parts_of(most_keys);
    float *all_scores = wide + rows * ldw, *said = all_scores + threads * scores_of(m, most_keys);
    memset(scratch, 0, (all_scores - scratch) * sizeof *scratch); /* what pads columns is 0 */

#pragma omp parallel num_threads(threads)
    for (int64_t l = 0; l < m->n_layers; l++) {
        const Layer *layer = m->layers + l;
        const int kind = inputs_for(layer), rounds = is_blocks(kind);
        float out[rows * ROWS], gate[rows * ROWS], *scores = all_scores + omp_get_thread_num() * scores_of(m, most_keys);

#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            rms_norm(h + r * dim, layer->attention_norm, dim, m->eps, x + r * ldd);
            if (rounds) round_inputs(kind, x + r * ldd, ldd / GROUP, rounded + r * (ldd / GROUP));
        }
        const int64_t bq = blocks_of(&layer->wq), bk = blocks_of(&layer->wk), bv = blocks_of(&layer->wv);
#pragma omp for schedule(guided, 4)
        for (int64_t b = 0; b < bq + bk + bv; b++) {
            const Matrix *w = b < bq ? &layer->wq : b < bq + bk ? &layer->wk : &layer->wv;
            float *to = b < bq ? q : b < bq + bk ? k : v;
            const int64_t ld = b < bq ? ldq : ldkv, first = (b < bq ? b : b < bq + bk ? b - bq : b - bq - bk) * ROWS;
            const int64_t n = w->n - first < ROWS ? w->n - first : ROWS;
            block(w, first, n, x, ldd, rounded, rows, out);
            for (int64_t r = 0; r < rows; r++) memcpy(to + r * ld + first, out + r * ROWS, n * 4);
        }
        const int64_t row_floats = layer->capacity * kv_heads * d;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * kv_heads; i++) { /* all keys are there before the first query looks */
            const int64_t r = i / kv_heads, g = i % kv_heads;
            const int64_t at = which[r] * row_floats + (positions[r] % layer->capacity * kv_heads + g) * d;
            float *mine = q + r * ldq + g * heads * d;
            for (int64_t j = 0; j < heads; j++) rotate(mine + j * d, cos + r * d / 2, sin + r * d / 2, d);
            rotate(k + r * ldkv + g * d, cos + r * d / 2, sin + r * d / 2, d);
            memcpy(layer->keys + at, k + r * ldkv + g * d, d * 4);
            memcpy(layer->values + at, v + r * ldkv + g * d, d * 4);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < rows * most_parts; i++) {
            const int64_t r = i / most_parts, n = seen(layer->window, origins[r], positions[r]);
            const int64_t from = i % most_parts * span_of(n), count = n - from < span_of(n) ? n - from : span_of(n);
            if (count > 0)
                attend(q + r * ldq, kv_heads, heads, layer->keys + which[r] * row_floats,
                       layer->values + which[r] * row_floats, layer->capacity, positions[r] - n + 1 + from, count, d,
                       scores, said + i * part_floats(kv_heads, heads, d));
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * m->n_heads; i++) {
            const int64_t r = i / m->n_heads, h = i % m->n_heads, n = seen(layer->window, origins[r], positions[r]);
            merge(said + r * most_parts * part_floats(kv_heads, heads, d), (n + span_of(n) - 1) / span_of(n), h,
                  m->n_heads, d, q + r * ldq + h * d);
        }
        if (rounds)
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) round_inputs(kind, q + r * ldq, ldq / GROUP, rounded + r * (ldq / GROUP));
#pragma omp for schedule(guided, 4)
        for (int64_t b = 0; b < blocks_of(&layer->wo); b++) {
            const int64_t first = b * ROWS, n = dim - first < ROWS ? dim - first : ROWS;
            block(&layer->wo, first, n, q, ldq, rounded, rows, out);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < n; j++) h[r * dim + first + j] += out[r * ROWS + j];
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            rms_norm(h + r * dim, layer->ffn_norm, dim, m->eps, x + r * ldd);
            if (rounds) round_inputs(kind, x + r * ldd, ldd / GROUP, rounded + r * (ldd / GROUP));
        }
#pragma omp for schedule(guided, 4)
        for (int64_t b = 0; b < blocks_of(&layer->w1); b++) {
            const int64_t first = b * ROWS, n = m->hidden_dim - first < ROWS ? m->hidden_dim - first : ROWS;
            block(&layer->w1, first, n, x, ldd, rounded, rows, gate);
            block(&layer->w3, first, n, x, ldd, rounded, rows, out);
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t j = 0; j < ROWS; j += LANES) {
                    const floats g = load_floats(gate + r * ROWS + j);
                    *(floats_at *)(out + r * ROWS + j) *= g * sigmoid(g);
                }
                memcpy(wide + r * ldw + first, out + r * ROWS, n * 4);
            }
        }
        if (rounds)
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) round_inputs(kind, wide + r * ldw, ldw / GROUP, rounded + r * (ldw / GROUP));
#pragma omp for schedule(guided, 4)
        for (int64_t b = 0; b < blocks_of(&layer->w2); b++) {
            const int64_t first = b * ROWS, n = dim - first < ROWS ? dim - first : ROWS;
            block(&layer->w2, first, n, wide, ldw, rounded, rows, out);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < n; j++) h[r * dim + first + j] += out[r * ROWS + j];
        }
    }
    for (int64_t r = 0; m->norm && r < rows; r++) {
        rms_norm(h + r * dim, m->norm, dim, m->eps, x);
        memcpy(h + r * dim, x, dim * 4);
    }
}
