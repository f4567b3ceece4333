/* Products with weights of few bits: integers in blocks, multiplied as they are. A part of kernels.c.

   Weights lie in blocks of ROWS rows that are interleaved, a group of GROUP columns after the other, so that a block is one
   stretch of memory and a lane belongs to a row. Columns are filled up to whole groups. Of each eight columns the even ones
   are a unit, and then the odd ones: four bytes a row, which one instruction multiplies and adds up. (INT8 is older and
   different.)

   Inputs are rounded to 16 bits, with a scale for each group (INT8: for SPAN of them), so that the sums within are whole
   numbers: exact, so that any order is right, and with VNNI the two bytes of an input may be multiplied apart. */

#if defined(__x86_64__) && !defined(__AVX2__) /* unrolled for so few registers it takes a compiler minutes */
#pragma push_macro("UNROLL")
#undef UNROLL
#define UNROLL
#endif

enum {
    UNITS = 8, /* in a group */
    HALVES = ROWS / LANES,
    SUPER = 8, /* groups with a common scale of their scales, in the kinds of GGML's that end in K */
    INPUT = 127 * 257, /* what the largest input of a group becomes: 127 in its high byte, and in its low one */
    SPAN = 4,  /* groups of inputs that share a scale beside INT8 */
    STRIP = 4, /* blocks that many rows of inputs are multiplied with before the next */
    FURTHER = 8192, /* bytes of weights that are asked for before they are wanted */
};

#include "kinds.h"

#if defined(__AVX512VNNI__) && LANES == 16
#define VNNI 1
#else
#define VNNI 0
#endif

#if defined(__ARM_FEATURE_DOTPROD)
#define DOTPROD 1
#else
#define DOTPROD 0
#endif

#if DOTPROD && defined(__ARM_FEATURE_MATMUL_INT8)
#define MATRICES 1
#else
#define MATRICES 0
#endif

/* Rows of inputs that are multiplied with a group together: as many as the registers have room for sums of. */
#if LANES == 16
#define TOGETHER 8
#elif defined(__AVX2__) || defined(__aarch64__)
#define TOGETHER 4
#else
#define TOGETHER 1 /* there are too few registers, and a compiler takes a minute */
#endif

/* A group of inputs. For INT8 the numbers in their order. For other kinds, with VNNI: the high bytes of all, then the low
   ones, in the order of units; without: the numbers, of each eight in the order 0 4 2 6 1 5 3 7, for products in 16 bits.
   On Arm with DOTPROD: bytes as with VNNI, for INT8 too, in their order. */
typedef struct {
    int16_t q[GROUP];
    float scale, low;       /* low: scale times their sum, for what is taken off all of a group */
    int32_t sum, halves[2]; /* of all, of the first half, of the second */
} Inputs;

static int64_t groups_of(int64_t k) { return (k + GROUP - 1) / GROUP; }

/* The largest of n numbers without their signs: their bits, which have the same order. */
INLINE float largest(const float *x, int64_t n) {
    int32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float out;
    memcpy(&out, &top, 4);
    return out;
}

/* A number as byte i of the high ones, and of the low ones. */
INLINE void place_bytes(int32_t q, int i, int16_t *to) {
    int8_t *high = (int8_t *)to, *low = high + GROUP;
    high[i] = (int8_t)((q + 128) >> 8);
    low[i] = (int8_t)q;
}

/* A group of numbers in 16 bits, in the order for products of pairs. */
INLINE void place_pairs(const int32_t *q, int16_t *to) {
    static const int order[8] = {0, 4, 2, 6, 1, 5, 3, 7};
#if defined(__AVX512VBMI__)
    int16_t in_order[GROUP], at[GROUP];
    for (int i = 0; i < GROUP; i++) in_order[i] = (int16_t)q[i], at[i] = i / 8 * 8 + order[i % 8];
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(at), _mm512_loadu_si512(in_order)));
#else
    for (int j = 0; j < GROUP; j += 8)
        for (int i = 0; i < 8; i++) to[j + i] = (int16_t)q[j + order[i]];
#endif
}

