/* Products with weights of few bits: integers in blocks, multiplied as they are. A part of kernels.c.

   Weights lie in blocks of ROWS rows that are interleaved, a group of GROUP columns after the other, so that a block is one
   stretch of memory and a lane belongs to a row. Columns are filled up to whole groups. Of each eight columns the even ones
   are a unit, and then the odd ones: four bytes a row, which one instruction multiplies and adds up.

   Inputs are rounded to 16 bits, with a scale for each group, so that the sums within a group are whole numbers: exact, so
   that any order is right, and with VNNI instructions the two halves of an input are multiplied one after the other. */

enum {
    UNITS = 8, /* in a group */
    HALVES = ROWS / LANES,
    SUPER = 8, /* groups with a common scale of their scales, in the kinds of GGML's that end in K */
    INPUT = 127 * 257, /* what the largest input of a group becomes: 127 in its high byte, and in its low one */
    STRIP = 4, /* blocks that many rows of inputs are multiplied with before the next */
};

/* What a group holds, one after the other.
   Low: 4 x ROWS words (word j of a row has columns 8 j .. 8 j + 7, the first in the lowest bits) of the lowest four bits;
     in kinds of 8 bits UNITS x ROWS words, one for each unit. INT8: for every pair of columns ROWS pairs of signed bytes.
   High: of 5 bits ROWS words (byte c of a word has in bit u the fifth bit of column c of unit u); of 6 bits 2 x ROWS words
     (word p of a row has units 4 p .. 4 p + 3, two bits each, the first in the lowest).
   Scales, each for ROWS rows: INT4 bf16; fp16 and, in kinds with a minimum, another fp16; or a byte, twice: factors of the
     scale and of the minimum (AFFINE4, AFFINE5), or signed ones of the scales of 16 columns each (Q6_K).
   INT8 has a float for each row apart; AFFINE4, AFFINE5 and Q6_K have apart, for SUPER groups, fp16 numbers that the factors
   are multiplied by: [blocks, supers, 2 or (Q6_K) 1, ROWS]. */
INLINE int is_blocks(int kind) { return kind >= INT8; }
INLINE int bits_of(int kind) {
    return kind == INT8 || kind == Q8_0 ? 8 : kind == Q6_K ? 6 : kind == Q5_0 || kind == Q5_1 || kind == AFFINE5 ? 5 : 4;
}
INLINE int has_minimum(int kind) { return kind == Q4_1 || kind == Q5_1 || kind == AFFINE4 || kind == AFFINE5; }
INLINE int supers_of(int kind) { return kind == AFFINE4 || kind == AFFINE5 ? 2 : kind == Q6_K ? 1 : 0; }
INLINE int plane_bytes(int kind) { return ROWS * GROUP * bits_of(kind) / 8; }
INLINE int group_bytes(int kind) {
    return plane_bytes(kind) + (kind == INT8 ? 0 : 2 * ROWS) + (kind == Q4_1 || kind == Q5_1 ? 2 * ROWS : 0);
}

/* What is taken off a stored number is 1 << this; -1 where nothing is. */
INLINE int offset_of(int kind) {
    switch (kind) {
    case INT4: case Q4_0: return 3;
    case Q5_0: return 4;
    case Q6_K: return 5;
    case Q8_0: return 7;
#if defined(__AVX512VNNI__) && LANES == 16
    case INT8: return 7;
#endif
    default: return -1;
    }
}

#if defined(__AVX512VNNI__) && LANES == 16
#define VNNI 1
enum { OPERANDS = UNITS };
#else
#define VNNI 0
enum { OPERANDS = 2 * UNITS };
#endif

/* A group of inputs. With VNNI the high bytes of all, then the low ones, in the order of units; without, the numbers
   themselves, of each eight in the order 0 4 2 6 1 5 3 7, as two products in 16 bits want them. */
