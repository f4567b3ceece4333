/* Products with weights of any kind, y[r, j] = w[j] . x[r], and weights as floats again. A part of kernels.c. */

INLINE int is_quantized(const Matrix *m) { return is_blocks(m->kind); }

/* out[r, 0..n) for the block of rows first .. first + n of a matrix, n <= ROWS; out is [rows, ROWS]. Weights in few
   bits are multiplied with the inputs that were rounded from x instead of x. */
static void block(const Matrix *m, int64_t first, int64_t n, const float *x, int64_t ldx, const Inputs *rounded,
                  int64_t rows, float *out) {
    const char *w = m->data;
    if (is_quantized(m)) few_bits_block(m, first / ROWS, rounded, rows, out);
    else stripes((int)m->kind, w + first * m->k * size_of((int)m->kind), n, m->k, x, ldx, rows, out);
}

static int64_t blocks_of(const Matrix *m) { return (m->n + ROWS - 1) / ROWS; }

int64_t inputs_bytes(void) { return sizeof(Inputs); }

/* Whether products of many rows with quantized weights are best made here too. */
int64_t takes_many(void) { return VNNI || DOTPROD; }

/* A row of n inputs, filled up to whole groups with zeros, and the way to the next row: not a whole number of pages, so that
   rows do not share places in the fastest cache. */
static int64_t apart(int64_t n) { return groups_of(n) * GROUP + APART; }

/* y [rows, n] = x [rows, ldx] times a matrix. Quantized weights want columns padded to whole groups, and room for
   rounded inputs. A thread takes STRIP blocks at a time through all rows of inputs, some after the others: so the weights
   stay in a cache. */
void product(const Matrix *m, const float *x, int64_t ldx, int64_t rows, Inputs *rounded, float *y, int64_t threads) {
    const int64_t groups = groups_of(m->k), few = rows <= ROWS ? 1 : STRIP, together = rows <= ROWS ? rows : ROWS;
    const int64_t ld = apart(m->k), given = ldx;
    float *moved = is_quantized(m) || rows < FEW ? NULL : aligned_alloc(LINE, rows * ld * sizeof *x);
    const float *from = moved ? moved : x;
    ldx = moved ? ld : ldx;
#pragma omp parallel num_threads(threads)
    {
        if (moved)
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) memcpy(moved + r * ld, x + r * given, m->k * sizeof *x);
        if (is_quantized(m))
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++)
                round_inputs_as(m->kind, takes_panels(m, rows), x + r * ldx, groups, rounded + r * groups);
        if (takes_panels(m, rows)) product_panels(m, rounded, rows, y);
        else
#pragma omp for schedule(guided, 4)
        for (int64_t strip = 0; strip < blocks_of(m); strip += few) {
            float out[ROWS * ROWS];
            for (int64_t at = 0; at < rows; at += together) {
                const int64_t count = rows - at < together ? rows - at : together;
                for (int64_t b = strip; b < strip + few && b < blocks_of(m); b++) {
                    const int64_t first = b * ROWS, n = m->n - first < ROWS ? m->n - first : ROWS;
                    block(m, first, n, from + at * ldx, ldx, rounded + at * groups, count, out);
                    for (int64_t r = 0; r < count; r++) memcpy(y + (at + r) * m->n + first, out + r * ROWS, n * 4);
                }
            }
        }
    }
    free(moved);
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