/* A group of numbers in the order of `Inputs`, for all kinds but INT8. */
INLINE void place_inputs(const int32_t *q, int16_t *to) {
#if VNNI && defined(__AVX512VBMI__)
    __m512i low = {0}, high = {0}, order = {0}; /* lowest bytes as they are; the next ones, of numbers rounded to them */
    UNROLL for (int i = 0; i < 64; i++) ((char *)&order)[i] = (i < GROUP ? 65 : 0) + i % GROUP / 8 * 16 + i % 8 % 4 * 4 + i % 8 / 4 * 2;
    low = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_loadu_si512(q))),
                             _mm512_cvtepi32_epi16(_mm512_loadu_si512(q + 16)), 1);
    high = _mm512_add_epi16(low, _mm512_set1_epi16(128));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi8(low, order, high));
#elif VNNI || DOTPROD
    for (int j = 0; j < GROUP; j += 8)
        for (int i = 0; i < 8; i++) place_bytes(q[j + i % 4 * 2 + i / 4], j + i, to);
#else
    place_pairs(q, to);
#endif
}

/* in_pairs: for products in 16 bits, also with VNNI. */
static void round_inputs_as(int kind, int in_pairs, const float *x, int64_t groups, Inputs *out) {
    const int64_t most = kind == INT8 ? SPAN : 1;
    float scale = 0, step = 0;
    for (int64_t g = 0; g < groups; g++, x += GROUP, out++) {
        if (g % most == 0) {
            scale = largest(x, (groups - g < most ? groups - g : most) * GROUP) / INPUT;
            step = scale > 1e-30f ? scale : 1e-30f;
        }
        int32_t q[GROUP], first = 0, second = 0;
        for (int i = 0; i < GROUP; i++) q[i] = (int32_t)rintf(x[i] / step);
        for (int i = 0; i < GROUP / 2; i++) first += q[i];
        for (int i = GROUP / 2; i < GROUP; i++) second += q[i];
        out->scale = scale, out->low = scale * (float)(first + second);
        out->sum = first + second, out->halves[0] = first, out->halves[1] = second;
        if (kind == INT8 && DOTPROD)
            for (int i = 0; i < GROUP; i++) place_bytes(q[i], i, out->q);
        else if (kind == INT8)
            for (int i = 0; i < GROUP; i++) out->q[i] = (int16_t)q[i];
        else if (in_pairs) place_pairs(q, out->q);
        else place_inputs(q, out->q);
    }
}

static void round_inputs(int kind, const float *x, int64_t groups, Inputs *out) { round_inputs_as(kind, 0, x, groups, out); }

/* 2 LANES bytes as as many halves, two in each word. */
INLINE words load_halves(const int8_t *p) {
#if defined(__AVX512BW__) && LANES == 16
    return (words)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__) && LANES == 8
    return (words)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
    return neon_load_halves(p);
#else
    int16_t wide[2 * LANES];
    words out;
    for (int i = 0; i < 2 * LANES; i++) wide[i] = p[i];
    memcpy(&out, wide, sizeof out);
    return out;
#endif
}

/* The words of rows h LANES .. of a plane. */
INLINE words plane(const char *w, int j, int h) { return *(const words_at *)(w + (j * ROWS + h * LANES) * 4); }

/* What a place in the table of IQ4_NL and IQ4_XS means, and 128: ggml's `kvalues_iq4nl`. */
static const uint8_t VALUE_AT[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

INLINE words values_at(words places) {
#if defined(__AVX512BW__) && LANES == 16
    return (words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)VALUE_AT)), (__m512i)places);
#elif defined(__AVX2__) && LANES == 8
    return (words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)VALUE_AT)), (__m256i)places);
#elif defined(__aarch64__)
    return (words)vqtbl1q_u8(vld1q_u8(VALUE_AT), (uint8x16_t)places);
#else
    uint8_t bytes[4 * LANES];
    memcpy(bytes, &places, sizeof bytes);
    for (int i = 0; i < 4 * LANES; i++) bytes[i] = VALUE_AT[bytes[i]];
    memcpy(&places, bytes, sizeof bytes);
    return places;
#endif
}

/* Unit u of a group as bytes from 0, four a word; not of INT8. */
INLINE words unit(int kind, const char *w, int u, int h) {
    if (bits_of(kind) == 8) return plane(w, u, h);
    if (bits_of(kind) < 4) {
        const words two = plane(w, u / 4, h) >> (u % 4 * 2) & 0x03030303u;
        return bits_of(kind) == 2 ? two : two | (plane(w + 2 * ROWS * 4, 0, h) >> u & 0x01010101u) << 2;
    }
    words low = plane(w, u / 2, h);
    low = (u % 2 ? low >> 4 : low) & 0x0f0f0f0fu;
    if (has_table(kind)) return values_at(low);
    if (bits_of(kind) == 4) return low;
    const int wide = bits_of(kind) - 4, each = 4 / wide * 2; /* units in a word of the high plane: 8, or 4 */
    const int shift = u % each * wide - 4;
    words high = plane(w + 4 * ROWS * 4, u / each, h);
    high = shift < 0 ? high << -shift : high >> shift;
    return low | (high & (wide == 1 ? 0x10101010u : 0x30303030u));
}