typedef struct {
    int16_t q[GROUP];
    float scale, low; /* low: scale times their sum, for what is taken off all of a group */
    int32_t sums[2];  /* of the first half, and of the second */
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

static void round_group(const float *x, Inputs *out) {
    const float scale = largest(x, GROUP) / INPUT, step = scale > 1e-30f ? scale : 1e-30f;
    int32_t q[GROUP], first = 0, second = 0;
    for (int i = 0; i < GROUP; i++) q[i] = (int32_t)rintf(x[i] / step);
    for (int i = 0; i < GROUP / 2; i++) first += q[i];
    for (int i = GROUP / 2; i < GROUP; i++) second += q[i];
    out->scale = scale, out->low = scale * (float)(first + second);
    out->sums[0] = first, out->sums[1] = second;
#if VNNI
    int8_t *high = (int8_t *)out->q, *low = high + GROUP;
    for (int j = 0; j < GROUP; j += 8)
        for (int i = 0; i < 8; i++) {
            high[j + i] = (int8_t)((q[j + i % 4 * 2 + i / 4] + 128) >> 8);
            low[j + i] = (int8_t)q[j + i % 4 * 2 + i / 4];
        }
#else
    static const int order[8] = {0, 4, 2, 6, 1, 5, 3, 7};
    for (int j = 0; j < GROUP; j += 8)
        for (int i = 0; i < 8; i++) out->q[j + i] = (int16_t)q[j + order[i]];
#endif
}

static void round_inputs(const float *x, int64_t groups, Inputs *out) {
    for (int64_t g = 0; g < groups; g++) round_group(x + g * GROUP, out + g);
}

/* 2 LANES bytes as as many halves, two in each word. */
INLINE words load_halves(const int8_t *p) {
#if defined(__AVX512BW__) && LANES == 16
    return (words)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__) && LANES == 8
    return (words)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
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

/* Unit u of a group as bytes from 0, four a word; not of INT8. */
INLINE words unit(int kind, const char *w, int u, int h) {
    if (bits_of(kind) == 8) return plane(w, u, h);
    words low = plane(w, u / 2, h);
    low = (u % 2 ? low >> 4 : low) & 0x0f0f0f0fu;
    if (bits_of(kind) == 4) return low;
    const int wide = bits_of(kind) - 4, each = 4 / wide * 2; /* units in a word of the high plane: 8, or 4 */
    const int shift = u % each * wide - 4;
    words high = plane(w + 4 * ROWS * 4, u / each, h);
    high = shift < 0 ? high << -shift : high >> shift;
    return low | (high & (wide == 1 ? 0x10101010u : 0x30303030u));
}

/* What inputs are multiplied with, for LANES rows of a group. */
INLINE void operands(int kind, const char *w, int h, words *out) {
#if VNNI
    if (kind == INT8) {
        const __m512i rows = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                              5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        UNROLL for (int j = 0; j < UNITS / 2; j++) {
            const __m512i a = _mm512_loadu_si512(w + j * 128), b = _mm512_loadu_si512(w + j * 128 + 64);
            const words x = (words)_mm512_permutex2var_epi16(a, rows, b); /* columns 0 1 4 5 of each eight */
            const words y = (words)_mm512_permutex2var_epi16(a, _mm512_add_epi16(rows, _mm512_set1_epi16(16)), b);
            out[2 * j] = ((x & 0x00ff00ffu) | (y & 0x00ff00ffu) << 8) ^ 0x80808080u;
            out[2 * j + 1] = ((x >> 8 & 0x00ff00ffu) | (y & 0xff00ff00u)) ^ 0x80808080u;
        }
        return;
    }
    UNROLL for (int u = 0; u < UNITS; u++) out[u] = unit(kind, w, u, h);
#else
    if (kind == INT8) {
        UNROLL for (int j = 0; j < UNITS / 2; j++) {
            words p[4]; /* columns 0 1, 2 3, 4 5, 6 7 of each eight */
            UNROLL for (int i = 0; i < 4; i++) p[i] = load_halves((const int8_t *)w + ((4 * j + i) * ROWS + h * LANES) * 2);
            UNROLL for (int i = 0; i < 2; i++) {
                out[4 * j + i] = (p[i] & 0xffffu) | p[i + 2] << 16;
                out[4 * j + 2 + i] = p[i] >> 16 | (p[i + 2] & 0xffff0000u);
            }
        }
        return;
    }
    UNROLL for (int u = 0; u < UNITS; u++) {
        const words four = unit(kind, w, u, h);
        out[2 * u] = four & 0x00ff00ffu;
        out[2 * u + 1] = four >> 8 & 0x00ff00ffu;
    }
#endif
}

#if !VNNI
/* To each lane the products of the two halves of u with those of v, all of them signed. */
INLINE ints add_products(ints acc, words u, words v) {
#if defined(__AVX512BW__) && LANES == 16
    return acc + (ints)_mm512_madd_epi16((__m512i)u, (__m512i)v);
#elif defined(__AVX2__) && LANES == 8
    return acc + (ints)_mm256_madd_epi16((__m256i)u, (__m256i)v);
#else
    return acc + (((ints)u << 16) >> 16) * (((ints)v << 16) >> 16) + ((ints)u >> 16) * ((ints)v >> 16);
#endif
}
#endif

INLINE words everywhere(const void *p) {
    uint32_t one;
    memcpy(&one, p, 4);
    return (words){0} + one;
}

/* The products of units first .. last with a group of inputs, added up. `apart`: in chains that need not wait for each
   other, where there are no other rows of inputs to go on with. */
INLINE ints whole(const words *u, const Inputs *x, int first, int last, int apart) {
#if VNNI
    const char *high = (const char *)x->q, *low = high + GROUP;
    __m512i a = _mm512_setzero_si512(), b = a;
    UNROLL for (int i = first; i < last; i++) a = _mm512_dpbusd_epi32(a, (__m512i)u[i], (__m512i)everywhere(high + 4 * i));
    if (apart) {
        UNROLL for (int i = first; i < last; i++) b = _mm512_dpbusd_epi32(b, (__m512i)u[i], (__m512i)everywhere(low + 4 * i));
        return ((ints)a << 8) + (ints)b;
    }
    a = _mm512_slli_epi32(a, 8);
    UNROLL for (int i = first; i < last; i++) a = _mm512_dpbusd_epi32(a, (__m512i)u[i], (__m512i)everywhere(low + 4 * i));
    return (ints)a;
#else
    ints acc[2] = {{0}};
    UNROLL for (int i = 2 * first; i < 2 * last; i++)
        acc[i % 2] = add_products(acc[i % 2], u[i], everywhere(x->q + 2 * i));
    (void)apart;
    return acc[0] + acc[1];
#endif
}

/* LANES bytes as floats. */
INLINE floats load_bytes(const char *p, int with_sign) {
#if defined(__AVX512F__)
    const __m128i b = _mm_loadu_si128((const __m128i *)p);
    return (floats)_mm512_cvtepi32_ps(with_sign ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b));
#elif defined(__AVX2__)
    const __m128i b = _mm_loadl_epi64((const __m128i *)p);
    return (floats)_mm256_cvtepi32_ps(with_sign ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
#else
    floats out;
    for (int i = 0; i < LANES; i++) out[i] = with_sign ? ((const int8_t *)p)[i] : ((const uint8_t *)p)[i];
    return out;
#endif
}

/* What LANES rows of a group are multiplied by, half by half, and what is then added: minus the minimum. */
typedef struct {
    floats step[2], add;
} Scales;

INLINE Scales scales_of(int kind, const char *w, const uint16_t *super, int64_t g, int h) {
    Scales s = {{{0}}, {0}};
    const char *at = w + plane_bytes(kind);
    const uint16_t *each = (const uint16_t *)at + h * LANES, *over = super + g / SUPER * supers_of(kind) * ROWS + h * LANES;
    switch (kind) {
    case INT8: s.step[0] = (floats){0} + 1; break;
    case INT4: s.step[0] = load_bf16(each); break;
    case AFFINE4: case AFFINE5:
        s.step[0] = load_f16(over) * load_bytes(at + h * LANES, 0);
        s.add = -(load_f16(over + ROWS) * load_bytes(at + ROWS + h * LANES, 0));
        break;
    case Q6_K:
        s.step[0] = load_f16(over) * load_bytes(at + h * LANES, 1);
        s.step[1] = load_f16(over) * load_bytes(at + ROWS + h * LANES, 1);
        break;
    default:
        s.step[0] = load_f16(each);
        if (has_minimum(kind)) s.add = load_f16(each + ROWS);
    }
    if (kind != Q6_K) s.step[1] = s.step[0];
    return s;
}

/* A block of ROWS rows of weights times R rows of inputs. */
INLINE void tile(int kind, int R, const char *w, const uint16_t *super, int64_t groups, const Inputs *x, float *out) {
    const int parts = kind == Q6_K ? 2 : 1, size = UNITS / parts;
    floats total[8][HALVES]; /* R of them are used */
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < HALVES; h++) total[r][h] = (floats){0};
    for (int64_t g = 0; g < groups; g++, w += group_bytes(kind)) {
        UNROLL for (int h = 0; h < HALVES; h++) {
            words u[OPERANDS];
            operands(kind, w, h, u);
            const Scales s = scales_of(kind, w, super, g, h);
            UNROLL for (int r = 0; r < R; r++) {
                const Inputs *in = x + r * groups + g;
                UNROLL for (int p = 0; p < parts; p++) {
                    ints sum = whole(u, in, p * size, (p + 1) * size, R < 4);
                    if (offset_of(kind) >= 0) {
                        const ints all = (ints){0} + (parts == 2 ? in->sums[p] : in->sums[0] + in->sums[1]);
                        sum -= all << (offset_of(kind) > 0 ? offset_of(kind) : 0);
                    }
                    const floats step = kind == INT8 ? (floats){0} + in->scale : s.step[p] * in->scale;
                    total[r][h] = multiply_add(step, __builtin_convertvector(sum, floats), total[r][h]);
                }
                if (has_minimum(kind)) total[r][h] = multiply_add(s.add, (floats){0} + in->low, total[r][h]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) memcpy(out + r * ROWS, total[r], ROWS * 4);
}

INLINE void tiles(int kind, const char *w, const uint16_t *super, int64_t groups, const Inputs *x, int64_t rows, float *out) {
    while (rows) {
        int64_t done;
        if (rows >= 8 && VNNI) tile(kind, done = 8, w, super, groups, x, out);
        else if (rows >= 4) tile(kind, done = 4, w, super, groups, x, out);
        else if (rows >= 2) tile(kind, done = 2, w, super, groups, x, out);
        else tile(kind, done = 1, w, super, groups, x, out);
        x += done * groups, out += done * ROWS, rows -= done;
    }
}

/* Where a block begins, and the numbers for its supers. */
INLINE const char *block_at(int kind, const Matrix *m, int64_t b) {
    return (const char *)m->data + b * groups_of(m->k) * group_bytes(kind);
}

INLINE const uint16_t *super_at(int kind, const Matrix *m, int64_t b) {
    return (const uint16_t *)m->scale + b * ((groups_of(m->k) + SUPER - 1) / SUPER) * supers_of(kind) * ROWS;
}

INLINE void block_of(int kind, const Matrix *m, int64_t b, const Inputs *x, int64_t rows, float *out) {
    tiles(kind, block_at(kind, m, b), super_at(kind, m, b), groups_of(m->k), x, rows, out);
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
    case AFFINE4: call(AFFINE4); break; \
    default: call(AFFINE5);          \
    }

/* out[r, 0..ROWS) for block b of a matrix; out is [rows, ROWS]. */
static void few_bits_block(const Matrix *m, int64_t b, const Inputs *x, int64_t rows, float *out) {
#define CALL(kind) block_of(kind, m, b, x, rows, out)
    FOR_KIND(m->kind, CALL)
#undef CALL
}

/* Row j of a matrix as floats, [k]: the numbers that its weights stand for. */
INLINE void row_of_blocks(int kind, const Matrix *m, int64_t j, float *out) {
    const int lane = j % ROWS, zero = offset_of(kind) < 0 ? 0 : 1 << offset_of(kind);
    const char *w = block_at(kind, m, j / ROWS);
    for (int64_t g = 0; g < groups_of(m->k); g++, w += group_bytes(kind)) {
        const Scales s = scales_of(kind, w, super_at(kind, m, j / ROWS), g, lane / LANES);
        words u[UNITS];
        if (kind != INT8)
            UNROLL for (int i = 0; i < UNITS; i++) u[i] = unit(kind, w, i, lane / LANES);
        for (int i = 0; i < GROUP && g * GROUP + i < m->k; i++) {
            if (kind == INT8) {
                out[g * GROUP + i] = ((const int8_t *)w)[(i / 2 * ROWS + lane) * 2 + i % 2] * ((const float *)m->scale)[j];
            } else {
                const int q = (u[i / 8 * 2 + i % 2][lane % LANES] >> (i % 8 / 2 * 8) & 0xff) - zero;
                out[g * GROUP + i] = q * s.step[i / 16][lane % LANES];
                if (has_minimum(kind)) out[g * GROUP + i] += s.add[lane % LANES];
            }
        }
    }
}

/* Block b of a matrix, `count` rows of it, as floats and transposed: column c at out + c * ld. */
INLINE void widen_block(int kind, const Matrix *m, int64_t b, int64_t count, float *out, int64_t ld) {
    const int zero = offset_of(kind) < 0 ? 0 : 1 << offset_of(kind);
    const char *w = block_at(kind, m, b);
    floats each[HALVES] = {{0}};
    if (kind == INT8) {
        float scale[ROWS] = {0};
        memcpy(scale, (const float *)m->scale + b * ROWS, count * 4);
        UNROLL for (int h = 0; h < HALVES; h++) each[h] = load_floats(scale + h * LANES);
    }
    for (int64_t g = 0; g < groups_of(m->k); g++, w += group_bytes(kind)) {
        float wide[GROUP][ROWS];
        UNROLL for (int h = 0; h < HALVES; h++) {
            const Scales s = scales_of(kind, w, super_at(kind, m, b), g, h);
            if (kind == INT8) {
                for (int i = 0; i < GROUP; i += 2) {
                    const ints u = (ints)load_halves((const int8_t *)w + (i / 2 * ROWS + h * LANES) * 2);
                    *(floats_at *)(wide[i] + h * LANES) = each[h] * __builtin_convertvector((u << 16) >> 16, floats);
                    *(floats_at *)(wide[i + 1] + h * LANES) = each[h] * __builtin_convertvector(u >> 16, floats);
                }
                continue;
            }
            UNROLL for (int u = 0; u < UNITS; u++) {
                const words four = unit(kind, w, u, h);
                UNROLL for (int c = 0; c < 4; c++) {
                    const floats q = __builtin_convertvector((ints)(four >> (8 * c) & 0xffu) - zero, floats);
                    floats value = s.step[u / 4] * q;
                    if (has_minimum(kind)) value += s.add;
                    *(floats_at *)(wide[u / 2 * 8 + u % 2 + 2 * c] + h * LANES) = value;
                }
            }
        }
        for (int64_t i = 0; i < GROUP && g * GROUP + i < m->k; i++) memcpy(out + (g * GROUP + i) * ld, wide[i], count * 4);
    }
}
