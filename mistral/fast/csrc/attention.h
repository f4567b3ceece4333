/* The attention of a decode step. A part of kernels.c. */

INLINE floats all(float x) { return x - (floats){0}; } /* plus 0 would be an addition, for -0 */

/* Lane by lane the larger one. */
INLINE floats larger(floats a, floats b) {
    const ints first = a > b;
    return (floats)(((ints)a & first) | ((ints)b & ~first));
}

/* exp for x <= 0, to a few units in the last place; below about -87 it is 0. */
INLINE floats exp_of(floats x) {
    const floats low = (floats){0} - 87.0f;
    const ints keep = x > low;
    x = larger(x, low);
    ints n = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, ints); /* rounds to nearest: x <= 0 */
    floats f = __builtin_convertvector(n, floats);
    floats r = multiply_add(f, all(2.12194440e-4f), multiply_add(f, all(-0.693359375f), x));
    floats p = multiply_add(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
    p = multiply_add(p, r, all(8.3334519073e-3f));
    p = multiply_add(p, r, all(4.1665795894e-2f));
    p = multiply_add(p, r, all(1.6666665459e-1f));
    p = multiply_add(p, r, all(5.0000001201e-1f));
    p = multiply_add(p * r, r, r) + 1.0f;
    return (floats)((ints)(p * (floats)((n + 127) << 23)) & keep);
}

INLINE floats sigmoid(floats x) {
    ints negative = x < 0;
    floats e = exp_of((floats)((ints)x | (int32_t)0x80000000)); /* of -|x| */
    floats top = (floats)(((ints)e & negative) | ((ints)((floats){0} + 1) & ~negative));
    return top / (1 + e);
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    floats s = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) s = multiply_add(load_floats(a + i), load_floats(b + i), s);
    float last = 0;
    for (; i < n; i++) last += a[i] * b[i];
    return sum(s) + last;
}

static void rms_norm(const float *x, const float *weight, int64_t n, double eps, float *out) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + (float)eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void rotate(float *x, const float *cos, const float *sin, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim / 2; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = even * sin[i] + odd * cos[i];
    }
}

/* A query: a head of one row. What positions score with it, from the first that is looked at on; and its results, [D]. */
typedef struct {
    const float *q;
    float *scores, *out;
} Query;

/* Of queries that are left, the one at i; there may be fewer than a tile has, and then the last is computed again. */
INLINE const Query *query_at(const Query *asked, int64_t left, int64_t i) { return asked + (i < left ? i : left - 1); }

/* The `dot`, times scale, of H queries with LANES / H keys, to their scores at `at`; and a word to memory about the keys
   `far` further on. Each key is loaded once: keys are so far apart that they share a few places in the fastest cache, and do
   not stay there. Keys and values are of a kind, see keys.h; their strides are in bytes. */
INLINE void dots(int kind, int H, const Query *asked, int64_t left, const char *keys, int64_t stride, int64_t far, int64_t d,
                 float scale, int64_t at) {
    const int K = LANES / H;
    const int64_t size = kept_size(kind), line = LINE / size;
    floats acc[LANES], last = {0};
    const float *q[4];
    UNROLL for (int h = 0; h < H; h++) q[h] = query_at(asked, left, h)->q;
    UNROLL for (int i = 0; i < LANES; i++) acc[i] = (floats){0};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        floats in[4];
        UNROLL for (int h = 0; h < H; h++) in[h] = held(load_floats(q[h] + c));
        UNROLL for (int i = 0; i < K; i++) {
            const floats k = held(load_kept(kind, keys + i * stride + c * size));
            if (far && c % line == 0) __builtin_prefetch(keys + (far + i) * stride + c * size);
            UNROLL for (int h = 0; h < H; h++) acc[h * K + i] = multiply_add(in[h], k, acc[h * K + i]);
        }
    }
    for (; c < d; c++)
        UNROLL for (int i = 0; i < LANES; i++) last[i] += q[i / K][c] * load_one(kind, keys + i % K * stride + c * size);
    last = scale * (sums_of(acc) + last);
    UNROLL for (int h = 0; h < H; h++) memcpy(query_at(asked, left, h)->scores + at, (float *)&last + h * K, K * sizeof(float));
}

