/* A decode step: a few tokens through all layers, in one call. A part of kernels.c.

   Each thread of a team goes through all layers and calls every function that takes a Step. The loops in these are shared out
   among the threads; at the end of each loop they wait for each other. The walk is that of model.py. */

/* A step, and where what it makes goes. Inputs of products have rows that are `ld`.. floats apart, see `apart`; what pads
   columns is 0. */
typedef struct {
    const Model *m;
    int64_t rows, threads;
    const int64_t *which, *positions, *origins;
    const float *cos, *sin, *query_cos, *query_sin;
    float *h;
    float *x, *q, *k, *v, *wide; /* normalised h; queries, then what attention gives; keys; values; gated w3 */
    int64_t ldx, ldq, ldkv, ldw;
    float *scores, *said, *mixed; /* of attention: one place a thread, and [rows, most_parts] of part_floats; see `mixture` */
    int64_t most_parts;
    Inputs *rounded;
} Step;

/* Floats for the scores of all heads of a team in a part, and what decode wants as scratch: for `rows` tokens, each of which
   sees up to `keys` positions. */
static int64_t scores_of(const Model *m, int64_t rows, int64_t keys) {
    return (rows < TEAM ? rows : TEAM) * m->n_heads * (span_of(keys) + LANES);
}

int64_t scratch_floats(const Model *m, int64_t rows, int64_t keys, int64_t threads) {
    const int64_t q = apart(m->n_heads * m->head_dim), kv = m->n_kv_heads * m->head_dim;
    return rows * (apart(m->dim) + q + 2 * kv + apart(m->hidden_dim)) + threads * scores_of(m, rows, keys) +
           rows * parts_of(keys) * part_floats(m->n_heads, m->head_dim) +
           mixture_floats(m, rows);
}

/* The kind that a layer's inputs are rounded for: INT8 is alone in a layer, and all others take the same. */
static int inputs_for(const Layer *l) {
    const Matrix *all[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->w1, &l->w2, &l->w3};
    for (int i = 0; i < 7; i++)
        if (is_quantized(all[i])) return all[i]->kind;
    return F32;
}

/* Rows of n inputs, rounded for products of a kind, if they want that. */
static void round_rows(const Step *s, int kind, const float *x, int64_t ldx, int64_t n) {
    const int64_t groups = groups_of(n);
    if (!is_blocks(kind)) return;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < s->rows; r++) round_inputs(kind, x + r * ldx, groups, s->rounded + r * groups);
}

/* x = h / rms(h) * weight, rounded too if products want that. */
static void normalise(const Step *s, int kind, const float *weight) {
    const int64_t dim = s->m->dim, groups = groups_of(dim);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < s->rows; r++) {
        rms_norm(s->h + r * dim, weight, dim, s->m->eps, s->x + r * s->ldx);
        if (is_blocks(kind)) round_inputs(kind, s->x + r * s->ldx, groups, s->rounded + r * groups);
    }
}

/* q, k and v: the products of x. */
static void project(const Step *s, const Layer *l) {
    const int64_t bq = blocks_of(&l->wq), bk = blocks_of(&l->wk), bv = blocks_of(&l->wv);
    float out[s->rows * ROWS];
#pragma omp for schedule(guided, 4)
    for (int64_t b = 0; b < bq + bk + bv; b++) {
        const Matrix *w = b < bq ? &l->wq : b < bq + bk ? &l->wk : &l->wv;
        float *to = b < bq ? s->q : b < bq + bk ? s->k : s->v;
        const int64_t ld = b < bq ? s->ldq : s->ldkv, first = (b < bq ? b : b < bq + bk ? b - bq : b - bq - bk) * ROWS;
        const int64_t n = w->n - first < ROWS ? w->n - first : ROWS;
        block(w, first, n, s->x, s->ldx, s->rounded, s->rows, out);
        for (int64_t r = 0; r < s->rows; r++) memcpy(to + r * ld + first, out + r * ROWS, n * 4);
    }
}

