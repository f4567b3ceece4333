/* Rounding weights to AFFINE4: a weight is s * q - m, q in 0 .. 15. A part of kernels.c. What is looked for, and why, is in
   quant/affine.py, which does the same in PyTorch.

   A lane is a row, so that sums over the columns of a group are in one order on every machine. */

typedef float rows_f __attribute__((vector_size(4 * ROWS)));
typedef int32_t rows_i __attribute__((vector_size(4 * ROWS)));
typedef uint8_t rows_b __attribute__((vector_size(ROWS)));

#define NONE ((rows_f){0})

INLINE rows_f choose(rows_i where, rows_f a, rows_f b) { return (rows_f)((where & (rows_i)a) | (~where & (rows_i)b)); }

/* The nearest whole number in 0 .. top, halves to the even one. */
INLINE rows_f nearest_code(rows_f x, float top) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: beyond it a float has no fraction */
#if defined(__AVX512F__)
    x = (rows_f)_mm512_min_ps(_mm512_max_ps((__m512)x, _mm512_setzero_ps()), _mm512_set1_ps(top));
#else
    x = choose(x > 0, x, NONE);
    x = choose(x < top, x, NONE + top);
#endif
    return (x + shift) - shift;
}

/* 1 / x; 0 where x is not above 0. */
INLINE rows_f inverse(rows_f x) { return choose(x > 0, 1 / choose(x > 0, x, NONE + 1), NONE); }

/* Sums over a group of ROWS rows, each column with its own weight h: of h q, h q q, h q w, and of the squared error. */
typedef struct {
    rows_f q, qq, qw, error;
} Sums;

/* With the q that are best for s and m. */
INLINE Sums group_sums(const rows_f *x, const float *h, rows_f s, rows_f m) {
    Sums sums = {NONE, NONE, NONE, NONE};
    const rows_f over = inverse(s);
    for (int j = 0; j < GROUP; j++) {
        const rows_f q = nearest_code((x[j] + m) * over, 15), hq = q * h[j], off = s * q - m - x[j];
        sums.q += hq, sums.qq += hq * q, sums.qw += hq * x[j], sums.error += off * off * h[j];
    }
    return sums;
}

/* The s and m of the least squares for these q, with m >= 0; as they were where all q are one number. */
INLINE void fit(const Sums *sums, float h, rows_f w, rows_f *s, rows_f *m) {
    const rows_f det = sums->qq * h - sums->q * sums->q, over = inverse(det);
    rows_f s1 = (sums->qw * h - sums->q * w) * over, m1 = (sums->q * sums->qw - sums->qq * w) * over;
    s1 = choose(m1 < 0, sums->qw * inverse(sums->qq), s1), m1 = choose(m1 < 0, NONE, m1);
    const rows_i good = (det > 0) & (s1 > 0);
    *s = choose(good, s1, *s), *m = choose(good, m1, *m);
}

/* Block b of a matrix, a column's ROWS weights together; rows and columns are filled up with zeros. */
static void block_of(const Matrix *m, int64_t b, rows_f *x) {
    float *to = (float *)x, row[m->k];
    memset(x, 0, groups_of(m->k) * GROUP * sizeof *x);
    for (int lane = 0; lane < ROWS && b * ROWS + lane < m->n; lane++) {
        any_row(m, b * ROWS + lane, row);
        for (int64_t i = 0; i < m->k; i++) to[i * ROWS + lane] = row[i];
    }
}

/* Sums of h, and of h w. */
static float weighted_sum(const rows_f *x, const float *h, rows_f *w) {
    float sum = 0;
    *w = NONE;
    for (int j = 0; j < GROUP; j++) sum += h[j], *w += x[j] * h[j];
    return sum;
}

static void search_group(const rows_f *x, const float *h, const float *steps, int64_t n_steps, int64_t refits, rows_f *s,
                         rows_f *m) {
    rows_f w;
    const float all = weighted_sum(x, h, &w);
    rows_f low = NONE, high = x[0], best = NONE + INFINITY; /* m >= 0, so low <= 0 */
    *s = *m = NONE;
    for (int j = 0; j < GROUP; j++) low = choose(x[j] < low, x[j], low), high = choose(x[j] > high, x[j], high);
    for (int64_t i = 0; i < n_steps; i++) {
        rows_f s1 = (high - low) / steps[i], m1 = -low;
        for (int64_t r = 0; r <= refits; r++) {
            const Sums sums = group_sums(x, h, s1, m1);
            const rows_i better = sums.error < best;
            best = choose(better, sums.error, best), *s = choose(better, s1, *s), *m = choose(better, m1, *m);
            fit(&sums, all, w, &s1, &m1);
        }
    }
}

