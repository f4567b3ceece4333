/* Products of few rows with many weights, and a whole decode step, on a CPU.

   Built once by fast/kernels.py, with whatever compiler is there, for the machine it runs on; called through
   ctypes. Plain C with the vector types that GCC and Clang share, so every instruction set is the
   compiler's affair. The arithmetic is that of model.py; tests compare the two.

   Every output is summed in one order, whatever the number of rows and of threads: LANES partial sums
   over the columns, then the sum of these. So a row's bits do not depend on what else is in the batch. */

#include "lanes.h" /* vectors of floats, the kinds of weights, what the kernels are given */

/* ---- products: y[r, j] = w[j] . x[r] */

#include "floats.h" /* with weights that are floats */

#include "blocks.h" /* with weights of few bits, by kinds.h, unpack.h and (on Arm) arm_blocks.h */

INLINE int is_quantized(const Matrix *m) { return is_blocks(m->kind); }

/* out[r, 0..n) for the block of rows first .. first + n of a matrix, n <= ROWS; out is [rows, ROWS]. Weights in few
   bits are multiplied with the inputs that were rounded from x instead of x. */
static void block(const Matrix *m, int64_t first, int64_t n, const float *x, int64_t ldx, const Inputs *rounded,
                  int64_t rows, float *out) {
    const char *w = m->data;
    if (is_quantized(m)) few_bits_block(m, first / ROWS, rounded, rows, out);
    else stripes((int)m->kind, w + first * m->k * size_of((int)m->kind), n, m->k, x, ldx, rows, out);
}

static int64_t blocks_of(const Matrix *m) { return (m->n + ROWS - 1) / ROWS; }

int64_t inputs_bytes(void) { return sizeof(Inputs); }

/* Whether products of many rows with quantized weights are best made here too. */
int64_t takes_many(void) { return VNNI || DOTPROD; }

#include "panels.h" /* with such weights, of many rows */

/* A row of n inputs, filled up to whole groups with zeros, and the way to the next row: not a whole number of pages, so that
   rows do not share places in the fastest cache. */
static int64_t apart(int64_t n) { return groups_of(n) * GROUP + APART; }

/* y [rows, n] = x [rows, ldx] times a matrix. Quantized weights want columns padded to whole groups, and room for
   rounded inputs. A thread takes STRIP blocks at a time through all rows of inputs, some after the others: so the weights
   stay in a cache. */
void product(const Matrix *m, const float *x, int64_t ldx, int64_t rows, Inputs *rounded, float *y, int64_t threads) {
    const int64_t groups = groups_of(m->k), few = rows <= ROWS ? 1 : STRIP, together = rows <= ROWS ? rows : ROWS;
    const int64_t ld = apart(m->k), given = ldx;
    float *moved = is_quantized(m) || rows < FEW ? NULL : aligned_alloc(LINE, rows * ld * sizeof *x);
    const float *from = moved ? moved : x;
    ldx = moved ? ld : ldx;
#pragma omp parallel num_threads(threads)
    {
        if (moved)
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) memcpy(moved + r * ld, x + r * given, m->k * sizeof *x);
        if (is_quantized(m))
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++)
                round_inputs_as(m->kind, takes_panels(m, rows), x + r * ldx, groups, rounded + r * groups);
        if (takes_panels(m, rows)) product_panels(m, rounded, rows, y);
        else
#pragma omp for schedule(guided, 4)
        for (int64_t strip = 0; strip < blocks_of(m); strip += few) {
            float out[ROWS * ROWS];
            for (int64_t at = 0; at < rows; at += together) {
                const int64_t count = rows - at < together ? rows - at : together;
                for (int64_t b = strip; b < strip + few && b < blocks_of(m); b++) {
                    const int64_t first = b * ROWS, n = m->n - first < ROWS ? m->n - first : ROWS;
                    block(m, first, n, from + at * ldx, ldx, rounded + at * groups, count, out);
                    for (int64_t r = 0; r < count; r++) memcpy(y + (at + r) * m->n + first, out + r * ROWS, n * 4);
                }
            }
        }
    }
    free(moved);
}

/* x [rows, k] as a product with quantized weights sees it, for products of many rows by somebody else: each span of
   columns rounded to 16 bits, and widened again. */
void through_16_bits(const float *x, int64_t k, int64_t rows, int64_t span, float *out, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t first = r * k; first < (r + 1) * k; first += span) {
            const int64_t n = (r + 1) * k - first < span ? (r + 1) * k - first : span;
            const float scale = largest(x + first, n) / INPUT, step = scale > 1e-30f ? scale : 1e-30f;
            for (int64_t i = first; i < first + n; i++) out[i] = rintf(x[i] / step) * scale;
        }
    }
}