/* To columns c .. c + V LANES of the results of H queries, what n values bring. */
INLINE void weigh(int kind, int H, int V, const Query *asked, int64_t left, const char *values, int64_t stride, int64_t n,
                  int64_t c, int64_t at) {
    floats acc[4][LANES];
    const float *p[4];
    UNROLL for (int h = 0; h < H; h++) {
        const Query *mine = query_at(asked, left, h);
        p[h] = mine->scores + at;
        UNROLL for (int u = 0; u < V; u++) acc[h][u] = load_floats(mine->out + c + u * LANES);
    }
    values += c * kept_size(kind);
    for (int64_t i = 0; i < n; i++, values += stride) {
        floats v[LANES];
        UNROLL for (int u = 0; u < V; u++) v[u] = held(load_kept(kind, values + u * LANES * kept_size(kind)));
        UNROLL for (int h = 0; h < H; h++) {
            const floats weight = held(all(p[h][i]));
            UNROLL for (int u = 0; u < V; u++) acc[h][u] = multiply_add(weight, v[u], acc[h][u]);
        }
    }
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int u = 0; u < V; u++) *(floats_at *)(query_at(asked, left, h)->out + c + u * LANES) = acc[h][u];
}

/* What `run` keys score with H queries of theirs; behind the last key there are so many that each tile is full. */
INLINE void score_tile(int kind, int H, const Query *asked, int64_t left, const char *keys, int64_t stride, int64_t far,
                       int64_t run, int64_t d, float scale, int64_t at) {
    for (int64_t j = 0; j < run; j += LANES / H)
        dots(kind, H, asked, left, keys + j * stride, stride, far, d, scale, at + j);
}

/* What `run` values bring to the results of H queries of theirs. */
INLINE void bring_tile(int kind, int H, const Query *asked, int64_t left, const char *values, int64_t stride, int64_t run,
                       int64_t d, int64_t at) {
    const int V = LANES / H < 64 / LANES ? LANES / H : 64 / LANES;
    int64_t c = 0;
    for (; c + V * LANES <= d; c += V * LANES) weigh(kind, H, V, asked, left, values, stride, run, c, at);
    for (; c + LANES <= d; c += LANES) weigh(kind, H, 1, asked, left, values, stride, run, c, at);
    for (; c < d; c++)
        for (int64_t h = 0; h < H && h < left; h++)
            for (int64_t j = 0; j < run; j++)
                asked[h].out[c] += asked[h].scores[at + j] * load_one(kind, values + j * stride + c * kept_size(kind));
}

/* The same for each kind. Not inlined: among other code a loop's pointers do not fit the registers. */
#define TILES(kind, H)                                                                                                         \
    static __attribute__((noinline)) void score_##kind##_##H(const Query *asked, int64_t left, const char *keys,               \
                                                             int64_t stride, int64_t far, int64_t run, int64_t d, float scale, \
                                                             int64_t at) {                                                     \
        score_tile(kind, H, asked, left, keys, stride, far, run, d, scale, at);                                                \
    }                                                                                                                          \
    static __attribute__((noinline)) void bring_##kind##_##H(const Query *asked, int64_t left, const char *values,             \
                                                             int64_t stride, int64_t run, int64_t d, int64_t at) {             \
        bring_tile(kind, H, asked, left, values, stride, run, d, at);                                                          \
    }
#define TILES_OF(kind) TILES(kind, 1) TILES(kind, 2) TILES(kind, 4)
TILES_OF(F32)
TILES_OF(BF16)
TILES_OF(F16)
TILES_OF(INT8)
#undef TILES
#undef TILES_OF

