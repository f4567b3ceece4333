/* `whole` and `int8_tile` of blocks.h on Arm, whose vectors have four rows. A part of blocks.h.

   With SDOT four columns of four rows are multiplied at once with the high bytes of inputs, and then with the low ones, as
   with VNNI. With SMMLA eight columns of two rows with both: a matrix [2, 8] times one [8, 2]. That needs columns of two
   units side by side, so it takes fewer instructions from two rows of inputs on. Without either, products are of 16 bits.
   All sums are of whole numbers, so the bits are the same. */

#if DOTPROD

/* The sums with high bytes of inputs, and with low ones, as sums with inputs. */
INLINE ints both(int32x4_t high, int32x4_t low) { return ((ints)high << 8) + (ints)low; }

#if MATRICES
typedef uint8x16_t codes; /* of weights: USDOT takes bytes from 0, and those of inputs with a sign */
#define DOT vusdotq_laneq_s32
INLINE int is_shifted(int kind) { return 0; }
#else
typedef int8x16_t codes;
#define DOT vdotq_laneq_s32
INLINE int is_shifted(int kind) { return bits_of(kind) == 8 || has_table(kind); } /* SDOT takes signs: 128 off, and added again to the sum */
#endif

INLINE int32x4_t dots_of_units(const words *four, int8x16_t x, int32x4_t acc) {
    acc = DOT(acc, (codes)four[0], x, 0), acc = DOT(acc, (codes)four[1], x, 1);
    return acc = DOT(acc, (codes)four[2], x, 2), DOT(acc, (codes)four[3], x, 3);
}