/* Rows of a quantized matrix as floats: row ids[i] to out + i * k. */
void rows_of(const Matrix *m, const int64_t *ids, int64_t count, float *out, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
#define CALL(kind) row_of_blocks(kind, m, ids[i], out + i * m->k)
        FOR_KIND(m->kind, CALL)
#undef CALL
    }
}

/* Rows first .. first + n of a quantized matrix as floats and transposed, [k, n]: for products of many rows, by somebody
   else. first begins a block. */
void widen(const Matrix *m, int64_t first, int64_t n, float *out, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < n; b += ROWS) {
        const int64_t count = n - b < ROWS ? n - b : ROWS;
#define CALL(kind) widen_block(kind, m, (first + b) / ROWS, count, out + b, n)
        FOR_KIND(m->kind, CALL)
#undef CALL
    }
}

#include "repack.h" /* GGML's blocks, as files have them, to those of blocks.h */
#include "rounding.h" /* to int8, and to int4 as it was at first */
#include "affine.h" /* to int4 */

/* ---- a decode step */

#include "keys.h" /* keys and values as the cache keeps them */

#include "attention.h" /* a few queries, by parts of their positions */

#include "experts.h" /* a router, and the chosen experts */

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

/* `rows` tokens, of as many sequences or fewer, through all layers. Those of one sequence must not be so many that one
   takes the slot of a key that another sees.
   which: the row of the cache that each has; positions, origins: where each is and where it began;
   cos, sin: [rows, D / 2]; query_cos, query_sin: those of queries, the same where these do not grow;
   h: [rows, dim], embeddings in, hidden states out, normalised if the model has a last norm;
   rounded: room for the widest inputs, where weights are quantized; with mixtures for those of all chosen experts too. */
