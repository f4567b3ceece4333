/* The attention of a decode step. A part of kernels.c. */

INLINE floats all(float x) { return (floats){0} + x; }

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

/* The `dot`, times scale, of H queries with LANES / H keys, and a word to memory about the keys KEYS further on. Each key
   is loaded once: keys are so far apart that they share a few places in the fastest cache, and do not stay there. Keys and
   values are of a kind, see keys.h; their strides are in bytes. */
INLINE void dots(int kind, int H, const float *q, const char *keys, int64_t stride, int64_t d, float scale, float *out,
                 int64_t ldo) {
    const int K = LANES / H;
    const int64_t size = kept_size(kind), line = LINE / size;
    floats acc[LANES], last = {0};
    UNROLL for (int i = 0; i < LANES; i++) acc[i] = (floats){0};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES)
        UNROLL for (int i = 0; i < K; i++) {
            const floats k = load_kept(kind, keys + i * stride + c * size);
            if (c % line == 0) __builtin_prefetch(keys + (KEYS + i) * stride + c * size);
            UNROLL for (int h = 0; h < H; h++)
                acc[h * K + i] = multiply_add(load_floats(q + h * d + c), k, acc[h * K + i]);
        }
    for (; c < d; c++)
        UNROLL for (int i = 0; i < LANES; i++)
            last[i] += q[i / K * d + c] * load_one(kind, keys + i % K * stride + c * size);
    last = scale * (sums_of(acc) + last);
    UNROLL for (int h = 0; h < H; h++) memcpy(out + h * ldo, (float *)&last + h * K, K * sizeof *out);
}

/* The `dot` of a query with one key. */
INLINE float dot_kept(int kind, const float *q, const char *key, int64_t d) {
    const int64_t size = kept_size(kind);
    floats s = {0};
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) s = multiply_add(load_floats(q + c), load_kept(kind, key + c * size), s);
    float last = 0;
    for (; c < d; c++) last += q[c] * load_one(kind, key + c * size);
    return sum(s) + last;
}

/* To V vectors of the results of H heads, what n values bring; p is [heads, ldp]. */
INLINE void weigh(int kind, int H, int V, const float *p, int64_t ldp, const char *values, int64_t stride, int64_t n,
                  float *out, int64_t d) {
    floats acc[4][LANES];
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int u = 0; u < V; u++) acc[h][u] = load_floats(out + h * d + u * LANES);
    for (int64_t i = 0; i < n; i++, values += stride) {
        floats v[LANES];
        UNROLL for (int u = 0; u < V; u++) v[u] = load_kept(kind, values + u * LANES * kept_size(kind));
        UNROLL for (int h = 0; h < H; h++)
            UNROLL for (int u = 0; u < V; u++) acc[h][u] = multiply_add(all(p[h * ldp + i]), v[u], acc[h][u]);
    }
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int u = 0; u < V; u++) *(floats_at *)(out + h * d + u * LANES) = acc[h][u];
}

/* What `run` keys score with H queries of theirs, and what `run` values bring to the results of H heads. */
INLINE void score(int kind, int H, const float *q, const char *k, int64_t stride, int64_t run, int64_t d, float scale,
                  float *to, int64_t ldt) {
    int64_t j = 0;
    for (; j + LANES / H <= run; j += LANES / H) dots(kind, H, q, k + j * stride, stride, d, scale, to + j, ldt);
    for (; j < run; j++)
        for (int h = 0; h < H; h++) to[h * ldt + j] = scale * dot_kept(kind, q + h * d, k + j * stride, d);
}

INLINE void bring(int kind, int H, const float *p, int64_t ldp, const char *v, int64_t stride, int64_t run, float *out,
                  int64_t d) {
    const int V = LANES / H;
    const int64_t size = kept_size(kind);
    int64_t c = 0;
    for (; c + V * LANES <= d; c += V * LANES) weigh(kind, H, V, p, ldp, v + c * size, stride, run, out + c, d);
    for (; c + LANES <= d; c += LANES) weigh(kind, H, 1, p, ldp, v + c * size, stride, run, out + c, d);
    for (; c < d; c++)
        for (int h = 0; h < H; h++)
            for (int64_t j = 0; j < run; j++)
                out[h * d + c] += p[h * ldp + j] * load_one(kind, v + j * stride + c * size);
}

/* What positions said, or weigh, times a scale of each; x is [heads, ldx], scales are `apart` from each other. */
INLINE void scaled(const float *x, int64_t ldx, int64_t heads, const float *scales, int64_t apart, int64_t run, float *to,
                   int64_t ldt) {
    for (int64_t h = 0; h < heads; h++)
        for (int64_t j = 0; j < run; j++) to[h * ldt + j] = x[h * ldx + j] * scales[j * apart];
}

