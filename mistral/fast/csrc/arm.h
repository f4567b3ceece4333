/* LANES numbers on Arm, by the instructions of NEON that vector types do not express. A part of kernels.c. */

INLINE floats neon_multiply_add(floats a, floats b, floats c) {
    return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

INLINE floats neon_load_f16(const uint16_t *p) { return (floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

/* 2 LANES bytes as as many halves. */
INLINE words neon_load_halves(const int8_t *p) { return (words)vmovl_s8(vld1_s8(p)); }

/* LANES bytes as floats. */
INLINE floats neon_load_bytes(const char *p, int with_sign) {
    uint32_t four;
    memcpy(&four, p, 4);
    const uint8x8_t b = vcreate_u8(four);
    if (with_sign) return (floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(b)))));
    return (floats)vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(b))));
}
