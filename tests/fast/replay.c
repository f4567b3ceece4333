/* Calls functions of the kernels on memory that a file describes, and writes the memory as they leave it. The file is what
   tests/support/builds.py writes: numbers of 8 bytes, and memory filled up to a multiple of them.

   FUNCTIONS names the functions, as X(product) X(decode) ..; all arguments are integers of 64 bits or pointers, and one that
   takes fewer than MOST ignores the others (so it is on x86-64 and on 64-bit Arm). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 16 };

#define X(name) void name(void);
FUNCTIONS
#undef X

#define X(name) {#name, name},
static const struct {
    const char *name;
    void (*function)(void);
} functions[] = {FUNCTIONS};
#undef X

static FILE *in;

static int64_t number(void) {
    int64_t n;
    if (fread(&n, sizeof n, 1, in) != 1) exit(3);
    return n;
}

static void *memory(int64_t size) {
    void *to = aligned_alloc(64, (size + 127) / 64 * 64);
    if (!to || fread(to, 1, (size + 7) / 8 * 8, in) != (size_t)(size + 7) / 8 * 8) exit(4);
    return to;
}

typedef void Function(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      int64_t, int64_t, int64_t, int64_t, int64_t);

static void call(void (*function)(void), char **blocks) {
    int64_t a[MOST] = {0};
    const int64_t count = number();
    if (count > MOST) exit(5);
    for (int64_t i = 0; i < count; i++) {
        const int64_t block = number(), value = number(); /* block -1: a number, not a place in a block */
        a[i] = block < 0 ? value : (int64_t)(blocks[block] + value);
    }
    ((Function *)function)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14],
                           a[15]);
}

int main(int argc, char **argv) {
    in = argc == 3 ? fopen(argv[1], "rb") : NULL;
    FILE *out = in ? fopen(argv[2], "wb") : NULL;
    if (!out) return 2;
    for (int64_t calls = number(); calls; calls--) {
        const int64_t length = number(), count = number();
        char *name = memory(length), **blocks = calloc(count, sizeof *blocks);
        int64_t *sizes = calloc(count, sizeof *sizes);
        for (int64_t i = 0; i < count; i++) sizes[i] = number(), blocks[i] = memory(sizes[i]);
        for (int64_t places = number(); places; places--) { /* pointers within memory: where, and where they point */
            const int64_t block = number(), at = number(), target = number(), value = number();
            const char *to = blocks[target] + value;
            memcpy(blocks[block] + at, &to, sizeof to);
        }
        for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
            if (strlen(functions[i].name) == (size_t)length && !memcmp(functions[i].name, name, length))
                call(functions[i].function, blocks);
        for (int64_t i = 0; i < count; i++) {
            fwrite(blocks[i], 1, sizes[i], out);
            free(blocks[i]);
        }
        free(blocks), free(sizes), free(name);
    }
    return fclose(out) ? 6 : 0;
}