/* How many parts a query's n positions are divided into, and how long they are at most: by n alone, so that its bits depend on
   nothing else. A part is all key heads of a stretch of positions, which is one stretch of memory. */
static int64_t parts_of(int64_t n) {
    const int64_t parts = (n + PART - 1) / PART;
    return parts < PARTS ? parts : PARTS;
}

static int64_t span_of(int64_t n) { return n ? (n + parts_of(n) - 1) / parts_of(n) : 0; }

/* What is said of a part: for each query head the weighted sum of its values [D], the largest score, the weights' sum. */
static int64_t part_floats(int64_t key_heads, int64_t heads, int64_t d) { return key_heads * heads * (d + 2); }

/* The n scores of a query, [padded], become their weights; and the largest score, and the weights' sum. */
static void weights_of(float *s, int64_t n, int64_t padded, float *top, float *sum_of) {
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

/* What a sequence has in a layer's cache: positions are slots of `stride` bytes, all key heads of one after the other. */
typedef struct {
    const char *keys, *values;
    const float *key_scales, *value_scales; /* INT8: a float for each slot and key head */
    int64_t capacity;
} Kept;

/* The positions first .. first + n of a sequence, seen by one query; q is [K, heads, D], scores has room for one float a
   position and query head. */
INLINE void attend_to(int kind, const float *q, int64_t key_heads, int64_t heads, const Kept *kept, int64_t first, int64_t n,
                      int64_t d, float *scores, float *out) {
    const int64_t head = d * kept_size(kind), stride = key_heads * head, capacity = kept->capacity;
    const int64_t padded = (n + LANES - 1) / LANES * LANES;
    const float scale = 1 / sqrtf(d);
    for (int64_t i = 0, slot = first % capacity, run; i < n; i += run, slot = slot + run == capacity ? 0 : slot + run) {
        run = n - i < capacity - slot ? n - i : capacity - slot;
        run = run < KEYS ? run : KEYS;
        for (int64_t g = 0; g < key_heads; g++) {
            const char *k = kept->keys + slot * stride + g * head;
            const float *mine = q + g * heads * d;
            float *to = scores + g * heads * padded + i;
            int64_t h = 0;
            for (; h + 4 <= heads; h += 4) score(kind, 4, mine + h * d, k, stride, run, d, scale, to + h * padded, padded);
            for (; h + 2 <= heads; h += 2) score(kind, 2, mine + h * d, k, stride, run, d, scale, to + h * padded, padded);
            for (; h < heads; h++) score(kind, 1, mine + h * d, k, stride, run, d, scale, to + h * padded, padded);
            if (kind == INT8)
                scaled(to, padded, heads, kept->key_scales + slot * key_heads + g, key_heads, run, to, padded);
        }
    }
    float *tops = out + key_heads * heads * d, *totals = tops + key_heads * heads;
    for (int64_t h = 0; h < key_heads * heads; h++) weights_of(scores + h * padded, n, padded, tops + h, totals + h);
    memset(out, 0, key_heads * heads * d * sizeof *out);
    for (int64_t i = 0, slot = first % capacity, run; i < n; i += run, slot = slot + run == capacity ? 0 : slot + run) {
        run = n - i < capacity - slot ? n - i : capacity - slot;
        run = run < VALUES ? run : VALUES;
        for (int64_t g = 0; g < key_heads; g++) {
            const char *v = kept->values + slot * stride + g * head;
            float *p = scores + g * heads * padded + i, *mine = out + g * heads * d;
            if (kind == INT8)
                scaled(p, padded, heads, kept->value_scales + slot * key_heads + g, key_heads, run, p, padded);
            int64_t h = 0;
            for (; h + 4 <= heads; h += 4) bring(kind, 4, p + h * padded, padded, v, stride, run, mine + h * d, d);
            for (; h + 2 <= heads; h += 2) bring(kind, 2, p + h * padded, padded, v, stride, run, mine + h * d, d);
            for (; h < heads; h++) bring(kind, 1, p + h * padded, padded, v, stride, run, mine + h * d, d);
        }
    }
}

static void attend(int64_t kind, const float *q, int64_t key_heads, int64_t heads, const Kept *kept, int64_t first, int64_t n,
                   int64_t d, float *scores, float *out) {
    switch (kind) {
    case F32: attend_to(F32, q, key_heads, heads, kept, first, n, d, scores, out); break;
    case BF16: attend_to(BF16, q, key_heads, heads, kept, first, n, d, scores, out); break;
    case F16: attend_to(F16, q, key_heads, heads, kept, first, n, d, scores, out); break;
    default: attend_to(INT8, q, key_heads, heads, kept, first, n, d, scores, out);
    }
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
