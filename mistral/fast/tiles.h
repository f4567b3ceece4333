/* Products of many rows, those of a prompt, with weights in bf16. A part of kernels.c.

   Inputs are rounded to bf16, or are sums of two numbers in bf16 (`pieces` 2), which is some 17 bits of them. Weights are
   what they are. Products of two bf16 numbers are exact, and are summed in fp32. Processors with bf16 arithmetic (avx512_bf16)
   multiply and add 32 of them at once; others widen both.

   A tile is TILE rows of inputs times PANEL rows of weights, whose sums stay in registers. A pair of columns is a word. A
   panel's weights are transposed DEPTH columns at a time, so that a lane belongs to a row of weights; then all rows of
   inputs go by. An output is the sum of the sums over DEPTH columns, each in the order of the columns: whatever the
   number of rows and threads. */

#if defined(__AVX512BF16__) && LANES == 16
#define BF16_DOTS 1
#else
#define BF16_DOTS 0
#endif

enum {
#if LANES == 16 /* 32 registers */
    WIDE = 4,
    TILE = 6,
#else
    WIDE = 2,
    TILE = 4,
#endif
    PANEL = WIDE * LANES,
    DEPTH = 256,
    BAND = 84 * TILE, /* rows of inputs that go by before the next panel */
    APART = 16,       /* words between rows of inputs, so that they do not share places in the fastest cache */
};

/* Whether the processor has bf16 arithmetic. */
int64_t has_bf16(void) { return BF16_DOTS; }

static int64_t pairs_of(int64_t k) { return (k + 1) / 2; }

static int64_t words_of(int64_t k) { return (pairs_of(k) + LANES - 1) / LANES * LANES + APART; }

/* Bytes of the rounded inputs of a product of `rows` rows. */
int64_t tiles_bytes(int64_t k, int64_t rows, int64_t pieces) {
    return ((rows < BAND ? rows : BAND) + TILE - 1) / TILE * TILE * pieces * words_of(k) * sizeof(uint32_t);
}

/* The bits of numbers that are rounded to bf16, ties to even, in the upper halves; a NaN stays one. */
INLINE words upper_half(floats x) {
    const words bits = (words)x, rounded = bits + 0x7fff + (bits >> 16 & 1), nan = (words)(x != x);
    return ((rounded & ~nan) | ((bits | 0x400000) & nan)) & 0xffff0000;
}

/* The numbers in bf16, whose upper halves of bits are `high`. */
INLINE void store_bf16(words high, uint16_t *to) { *(halves_at *)to = __builtin_convertvector(high >> 16, halves); }

/* LANES numbers, the first of a pair in the lower half of its word, and what is left of each if `low` is not NULL. Nothing is left
   of what is not finite: infinity less infinity would be NaN. */
INLINE void split(const float *at, uint16_t *high, uint16_t *low) {
    const floats x = load_floats(at);
    const words upper = upper_half(x);
    store_bf16(upper, high);
    if (low) store_bf16(upper_half(x - (floats)upper) & (words)((x - x) == 0), low);
}

/* A row of inputs, or zeros where there is none: words of the upper pieces, then, of two, of the lower ones. */
static void round_row(const float *x, int64_t k, int64_t pieces, uint32_t *out) {
    const int64_t ld = words_of(k), whole = x ? k - k % LANES : 0;
    uint16_t *high = (uint16_t *)out, *low = pieces > 1 ? (uint16_t *)(out + ld) : NULL;
    if (!x) memset(out, 0, pieces * ld * sizeof *out);
    for (int64_t i = 0; i < whole; i += LANES) split(x + i, high + i, low ? low + i : NULL);
    if (x && whole < k) {
        float end[LANES] = {0};
        memcpy(end, x + whole, (k - whole) * sizeof *x);
        split(end, high + whole, low ? low + whole : NULL);
    }
}

/* Lanes of a and b in turn: those of the first halves, or of the second. */
INLINE words in_turn(words a, words b, int half) {
    ints pick;
    UNROLL for (int i = 0; i < LANES; i++) pick[i] = half * LANES / 2 + i / 2 + i % 2 * LANES;
#if defined(__clang__)
    words out;
    UNROLL for (int i = 0; i < LANES; i++) out[i] = i % 2 ? b[pick[i] - LANES] : a[pick[i]];
    return out;
#else
    return __builtin_shuffle(a, b, pick);
#endif
}

/* LANES words of each of LANES rows, transposed: to[i * ldt] has word i of all rows. */
INLINE void transpose(words *v, uint32_t *to, int64_t ldt) {
    for (int n = 1; n < LANES; n *= 2) {
        words next[LANES];
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = in_turn(v[i], v[i + LANES / 2], 0);
            next[2 * i + 1] = in_turn(v[i], v[i + LANES / 2], 1);
        }
        UNROLL for (int i = 0; i < LANES; i++) v[i] = next[i];
    }
    UNROLL for (int i = 0; i < LANES; i++) *(words_at *)(to + i * ldt) = v[i];
}

