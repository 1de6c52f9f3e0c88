/* y = x Wᵀ with 4-bit weights on processors with AVX2, or with AVX-512 and VNNI. kernels/native.py compiles it.

   The inputs of a token become 16-bit fixed point in blocks of inputs, each with a step of its own; a block lies within a
   group of the weights, so that everything inside one is an exact sum of integers in 32 bits:

       y = Σ over blocks of step · scale · Σ (code − zero) · q,   q = round(x / step),   step = max |x| / 32767

   Sixteen outputs are in the lanes of one register, or of two, and a lane adds up two inputs at a time (vpdpwssd, or
   vpmaddwd), so that nothing is shuffled and no lanes are ever summed. A 32-bit word of an output has its codes of eight
   inputs: those of even inputs in the lower half, those of odd ones in the upper, the first pair in the lowest bits of
   both. Sums of integers are exact, so both kinds of processor come to the same but for how float32 rounds. */

#include "lanes.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS (WIDTH / 2) /* tokens at a time, whose sums are in registers */

enum { OUTPUTS = 16, INPUTS = 8, PARTS = OUTPUTS / WIDTH, AHEAD = 2048 }; /* AHEAD: bytes of codes asked for early */

#define MAGIC 0x3631413457 /* "W4A16" */
#define LARGEST 32767.0f
#define TINIEST 1e-30f /* of the largest of a block: below it, 1 / step would overflow */

/* What a layer's buffer begins with. Behind it, one after the other: codes uint32 [tiles, blocks · block / 8, 16],
   bias float32 [tiles, 16], scales float16 and zeros uint8 [tiles, groups, 16]; zeros in tiles and blocks beyond the
   layer's outputs and inputs. */
typedef struct {
    int64_t magic, outputs, inputs;
    int64_t blocks, block; /* block: at most 128, or 32 bits are not enough for its sums */
    int64_t groups;        /* divides blocks */
    int64_t reserved[2];
} Header;

typedef struct {
    const uint32_t *codes;
    const float *bias;
    const uint16_t *scales;
    const uint8_t *zeros;
    long tiles, outputs, inputs, blocks, block, groups;
} Layer;

/* The layer that lies in a buffer; 0 where it does not fit into its bytes. */
static int layer_of(const void *buffer, long bytes, Layer *layer) {
    Header h;
    if (bytes < (long)sizeof h) return 0;
    memcpy(&h, buffer, sizeof h);
    const int64_t most = (int64_t)1 << 24; /* of each number, so that no product overflows */
    if (h.magic != MAGIC || h.outputs < 1 || h.outputs > most || h.inputs < 1 || h.inputs > most) return 0;
    if ((h.block != 32 && h.block != 64 && h.block != 128) || h.blocks != (h.inputs + h.block - 1) / h.block) return 0;
    if (h.groups < 1 || h.blocks % h.groups != 0) return 0;
    const int64_t tiles = (h.outputs + OUTPUTS - 1) / OUTPUTS, lanes = tiles * OUTPUTS, grid = lanes * h.groups;
    const int64_t words = lanes * h.blocks * h.block / INPUTS;
    if (bytes != (int64_t)sizeof h + words * 4 + lanes * 4 + grid * 3) return 0;
    layer->codes = (const uint32_t *)((const char *)buffer + sizeof h);
    layer->bias = (const float *)(layer->codes + words);
    layer->scales = (const uint16_t *)(layer->bias + lanes);
    layer->zeros = (const uint8_t *)(layer->scales + grid);
    layer->tiles = tiles, layer->outputs = h.outputs, layer->inputs = h.inputs;
    layer->blocks = h.blocks, layer->block = h.block, layer->groups = h.groups;
    return 1;
}

/* Numbers of a token: float32, or bfloat16, which is its upper half. */
static uint32_t bits_at(const void *x, long at, int bfloat16) {
    uint32_t bits;
    if (bfloat16) return (uint32_t)((const uint16_t *)x)[at] << 16;
    memcpy(&bits, (const float *)x + at, sizeof bits);
    return bits;
}

static void put(void *y, long at, int bfloat16, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (!bfloat16) ((float *)y)[at] = value;
    else if ((bits & 0x7fffffff) > 0x7f800000) ((uint16_t *)y)[at] = 0x7fc0; /* NaN stays one */
    else ((uint16_t *)y)[at] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to the nearest, ties to even */
}

static int fixed(uint32_t bits, float inverse) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return _mm_cvtss_si32(_mm_set_ss(x * inverse));
}

/* One token in fixed point: pairs of inputs [inputs / 2, rows], the even one in the lower half; sums and steps
   [blocks, rows]. A block with infinity or NaN in it gets NaN for a step, and so does every output of the token. */
