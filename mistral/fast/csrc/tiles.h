/* Products of many rows, those of a prompt, with weights that are floats. A part of kernels.c.

   A tile is TILE rows of inputs times PANEL rows of weights, whose sums stay in registers. A panel's weights are widened and
   transposed some columns at a time, so that a lane belongs to a row of weights; then all rows of inputs go by. An output is
   the sum of the sums over DEPTH columns (of inputs in bf16 one sum), each in the order of the columns: whatever the number
   of rows and threads.

   Where inputs are rounded to bf16, weights in bf16 are not widened: a pair of columns is a word, and processors with bf16
   arithmetic (avx512_bf16) multiply and add 32 numbers at once, in fp32; others widen both. */

#if defined(__AVX512BF16__) && LANES == 16
#define BF16_DOTS 1
#else
#define BF16_DOTS 0
#endif

enum {
    WIDE = LANES == 16 ? 4 : 2, /* vectors of a panel, as many as registers take */
    PANEL = WIDE * LANES,
    DEPTH = 256,
    NEAR = 192, /* columns of a panel in bf16: with them it stays in the fastest cache */
    BAND = 84 * TILE, /* rows of inputs that go by before the next panel */
};

/* Whether products of many rows with weights that are floats are best made here. */
int64_t takes_many_floats(void) { return LANES == 16; }

/* Whether the processor has bf16 arithmetic. */
int64_t has_bf16(void) { return BF16_DOTS; }

static int64_t pairs_of(int64_t k) { return (k + 1) / 2; }

static int64_t words_of(int64_t k) { return (pairs_of(k) + LANES - 1) / LANES * LANES + APART; }

/* Bytes of the rounded inputs of a product of `rows` rows. */
int64_t tiles_bytes(int64_t k, int64_t rows) {
    return ((rows < BAND ? rows : BAND) + TILE - 1) / TILE * TILE * words_of(k) * sizeof(uint32_t);
}

/* LANES numbers rounded to bf16, ties to even; a NaN stays one. */
INLINE void round_to(floats x, uint16_t *to) {
    const words bits = (words)x, rounded = bits + 0x7fff + (bits >> 16 & 1), nan = (words)(x != x);
    const words high = (rounded & ~nan) | ((bits | 0x400000) & nan);
    *(halves_at *)to = __builtin_convertvector(high >> 16, halves);
}

