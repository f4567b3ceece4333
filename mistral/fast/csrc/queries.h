/* The attention of many queries, those of a prompt. A part of kernels.c.

   A block of PANEL keys is transposed and its values are copied, so that both are one stretch of memory; then rows, a query of
   one head each, go by TILE at a time: what the keys score with them, the softmax as far as the blocks before this one go,
   and what the values bring. A block that none of the queries sees is left out. All of it is fp32. */

enum { QUERIES = 64 }; /* whose heads of a group are one thread's at a time */

typedef uint8_t bytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));

/* Queries, keys and values of `rows` sequences, [rows, n, H, D] and [rows, positions, K, D]; the heads of a query, and those of a
   position, lie one after the other. mask: [rows, n, positions], 1 where a query sees a position; out: [rows, n, H, D]. */
typedef struct {
    const float *q, *k, *v;
    const uint8_t *mask;
    float *out;
    int64_t rows, n, positions, n_heads, n_kv_heads, head_dim;
    int64_t next_query, next_queries, next_keys; /* floats from a query to the next, from a sequence to the next */
} Queries;

/* What a thread needs room for. */
typedef struct {
    float *keys;             /* [D, PANEL] */
    float *values;           /* [PANEL, wide] */
    float *sums;             /* [full, wide]: of values times weights */
    float *tops, *totals;    /* [full]: the largest score so far, the sum of the weights */
    uint8_t *mask;           /* [queries, PANEL] */
    int64_t wide, full;      /* D and the rows, filled up to whole panels and tiles */
} Room;

/* Keys transposed, [D, PANEL], and values, [PANEL, wide], of `count` positions; what is filled up is 0. */
static void pack_keys(const Queries *a, const float *k, const float *v, int64_t count, Room *room) {
    const int64_t d = a->head_dim, next = a->n_kv_heads * d;
    for (int64_t j = 0; j < PANEL; j += LANES)
        for (int64_t c = 0; c < d; c += LANES) {
            words w[LANES];
            uint32_t turned[LANES][LANES];
            const int64_t there = d - c < LANES ? d - c : LANES;
            for (int64_t i = 0; i < LANES; i++) {
                w[i] = (words){0};
                if (j + i < count) memcpy(&w[i], k + (j + i) * next + c, there * sizeof *k);
            }
            transpose(w, turned[0], LANES);
            for (int64_t i = 0; i < there; i++) memcpy(room->keys + (c + i) * PANEL + j, turned[i], sizeof turned[i]);
        }
    for (int64_t j = 0; j < PANEL; j++) {
        float *to = room->values + j * room->wide;
        if (j < count) memcpy(to, v + j * next, d * sizeof *to);
        else memset(to, 0, d * sizeof *to);
    }
}

/* The softmax of a row as far as one more block of scores goes: weights in place of scores, and what there was before
   it scaled down where the block has a larger score. */
INLINE void weights_so_far(float *scores, const uint8_t *mask, float scale, float *sums, int64_t wide, float *top, float *total) {
    floats s[WIDE], most = all(*top), sum_of = {0};
    UNROLL for (int j = 0; j < WIDE; j++) {
        const words sees = __builtin_convertvector(*(const bytes_at *)(mask + j * LANES), words) != 0;
        const words kept = (words)(scale * load_floats(scores + j * LANES)) & sees;
        s[j] = (floats)(kept | (0xff800000 & ~sees)); /* -infinity */
        most = larger(s[j], most);
        sum_of += (floats)kept - (floats)kept; /* 0, or NaN, which exp_of loses */
    }
    float largest_of = most[0];
    for (int i = 1; i < LANES; i++) largest_of = most[i] > largest_of ? most[i] : largest_of;
    UNROLL for (int j = 0; j < WIDE; j++) {
        const floats p = exp_of(s[j] - largest_of);
        *(floats_at *)(scores + j * LANES) = p;
        sum_of += p;
    }
    if (largest_of > *top) {
        const floats less = exp_of(all(*top - largest_of));
        for (int64_t c = 0; c < wide; c += LANES) *(floats_at *)(sums + c) = less * load_floats(sums + c);
        *total *= less[0];
        *top = largest_of;
    }
    *total += sum(sum_of);
}