/* To each lane the products of the two halves of u with those of v, all of them signed. */
INLINE ints add_products(ints acc, words u, words v) {
#if defined(__AVX512VNNI__) && LANES == 16
    return (ints)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)u, (__m512i)v);
#elif defined(__AVX512BW__) && LANES == 16
    return acc + (ints)_mm512_madd_epi16((__m512i)u, (__m512i)v);
#elif defined(__AVX2__) && LANES == 8
    return acc + (ints)_mm256_madd_epi16((__m256i)u, (__m256i)v);
#else
    return acc + (((ints)u << 16) >> 16) * (((ints)v << 16) >> 16) + ((ints)u >> 16) * ((ints)v >> 16);
#endif
}

INLINE words everywhere(const void *p) {
    uint32_t one;
    memcpy(&one, p, 4);
    return (words){0} + one;
}

/* The bytes o and o + 2 of a unit as numbers in 16 bits. */
INLINE words two_of(int kind, const char *w, int u, int o, int h) {
    if (bits_of(kind) == 4 && !has_table(kind)) return plane(w, u / 2, h) >> (u % 2 * 4 + o * 8) & 0x000f000fu;
    return unit(kind, w, u, h) >> (o * 8) & 0x00ff00ffu;
}

#if defined(__aarch64__)
#include "arm_blocks.h"
#else
/* The products of units first .. last with the group that each of R rows of inputs has at x, x + ld, .., added up: in
   several chains of additions, which need not wait for each other. */
