/* Blocks of GGML's types, as they lie in files, to blocks.h's: the same numbers in another order. A part of kernels.c. */

/* Bytes of a group in a file, or of SUPER groups in the types that end in K. */
INLINE int64_t file_bytes(int kind) {
    switch (kind) {
    case Q8_0: return 34;
    case Q4_0: return 18;
    case Q4_1: return 20;
    case Q5_0: return 22;
    case Q5_1: return 24;
    case AFFINE4: return 144;
    case AFFINE5: return 176;
    case Q2_K: return 84;
    case Q3_K: return 110;
    case IQ4_NL: return 18;
    case IQ4_XS: return 136;
    default: return 210; /* Q6_K */
    }
}

/* Where the fp16 numbers for SUPER groups are in these bytes. */
INLINE int supers_at(int kind) { return kind == Q6_K ? 208 : kind == Q3_K ? 108 : kind == Q2_K ? 80 : 0; }

INLINE void nibbles(const uint8_t *from, int half, uint8_t *q) {
    for (int i = 0; i < GROUP; i++) q[i] = from[i] >> (4 * half) & 15;
}

/* Factor g of the scales (half 0) or of the minima (half 1) among the 12 bytes of Q4_K and Q5_K, six bits each. */
INLINE uint8_t factor(const uint8_t *from, int half, int g) {
    if (g < 4) return from[4 * half + g] & 63;
    return (from[4 + g] >> (4 * half) & 15) | (from[4 * half + g - 4] >> 6 << 4);
}

/* Factor j, less 32, of the 16 among the 12 bytes of Q3_K, six bits each; of the 8 of IQ4_XS, among the 6 from `from` on. */
INLINE uint8_t factor_of_16(const uint8_t *from, int j) {
    return (from[j % 8] >> (j / 8 * 4) & 15) + (from[8 + j % 4] >> (j / 4 * 2) & 3) * 16 - 32;
}
INLINE uint8_t factor_of_8(const uint8_t *from, int j) {
    return (from[2 + j / 2] >> (j % 2 * 4) & 15) + (from[j / 4] >> (j % 4 * 2) & 3) * 16 - 32;
}

/* Group g of a row: its numbers q, as bytes from 0, and what follows them in a block: `each` halves or bytes. */
INLINE void read_group(int kind, const uint8_t *row, int64_t g, uint8_t *q, uint16_t *each) {
    const uint8_t *from = row + (supers_of(kind) ? g / SUPER : g) * file_bytes(kind);
    const int at = g % SUPER;
    switch (kind) {
    case Q8_0:
        for (int i = 0; i < GROUP; i++) q[i] = from[2 + i] ^ 0x80;
        memcpy(each, from, 2);
        break;
    case Q4_0: case Q4_1: case Q5_0: case Q5_1: case IQ4_NL: {
        const int scales = has_minimum(kind) ? 4 : 2, fifth = bits_of(kind) == 5 ? 4 : 0;
        uint32_t high = 0;
        memcpy(each, from, scales);
        memcpy(&high, from + scales, fifth);
        for (int i = 0; i < GROUP; i++)
            q[i] = (from[scales + fifth + i % 16] >> (i / 16 * 4) & 15) | (high >> i & 1) << 4;
        break;
    }
    case AFFINE4: case AFFINE5:
        nibbles(from + (kind == AFFINE4 ? 16 : 48) + at / 2 * GROUP, at % 2, q);
        if (kind == AFFINE5)
            for (int i = 0; i < GROUP; i++) q[i] |= (from[16 + i] >> at & 1) << 4;
        each[0] = factor(from + 4, 0, at), each[1] = factor(from + 4, 1, at);
        break;
    case IQ4_XS:
        for (int i = 0; i < GROUP; i++) q[i] = from[8 + at * 16 + i % 16] >> (i / 16 * 4) & 15;
        each[0] = factor_of_8(from + 2, at);
        break;
    case Q2_K: case Q3_K:
        for (int i = 0; i < GROUP; i++) q[i] = from[(kind == Q2_K ? 16 : 32) + at / 4 * GROUP + i] >> (at % 4 * 2) & 3;
        if (kind == Q3_K)
            for (int i = 0; i < GROUP; i++) q[i] |= (from[i] >> at & 1) << 2;
        for (int p = 0; p < 2; p++) each[p] = kind == Q2_K ? from[2 * at + p] : factor_of_16(from + 96, 2 * at + p);
        break;
    default: /* Q6_K */
        nibbles(from + at / 4 * 64 + at % 2 * GROUP, at % 4 / 2, q);
        for (int i = 0; i < GROUP; i++) q[i] |= (from[128 + at / 4 * GROUP + i] >> (at % 4 * 2) & 3) << 4;
        each[0] = from[192 + 2 * at], each[1] = from[193 + 2 * at];
    }
}