INLINE void whole_by_dots(int kind, int R, const char *w, const Inputs *x, int64_t ld, int first, int last, int h,
                          ints (*out)[HALVES]) {
    int32x4_t high[TOGETHER], low[TOGETHER];
    UNROLL for (int r = 0; r < R; r++) high[r] = low[r] = vdupq_n_s32(0);
    UNROLL for (int u = first; u < last; u += 4) {
        words four[4];
        UNROLL for (int i = 0; i < 4; i++) four[i] = unit(kind, w, u + i, h) ^ (is_shifted(kind) ? 0x80808080u : 0);
        UNROLL for (int r = 0; r < R; r++) {
            const int8_t *in = (const int8_t *)x[r * ld].q + 4 * u;
            high[r] = dots_of_units(four, vld1q_s8(in), high[r]);
            low[r] = dots_of_units(four, vld1q_s8(in + GROUP), low[r]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        out[r][h] = both(high[r], low[r]);
        if (is_shifted(kind)) out[r][h] += x[r * ld].sum << 7;
    }
}

INLINE int32x4_t dots_of_pairs(const int8x16_t *four, int8x16_t x, int32x4_t acc) {
    acc = vdotq_laneq_s32(acc, four[0], x, 0), acc = vdotq_laneq_s32(acc, four[1], x, 1);
    return acc = vdotq_laneq_s32(acc, four[2], x, 2), vdotq_laneq_s32(acc, four[3], x, 3);
}

/* Eight rows of INT8, which begin at w, times the n groups that each of R rows of inputs has at x, x + ld, .. */
INLINE void int8_by_dots(int R, const int8_t *w, const Inputs *x, int64_t ld, int64_t n, ints (*out)[2]) {
    int32x4_t high[TOGETHER][2], low[TOGETHER][2];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < 2; h++) high[r][h] = low[r][h] = vdupq_n_s32(0);
    for (int64_t s = 0; s < n; s++) {
        for (int i = 0; i < GROUP; i += 16, w += 16 * ROWS) {
            int8x16_t four[2][4]; /* of four rows four columns each, four times */
            UNROLL for (int c = 0; c < 4; c++) {
                const int16x8_t a = (int16x8_t)vld1q_s8(w + 4 * c * ROWS), b = (int16x8_t)vld1q_s8(w + (4 * c + 2) * ROWS);
                four[0][c] = (int8x16_t)vzip1q_s16(a, b), four[1][c] = (int8x16_t)vzip2q_s16(a, b);
            }
            UNROLL for (int r = 0; r < R; r++) {
                const int8_t *in = (const int8_t *)x[r * ld + s].q + i;
                UNROLL for (int h = 0; h < 2; h++) {
                    high[r][h] = dots_of_pairs(four[h], vld1q_s8(in), high[r][h]);
                    low[r][h] = dots_of_pairs(four[h], vld1q_s8(in + GROUP), low[r][h]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < 2; h++) out[r][h] = both(high[r][h], low[r][h]);
}

#if MATRICES

/* Eight high bytes of inputs, and the low ones of the same: the two columns of a matrix. */
INLINE int8x16_t columns_of(const int8_t *in) { return vcombine_s8(vld1_s8(in), vld1_s8(in + GROUP)); }

/* The same of two products of matrices, two rows of weights each. */
INLINE ints both_of(int32x4_t a, int32x4_t b) { return both(vuzp1q_s32(a, b), vuzp2q_s32(a, b)); }

INLINE void whole_by_matrices(int kind, int R, const char *w, const Inputs *x, int64_t ld, int first, int last, int h,
                              ints (*out)[HALVES]) {
    int32x4_t acc[TOGETHER][2];
    UNROLL for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = vdupq_n_s32(0);
    UNROLL for (int u = first; u < last; u += 2) {
        const uint32x4_t a = (uint32x4_t)unit(kind, w, u, h), b = (uint32x4_t)unit(kind, w, u + 1, h);
        const uint8x16_t top = (uint8x16_t)vzip1q_u32(a, b), end = (uint8x16_t)vzip2q_u32(a, b);
        UNROLL for (int r = 0; r < R; r++) {
            const int8x16_t in = columns_of((const int8_t *)x[r * ld].q + 4 * u);
            acc[r][0] = vusmmlaq_s32(acc[r][0], top, in), acc[r][1] = vusmmlaq_s32(acc[r][1], end, in);
        }
    }
    UNROLL for (int r = 0; r < R; r++) out[r][h] = both_of(acc[r][0], acc[r][1]);
}

INLINE void int8_by_matrices(int R, const int8_t *w, const Inputs *x, int64_t ld, int64_t n, ints (*out)[2]) {
    int32x4_t acc[TOGETHER][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int i = 0; i < 4; i++) acc[r][i] = vdupq_n_s32(0);
    for (int64_t s = 0; s < n; s++) {
        for (int i = 0; i < GROUP; i += 8, w += 8 * ROWS) {
            int16x8_t pair[4];
            UNROLL for (int c = 0; c < 4; c++) pair[c] = (int16x8_t)vld1q_s8(w + 2 * c * ROWS);
            const int32x4_t a = (int32x4_t)vzip1q_s16(pair[0], pair[1]), b = (int32x4_t)vzip1q_s16(pair[2], pair[3]);
            const int32x4_t c = (int32x4_t)vzip2q_s16(pair[0], pair[1]), d = (int32x4_t)vzip2q_s16(pair[2], pair[3]);
            const int32x4_t rows[4] = {vzip1q_s32(a, b), vzip2q_s32(a, b), vzip1q_s32(c, d), vzip2q_s32(c, d)};
            UNROLL for (int r = 0; r < R; r++) {
                const int8x16_t in = columns_of((const int8_t *)x[r * ld + s].q + i);
                UNROLL for (int j = 0; j < 4; j++) acc[r][j] = vmmlaq_s32(acc[r][j], (int8x16_t)rows[j], in);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < 2; h++) out[r][h] = both_of(acc[r][2 * h], acc[r][2 * h + 1]);
}
#endif

#else /* products of 16 bits: two columns of four rows */

INLINE void whole_by_halves(int kind, int R, const char *w, const Inputs *x, int64_t ld, int first, int last, int h,
                            ints (*out)[HALVES]) {
    int32x4_t acc[TOGETHER][2];
    UNROLL for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = vdupq_n_s32(0);
    UNROLL for (int u = first; u < last; u++) {
        UNROLL for (int o = 0; o < 2; o++) {
            const int16x8_t two = (int16x8_t)two_of(kind, w, u, o, h);
            UNROLL for (int r = 0; r < R; r++) {
                const int16x8_t in = (int16x8_t)everywhere(x[r * ld].q + 4 * u + 2 * o);
                acc[r][0] = vmlal_s16(acc[r][0], vget_low_s16(two), vget_low_s16(in));
                acc[r][1] = vmlal_high_s16(acc[r][1], two, in);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) out[r][h] = (ints)vpaddq_s32(acc[r][0], acc[r][1]);
}

INLINE void int8_by_halves(int R, const int8_t *w, const Inputs *x, int64_t ld, int64_t n, ints (*out)[2]) {
    int32x4_t acc[TOGETHER][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int i = 0; i < 4; i++) acc[r][i] = vdupq_n_s32(0);
    for (int64_t s = 0; s < n; s++) {
        for (int i = 0; i < GROUP; i += 2, w += 2 * ROWS) {
            const int8x16_t bytes = vld1q_s8(w);
            const int16x8_t two[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)};
            UNROLL for (int r = 0; r < R; r++) {
                const int16x8_t in = (int16x8_t)everywhere(x[r * ld + s].q + i);
                UNROLL for (int h = 0; h < 2; h++) {
                    acc[r][2 * h] = vmlal_s16(acc[r][2 * h], vget_low_s16(two[h]), vget_low_s16(in));
                    acc[r][2 * h + 1] = vmlal_high_s16(acc[r][2 * h + 1], two[h], in);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < 2; h++) out[r][h] = (ints)vpaddq_s32(acc[r][2 * h], acc[r][2 * h + 1]);
}
#endif

/* As in blocks.h. */
INLINE void whole(int kind, int R, const char *w, const Inputs *x, int64_t ld, int first, int last, ints (*out)[HALVES]) {
    UNROLL for (int h = 0; h < HALVES; h++) {
#if MATRICES
        if (R > 1) whole_by_matrices(kind, R, w, x, ld, first, last, h, out);
        else whole_by_dots(kind, R, w, x, ld, first, last, h, out);
#elif DOTPROD
        whole_by_dots(kind, R, w, x, ld, first, last, h, out);
#else
        whole_by_halves(kind, R, w, x, ld, first, last, h, out);
#endif
    }
}

INLINE void int8_sums(int R, const int8_t *w, const Inputs *x, int64_t ld, int64_t n, ints (*out)[2]) {
#if MATRICES
    if (R > 1) int8_by_matrices(R, w, x, ld, n, out);
    else int8_by_dots(R, w, x, ld, n, out);
#elif DOTPROD
    int8_by_dots(R, w, x, ld, n, out);
#else
    int8_by_halves(R, w, x, ld, n, out);
#endif
}

/* As in blocks.h, eight rows at a time. */
INLINE void int8_tile(int R, const char *w, int64_t groups, const Inputs *x, float *out) {
    floats total[TOGETHER][HALVES];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < HALVES; h++) total[r][h] = (floats){0};
    for (int64_t g = 0; g < groups; g += SPAN, w += SPAN * group_bytes(INT8)) {
        UNROLL for (int h = 0; h < HALVES; h += 2) {
            ints sums[TOGETHER][2];
            int8_sums(R, (const int8_t *)w + h * LANES * 2, x + g, groups, groups - g < SPAN ? groups - g : SPAN, sums);
            UNROLL for (int r = 0; r < R; r++) {
                const floats scale = (floats){0} + x[r * groups + g].scale;
                UNROLL for (int i = 0; i < 2; i++)
                    total[r][h + i] = multiply_add(scale, __builtin_convertvector(sums[r][i], floats), total[r][h + i]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) memcpy(out + r * ROWS, total[r], ROWS * 4);
}
