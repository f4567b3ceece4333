/* Products of many rows, those of a prompt, with weights of few bits whose scales are those of half a group: more is done with
   each sum there than in other kinds, and unpacking them takes longer. A part of kernels.c.

   Weights are unpacked once for all rows: SIDE blocks to numbers of 16 bits and their scales to floats, DEEP groups at a time,
   which the fastest cache takes; then all rows of inputs go by, TILE at a time. Inputs are the same whole numbers as in
   blocks.h, here in 16 bits. So the sums are those of blocks.h, and what is done with them in floats and in which order
   as well: the bits are the same. */

enum {
    TILE = 6, /* rows of inputs */
    SIDE = 4, /* blocks of a panel */
    ACROSS = 2, /* blocks that are multiplied together */
    DEEP = 4, /* groups of a panel */
    PAIRS = GROUP / 2, /* of columns, in a group */
};

typedef int16_t shorts __attribute__((vector_size(4 * LANES)));

typedef struct {
    words pairs[DEEP][PAIRS][SIDE]; /* bytes o and o + 2 of a unit as numbers of 16 bits, what is taken off them taken off */
    floats step[DEEP][2][SIDE], add[DEEP][2][SIDE]; /* of the halves of a group */
} Panel;

/* Rows of a tile where `left` are left: TILE or one less, so that few of the last tile are nobody's. */
INLINE int64_t height(int64_t left) {
    const int64_t tiles = (left + TILE - 1) / TILE;
    return (left + tiles - 1) / tiles == TILE ? TILE : TILE - 1;
}

/* Whether `rows` rows times a matrix are best multiplied panel by panel. */
INLINE int takes_panels(const Matrix *m, int64_t rows) { return VNNI && is_halved(m->kind) && rows > 2 * ROWS; }

#if VNNI
/* Groups first .. first + count of SIDE blocks from b on; beyond the last block once more the last one. */
INLINE void unpack_panel(int kind, const Matrix *m, int64_t b, int64_t first, int64_t count, Panel *to) {
    const int16_t zero = offset_of(kind) < 0 ? 0 : 1 << offset_of(kind);
    for (int64_t j = 0; j < SIDE; j++) {
        const int64_t from = b + j < (m->n + ROWS - 1) / ROWS ? b + j : (m->n + ROWS - 1) / ROWS - 1;
        const char *w = block_at(kind, m, from) + first * group_bytes(kind);
        for (int64_t g = 0; g < count; g++, w += group_bytes(kind)) {
            const Scales s = scales_of(kind, w, super_at(kind, m, from), first + g, 0);
            const int64_t next = first + DEEP < groups_of(m->k) ? DEEP : SIDE * groups_of(m->k) - first;
            UNROLL for (int c = 0; c < group_bytes(kind); c += LINE) /* asks for what this panel, or the next one, has next */
                __builtin_prefetch(w + next * group_bytes(kind) + c, 0, 2);
            UNROLL for (int u = 0; u < UNITS; u++)
                UNROLL for (int o = 0; o < 2; o++) to->pairs[g][2 * u + o][j] = (words)((shorts)two_of(kind, w, u, o, 0) - zero);
            UNROLL for (int p = 0; p < 2; p++) to->step[g][p][j] = s.step[p], to->add[g][p][j] = s.add[p];
        }
    }
}

/* To totals [R, SIDE ROWS] of R <= TILE rows of inputs what `count` groups of a panel bring: ACROSS blocks at a time, so that
   the totals of a tile stay in registers beside the sums of half a group. */