/* A row of inputs, or zeros where there is none, as bf16. */
static void round_row(const float *x, int64_t k, uint32_t *out) {
    const int64_t whole = x ? k - k % LANES : 0;
    uint16_t *to = (uint16_t *)out;
    if (!x) memset(out, 0, words_of(k) * sizeof *out);
    for (int64_t i = 0; i < whole; i += LANES) round_to(load_floats(x + i), to + i);
    if (x && whole < k) {
        float end[LANES] = {0};
        memcpy(end, x + whole, (k - whole) * sizeof *x);
        round_to(load_floats(end), to + whole);
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

/* To `sums` [R, PANEL] what `pairs` of columns bring; ld: words from a row of inputs to the next. */
INLINE void dot_tile_bf16(int R, const uint32_t *w, const uint32_t *x, int64_t ld, int64_t pairs, float *sums) {
    floats acc[TILE][WIDE];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < WIDE; j++) acc[r][j] = load_floats(sums + r * PANEL + j * LANES);
    for (int64_t i = 0; i < pairs; i++, w += PANEL) {
        words ws[WIDE];
        UNROLL for (int j = 0; j < WIDE; j++) ws[j] = (words)held(load_floats((const float *)w + j * LANES));
        UNROLL for (int r = 0; r < R; r++) {
            const words v = (words){0} + x[r * ld + i];
            UNROLL for (int j = 0; j < WIDE; j++) acc[r][j] = dot_pair(acc[r][j], ws[j], v);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < WIDE; j++) *(floats_at *)(sums + r * PANEL + j * LANES) = acc[r][j];
}

/* As pack_panel, for weights of a kind, as floats: [columns, PANEL]. */
INLINE void widen_panel(int kind, const char *w, int64_t n, int64_t k, int64_t first, int64_t columns, float *to) {
    for (int64_t j = 0; j < PANEL; j += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
            words v[LANES];
            const int64_t there = columns - c < LANES ? columns - c : LANES;
            for (int64_t i = 0; i < LANES; i++) {
                const char *from = w + ((j + i) * k + first + c) * size_of(kind);
                char end[4 * LANES] = {0};
                v[i] = (words){0};
                if (j + i >= n) continue;
                if (there < LANES) memcpy(end, from, there * size_of(kind)), from = end;
                v[i] = (words)load(kind, from);
            }
            transpose(v, (uint32_t *)to + c * PANEL + j, PANEL);
        }
}

/* To sums [TILE, PANEL] what `depth` columns of TILE rows of a bring, times b [depth, ldb]. */
INLINE void multiply_tile(const float *const *a, const float *b, int64_t ldb, int64_t depth, float *sums, int64_t lds) {
    floats acc[TILE][WIDE];
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int j = 0; j < WIDE; j++) acc[r][j] = (floats){0};
    for (int64_t i = 0; i < depth; i++, b += ldb) {
        floats bs[WIDE];
        UNROLL for (int j = 0; j < WIDE; j++) bs[j] = load_floats(b + j * LANES);
        UNROLL for (int r = 0; r < TILE; r++) {
            const floats v = (floats){0} + a[r][i];
            UNROLL for (int j = 0; j < WIDE; j++) acc[r][j] = multiply_add(v, bs[j], acc[r][j]);
        }
    }
    UNROLL for (int r = 0; r < TILE; r++)
        UNROLL for (int j = 0; j < WIDE; j++) {
            float *at = sums + r * lds + j * LANES;
            *(floats_at *)at = load_floats(at) + acc[r][j];
        }
}

/* Asks memory for the weights after those of a panel's columns from c on, `depth` columns of rows first .. last of it: the machine
   itself follows fewer rows than a panel has. */
INLINE void ask_ahead(const Matrix *m, int64_t j, int64_t c, int64_t depth, int64_t first, int64_t last) {
    const int64_t size = size_of(m->kind), next = m->k * size, more = c + depth < m->k;
    const char *w = (const char *)m->data + (more ? j : j + PANEL) * next + (more ? c + depth : 0) * size;
    for (int64_t i = first; i < last; i++)
        for (int64_t at = 0; at <= depth * size; at += LINE) __builtin_prefetch(w + i * next + at, 0, 2);
}

/* What n rows of weights from j on add to the sums [count, PANEL] of rows of inputs, DEPTH columns from c on. */
INLINE void float_panel(int kind, const Matrix *m, int64_t j, int64_t n, int64_t c, const float *x, int64_t count, float *panel,
                        float *sums) {
    const int64_t k = m->k, columns = k - c < DEPTH ? k - c : DEPTH;
    widen_panel(kind, (const char *)m->data + j * k * size_of(kind), n, k, c, columns, panel);
    for (int64_t r = 0; r < count; r += TILE) {
        const float *from[TILE]; /* a tile's last rows may be nobody's */
        for (int64_t i = 0; i < TILE; i++) from[i] = x + (r + i < count ? r + i : count - 1) * k + c;
        ask_ahead(m, j, c, DEPTH, PANEL * r / count, PANEL * (r + TILE) / count);
        multiply_tile(from, panel, PANEL, columns, sums + r * PANEL, PANEL);
    }
}

static void bf16_panel(const Matrix *m, int64_t j, int64_t n, int64_t c, const uint32_t *rounded, int64_t count,
                       uint32_t *panel, float *sums) {
    const int64_t ld = words_of(m->k), columns = m->k - c < NEAR ? m->k - c : NEAR;
    pack_panel((const uint16_t *)m->data + j * m->k, n, m->k, c, columns, panel);
    for (int64_t r = 0, tall, asked = 0; r < count; r += tall) {
        const uint32_t *from = rounded + r * ld + c / 2;
        tall = height(count - r);
        const int64_t ask = PANEL * (r + tall) / count;
        ask_ahead(m, j, c, NEAR, asked, ask);
        asked = ask;
        if (tall == TILE) dot_tile_bf16(TILE, panel, from, ld, pairs_of(columns), sums + r * PANEL);
        else dot_tile_bf16(TILE - 1, panel, from, ld, pairs_of(columns), sums + r * PANEL);
    }
}

/* y [rows, n] = x [rows, k] times a matrix of floats of some kind. rounded: NULL, or room for `tiles_bytes`: inputs are
   rounded to bf16, and weights are in bf16. */
void product_many(const Matrix *m, const float *x, int64_t rows, uint32_t *rounded, float *y, int64_t threads) {
    const int64_t k = m->k;
    for (int64_t at = 0; at < rows; at += BAND) {
        const int64_t count = rows - at < BAND ? rows - at : BAND, full = (count + TILE - 1) / TILE * TILE;
        const float *from = x + at * k;
#pragma omp parallel num_threads(threads)
        {
            uint32_t *panel = aligned_alloc(64, (DEPTH + full) * PANEL * sizeof *panel);
            float *sums = (float *)(panel + DEPTH * PANEL);
            if (rounded)
#pragma omp for schedule(static)
                for (int64_t r = 0; r < full; r++) round_row(r < count ? from + r * k : NULL, k, rounded + r * words_of(k));
#pragma omp for schedule(dynamic, 1)
            for (int64_t j = 0; j < m->n; j += PANEL) {
                const int64_t n = m->n - j < PANEL ? m->n - j : PANEL;
                memset(sums, 0, full * PANEL * sizeof *sums);
                for (int64_t c = 0; c < k; c += rounded ? NEAR : DEPTH) {
                    if (rounded) bf16_panel(m, j, n, c, rounded, count, panel, sums);
                    else if (m->kind == F32) float_panel(F32, m, j, n, c, from, count, (float *)panel, sums);
                    else if (m->kind == BF16) float_panel(BF16, m, j, n, c, from, count, (float *)panel, sums);
                    else float_panel(F16, m, j, n, c, from, count, (float *)panel, sums);
                }
                for (int64_t r = 0; r < count; r++) memcpy(y + (at + r) * m->n + j, sums + r * PANEL, n * sizeof *y);
            }
            free(panel);
        }
    }
}
