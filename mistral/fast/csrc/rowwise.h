/* What is done to each of many rows by itself: norms, rotations, gates. A part of kernels.c. */

/* out [rows, n] = x / rms(x) * weight. */
void norm_rows(const float *x, const float *weight, int64_t rows, int64_t n, double eps, float *out, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) rms_norm(x + r * n, weight, n, eps, out + r * n);
}

/* The pairs of x [rows, heads, D] turned in place, by cosines and sines [rows, D / 2]. */
void rotate_rows(float *x, const float *cos, const float *sin, int64_t rows, int64_t heads, int64_t d, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++) rotate(x + (r * heads + h) * d, cos + r * d / 2, sin + r * d / 2, d);
}

/* gate [n] = silu(gate) times up [n], in place. */
void gate_rows(float *gate, const float *up, int64_t n, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < n; first += 1 << 12) {
        const int64_t last = n - first < 1 << 12 ? n : first + (1 << 12);
        int64_t i = first;
        for (; i + LANES <= last; i += LANES) {
            const floats g = load_floats(gate + i);
            *(floats_at *)(gate + i) = g * sigmoid(g) * load_floats(up + i);
        }
        if (i < last) {
            float ends[2][LANES] = {{0}};
            memcpy(ends[0], gate + i, (last - i) * sizeof *gate);
            const floats g = load_floats(ends[0]);
            *(floats_at *)ends[1] = g * sigmoid(g);
            for (int64_t j = i; j < last; j++) gate[j] = ends[1][j - i] * up[j];
        }
    }
}