void decode(Model *m, int64_t rows, const int64_t *which, const int64_t *positions, const int64_t *origins,
            const float *cos, const float *sin, const float *query_cos, const float *query_sin, int64_t most_keys,
            float *h, float *scratch, Inputs *rounded, int64_t threads) {
    const int64_t dim = m->dim, d = m->head_dim, kv_heads = m->n_kv_heads, heads = m->n_heads / kv_heads;
    const int64_t ldd = apart(dim), ldq = apart(m->n_heads * d), ldkv = kv_heads * d, ldw = apart(m->hidden_dim);
    const int64_t gd = groups_of(dim), gq = groups_of(m->n_heads * d), gw = groups_of(m->hidden_dim);
    float *x = scratch, *q = x + rows * ldd, *k = q + rows * ldq, *v = k + rows * ldkv, *wide = v + rows * ldkv;
    const int64_t most_parts = parts_of(most_keys);
    float *all_scores = wide + rows * ldw, *said = all_scores + threads * scores_of(m, rows, most_keys);
    float *mixed = said + rows * most_parts * part_floats(m->n_heads, d);
    memset(scratch, 0, (all_scores - scratch) * sizeof *scratch); /* what pads columns is 0 */
    m->overflows = 0;
    for (int64_t l = 0; l < m->n_layers; l++) m->layers[l].overflows = 0;

#pragma omp parallel num_threads(threads)
    for (int64_t l = 0; l < m->n_layers; l++) {
        Layer *layer = m->layers + l;
        const int kind = inputs_for(layer), rounds = is_blocks(kind);
        float out[rows * ROWS], gate[rows * ROWS], *scores = all_scores + omp_get_thread_num() * scores_of(m, rows, most_keys);

#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            rms_norm(h + r * dim, layer->attention_norm, dim, m->eps, x + r * ldd);
            if (rounds) round_inputs(kind, x + r * ldd, gd, rounded + r * gd);
        }
        const int64_t bq = blocks_of(&layer->wq), bk = blocks_of(&layer->wk), bv = blocks_of(&layer->wv);
#pragma omp for schedule(guided, 4)
        for (int64_t b = 0; b < bq + bk + bv; b++) {
            const Matrix *w = b < bq ? &layer->wq : b < bq + bk ? &layer->wk : &layer->wv;
            float *to = b < bq ? q : b < bq + bk ? k : v;
            const int64_t ld = b < bq ? ldq : ldkv, first = (b < bq ? b : b < bq + bk ? b - bq : b - bq - bk) * ROWS;
            const int64_t n = w->n - first < ROWS ? w->n - first : ROWS;
            block(w, first, n, x, ldd, rounded, rows, out);
            for (int64_t r = 0; r < rows; r++) memcpy(to + r * ld + first, out + r * ROWS, n * 4);
        }
        const int64_t slots = layer->capacity * kv_heads, size = kept_size(layer->kept);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * kv_heads; i++) { /* all keys are there before the first query looks */
            const int64_t r = i / kv_heads, g = i % kv_heads;
            const int64_t at = which[r] * slots + positions[r] % layer->capacity * kv_heads + g;
            float *mine = q + r * ldq + g * heads * d;
            for (int64_t j = 0; j < heads; j++) rotate(mine + j * d, query_cos + r * d / 2, query_sin + r * d / 2, d);
            rotate(k + r * ldkv + g * d, cos + r * d / 2, sin + r * d / 2, d);
            int lost = keep(layer->kept, k + r * ldkv + g * d, d, layer->keys + at * d * size, scale_at(layer->key_scales, at));
            lost |= keep(layer->kept, v + r * ldkv + g * d, d, layer->values + at * d * size, scale_at(layer->value_scales, at));
            if (lost) {
#pragma omp atomic write
                layer->overflows = 1;
#pragma omp atomic write
                m->overflows = 1;
            }
        }
        int64_t teams = 0, begin[rows + 1]; /* large ones as long as every thread has something to do */
        const int64_t most = rows * most_parts / threads < 1 ? 1 : rows * most_parts / threads;
        for (begin[0] = 0; begin[teams] < rows; teams++)
            begin[teams + 1] = begin[teams] + team_at(layer, which, positions, origins, begin[teams], rows, most < TEAM ? most : TEAM);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < teams * (most_parts + 1); i++) {
            const int64_t t = i / (most_parts + 1), first = which[begin[t]] * slots;
            const Kept kept = {layer->keys + first * d * size, layer->values + first * d * size,
                               scale_at(layer->key_scales, first), scale_at(layer->value_scales, first),
                               layer->capacity, kv_heads, heads, d};
            attend_part(layer, &kept, positions, origins, begin[t], begin[t + 1] - begin[t], i % (most_parts + 1), most_parts,
                        q, ldq, scores, said);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * m->n_heads; i++) {
            const int64_t r = i / m->n_heads, h = i % m->n_heads, n = seen(layer->window, origins[r], positions[r]);
            const int64_t parts = positions[r] / span_of(n) - (positions[r] + 1 - n) / span_of(n) + 1;
            merge(said + r * most_parts * part_floats(m->n_heads, d), parts, h, m->n_heads, d, q + r * ldq + h * d);
        }
        if (rounds)
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) round_inputs(kind, q + r * ldq, gq, rounded + r * gq);
#pragma omp for schedule(guided, 4)
        for (int64_t b = 0; b < blocks_of(&layer->wo); b++) {
            const int64_t first = b * ROWS, n = dim - first < ROWS ? dim - first : ROWS;
            block(&layer->wo, first, n, q, ldq, rounded, rows, out);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < n; j++) h[r * dim + first + j] += out[r * ROWS + j];
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            rms_norm(h + r * dim, layer->ffn_norm, dim, m->eps, x + r * ldd);
            if (rounds) round_inputs(kind, x + r * ldd, gd, rounded + r * gd);
        }
        if (layer->experts) {
            mixture(m, layer, kind, rows, x, rounded, mixed, h);
            continue;
        }
#pragma omp for schedule(guided, 4)
        for (int64_t b = 0; b < blocks_of(&layer->w1); b++) {
            const int64_t first = b * ROWS, n = m->hidden_dim - first < ROWS ? m->hidden_dim - first : ROWS;
            block(&layer->w1, first, n, x, ldd, rounded, rows, gate);
            block(&layer->w3, first, n, x, ldd, rounded, rows, out);
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t j = 0; j < ROWS; j += LANES) {
                    const floats g = load_floats(gate + r * ROWS + j);
                    *(floats_at *)(out + r * ROWS + j) *= g * sigmoid(g);
                }
                memcpy(wide + r * ldw + first, out + r * ROWS, n * 4);
            }
        }
        if (rounds)
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) round_inputs(kind, wide + r * ldw, gw, rounded + r * gw);
#pragma omp for schedule(guided, 4)
        for (int64_t b = 0; b < blocks_of(&layer->w2); b++) {
            const int64_t first = b * ROWS, n = dim - first < ROWS ? dim - first : ROWS;
            block(&layer->w2, first, n, wide, ldw, rounded, rows, out);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < n; j++) h[r * dim + first + j] += out[r * ROWS + j];
        }
    }
    for (int64_t r = 0; m->norm && r < rows; r++) {
        rms_norm(h + r * dim, m->norm, dim, m->eps, x);
        memcpy(h + r * dim, x, dim * 4);
    }
}

/* ---- prompts */

#include "tiles.h" /* products of many rows with weights that are floats */
#include "queries.h" /* attention of many queries */
#include "rowwise.h" /* norms, rotations and gates of many rows */
