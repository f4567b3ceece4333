/* Quantization to int8 and to the older int4, as quant/rounding.py has it. A part of kernels.c. */

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

INLINE float to_bf16(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}

/* Blocks of INT4, of a matrix of floats of some kind. */
void to_int4(const Matrix *m, const float *shares, int64_t n_shares, char *packed, int64_t threads) {
    const int64_t groups = groups_of(m->k);
#pragma omp parallel for schedule(dynamic, 2) num_threads(threads)
    for (int64_t b = 0; b < blocks_of(m); b++) {
        char *to = packed + b * groups * group_bytes(INT4);
        for (int64_t g = 0; g < groups; g++) { /* what is filled up is 0, that is 8 */
            memset(to + g * group_bytes(INT4), 0x88, 4 * ROWS * 4);
            memset(to + g * group_bytes(INT4) + 4 * ROWS * 4, 0, 2 * ROWS);
        }
        for (int lane = 0; lane < ROWS && b * ROWS + lane < m->n; lane++) {
            float row[groups * GROUP];
            memset(row, 0, sizeof row);
            any_row(m, b * ROWS + lane, row);
            for (int64_t g = 0; g < groups; g++) {
                const float *x = row + g * GROUP;
                float largest = x[0], least = INFINITY, scale = 0;
                for (int i = 1; i < GROUP; i++) largest = fabsf(x[i]) > fabsf(largest) ? x[i] : largest;
                for (int64_t s = 0; s < n_shares; s++) {
                    const float step = to_bf16(largest * (shares[s] / -8)), over = step == 0 ? 1 : step;
                    float error = 0;
                    for (int i = 0; i < GROUP; i++) {
                        float q = rintf(x[i] / over);
                        q = q > 7 ? 7 : q < -8 ? -8 : q;
                        error += (q * step - x[i]) * (q * step - x[i]);
                    }
                    if (error < least) least = error, scale = step;
                }
                char *at = to + g * group_bytes(INT4);
                uint32_t bits;
                memcpy(&bits, &scale, 4);
                ((uint16_t *)(at + 4 * ROWS * 4))[lane] = bits >> 16;
                for (int i = 0; i < GROUP; i++) {
                    float q = rintf(x[i] / (scale == 0 ? 1 : scale));
                    q = q > 7 ? 7 : q < -8 ? -8 : q;
                    ((uint32_t *)at)[i / 8 * ROWS + lane] ^= (((uint32_t)(int)q + 8) ^ 8) << (4 * (i % 8));
                }
            }
        }
    }
}