/* The same group of a lane into its block. */
INLINE void write_group(int kind, const uint8_t *q, const uint16_t *each, int lane, uint8_t *to) {
    for (int i = 0; i < GROUP; i++) {
        const int u = i / 8 * 2 + i % 2, c = i % 8 / 2;
        if (bits_of(kind) == 8) {
            to[(u * ROWS + lane) * 4 + c] = q[i];
            continue;
        }
        if (bits_of(kind) < 4) {
            to[(u / 4 * ROWS + lane) * 4 + c] |= (q[i] & 3) << (u % 4 * 2);
            if (bits_of(kind) == 3) to[(2 * ROWS + lane) * 4 + c] |= q[i] >> 2 << u;
            continue;
        }
        to[(u / 2 * ROWS + lane) * 4 + c] |= (q[i] & 15) << (u % 2 * 4);
        uint8_t *high = to + 4 * ROWS * 4;
        if (bits_of(kind) == 5) high[lane * 4 + c] |= q[i] >> 4 << u;
        if (bits_of(kind) == 6) high[(u / 4 * ROWS + lane) * 4 + c] |= q[i] >> 4 << (u % 4 * 2);
    }
    uint8_t *scales = to + plane_bytes(kind);
    if (supers_of(kind)) {
        for (int i = 0; i < scale_bytes(kind); i++) scales[i * ROWS + lane] = each[i];
    } else {
        ((uint16_t *)scales)[lane] = each[0];
        if (has_minimum(kind)) ((uint16_t *)scales)[ROWS + lane] = each[1];
    }
}

INLINE void repack_block(int kind, const uint8_t *raw, int64_t n, int64_t k, int64_t b, uint8_t *packed, uint16_t *scale) {
    const int64_t groups = groups_of(k), supers = (groups + SUPER - 1) / SUPER, size = group_bytes(kind);
    const int64_t row_bytes = (supers_of(kind) ? supers : groups) * file_bytes(kind);
    packed += b * groups * size, scale += b * supers * supers_of(kind) * ROWS;
    memset(packed, 0, groups * size);
    if (supers_of(kind)) memset(scale, 0, supers * supers_of(kind) * ROWS * 2);
    for (int lane = 0; lane < ROWS && b * ROWS + lane < n; lane++) {
        const uint8_t *row = raw + (b * ROWS + lane) * row_bytes;
        for (int64_t g = 0; g < groups; g++) {
            uint8_t q[GROUP];
            uint16_t each[2] = {0};
            read_group(kind, row, g, q, each);
            write_group(kind, q, each, lane, packed + g * size);
        }
        for (int64_t s = 0; s < supers && supers_of(kind); s++) {
            const uint8_t *from = row + s * file_bytes(kind) + supers_at(kind);
            for (int i = 0; i < supers_of(kind); i++) memcpy(scale + (s * supers_of(kind) + i) * ROWS + lane, from + 2 * i, 2);
        }
    }
}

/* [n, k] weights of a GGML type, rows one after the other as in a file, as blocks of `kind`. */
void repack(int64_t kind, const uint8_t *raw, int64_t n, int64_t k, uint8_t *packed, uint16_t *scale, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 2) num_threads(threads)
    for (int64_t b = 0; b < (n + ROWS - 1) / ROWS; b++) {
#define CALL(kind) repack_block(kind, raw, n, k, b, packed, scale)
        switch (kind) {
        case Q8_0: CALL(Q8_0); break;
        case Q4_0: CALL(Q4_0); break;
        case Q4_1: CALL(Q4_1); break;
        case Q5_0: CALL(Q5_0); break;
        case Q5_1: CALL(Q5_1); break;
        case Q6_K: CALL(Q6_K); break;
        case Q2_K: CALL(Q2_K); break;
        case Q3_K: CALL(Q3_K); break;
        case IQ4_NL: CALL(IQ4_NL); break;
        case IQ4_XS: CALL(IQ4_XS); break;
        case AFFINE4: CALL(AFFINE4); break;
        default: CALL(AFFINE5);
        }
#undef CALL
    }
}
