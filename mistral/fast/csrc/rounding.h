/* Quantization to int8, as quant/rounding.py has it. A part of kernels.c. */

INLINE void row_of(int kind, const char *w, int64_t k, float *out) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) *(floats_at *)(out + i) = load(kind, w + i * size_of(kind));
    if (i < k) {
        char last[4 * LANES] = {0};
        float end[LANES];
        memcpy(last, w + i * size_of(kind), (k - i) * size_of(kind));
        *(floats_at *)end = load(kind, last);
        memcpy(out + i, end, (k - i) * 4);
    }
}

static void any_row(const Matrix *m, int64_t j, float *out) {
    const char *w = (const char *)m->data + j * m->k * size_of(m->kind);
    if (m->kind == F32) row_of(F32, w, m->k, out);
    else if (m->kind == BF16) row_of(BF16, w, m->k, out);
    else row_of(F16, w, m->k, out);
}

/* Blocks of INT8, and scale [n], of a matrix of floats of some kind. */
void to_int8(const Matrix *m, int8_t *packed, float *scale, int64_t threads) {
    const int64_t size = groups_of(m->k) * group_bytes(INT8);
#pragma omp parallel for schedule(dynamic, 2) num_threads(threads)
    for (int64_t b = 0; b < blocks_of(m); b++) {
        int8_t *to = packed + b * size;
        memset(to, 0, size);
        for (int lane = 0; lane < ROWS && b * ROWS + lane < m->n; lane++) {
            float row[m->k], top = 0;
            any_row(m, b * ROWS + lane, row);
            for (int64_t i = 0; i < m->k; i++) top = fabsf(row[i]) > top ? fabsf(row[i]) : top;
            scale[b * ROWS + lane] = top / 127;
            const float step = top / 127 > 1e-30f ? top / 127 : 1e-30f;
            for (int64_t i = 0; i < m->k; i++) to[(i / 2 * ROWS + lane) * 2 + i % 2] = (int8_t)rintf(row[i] / step);
        }
    }
}