INLINE void whole(int kind, int R, const char *w, const Inputs *x, int64_t ld, int first, int last, ints (*out)[HALVES]) {
    ints acc[TOGETHER][HALVES][2][2];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < HALVES; h++)
            UNROLL for (int c = 0; c < 4; c++) acc[r][h][c / 2][c % 2] = (ints){0};
    UNROLL for (int u = first; u < last; u++) {
        const int chain = R == 1 ? u % 2 : 0;
        UNROLL for (int o = 0; o < 2; o++) { /* with VNNI high bytes of inputs and low ones, else bytes o and o + 2 of a unit */
            words v[HALVES];
            UNROLL for (int h = 0; h < HALVES; h++) v[h] = VNNI ? unit(kind, w, u, h) : two_of(kind, w, u, o, h);
            UNROLL for (int r = 0; r < R; r++) {
                const words in = everywhere((const char *)x[r * ld].q + (VNNI ? 4 * u + GROUP * o : 8 * u + 4 * o));
                UNROLL for (int h = 0; h < HALVES; h++) {
                    ints *to = &acc[r][h][o][chain];
#if VNNI
                    *to = (ints)_mm512_dpbusd_epi32((__m512i)*to, (__m512i)v[h], (__m512i)in);
#else
                    *to = add_products(*to, v[h], in);
#endif
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int h = 0; h < HALVES; h++) {
            const ints a = acc[r][h][0][0] + acc[r][h][0][1], b = acc[r][h][1][0] + acc[r][h][1][1];
            out[r][h] = VNNI ? (a << 8) + b : a + b;
        }
    }
}
#endif

/* LANES bytes as floats. */
INLINE floats load_bytes(const char *p, int with_sign) {
#if defined(__AVX512F__)
    const __m128i b = _mm_loadu_si128((const __m128i *)p);
    return (floats)_mm512_cvtepi32_ps(with_sign ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b));
#elif defined(__AVX2__)
    const __m128i b = _mm_loadl_epi64((const __m128i *)p);
    return (floats)_mm256_cvtepi32_ps(with_sign ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
#elif defined(__aarch64__)
    return neon_load_bytes(p, with_sign);
#else
    floats out;
    for (int i = 0; i < LANES; i++) out[i] = with_sign ? ((const int8_t *)p)[i] : ((const uint8_t *)p)[i];
    return out;
#endif
}

/* What LANES rows of a group are multiplied by, half by half, and what is then added: minus the minimum. */
typedef struct {
    floats step[2], add[2];
} Scales;

INLINE Scales scales_of(int kind, const char *w, const uint16_t *super, int64_t g, int h) {
    Scales s = {{{0}}, {{0}}};
    const char *at = w + plane_bytes(kind);
    const uint16_t *each = (const uint16_t *)at + h * LANES, *over = super + g / SUPER * supers_of(kind) * ROWS + h * LANES;
    switch (kind) {
    case INT4: s.step[0] = load_bf16(each); break;
    case AFFINE4: case AFFINE5:
        s.step[0] = load_f16(over) * load_bytes(at + h * LANES, 0);
        s.add[0] = -(load_f16(over + ROWS) * load_bytes(at + ROWS + h * LANES, 0));
        break;
    case IQ4_XS: s.step[0] = load_f16(over) * load_bytes(at + h * LANES, 1); break;
    case Q2_K:
        for (int p = 0; p < 2; p++) {
            const ints both = __builtin_convertvector(load_bytes(at + p * ROWS + h * LANES, 0), ints);
            s.step[p] = load_f16(over) * __builtin_convertvector(both & 15, floats);
            s.add[p] = -(load_f16(over + ROWS) * __builtin_convertvector(both >> 4, floats));
        }
        break;
    case Q6_K: case Q3_K:
        s.step[0] = load_f16(over) * load_bytes(at + h * LANES, 1);
        s.step[1] = load_f16(over) * load_bytes(at + ROWS + h * LANES, 1);
        break;
    default:
        s.step[0] = load_f16(each);
        if (has_minimum(kind)) s.add[0] = load_f16(each + ROWS);
    }
    if (!is_halved(kind)) s.step[1] = s.step[0], s.add[1] = s.add[0];
    return s;
}

/* A word to memory, for the second cache, about what comes after a group: the processor's own guesses reach far enough as
   long as rows of inputs are few. */
INLINE void ask_for(int kind, int R, const char *w) {
    if (R > 2)
        UNROLL for (int c = 0; c < group_bytes(kind); c += LINE) __builtin_prefetch(w + FURTHER + c, 0, 2);
}

/* A block of weights times R rows of inputs. */
INLINE void unit_tile(int kind, int R, const char *w, const uint16_t *super, int64_t groups, const Inputs *x, float *out) {
    const int parts = is_halved(kind) ? 2 : 1, part = UNITS / parts;
    floats total[TOGETHER][HALVES];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < HALVES; h++) total[r][h] = (floats){0};
    for (int64_t g = 0; g < groups; g++, w += group_bytes(kind)) {
        ask_for(kind, R, w);
        UNROLL for (int p = 0; p < parts; p++) {
            ints sums[TOGETHER][HALVES];
            whole(kind, R, w, x + g, groups, p * part, (p + 1) * part, sums);
            UNROLL for (int h = 0; h < HALVES; h++) {
                const Scales s = scales_of(kind, w, super, g, h);
                UNROLL for (int r = 0; r < R; r++) {
                    const Inputs *in = x + r * groups + g;
                    floats *to = &total[r][h];
                    if (offset_of(kind) >= 0)
                        sums[r][h] -= ((ints){0} + (parts == 2 ? in->halves[p] : in->sum)) << offset_of(kind);
                    *to = multiply_add(s.step[p] * in->scale, __builtin_convertvector(sums[r][h], floats), *to);
                    const float low = parts == 2 ? in->scale * (float)in->halves[p] : in->low;
                    if (has_minimum(kind)) *to = multiply_add(s.add[p], (floats){0} + low, *to);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) memcpy(out + r * ROWS, total[r], ROWS * 4);
}

#if !defined(__aarch64__)
/* The same with INT8, but for the scales of the rows. */
INLINE void int8_tile(int R, const char *w, int64_t groups, const Inputs *x, float *out) {
    enum { CHAINS = 4 }; /* of additions that need not wait for each other; whole numbers, so any order is right */
    floats total[TOGETHER][HALVES];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < HALVES; h++) total[r][h] = (floats){0};
    for (int64_t g = 0; g < groups; g += SPAN) {
        ints acc[TOGETHER][HALVES][CHAINS];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int h = 0; h < HALVES; h++)
                UNROLL for (int i = 0; i < CHAINS; i++) acc[r][h][i] = (ints){0};
        for (int64_t s = g; s < groups && s < g + SPAN; s++, w += group_bytes(INT8)) {
            ask_for(INT8, R, w);
            UNROLL for (int i = 0; i < GROUP / 2; i++) {
                UNROLL for (int h = 0; h < HALVES; h++) {
                    const words u = load_halves((const int8_t *)w + (i * ROWS + h * LANES) * 2);
                    UNROLL for (int r = 0; r < R; r++) {
                        ints *to = &acc[r][h][R == 1 ? i % CHAINS : R == 2 ? i % 2 : 0];
                        *to = add_products(*to, u, everywhere(x[r * groups + s].q + 2 * i));
                    }
                }
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            UNROLL for (int h = 0; h < HALVES; h++) {
                const ints all = (acc[r][h][0] + acc[r][h][1]) + (acc[r][h][2] + acc[r][h][3]);
                total[r][h] = multiply_add((floats){0} + x[r * groups + g].scale, __builtin_convertvector(all, floats),
                                           total[r][h]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) memcpy(out + r * ROWS, total[r], ROWS * 4);
}
#endif

INLINE void tile(int kind, int R, const char *w, const uint16_t *super, int64_t groups, const Inputs *x, float *out) {
    if (kind == INT8) int8_tile(R, w, groups, x, out);
    else unit_tile(kind, R, w, super, groups, x, out);
}

/* Where a block begins, and the numbers for its supers. */
INLINE const char *block_at(int kind, const Matrix *m, int64_t b) {
    return (const char *)m->data + b * groups_of(m->k) * group_bytes(kind);
}

INLINE const uint16_t *super_at(int kind, const Matrix *m, int64_t b) {
    return (const uint16_t *)m->scale + b * ((groups_of(m->k) + SUPER - 1) / SUPER) * supers_of(kind) * ROWS;
}

INLINE void tiles(int kind, const Matrix *m, int64_t b, const Inputs *x, int64_t rows, float *out) {
    const char *w = block_at(kind, m, b);
    const uint16_t *super = super_at(kind, m, b);
    const int64_t groups = groups_of(m->k);
    for (int64_t at = 0, done; at < rows; at += done) {
        const int64_t left = rows - at, passes = (left + TOGETHER - 1) / TOGETHER;
        done = (left + passes - 1) / passes;
#define TILE_OF(R) case R: tile(kind, R, w, super, groups, x + at * groups, out + at * ROWS); break
        switch (done) {
            TILE_OF(1);
#if TOGETHER > 1
            TILE_OF(2); TILE_OF(3); TILE_OF(4);
#endif
#if TOGETHER > 4
            TILE_OF(5); TILE_OF(6); TILE_OF(7); TILE_OF(8);
#endif
        }
#undef TILE_OF
    }
    if (kind == INT8)
        for (int64_t j = b * ROWS; j < (b + 1) * ROWS && j < m->n; j++)
            for (int64_t r = 0; r < rows; r++) out[r * ROWS + j % ROWS] *= ((const float *)m->scale)[j];
}

/* `call(kind)` with a kind that the compiler knows. */
#define FOR_KIND(kind, call)         \
    switch (kind) {                  \
    case INT8: call(INT8); break;    \
    case INT4: call(INT4); break;    \
    case Q8_0: call(Q8_0); break;    \
    case Q4_0: call(Q4_0); break;    \
    case Q4_1: call(Q4_1); break;    \
    case Q5_0: call(Q5_0); break;    \
    case Q5_1: call(Q5_1); break;    \
    case Q6_K: call(Q6_K); break;    \
    case Q2_K: call(Q2_K); break;    \
    case Q3_K: call(Q3_K); break;    \
    case IQ4_NL: call(IQ4_NL); break; \
    case IQ4_XS: call(IQ4_XS); break; \
    case AFFINE4: call(AFFINE4); break; \
    default: call(AFFINE5);          \
    }

/* out[r, 0..ROWS) for block b of a matrix; out is [rows, ROWS]. */
static void few_bits_block(const Matrix *m, int64_t b, const Inputs *x, int64_t rows, float *out) {
#define CALL(kind) tiles(kind, m, b, x, rows, out)
    FOR_KIND(m->kind, CALL)
#undef CALL
}

#include "unpack.h"

#if defined(__x86_64__) && !defined(__AVX2__)
#pragma pop_macro("UNROLL")
#endif
