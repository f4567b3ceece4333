/* Products with weights that are floats. A part of kernels.c. */

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
#if LANES == 16 || defined(__aarch64__) /* 32 registers */
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