static void fixed_point(const Layer *layer, const void *x, long row, int bfloat16, long rows, int32_t *pairs,
                        int32_t *sums, float *steps) {
    for (long b = 0; b < layer->blocks; b++) {
        const long left = layer->inputs - b * layer->block, count = left < layer->block ? left : layer->block;
        const long at = row * layer->inputs + b * layer->block;
        uint32_t most = 0; /* without their sign, bits are ordered as |x| is, infinity and NaN last */
        for (long i = 0; i < count; i++) {
            const uint32_t bits = bits_at(x, at + i, bfloat16) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        const int finite = most < 0x7f800000;
        float largest;
        memcpy(&largest, &most, sizeof largest);
        if (!finite || largest < TINIEST) largest = TINIEST;
        const float inverse = LARGEST / largest;
        int32_t sum = 0;
        for (long i = 0; i < layer->block; i += 2, pairs += rows) {
            const int even = finite && i < count ? fixed(bits_at(x, at + i, bfloat16), inverse) : 0;
            const int odd = finite && i + 1 < count ? fixed(bits_at(x, at + i + 1, bfloat16), inverse) : 0;
            *pairs = (int32_t)((uint32_t)odd << 16 | (uint16_t)even);
            sum += even + odd;
        }
        sums[b * rows] = sum;
        steps[b * rows] = finite ? largest / LARGEST : __builtin_nanf("");
    }
}

/* One tile of 16 outputs for `rows` tokens, a constant wherever this is inlined. */
INLINE void tile(const Layer *layer, long at, const int rows, const int32_t *pairs, const int32_t *sums,
                 const float *steps, Floats (*y)[ROWS]) {
    const Ints low = INT(set1_epi16)(15);
    const long run = layer->block / INPUTS, blocks_of_a_group = layer->blocks / layer->groups;
    const uint32_t *words = layer->codes + at * layer->blocks * run * OUTPUTS;
    for (int v = 0; v < PARTS; v++)
        for (int t = 0; t < rows; t++) y[v][t] = INT(setzero_ps)();
    for (long b = 0; b < layer->blocks; b++) {
        const long grid = (at * layer->groups + b / blocks_of_a_group) * OUTPUTS;
        Ints sum[PARTS][ROWS];
        for (int v = 0; v < PARTS; v++)
            for (int t = 0; t < rows; t++)
                sum[v][t] = INT(mullo_epi32)(BYTES(layer->zeros + grid + WIDTH * v), INT(set1_epi32)(-sums[b * rows + t]));
        for (long k = 0; k < run; k++, words += OUTPUTS, pairs += 4 * rows) {
            Ints word[PARTS];
            for (int v = 0; v < PARTS; v++) word[v] = BITS_OF(loadu)((const Ints *)(words + WIDTH * v));
            _mm_prefetch((const char *)words + AHEAD, _MM_HINT_T0);
#define PAIR(P, CODES)                                                                                   \
    for (int v = 0; v < PARTS; v++) {                                                                    \
        const Ints codes = CODES(word[v]);                                                               \
        for (int t = 0; t < rows; t++)                                                                   \
            sum[v][t] = ADD_PAIRS(sum[v][t], codes, INT(set1_epi32)(pairs[(P) * rows + t]));             \
    }
#define FIRST(words) BITS_OF(and)(words, low)
#define SECOND(words) BITS_OF(and)(INT(srli_epi16)(words, 4), low)
#define THIRD(words) BITS_OF(and)(INT(srli_epi16)(words, 8), low)
#define FOURTH(words) INT(srli_epi16)(words, 12)
            PAIR(0, FIRST) PAIR(1, SECOND) PAIR(2, THIRD) PAIR(3, FOURTH)
        }
        for (int v = 0; v < PARTS; v++) {
            const Floats scale = FLOAT16(layer->scales + grid + WIDTH * v);
            for (int t = 0; t < rows; t++) {
                const Floats factor = INT(mul_ps)(scale, INT(set1_ps)(steps[b * rows + t]));
                y[v][t] = INT(fmadd_ps)(INT(cvtepi32_ps)(sum[v][t]), factor, y[v][t]);
            }
        }
    }
}

INLINE void tiles(const Layer *layer, long first, long last, const int rows, const int32_t *pairs, const int32_t *sums,
                  const float *steps, void *y, long row, int bfloat16) {
    for (long at = first; at < last; at++) {
        Floats result[PARTS][ROWS];
        tile(layer, at, rows, pairs, sums, steps, result);
        const long from = at * OUTPUTS, left = layer->outputs - from, count = left < OUTPUTS ? left : OUTPUTS;
        for (int t = 0; t < rows; t++) {
            float whole[OUTPUTS];
            for (int v = 0; v < PARTS; v++) {
                const Floats bias = INT(loadu_ps)(layer->bias + from + WIDTH * v);
                INT(storeu_ps)(whole + WIDTH * v, INT(add_ps)(result[v][t], bias));
            }
            for (long o = 0; o < count; o++) put(y, (row + t) * layer->outputs + from + o, bfloat16, whole[o]);
        }
    }
}

/* Of y[rows, outputs] that part of all outputs; x[rows, inputs] and y are both float32 or both bfloat16. Returns 0, 1
   where there is no memory, 2 where the buffer holds no layer of these sizes. */
int w4a16(const void *buffer, long bytes, const void *x, long inputs, void *y, long outputs, long rows, int bfloat16,
          long part, long parts) {
    Layer layer;
    if (!layer_of(buffer, bytes, &layer) || layer.inputs != inputs || layer.outputs != outputs) return 2;
    const long words = layer.blocks * layer.block / 2;
    const long first = layer.tiles * part / parts, last = layer.tiles * (part + 1) / parts;
    int32_t *pairs = malloc(ROWS * (words * sizeof(int32_t) + layer.blocks * (sizeof(int32_t) + sizeof(float))));
    if (pairs == NULL) return 1;
    int32_t *sums = pairs + ROWS * words;
    float *steps = (float *)(sums + ROWS * layer.blocks);
    for (long row = 0; row < rows; row += ROWS) {
        const long count = rows - row < ROWS ? rows - row : ROWS;
        for (long t = 0; t < count; t++)
            fixed_point(&layer, x, row + t, bfloat16, count, pairs + t, sums + t, steps + t);
        switch (count) { /* a constant for each, so that all sums stay in registers */
#define CASE(N) case N: tiles(&layer, first, last, N, pairs, sums, steps, y, row, bfloat16); break;
            CASE(1) CASE(2) CASE(3) CASE(4)
#if ROWS == 8
            CASE(5) CASE(6) CASE(7) CASE(8)
#endif
        }
    }
    free(pairs);
    return 0;
}