#define WITH_KIND(kind, call)          \
    switch (kind) {                    \
    case F32: call(F32); break;        \
    case BF16: call(BF16); break;      \
    case F16: call(F16); break;        \
    default: call(INT8);               \
    }

/* What `run` keys score with queries, and what as many values bring to their results. */
static void score(int kind, const Query *asked, int64_t count, const char *keys, int64_t stride, int64_t far, int64_t run,
                  int64_t d, float scale, int64_t at) {
    for (; count > 0; asked += 4, count -= 4) {
#define CALL(kind) (count > 2 ? score_##kind##_4 : score_##kind##_2)(asked, count, keys, stride, far, run, d, scale, at)
        WITH_KIND(kind, CALL)
#undef CALL
    }
}

static void bring(int kind, const Query *asked, int64_t count, const char *values, int64_t stride, int64_t run, int64_t d,
                  int64_t at) {
    for (; count > 0; asked += 4, count -= 4) {
#define CALL(kind) (count > 2 ? bring_##kind##_4 : count > 1 ? bring_##kind##_2 : bring_##kind##_1)(asked, count, values, stride, run, d, at)
        WITH_KIND(kind, CALL)
#undef CALL
    }
}

/* n keys or values of a head as floats, [rows, D] with zeros at the end; and a word to memory about those further on. */
INLINE void widen_to(int kind, const char *from, int64_t stride, int64_t n, int64_t rows, int64_t d, float *to) {
    const int64_t size = kept_size(kind), line = LINE / size;
    for (int64_t i = 0; i < n; i++, from += stride, to += d) {
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) {
            if (c % line == 0) __builtin_prefetch(from + rows * stride + c * size);
            *(floats_at *)(to + c) = load_kept(kind, from + c * size);
        }
        for (; c < d; c++) to[c] = load_one(kind, from + c * size);
    }
    memset(to, 0, (rows - n) * d * sizeof *to);
}

static void widen_kept(int kind, const char *from, int64_t stride, int64_t n, int64_t rows, int64_t d, float *to) {
#define CALL(kind) widen_to(kind, from, stride, n, rows, d, to)
    WITH_KIND(kind, CALL)
#undef CALL
}

/* What positions said, or weigh, times a scale of each, which are `apart` from each other. */
INLINE void scaled(const Query *asked, int64_t count, const float *scales, int64_t apart, int64_t run, int64_t at) {
    float each[VALUES];
    for (int64_t j = 0; j < run; j++) each[j] = scales[j * apart];
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < run; j++) asked[i].scores[at + j] *= each[j];
}

/* How many positions the one at `last` sees. */
static int64_t seen(int64_t window, int64_t origin, int64_t last) {
    return window && last - window + 1 > origin ? window : last - origin + 1;
}

/* A query's positions are divided where they are multiples of this, into at most PARTS + 1 parts: by the query's own position
   and how many it sees, so that its bits depend on nothing else. A part is all key heads of a stretch of positions, which is
   one stretch of memory. */
static int64_t span_of(int64_t n) { return (n + PART * PARTS - 1) / (PART * PARTS) * PART; }

/* The most parts that up to n positions have. */
static int64_t parts_of(int64_t n) {
    const int64_t parts = (n + PART - 2) / PART + 1;
    return parts < PARTS + 1 ? parts : PARTS + 1;
}

/* What is said of a part: for each query head the weighted sum of its values [D], the largest score, the weights' sum. */
static int64_t part_floats(int64_t heads, int64_t d) { return heads * (d + 2); }

/* The n scores of a query become their weights; behind them there are LANES - 1 more. And the largest score, and the
   weights' sum. */
static void weights_of(float *s, int64_t n, float *top, float *sum_of) {
    const int64_t padded = (n + LANES - 1) / LANES * LANES;
    for (int64_t i = n; i < padded; i++) s[i] = -INFINITY;
    floats total = {0}, most = load_floats(s);
    for (int64_t i = LANES; i < padded; i += LANES) most = larger(most, load_floats(s + i));
    *top = most[0];
    for (int i = 1; i < LANES; i++) *top = most[i] > *top ? most[i] : *top;
    for (int64_t i = 0; i < padded; i += LANES) {
        const floats p = exp_of(load_floats(s + i) - *top);
        *(floats_at *)(s + i) = p;
        total += p;
    }
    *sum_of = sum(total);
}