/* Turns queries and keys, and puts keys and values into the cache: all are there before the first query looks. */
static void rotate_and_keep(const Step *s, Model *m, Layer *l) {
    const int64_t d = m->head_dim, kv_heads = m->n_kv_heads, heads = m->n_heads / kv_heads;
    const int64_t slots = l->capacity * kv_heads, size = kept_size(l->kept);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s->rows * kv_heads; i++) {
        const int64_t r = i / kv_heads, g = i % kv_heads, angle = r * d / 2;
        const int64_t at = s->which[r] * slots + s->positions[r] % l->capacity * kv_heads + g;
        float *q = s->q + r * s->ldq + g * heads * d, *k = s->k + r * s->ldkv + g * d, *v = s->v + r * s->ldkv + g * d;
        for (int64_t j = 0; j < heads; j++) rotate(q + j * d, s->query_cos + angle, s->query_sin + angle, d);
        rotate(k, s->cos + angle, s->sin + angle, d);
        int lost = keep(l->kept, k, d, l->keys + at * d * size, scale_at(l->key_scales, at));
        lost |= keep(l->kept, v, d, l->values + at * d * size, scale_at(l->value_scales, at));
        if (lost) {
#pragma omp atomic write
            l->overflows = 1;
#pragma omp atomic write
            m->overflows = 1;
        }
    }
}

/* What queries see of values, in the place of q: teams of rows by parts of their positions, then the parts of each query. */
static void look(const Step *s, const Layer *l, float *scores) {
    const Model *m = s->m;
    const int64_t rows = s->rows, parts = s->most_parts, d = m->head_dim, kv_heads = m->n_kv_heads;
    const int64_t slots = l->capacity * kv_heads, size = kept_size(l->kept);
    int64_t teams = 0, begin[rows + 1]; /* large ones as long as every thread has something to do */
    const int64_t most = rows * parts / s->threads < 1 ? 1 : rows * parts / s->threads;
    for (begin[0] = 0; begin[teams] < rows; teams++)
        begin[teams + 1] = begin[teams] + team_at(l, s->which, s->positions, s->origins, begin[teams], rows,
                                                  most < TEAM ? most : TEAM);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < teams * (parts + 1); i++) {
        const int64_t t = i / (parts + 1), first = s->which[begin[t]] * slots;
        const Kept kept = {l->keys + first * d * size, l->values + first * d * size, scale_at(l->key_scales, first),
                           scale_at(l->value_scales, first), l->capacity, kv_heads, m->n_heads / kv_heads, d};
        attend_part(l, &kept, s->positions, s->origins, begin[t], begin[t + 1] - begin[t], i % (parts + 1), parts, s->q, s->ldq,
                    scores, s->said);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows * m->n_heads; i++) {
        const int64_t r = i / m->n_heads, head = i % m->n_heads, n = seen(l->window, s->origins[r], s->positions[r]);
        const int64_t its = s->positions[r] / span_of(n) - (s->positions[r] + 1 - n) / span_of(n) + 1;
        merge(s->said + r * parts * part_floats(m->n_heads, d), its, head, m->n_heads, d, s->q + r * s->ldq + head * d);
    }
}

/* h += the product of a matrix and rows x. */
static void add_product(const Step *s, const Matrix *w, const float *x, int64_t ldx) {
    const int64_t dim = s->m->dim;
    float out[s->rows * ROWS];
#pragma omp for schedule(guided, 4)
    for (int64_t b = 0; b < blocks_of(w); b++) {
        const int64_t first = b * ROWS, n = dim - first < ROWS ? dim - first : ROWS;
        block(w, first, n, x, ldx, s->rounded, s->rows, out);
        for (int64_t r = 0; r < s->rows; r++)
            for (int64_t j = 0; j < n; j++) s->h[r * dim + first + j] += out[r * ROWS + j];
    }
}