/* Codes of s and m among those near; S and M are what they are multiplied by. */
static void code_group(const rows_f *x, const float *h, int64_t near, int64_t rounds, rows_f S, rows_f M, rows_f *s, rows_f *m) {
    rows_f w;
    const float all = weighted_sum(x, h, &w);
    const rows_f over_S = inverse(S), over_M = inverse(M);
    rows_f sc = nearest_code(*s * over_S, 255), mn = nearest_code(*m * over_M, 255);
    Sums sums = group_sums(x, h, sc * S, mn * M);
    for (int64_t r = 0; r < rounds; r++) {
        rows_f s1 = sc * S, m1 = mn * M, best = sums.error;
        fit(&sums, all, w, &s1, &m1);
        const rows_f middle = nearest_code(s1 * over_S, 255);
        for (int64_t d = -near; d <= near; d++) {
            const rows_f sc1 = nearest_code(middle + (float)d, 255);
            const rows_f mn1 = nearest_code((sc1 * S * sums.q - w) / (all > 0 ? all : 1) * over_M, 255);
            const Sums now = group_sums(x, h, sc1 * S, mn1 * M);
            const rows_i better = now.error < best;
            best = choose(better, now.error, best), sc = choose(better, sc1, sc), mn = choose(better, mn1, mn);
        }
        sums = group_sums(x, h, sc * S, mn * M);
    }
    *s = sc, *m = mn;
}

/* A group as it lies in memory, see blocks of AFFINE4: words of eight columns, then the codes. */
static void pack_group(const rows_f *x, rows_f S, rows_f M, rows_f sc, rows_f mn, uint8_t *to) {
    const rows_f s = sc * S, m = mn * M, over = inverse(s);
    for (int w = 0; w < GROUP / 8; w++) {
        rows_i word = {0};
        for (int j = 0; j < 8; j++) word |= __builtin_convertvector(nearest_code((x[8 * w + j] + m) * over, 15), rows_i) << (4 * j);
        memcpy(to + w * sizeof word, &word, sizeof word);
    }
    const rows_b codes[2] = {__builtin_convertvector(__builtin_convertvector(sc, rows_i), rows_b),
                             __builtin_convertvector(__builtin_convertvector(mn, rows_i), rows_b)};
    memcpy(to + ROWS * GROUP / 2, codes, sizeof codes);
}

/* The best s and m of every group, [blocks, groups, ROWS].
   h: [groups * GROUP] weights of the columns, 0 where columns are filled up; steps: into how many a group's range is divided
   at first, one start after the other. */
void affine4_search(const Matrix *m, const float *h, const float *steps, int64_t n_steps, int64_t refits, float *s, float *low,
                    int64_t threads) {
    const int64_t groups = groups_of(m->k);
#pragma omp parallel num_threads(threads)
    {
        rows_f *x = aligned_alloc(64, groups * GROUP * sizeof *x);
#pragma omp for schedule(dynamic, 2)
        for (int64_t b = 0; b < blocks_of(m); b++) {
            block_of(m, b, x);
            for (int64_t g = 0; g < groups; g++) {
                rows_f found[2];
                search_group(x + g * GROUP, h + g * GROUP, steps, n_steps, refits, found, found + 1);
                memcpy(s + (b * groups + g) * ROWS, found, sizeof *found);
                memcpy(low + (b * groups + g) * ROWS, found + 1, sizeof *found);
            }
        }
        free(x);
    }
}

/* Blocks of AFFINE4 from what affine4_search found; shared: [blocks, supers, 2, ROWS] S and M. */
void to_affine4(const Matrix *m, const float *h, const float *s, const float *low, const float *shared, int64_t near,
                int64_t rounds, uint8_t *packed, int64_t threads) {
    const int64_t groups = groups_of(m->k), supers = (groups + SUPER - 1) / SUPER;
#pragma omp parallel num_threads(threads)
    {
        rows_f *x = aligned_alloc(64, groups * GROUP * sizeof *x);
#pragma omp for schedule(dynamic, 2)
        for (int64_t b = 0; b < blocks_of(m); b++) {
            block_of(m, b, x);
            for (int64_t g = 0; g < groups; g++) {
                rows_f of[2], found[2];
                memcpy(of, shared + (b * supers + g / SUPER) * 2 * ROWS, sizeof of);
                memcpy(found, s + (b * groups + g) * ROWS, sizeof *found);
                memcpy(found + 1, low + (b * groups + g) * ROWS, sizeof *found);
                code_group(x + g * GROUP, h + g * GROUP, near, rounds, of[0], of[1], found, found + 1);
                pack_group(x + g * GROUP, of[0], of[1], found[0], found[1], packed + (b * groups + g) * (ROWS * GROUP / 2 + 2 * ROWS));
            }
        }
        free(x);
    }
}
