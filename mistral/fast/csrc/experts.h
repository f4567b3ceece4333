/* A mixture of experts in a decode step: a router, and the chosen experts alone. A part of kernels.c. */

/* Floats for the pairs of a token and one of its experts: what goes in, what comes out of w1 and w3, weights and choices. */
static int64_t mixture_floats(const Model *m, int64_t rows) {
    return rows * m->chosen * (apart(m->dim) + apart(m->hidden_dim) + 2);
}

/* The k largest of n logits, in the order of experts; of equal ones the lowest expert's. Weights are their softmax. */
static void choose_experts(const float *logits, int64_t n, int64_t k, int32_t *experts, float *weights) {
    char taken[n];
    float top = 0, total = 0;
    memset(taken, 0, n);
    for (int64_t i = 0; i < k; i++) {
        int64_t best = -1;
        for (int64_t e = 0; e < n; e++)
            if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
        taken[best] = 1;
        if (!i) top = logits[best];
    }
    for (int64_t e = 0; e < n; e++) {
        if (!taken[e]) continue;
        *experts++ = (int32_t)e;
        total += *weights++ = expf(logits[e] - top);
    }
    for (int64_t i = 1; i <= k; i++) weights[-i] /= total;
}

/* Adds to h [rows, dim] what their experts make of tokens. Every thread of a team calls it.
   kind: what inputs are rounded for; x: [rows, apart(dim)], normalised; rounded: the same rounded, if they are, and behind
   them room for those of all pairs, as wide as w1's or w2's; scratch: mixture_floats. */
static void mixture(const Model *m, const Layer *l, int kind, int64_t rows, const float *x, Inputs *rounded, float *scratch,
                    float *h) {
    const int64_t k = m->chosen, n = l->gate.n, pairs = rows * k, dim = m->dim, hidden = m->hidden_dim;
    const int64_t ldx = apart(dim), ldw = apart(hidden), gx = groups_of(dim), gw = groups_of(hidden);
    const int rounds = is_blocks(kind);
    float *gathered = scratch, *wide = gathered + pairs * ldx, *shares = wide + pairs * ldw;
    int32_t *chosen = (int32_t *)(shares + pairs);
    Inputs *inputs = rounded + rows * gx;

#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float logits[blocks_of(&l->gate) * ROWS];
        for (int64_t first = 0; first < n; first += ROWS)
            block(&l->gate, first, n - first < ROWS ? n - first : ROWS, x + r * ldx, ldx, NULL, 1, logits + first);
        choose_experts(logits, n, k, chosen + r * k, shares + r * k);
        for (int64_t p = r * k; p < (r + 1) * k; p++) memset(wide + p * ldw + hidden, 0, (ldw - hidden) * sizeof *wide);
    }
    /* Pairs in the order of experts: those of the s-th one that has any are begin[s] .. begin[s + 1). Each thread counts. */
    int64_t token[pairs], begin[pairs + 1], used = 0, at = 0;
    const Expert *expert[pairs];
    float share[pairs];
    for (int64_t e = 0; e < n; e++) {
        begin[used] = at;
        for (int64_t p = 0; p < pairs; p++)
            if (chosen[p] == e) token[at] = p / k, share[at++] = shares[p];
        if (at > begin[used]) expert[used++] = l->experts + e;
    }
    begin[used] = pairs;
    if (rows > 1) /* one token goes to all of its experts as it is */
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pairs; p++) {
            memcpy(gathered + p * ldx, x + token[p] * ldx, ldx * sizeof *x);
            if (rounds) memcpy(inputs + p * gx, rounded + token[p] * gx, gx * sizeof *inputs);
        }
    const int64_t bw = (hidden + ROWS - 1) / ROWS;
#pragma omp for schedule(guided, 4)
    for (int64_t i = 0; i < used * bw; i++) {
        const int64_t s = i / bw, first = i % bw * ROWS, wanted = hidden - first < ROWS ? hidden - first : ROWS;
        const int64_t p = begin[s], count = begin[s + 1] - p;
        const float *in = rows > 1 ? gathered + p * ldx : x;
        const Inputs *in_rounded = rows > 1 ? inputs + p * gx : rounded;
        float gate[rows * ROWS], out[rows * ROWS];
        block(&expert[s]->w1, first, wanted, in, ldx, in_rounded, count, gate);
        block(&expert[s]->w3, first, wanted, in, ldx, in_rounded, count, out);
        for (int64_t r = 0; r < count; r++) {
            for (int64_t j = 0; j < ROWS; j += LANES) {
                const floats g = load_floats(gate + r * ROWS + j);
                *(floats_at *)(out + r * ROWS + j) *= g * sigmoid(g);
            }
            memcpy(wide + (p + r) * ldw + first, out + r * ROWS, wanted * sizeof *wide);
        }
    }
    if (rounds)
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pairs; p++) round_inputs(kind, wide + p * ldw, gw, inputs + p * gw);
#pragma omp for schedule(guided, 4)
    for (int64_t b = 0; b < (dim + ROWS - 1) / ROWS; b++) {
        const int64_t first = b * ROWS, wanted = dim - first < ROWS ? dim - first : ROWS;
        float out[rows * ROWS], all[rows * ROWS];
        memset(all, 0, sizeof all);
        for (int64_t s = 0; s < used; s++) {
            const int64_t p = begin[s], count = begin[s + 1] - p;
            block(&expert[s]->w2, first, wanted, wide + p * ldw, ldw, inputs + p * gw, count, out);
            for (int64_t r = 0; r < count; r++)
                for (int64_t j = 0; j < wanted; j++) all[token[p + r] * ROWS + j] += share[p + r] * out[r * ROWS + j];
        }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < wanted; j++) h[r * dim + first + j] += all[r * ROWS + j];
    }
}