INLINE void panel_tile(int R, int minimum, const Panel *w, int64_t count, const Inputs *const *x, float *totals) {
    for (int first = 0; first < SIDE; first += ACROSS) {
        floats total[TILE][ACROSS];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < ACROSS; j++) total[r][j] = load_floats(totals + (r * SIDE + first + j) * ROWS);
        for (int64_t h = 0; h < 2 * count; h++) {
            const int64_t g = h / 2, p = h % 2;
            ints sums[TILE][ACROSS];
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int j = 0; j < ACROSS; j++) sums[r][j] = (ints){0};
            for (int64_t i = p * PAIRS / 2; i < (p + 1) * PAIRS / 2; i++) {
                words ws[ACROSS];
                UNROLL for (int j = 0; j < ACROSS; j++) ws[j] = (words)held((floats)w->pairs[g][i][first + j]);
                UNROLL for (int r = 0; r < R; r++) {
                    const words in = everywhere(x[r][g].q + 2 * i);
                    UNROLL for (int j = 0; j < ACROSS; j++) sums[r][j] = add_products(sums[r][j], ws[j], in);
                }
            }
            UNROLL for (int r = 0; r < R; r++) {
                const Inputs *in = x[r] + g;
                const float scale = in->scale, low = scale * (float)in->halves[p];
                UNROLL for (int j = 0; j < ACROSS; j++) {
                    floats *to = &total[r][j];
                    *to = multiply_add(w->step[g][p][first + j] * scale, __builtin_convertvector(sums[r][j], floats), *to);
                    if (minimum) *to = multiply_add(w->add[g][p][first + j], (floats){0} + low, *to);
                }
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < ACROSS; j++) *(floats_at *)(totals + (r * SIDE + first + j) * ROWS) = total[r][j];
    }
}

INLINE void tile_of(int R, int minimum, const Panel *w, int64_t count, const Inputs *const *x, float *totals) {
    if (minimum) panel_tile(R, 1, w, count, x, totals);
    else panel_tile(R, 0, w, count, x, totals);
}

/* As product, of a thread's panel: SIDE blocks from b on times all rows. totals: [rows, SIDE ROWS], filled up to whole tiles. */
static void panel_of(const Matrix *m, int64_t b, const Inputs *x, int64_t rows, Panel *panel, float *totals) {
    const int64_t groups = groups_of(m->k);
    const int kind = m->kind, minimum = has_minimum(kind);
    memset(totals, 0, (rows + TILE - 1) / TILE * TILE * SIDE * ROWS * sizeof *totals);
    for (int64_t first = 0; first < groups; first += DEEP) {
        const int64_t count = groups - first < DEEP ? groups - first : DEEP;
        if (kind == Q6_K) unpack_panel(Q6_K, m, b, first, count, panel);
        else if (kind == Q3_K) unpack_panel(Q3_K, m, b, first, count, panel);
        else unpack_panel(Q2_K, m, b, first, count, panel);
        for (int64_t r = 0, tall; r < rows; r += tall) {
            const Inputs *from[TILE];
            tall = height(rows - r);
            for (int64_t i = 0; i < TILE; i++) from[i] = x + (r + i < rows ? r + i : rows - 1) * groups + first;
            if (tall == TILE) tile_of(TILE, minimum, panel, count, from, totals + r * SIDE * ROWS);
            else tile_of(TILE - 1, minimum, panel, count, from, totals + r * SIDE * ROWS);
        }
    }
}
#endif

/* y [rows, n] = rounded inputs times a matrix; for a team of threads. */
static void product_panels(const Matrix *m, const Inputs *x, int64_t rows, float *y) {
#if VNNI
    const int64_t full = (rows + TILE - 1) / TILE * TILE, wide = SIDE * ROWS;
    Panel *panel = aligned_alloc(LINE, sizeof *panel + full * wide * sizeof *y);
    float *totals = (float *)(panel + 1);
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < m->n; first += wide) {
        const int64_t n = m->n - first < wide ? m->n - first : wide;
        panel_of(m, first / ROWS, x, rows, panel, totals);
        for (int64_t r = 0; r < rows; r++) memcpy(y + r * m->n + first, totals + r * wide, n * sizeof *y);
    }
    free(panel);
#endif
}
