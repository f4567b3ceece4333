/* Products with weights that are floats. A part of kernels.c. */

enum {
    TALL = LANES == 8 ? 2 : 4, /* rows of weights beside up to 6 of inputs: the sums of a tile in 16 or 32 registers */
    STRETCH = 2048,            /* bytes of a row of weights that all inputs are multiplied with, so that these stay in a cache */
    FEW = 5,                   /* rows of inputs: less are in a cache as they are, and memory is the limit */
    TOGETHER = 36,             /* rows of inputs that go by before the next stretch */
};

/* Some rows of weights times some of inputs: a stretch of columns, a multiple of a LINE's. */
typedef struct {
    const char *w;   /* rows are `row` bytes apart */
    const float *x;  /* rows are `ldx` floats apart */
    floats *sums;    /* LANES parts of each: those of a row of inputs, ROWS, one after the other */
    const char *ask; /* what will be wanted, of each row: for each LINE that is used, `step` bytes further; from byte `turn` on
                        of the next rows. The machine's own guess at what comes next is too late. */
    int64_t row, ldx, columns, step, turn;
} Tile;

/* Adds to the sums of R rows of inputs with J of weights. */
INLINE void dot_tile(int kind, int J, int R, const Tile *t) {
    const char *w = t->w, *ask = t->ask;
    const int64_t row = t->row, ldx = t->ldx, columns = t->columns, step = t->step, turn = t->turn;
    floats acc[8][8]; /* R x J of them are used, and stay in registers */
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < J; j++) acc[r][j] = t->sums[r * ROWS + j];
    for (int64_t i = 0; i < columns; i += LINE / size_of(kind), ask += step) {
        const char *next = ask + (i * size_of(kind) >= turn ? (J - 1) * row : 0);
        UNROLL for (int j = 0; j < J; j++) __builtin_prefetch(next + j * row, 0, 2);
        UNROLL for (int64_t c = i; c < i + LINE / size_of(kind); c += LANES) {
            floats ws[8];
            UNROLL for (int j = 0; j < J; j++) {
                ws[j] = load(kind, w + j * row + c * size_of(kind));
                if (R > 2) ws[j] = held(ws[j]); /* with fewer memory is the limit: loaded twice is then no slower */
            }
            UNROLL for (int r = 0; r < R; r++) {
                floats v = load_floats(t->x + r * ldx + c);
                if (R > 2) v = held(v);
                UNROLL for (int j = 0; j < J; j++) acc[r][j] = multiply_add(ws[j], v, acc[r][j]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < J; j++) t->sums[r * ROWS + j] = acc[r][j];
}

/* n rows of weights, J at a time. */
INLINE void dot_tiles(int kind, int J, int R, int64_t n, Tile t) {
    for (; n >= J; n -= J, t.w += J * t.row, t.ask += J * t.row, t.sums += J) dot_tile(kind, J, R, &t);
    for (; n > 0; n--, t.w += t.row, t.ask += t.row, t.sums++) dot_tile(kind, 1, R, &t);
}

/* The same for each kind. Not inlined: among other code a loop's pointers do not fit the registers. */
#define TILES(J, R)                                                                                                            \
    static __attribute__((noinline)) void dot_tiles_##R(int kind, int64_t n, Tile t) {                                         \
        switch (kind) {                                                                                                        \
        case F32: dot_tiles(F32, J, R, n, t); break;                                                                           \
        case BF16: dot_tiles(BF16, J, R, n, t); break;                                                                         \
        default: dot_tiles(F16, J, R, n, t);                                                                                   \
        }                                                                                                                      \
    }
TILES(8, 1)
TILES(4, 2)
TILES(TALL, 4)
TILES(TALL, 6)
#undef TILES

/* A stretch of n <= ROWS rows of weights times all rows of inputs. Where these are several, lines are asked for evenly: while
   each of them goes by its share. */
static void all_inputs(int kind, int64_t n, int64_t rows, Tile t) {
    const char *ask = t.ask;
    const int64_t bytes = t.columns * size_of(kind);
    for (int64_t r = 0, R; r < rows; r += R, t.x += R * t.ldx, t.sums += R * ROWS) {
        const int64_t left = rows - r;
        R = left >= 10 || left == 6 || left == 7 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (rows >= FEW) t.ask = ask + bytes * r / rows, t.step = LINE * R / rows;
        if (R == 6) dot_tiles_6(kind, n, t);
        else if (R == 4) dot_tiles_4(kind, n, t);
        else if (R == 2) dot_tiles_2(kind, n, t);
        else dot_tiles_1(kind, n, t);
    }
}

/* The columns from `whole` on, less than a LINE's, with zeros after them. */
static void last_columns(int kind, const char *w, int64_t n, int64_t k, int64_t whole, const float *x, int64_t ldx, int64_t rows,
                         floats *sums) {
    float end[TOGETHER][LINE / 2];
    char last[ROWS][LINE] = {{0}};
    memset(end, 0, rows * sizeof *end);
    for (int64_t r = 0; r < rows; r++) memcpy(end[r], x + r * ldx + whole, (k - whole) * sizeof *x);
    for (int64_t j = 0; j < n; j++) memcpy(last[j], w + (j * k + whole) * size_of(kind), (k - whole) * size_of(kind));
    const Tile t = {last[0], end[0], sums, last[0], LINE, LINE / 2, LINE / size_of(kind), 0, LINE};
    all_inputs(kind, n, rows, t);
}

/* out [rows, ROWS] = n <= ROWS rows of weights times rows <= TOGETHER of x. */
static void stripe(int kind, const char *w, int64_t n, int64_t k, const float *x, int64_t ldx, int64_t rows, float *out) {
    const int64_t size = size_of(kind), row = k * size, whole = k - k % (LINE / size);
    const int64_t stretch = rows < FEW ? whole : STRETCH / size;
    floats sums[TOGETHER * ROWS];
    memset(sums, 0, rows * ROWS * sizeof *sums);
    for (int64_t c = 0; c < whole; c += stretch) {
        const char *from = w + c * size;
        Tile t = {from, x + c, sums, from + AHEAD, row, ldx, whole - c < stretch ? whole - c : stretch, LINE, row - AHEAD};
        if (rows >= FEW) t.ask = c + stretch < whole ? from + STRETCH : w + ROWS * row, t.turn = row;
        all_inputs(kind, n, rows, t);
    }
    if (whole < k) last_columns(kind, w, n, k, whole, x, ldx, rows, sums);
    for (int64_t i = 0; i < rows * ROWS; i += LANES) *(floats_at *)(out + i) = sums_of(sums + i);
}

static void stripes(int kind, const char *w, int64_t n, int64_t k, const float *x, int64_t ldx, int64_t rows, float *out) {
    for (; rows > 0; x += TOGETHER * ldx, out += TOGETHER * ROWS, rows -= TOGETHER)
        stripe(kind, w, n, k, x, ldx, rows < TOGETHER ? rows : TOGETHER, out);
}
