/* Products of many rows, those of a prompt, with weights of few bits. A part of kernels.c.

   What a row of inputs costs beside its multiplications is paid once for all of them: SIDE blocks are unpacked to bytes and
   their scales to floats, DEEP groups at a time, which the fastest cache takes; then all rows of inputs go by, TILE at a time.
   The whole numbers, and what is done with them in floats and in which order, are those of blocks.h: so are the bits. */

enum {
    TILE = 6, /* rows of inputs */
    SIDE = 4, /* blocks of a panel */
    DEEP = 4, /* groups */
    PAIRS = GROUP / 2, /* of columns, in a group */
};

typedef struct {
    words pairs[DEEP][PAIRS][SIDE]; /* two numbers of 16 bits in each, for neighbouring columns */
    floats step[DEEP][2][SIDE], add[DEEP][2][SIDE]; /* of the halves of a group; of all of it in kinds that have one scale */
} Panel;

/* Whether `rows` rows times a matrix are best multiplied panel by panel. */
INLINE int takes_panels(const Matrix *m, int64_t rows) { return VNNI && rows > ROWS && m->kind > INT8; }

#if VNNI
/* Groups first .. first + count of SIDE blocks from b on; beyond the last block once more the last one. */
INLINE void unpack_panel(int kind, const Matrix *m, int64_t b, int64_t first, int64_t count, Panel *to) {
    const int zero = offset_of(kind) < 0 ? 0 : 1 << offset_of(kind);
    for (int64_t j = 0; j < SIDE; j++) {
        const int64_t from = b + j < (m->n + ROWS - 1) / ROWS ? b + j : (m->n + ROWS - 1) / ROWS - 1;
        const char *w = block_at(kind, m, from) + first * group_bytes(kind);
        for (int64_t g = 0; g < count; g++, w += group_bytes(kind)) {
            const Scales s = scales_of(kind, w, super_at(kind, m, from), first + g, 0);
            UNROLL for (int u = 0; u < UNITS; u += 2) {
                const words even = unit(kind, w, u, 0), odd = unit(kind, w, u + 1, 0);
                UNROLL for (int c = 0; c < 4; c++) {
                    const words low = even >> 8 * c & 0xff, high = odd >> 8 * c & 0xff;
                    to->pairs[g][u * 2 + c][j] = ((low - zero) & 0xffff) | (high - zero) << 16;
                }
            }
            UNROLL for (int p = 0; p < 2; p++) to->step[g][p][j] = s.step[p], to->add[g][p][j] = s.add[p];
        }
    }
}

/* To totals [TILE, SIDE ROWS] what `count` groups of a panel bring. */
INLINE void panel_tile(int parts, int minimum, const Panel *w, int64_t count, const Inputs *const *x, float *totals) {
    const int part = PAIRS / parts;
    for (int64_t h = 0; h < count * parts; h++) {
        const int64_t g = h / parts, p = h % parts;
        ints acc[TILE][SIDE];
        UNROLL for (int r = 0; r < TILE; r++)
            UNROLL for (int j = 0; j < SIDE; j++) acc[r][j] = (ints){0};
        for (int64_t i = p * part; i < (p + 1) * part; i++) {
            words ws[SIDE];
            UNROLL for (int j = 0; j < SIDE; j++) ws[j] = (words)held((floats)w->pairs[g][i][j]);
            UNROLL for (int r = 0; r < TILE; r++) {
                const words in = everywhere(x[r][g].q + 2 * i);
                UNROLL for (int j = 0; j < SIDE; j++) acc[r][j] = add_products(acc[r][j], ws[j], in);
            }
        }
        UNROLL for (int r = 0; r < TILE; r++) {
            const Inputs *in = x[r] + g;
            const float scale = in->scale, low = parts == 2 ? scale * (float)in->halves[p] : in->low;
            UNROLL for (int j = 0; j < SIDE; j++) {
                float *at = totals + (r * SIDE + j) * ROWS;
                floats to = multiply_add(w->step[g][p][j] * scale, __builtin_convertvector(acc[r][j], floats), load_floats(at));
                if (minimum) to = multiply_add(w->add[g][p][j], (floats){0} + low, to);
                *(floats_at *)at = to;
            }
        }
        __asm__("" ::: "memory"); /* or a compiler keeps totals in registers, which are needed for sums */
    }
}

/* As product, of a thread's panel: SIDE blocks from b on times all rows. totals: [rows, SIDE ROWS], filled up to whole tiles. */
static void panel_of(const Matrix *m, int64_t b, const Inputs *x, int64_t rows, Panel *panel, float *totals) {
    const int64_t groups = groups_of(m->k);
    const int kind = m->kind, way = 2 * is_halved(kind) + has_minimum(kind);
    memset(totals, 0, (rows + TILE - 1) / TILE * TILE * SIDE * ROWS * sizeof *totals);
    for (int64_t first = 0; first < groups; first += DEEP) {
        const int64_t count = groups - first < DEEP ? groups - first : DEEP;
#define CALL(kind) unpack_panel(kind, m, b, first, count, panel)
        FOR_KIND(kind, CALL)
#undef CALL
        for (int64_t r = 0; r < rows; r += TILE) {
            const Inputs *from[TILE]; /* a tile's last rows may be nobody's */
            for (int64_t i = 0; i < TILE; i++) from[i] = x + (r + i < rows ? r + i : rows - 1) * groups + first;
            float *to = totals + r * SIDE * ROWS;
            switch (way) {
            case 0: panel_tile(1, 0, panel, count, from, to); break;
            case 1: panel_tile(1, 1, panel, count, from, to); break;
            case 2: panel_tile(2, 0, panel, count, from, to); break;
            default: panel_tile(2, 1, panel, count, from, to);
            }
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