/* What a sequence has in a layer's cache: positions are slots, all key heads of one after the other. */
typedef struct {
    const char *keys, *values;
    const float *key_scales, *value_scales; /* INT8: a float for each slot and key head */
    int64_t capacity, key_heads, heads, d;  /* heads: of queries, for each of keys */
} Kept;

/* Rows of a sequence, one position after the other, and which positions of a part each sees: from .. to, never none. */
typedef struct {
    int64_t rows, from[TEAM], to[TEAM];
    const float *q[TEAM];
    float *said[TEAM];
} Team;

/* What positions first .. last score with queries; asked is [key_heads, step], of which there are `count` each. */
static void score_all(int kind, const Kept *kept, const Query *asked, int64_t count, int64_t first, int64_t last) {
    const int64_t d = kept->d, head = d * kept_size(kind), stride = kept->key_heads * head, capacity = kept->capacity;
    const float scale = 1 / sqrtf(d);
    float wide[KEYS * d];
    for (int64_t at = first, slot = first % capacity, run; at < last; at += run, slot = (slot + run) % capacity) {
        run = last - at < capacity - slot ? last - at : capacity - slot;
        run = run < KEYS ? run : KEYS;
        for (int64_t g = 0; g < kept->key_heads; g++) {
            const Query *mine = asked + g * count;
            const char *k = kept->keys + slot * stride + g * head;
            if (count > 4 || run < KEYS) {
                widen_kept(kind, k, stride, run, KEYS, d, wide);
                score(F32, mine, count, (const char *)wide, d * sizeof *wide, 0, run, d, scale, at - first);
            } else {
                score(kind, mine, count, k, stride, KEYS, run, d, scale, at - first);
            }
            if (kind == INT8)
                scaled(mine, count, kept->key_scales + slot * kept->key_heads + g, kept->key_heads, run, at - first);
        }
    }
}

/* What the values of positions first .. last bring to the results of queries, whose scores begin at `zero`; asked is
   [key_heads, ld], of which there are `count` each. */
static void bring_all(int kind, const Kept *kept, const Query *asked, int64_t ld, int64_t count, int64_t zero, int64_t first,
                      int64_t last) {
    const int64_t d = kept->d, head = d * kept_size(kind), stride = kept->key_heads * head, capacity = kept->capacity;
    float wide[VALUES * d];
    for (int64_t at = first, slot = first % capacity, run; at < last; at += run, slot = (slot + run) % capacity) {
        run = last - at < capacity - slot ? last - at : capacity - slot;
        run = run < VALUES ? run : VALUES;
        for (int64_t g = 0; g < kept->key_heads; g++) {
            const Query *mine = asked + g * ld;
            const char *v = kept->values + slot * stride + g * head;
            if (kind == INT8)
                scaled(mine, count, kept->value_scales + slot * kept->key_heads + g, kept->key_heads, run, at - zero);
            if (kind != F32 && count > 4) {
                widen_kept(kind, v, stride, run, run, d, wide);
                bring(F32, mine, count, (const char *)wide, d * sizeof *wide, run, d, at - zero);
            } else {
                bring(kind, mine, count, v, stride, run, d, at - zero);
            }
        }
    }
}

/* What is said of a part for each row of a team; scores has room for one float a position, row and query head. Each score is
   the same whoever else is asked, and values are added up in the order of positions, so no row's bits depend on the team. */