/* Columns first .. first + columns of n <= PANEL rows of weights [., k]: [pairs, PANEL] words, filled up with zeros. */
static void pack_panel(const uint16_t *w, int64_t n, int64_t k, int64_t first, int64_t columns, uint32_t *to) {
    for (int64_t j = 0; j < PANEL; j += LANES)
        for (int64_t c = 0; c < columns; c += 2 * LANES) {
            words v[LANES];
            const int64_t there = columns - c < 2 * LANES ? columns - c : 2 * LANES;
            for (int64_t i = 0; i < LANES; i++) {
                const uint16_t *from = w + (j + i) * k + first + c;
                v[i] = (words){0};
                if (j + i < n && there == 2 * LANES) memcpy(&v[i], from, sizeof v[i]);
                else if (j + i < n) memcpy(&v[i], from, there * sizeof *from);
            }
            transpose(v, to + c / 2 * PANEL + j, PANEL);
        }
}

/* What a pair of columns adds to sums: a + w x. */
INLINE floats dot_pair(floats a, words w, words x) {
#if BF16_DOTS
    return (floats)_mm512_dpbf16_ps((__m512)a, (__m512bh)(__m512i)w, (__m512bh)(__m512i)x);
#else
    a = multiply_add((floats)(w << 16), (floats)(x << 16), a);
    return multiply_add((floats)(w & 0xffff0000), (floats)(x & 0xffff0000), a);
#endif
}

/* To `sums` [TILE, PANEL] what `pairs` of columns bring. */
INLINE void dot_panel(int pieces, const uint32_t *w, const uint32_t *x, int64_t ld, int64_t pairs, float *sums) {
    floats acc[TILE][WIDE];
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int j = 0; j < WIDE; j++) acc[r][j] = (floats){0};
    for (int64_t i = 0; i < pairs; i++, w += PANEL) {
        words ws[WIDE];
        UNROLL for (int j = 0; j < WIDE; j++) ws[j] = *(const words_at *)(w + j * LANES);
        UNROLL for (int p = 0; p < pieces; p++)
            UNROLL for (int r = 0; r < TILE; r++) {
                const words v = (words){0} + x[(r * pieces + p) * ld + i];
                UNROLL for (int j = 0; j < WIDE; j++) acc[r][j] = dot_pair(acc[r][j], ws[j], v);
            }
    }
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int j = 0; j < WIDE; j++) {
            float *at = sums + r * PANEL + j * LANES;
            *(floats_at *)at = load_floats(at) + acc[r][j];
        }
}

/* y [rows, n] = x [rows, k] times a matrix of bf16. rounded: room for `tiles_bytes`; pieces: 1 rounds
   inputs to bf16, 2 makes two pieces of each. */
void product_bf16(const Matrix *m, const float *x, int64_t rows, int64_t pieces, uint32_t *rounded, float *y, int64_t threads) {
    const int64_t k = m->k, ld = words_of(k), size = pieces * ld;
    const uint16_t *w = m->data;
    for (int64_t at = 0; at < rows; at += BAND) {
        const int64_t count = rows - at < BAND ? rows - at : BAND, full = (count + TILE - 1) / TILE * TILE;
#pragma omp parallel num_threads(threads)
        {
            uint32_t *panel = aligned_alloc(64, DEPTH / 2 * PANEL * sizeof *panel + full * PANEL * sizeof(float));
            float *sums = (float *)(panel + DEPTH / 2 * PANEL);
#pragma omp for schedule(static)
            for (int64_t r = 0; r < full; r++)
                round_row(r < count ? x + (at + r) * k : NULL, k, pieces, rounded + r * size);
#pragma omp for schedule(dynamic, 1)
            for (int64_t j = 0; j < m->n; j += PANEL) {
                const int64_t n = m->n - j < PANEL ? m->n - j : PANEL;
                memset(sums, 0, full * PANEL * sizeof *sums);
                for (int64_t c = 0; c < k; c += DEPTH) {
                    const int64_t columns = k - c < DEPTH ? k - c : DEPTH;
                    pack_panel(w + j * k, n, k, c, columns, panel);
                    for (int64_t r = 0; r < full; r += TILE) {
                        const uint32_t *from = rounded + r * size + c / 2;
                        if (pieces == 1) dot_panel(1, panel, from, ld, pairs_of(columns), sums + r * PANEL);
                        else dot_panel(2, panel, from, ld, pairs_of(columns), sums + r * PANEL);
                    }
                }
                for (int64_t r = 0; r < count; r++) memcpy(y + (at + r) * m->n + j, sums + r * PANEL, n * sizeof *y);
            }
            free(panel);
        }
    }
}
