/* Quantized weights as floats again: the numbers that they stand for. A part of kernels.c. */

/* Row j of a matrix, [k]. */
INLINE void row_of_blocks(int kind, const Matrix *m, int64_t j, float *out) {
    const int lane = j % ROWS, zero = offset_of(kind) < 0 ? 0 : 1 << offset_of(kind);
    const char *w = block_at(kind, m, j / ROWS);
    for (int64_t g = 0; g < groups_of(m->k); g++, w += group_bytes(kind)) {
        const Scales s = scales_of(kind, w, super_at(kind, m, j / ROWS), g, lane / LANES);
        words u[UNITS];
        if (kind != INT8)
            UNROLL for (int i = 0; i < UNITS; i++) u[i] = unit(kind, w, i, lane / LANES);
        for (int i = 0; i < GROUP && g * GROUP + i < m->k; i++) {
            if (kind == INT8) {
                out[g * GROUP + i] = ((const int8_t *)w)[(i / 2 * ROWS + lane) * 2 + i % 2] * ((const float *)m->scale)[j];
            } else {
                const int q = (u[i / 8 * 2 + i % 2][lane % LANES] >> (i % 8 / 2 * 8) & 0xff) - zero;
                out[g * GROUP + i] = q * s.step[i / 16][lane % LANES];
                if (has_minimum(kind)) out[g * GROUP + i] += s.add[i / 16][lane % LANES];
            }
        }
    }
}

/* Block b of a matrix, `count` rows of it, as floats and transposed: column c at out + c * ld. */
INLINE void widen_block(int kind, const Matrix *m, int64_t b, int64_t count, float *out, int64_t ld) {
    const int zero = offset_of(kind) < 0 ? 0 : 1 << offset_of(kind);
    const char *w = block_at(kind, m, b);
    floats each[HALVES] = {{0}};
    if (kind == INT8) {
        float scale[ROWS] = {0};
        memcpy(scale, (const float *)m->scale + b * ROWS, count * 4);
        UNROLL for (int h = 0; h < HALVES; h++) each[h] = load_floats(scale + h * LANES);
    }
    for (int64_t g = 0; g < groups_of(m->k); g++, w += group_bytes(kind)) {
        float wide[GROUP][ROWS];
        UNROLL for (int h = 0; h < HALVES; h++) {
            const Scales s = scales_of(kind, w, super_at(kind, m, b), g, h);
            if (kind == INT8) {
                for (int i = 0; i < GROUP; i += 2) {
                    const ints u = (ints)load_halves((const int8_t *)w + (i / 2 * ROWS + h * LANES) * 2);
                    *(floats_at *)(wide[i] + h * LANES) = each[h] * __builtin_convertvector((u << 16) >> 16, floats);
                    *(floats_at *)(wide[i + 1] + h * LANES) = each[h] * __builtin_convertvector(u >> 16, floats);
                }
                continue;
            }
            UNROLL for (int u = 0; u < UNITS; u++) {
                const words four = unit(kind, w, u, h);
                UNROLL for (int c = 0; c < 4; c++) {
                    const floats q = __builtin_convertvector((ints)(four >> (8 * c) & 0xffu) - zero, floats);
                    floats value = s.step[u / 4] * q;
                    if (has_minimum(kind)) value += s.add[u / 4];
                    *(floats_at *)(wide[u / 2 * 8 + u % 2 + 2 * c] + h * LANES) = value;
                }
            }
        }
        for (int64_t i = 0; i < GROUP && g * GROUP + i < m->k; i++) memcpy(out + (g * GROUP + i) * ld, wide[i], count * 4);
    }
}