static void attend(int kind, const Kept *kept, const Team *t, int64_t room, float *scores) {
    const int64_t heads = kept->heads, d = kept->d, each = t->rows * heads, total = kept->key_heads * heads;
    const int64_t first = t->from[0], last = t->to[t->rows - 1];
    Query asked[kept->key_heads * each];
    for (int64_t i = 0; i < kept->key_heads * each; i++) {
        const int64_t r = i % each / heads, h = i / each * heads + i % heads;
        asked[i] = (Query){t->q[r] + h * d, scores + i * room, t->said[r] + h * d};
    }
    score_all(kind, kept, asked, each, first, last);
    for (int64_t i = 0; i < kept->key_heads * each; i++) {
        const int64_t r = i % each / heads, h = i / each * heads + i % heads;
        float *tops = t->said[r] + total * d;
        weights_of(asked[i].scores + t->from[r] - first, t->to[r] - t->from[r], tops + h, tops + total + h);
    }
    for (int64_t r = 0; r < t->rows; r++) memset(t->said[r], 0, total * d * sizeof(float));
    for (int64_t at = first, low = 0, high = 0, next; at < last; at = next) { /* rows low .. high see the same up to next */
        while (t->to[low] <= at) low++;
        while (high < t->rows && t->from[high] <= at) high++;
        next = high < t->rows && t->from[high] < t->to[low] ? t->from[high] : t->to[low];
        bring_all(kind, kept, asked + low * heads, each, (high - low) * heads, first, at, next);
    }
}

/* Rows of a step that one thread attends to together, in part i of theirs: rows `row` .. of the sequence, one position after
   the other. said: [rows, most_parts] of part_floats. */
static void attend_part(const Layer *l, const Kept *kept, const int64_t *positions, const int64_t *origins, int64_t row,
                        int64_t rows, int64_t i, int64_t most_parts, const float *q, int64_t ldq, float *scores, float *said) {
    const int64_t span = span_of(seen(l->window, origins[row], positions[row]));
    const int64_t part = (positions[row] + 1 - seen(l->window, origins[row], positions[row])) / span + i;
    Team t = {0};
    for (int64_t r = row; r < row + rows; r++) {
        const int64_t first = positions[r] + 1 - seen(l->window, origins[r], positions[r]), last = positions[r] + 1;
        const int64_t from = first > part * span ? first : part * span, to = last < (part + 1) * span ? last : (part + 1) * span;
        if (from >= to) continue;
        t.from[t.rows] = from, t.to[t.rows] = to, t.q[t.rows] = q + r * ldq;
        t.said[t.rows++] = said + (r * most_parts + part - first / span) * part_floats(kept->key_heads * kept->heads, kept->d);
    }
    if (t.rows) attend((int)l->kept, kept, &t, span + LANES, scores);
}

/* Of the rows of a step, how many from `row` on are one team: of one sequence, whose rows come in order, with parts of one
   length, and at most so many. */
static int64_t team_at(const Layer *l, const int64_t *which, const int64_t *positions, const int64_t *origins, int64_t row,
                       int64_t rows, int64_t most) {
    const int64_t span = span_of(seen(l->window, origins[row], positions[row]));
    int64_t n = 1;
    while (n < most && row + n < rows && which[row + n] == which[row] &&
           span_of(seen(l->window, origins[row + n], positions[row + n])) == span)
        n++;
    return n;
}

/* The attention of query head h of so many, by what was said of its parts. */
static void merge(const float *said, int64_t parts, int64_t h, int64_t heads, int64_t d, float *out) {
    const int64_t size = heads * (d + 2), tops = heads * d + h, totals = tops + heads;
    float top = said[tops], total = 0;
    for (int64_t i = 1; i < parts; i++) top = said[i * size + tops] > top ? said[i * size + tops] : top;
    memset(out, 0, d * sizeof *out);
    for (int64_t i = 0; i < parts; i++) {
        const float *part = said + i * size, weight = exp_of(all(part[tops] - top))[0];
        total += weight * part[totals];
        for (int64_t c = 0; c < d; c++) out[c] += weight * part[h * d + c];
    }
    for (int64_t c = 0; c < d; c++) out[c] /= total;
}