/* wide = silu(w1 x) * w3 x. */
static void gated(const Step *s, const Layer *l) {
    const int64_t hidden = s->m->hidden_dim;
    float gate[s->rows * ROWS], out[s->rows * ROWS];
#pragma omp for schedule(guided, 4)
    for (int64_t b = 0; b < blocks_of(&l->w1); b++) {
        const int64_t first = b * ROWS, n = hidden - first < ROWS ? hidden - first : ROWS;
        block(&l->w1, first, n, s->x, s->ldx, s->rounded, s->rows, gate);
        block(&l->w3, first, n, s->x, s->ldx, s->rounded, s->rows, out);
        for (int64_t r = 0; r < s->rows; r++) {
            for (int64_t j = 0; j < ROWS; j += LANES) {
                const floats g = load_floats(gate + r * ROWS + j);
                *(floats_at *)(out + r * ROWS + j) *= g * sigmoid(g);
            }
            memcpy(s->wide + r * s->ldw + first, out + r * ROWS, n * 4);
        }
    }
}

/* `rows` tokens, of as many sequences or fewer, through all layers. Those of one sequence must not be so many that one
   takes the slot of a key that another sees.
   which: the row of the cache that each has; positions, origins: where each is and where it began;
   cos, sin: [rows, D / 2]; query_cos, query_sin: those of queries, the same where these do not grow;
   h: [rows, dim], embeddings in, hidden states out, normalised if the model has a last norm;
   rounded: room for the widest inputs, where weights are quantized; with mixtures for those of all chosen experts too. */
void decode(Model *m, int64_t rows, const int64_t *which, const int64_t *positions, const int64_t *origins,
            const float *cos, const float *sin, const float *query_cos, const float *query_sin, int64_t most_keys,
            float *h, float *scratch, Inputs *rounded, int64_t threads) {
    const int64_t heads = m->n_heads * m->head_dim, a_scores = scores_of(m, rows, most_keys);
    Step step = {m, rows, threads, which, positions, origins, cos, sin, query_cos, query_sin, h, .rounded = rounded};
    Step *s = &step;
    s->ldx = apart(m->dim), s->ldq = apart(heads), s->ldkv = m->n_kv_heads * m->head_dim, s->ldw = apart(m->hidden_dim);
    s->x = scratch, s->q = s->x + rows * s->ldx, s->k = s->q + rows * s->ldq, s->v = s->k + rows * s->ldkv;
    s->wide = s->v + rows * s->ldkv, s->scores = s->wide + rows * s->ldw, s->said = s->scores + threads * a_scores;
    s->most_parts = parts_of(most_keys), s->mixed = s->said + rows * s->most_parts * part_floats(m->n_heads, m->head_dim);
    memset(scratch, 0, (s->scores - scratch) * sizeof *scratch);
    m->overflows = 0;
    for (int64_t l = 0; l < m->n_layers; l++) m->layers[l].overflows = 0;

#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < m->n_layers; i++) {
        Layer *l = m->layers + i;
        const int kind = inputs_for(l);
        normalise(s, kind, l->attention_norm);
        project(s, l);
        rotate_and_keep(s, m, l);
        look(s, l, s->scores + omp_get_thread_num() * a_scores);
        round_rows(s, kind, s->q, s->ldq, heads);
        add_product(s, &l->wo, s->q, s->ldq);
        normalise(s, kind, l->ffn_norm);
        if (l->experts) {
            mixture(m, l, kind, rows, s->x, rounded, s->mixed, h);
            continue;
        }
        gated(s, l);
        round_rows(s, kind, s->wide, s->ldw, m->hidden_dim);
        add_product(s, &l->w2, s->wide, s->ldw);
    }
    for (int64_t r = 0; m->norm && r < rows; r++) {
        rms_norm(h + r * m->dim, m->norm, m->dim, m->eps, s->x);
        memcpy(h + r * m->dim, s->x, m->dim * 4);
    }
}
