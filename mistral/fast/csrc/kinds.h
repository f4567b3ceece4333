/* The kinds of quantized weights in blocks, see blocks.h: how many bits they have, and what lies where. A part of kernels.c. */

/* What a group holds, one after the other.
   Low: 4 x ROWS words (word j of a row has columns 8 j .. 8 j + 7, the first in the lowest bits) of the lowest four bits;
     in kinds of 8 bits UNITS x ROWS words, one for each unit; of 2 and 3 bits the lowest two, as the high ones of 6 bits.
     INT8: for every pair of columns ROWS pairs of signed bytes.
   High: of 3 and 5 bits ROWS words (byte c of a word has in bit u the last bit of column c of unit u); of 6 bits 2 x ROWS
     words (word p of a row has units 4 p .. 4 p + 3, two bits each, the first in the lowest).
   Scales, each for ROWS rows: INT4 bf16; fp16 and, in kinds with a minimum, another fp16; or bytes: factors of the scale and
     of the minimum (AFFINE4, AFFINE5), a signed one of the scale (IQ4_XS), two signed ones of the scales of 16 columns each
     (Q6_K, Q3_K), or two with four bits for the scale of 16 columns and, above, four for their minimum (Q2_K).
   INT8 has a float for each row apart; kinds with factors have apart, for SUPER groups, fp16 numbers that these are
   multiplied by: [blocks, supers, 2 with a minimum, else 1, ROWS]. In IQ4_NL and IQ4_XS four bits are the place of a weight
   in a table. */
INLINE int is_blocks(int kind) { return kind >= INT8; }
INLINE int bits_of(int kind) {
    switch (kind) {
    case INT8: case Q8_0: return 8;
    case Q6_K: return 6;
    case Q5_0: case Q5_1: case AFFINE5: return 5;
    case Q3_K: return 3;
    case Q2_K: return 2;
    default: return 4;
    }
}
INLINE int has_table(int kind) { return kind == IQ4_NL || kind == IQ4_XS; }
INLINE int has_minimum(int kind) {
    return kind == Q4_1 || kind == Q5_1 || kind == AFFINE4 || kind == AFFINE5 || kind == Q2_K;
}
INLINE int is_halved(int kind) { return kind == Q6_K || kind == Q3_K || kind == Q2_K; } /* scales of 16 columns each */
INLINE int supers_of(int kind) {
    if (kind == AFFINE4 || kind == AFFINE5 || kind == Q2_K) return 2;
    return kind == Q6_K || kind == Q3_K || kind == IQ4_XS ? 1 : 0;
}
INLINE int plane_bytes(int kind) { return ROWS * GROUP * bits_of(kind) / 8; }
INLINE int scale_bytes(int kind) { /* of a row, in a group */
    return kind == INT8 ? 0 : kind == IQ4_XS ? 1 : kind == Q4_1 || kind == Q5_1 ? 4 : 2;
}
INLINE int group_bytes(int kind) { return plane_bytes(kind) + ROWS * scale_bytes(kind); }

/* What is taken off a stored number is 1 << this; -1 where nothing is. */
INLINE int offset_of(int kind) {
    switch (kind) {
    case INT4: case Q4_0: return 3;
    case Q5_0: return 4;
    case Q6_K: return 5;
    case Q3_K: return 2;
    case Q8_0: case IQ4_NL: case IQ4_XS: return 7;
    default: return -1;
    }
}