/* Which of `count` positions from `first` on each query sees, one after the other; whether any does. */
static int masks_of(const Queries *a, const uint8_t *mask, int64_t queries, int64_t first, int64_t count, uint8_t *to) {
    uint8_t any = 0;
    for (int64_t i = 0; i < queries; i++, to += PANEL) {
        memset(to, 0, PANEL);
        memcpy(to, mask + i * a->positions + first, count);
        for (int64_t j = 0; j < PANEL; j++) any |= to[j];
    }
    return any;
}

/* The heads of group g of `queries` queries of a sequence. */
static void attend_queries(const Queries *a, const float *q, const float *k, const float *v, const uint8_t *mask,
                           int64_t queries, int64_t g, Room *room, float *out) {
    const int64_t d = a->head_dim, heads = a->n_heads / a->n_kv_heads, rows = queries * heads, wide = room->wide;
    const float scale = 1 / sqrtf(d);
    memset(room->sums, 0, room->full * wide * sizeof *room->sums);
    for (int64_t t = 0; t < room->full; t++) room->tops[t] = -3.4e38f, room->totals[t] = 0;
    for (int64_t first = 0; first < a->positions; first += PANEL) {
        const int64_t count = a->positions - first < PANEL ? a->positions - first : PANEL, at = first * a->n_kv_heads * d;
        if (!masks_of(a, mask, queries, first, count, room->mask)) continue;
        pack_keys(a, k + at, v + at, count, room);
        for (int64_t t = 0; t < rows; t += TILE) {
            float scores[TILE][PANEL] = {{0}};
            const float *from[TILE], *weights[TILE];
            const uint8_t *seen[TILE];
            for (int64_t r = 0; r < TILE; r++) {
                const int64_t row = t + r < rows ? t + r : rows - 1; /* a tile's last rows may be nobody's */
                from[r] = q + row / heads * a->next_query + (g * heads + row % heads) * d;
                seen[r] = room->mask + row / heads * PANEL, weights[r] = scores[r];
            }
            float *sums = room->sums + t * wide;
            multiply_tile(from, room->keys, PANEL, d, scores[0], PANEL);
            for (int64_t r = 0; r < TILE; r++)
                weights_so_far(scores[r], seen[r], scale, sums + r * wide, wide, room->tops + t + r, room->totals + t + r);
            for (int64_t c = 0; c < wide; c += PANEL)
                multiply_tile(weights, room->values + c, wide, PANEL, sums + c, wide);
        }
    }
    for (int64_t t = 0; t < rows; t++) {
        float *to = out + (t / heads * a->n_heads + g * heads + t % heads) * d;
        const float total = room->totals[t];
        for (int64_t c = 0; c < d; c++) to[c] = total == 0 ? 0 : room->sums[t * wide + c] / total; /* who sees nothing: 0 */
    }
}

static Room room_for(const Queries *a) {
    const int64_t wide = (a->head_dim + PANEL - 1) / PANEL * PANEL, heads = a->n_heads / a->n_kv_heads;
    const int64_t full = (QUERIES * heads + TILE - 1) / TILE * TILE;
    Room room = {.wide = wide, .full = full};
    room.keys = calloc(a->head_dim * PANEL + PANEL * wide + full * wide + 2 * full + QUERIES * PANEL / sizeof(float), sizeof(float));
    room.values = room.keys + a->head_dim * PANEL, room.sums = room.values + PANEL * wide;
    room.tops = room.sums + full * wide, room.totals = room.tops + full;
    room.mask = (uint8_t *)(room.totals + full);
    return room;
}

/* The attention of queries that are there to keys that are there. */
void attend_many(const Queries *a, int64_t threads) {
    const int64_t parts = (a->n + QUERIES - 1) / QUERIES, d = a->head_dim;
#pragma omp parallel num_threads(threads)
    {
        Room room = room_for(a);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a->rows * a->n_kv_heads * parts; i++) {
            const int64_t r = i / parts / a->n_kv_heads, g = i / parts % a->n_kv_heads, first = i % parts * QUERIES;
            const int64_t queries = a->n - first < QUERIES ? a->n - first : QUERIES, keys = r * a->next_keys + g * d;
            attend_queries(a, a->q + r * a->next_queries + first * a->next_query, a->k + keys, a->v + keys,
                           a->mask + (r * a->n + first) * a->positions, queries, g, &room,
                           a->out + (r * a->n + first) * a->n_heads * d);
        }
        free(room.keys);
    }
}
