/* y = x Wᵀ of integers: x of codes up to 8 bits, W of codes of 4 or 8, on processors with AVX2 (4 bits), with AVX-512
   and VNNI, or with AMX. kernels/native.py compiles it.

   Everything inside a group of inputs is an exact sum in 32 bits:

       y = token's scale · Σ over groups of scale · Σ (x − x's zero)(code − code's zero) + bias

   Weights lie in panels of 64 outputs, their inputs four by four: 64 bytes are a quad of inputs of 16 outputs, which is
   how vpdpbusd and tiles read them. With 4 bits a byte holds two quads, the first in its lower half. Many tokens have
   as many inputs of a panel unpacked as stay in the first cache; few unpack them in registers, each time anew.
   Activations come less 128, since the processor multiplies unsigned with signed bytes. */

#include "lanes.h"
#include "tiles.h"

#include <stdlib.h>

enum { OUTPUTS = 64, QUAD = 4, LINE = 64, STEP = QUAD * LINE, PARTS = OUTPUTS / WIDTH }; /* LINE: a quad of 16 */
enum { DEPTH = 256, TOKENS = 128 }; /* inputs unpacked at a time; tokens whose sums are kept at a time */
enum { AHEAD = 8192 };              /* bytes of codes asked for early where they are unpacked in registers */

#define MAGIC 0x38414e57 /* "WNA8" */

/* What a layer's buffer begins with. Behind it, one after the other: codes [panels, groups · group · bits / 32, 64],
   scales float32, sums int32 (of codes less their zeros) and zeros int32 [panels, groups, 64], bias float32
   [panels, 64]; zeros in panels and groups beyond the layer's outputs and inputs. */
typedef struct {
    int64_t magic, outputs, inputs;
    int64_t groups, group; /* group: a multiple of 32 */
    int64_t bits;          /* 4 or 8 */
    int64_t reserved[2];
} Header;

typedef struct {
    const uint8_t *codes;
    const float *scales, *bias;
    const int32_t *sums, *zeros;
    long panels, outputs, groups, group, bits;
} Layer;

/* The layer that lies in a buffer; 0 where it does not fit into its bytes. */
static int layer_of(const void *buffer, long bytes, Layer *layer) {
    Header h;
    if (bytes < (long)sizeof h) return 0;
    memcpy(&h, buffer, sizeof h);
    const int64_t most = (int64_t)1 << 24; /* of each number, so that no product overflows */
    if (h.magic != MAGIC || h.outputs < 1 || h.outputs > most || h.inputs < 1 || h.inputs > most) return 0;
    if ((h.bits != 4 && h.bits != 8) || h.group < 32 || h.group % 32 != 0) return 0;
    if (h.group > INT32_MAX / 255 / ((1 << h.bits) - 1)) return 0; /* its sum would overflow */
    if (h.groups != (h.inputs + h.group - 1) / h.group) return 0;
    const int64_t panels = (h.outputs + OUTPUTS - 1) / OUTPUTS, lanes = panels * OUTPUTS, grid = lanes * h.groups;
    const int64_t codes = grid * h.group * h.bits / 8;
    if (bytes != (int64_t)sizeof h + codes + (grid * 3 + lanes) * 4) return 0;
    layer->codes = (const uint8_t *)buffer + sizeof h;
    layer->scales = (const float *)(layer->codes + codes);
    layer->sums = (const int32_t *)(layer->scales + grid);
    layer->zeros = layer->sums + grid;
    layer->bias = (const float *)(layer->zeros + grid);
    layer->panels = panels, layer->outputs = h.outputs, layer->groups = h.groups, layer->group = h.group;
    layer->bits = h.bits;
    return 1;
}

/* A register of a panel, at `byte` of a quad; `packed`: two quads share their bytes. */
INLINE Ints weights_at(const uint8_t *panel, long quad, long byte, const int packed) {
    if (!packed) return BITS_OF(loadu)((const Ints *)(panel + quad * STEP + byte));
    const Ints both = BITS_OF(loadu)((const Ints *)(panel + quad / 2 * STEP + byte));
    return BITS_OF(and)(quad % 2 ? INT(srli_epi16)(both, 4) : both, INT(set1_epi8)(15));
}

/* `quads` of a panel, an even number, from two in a byte to one. */
INLINE void unpacked(const uint8_t *panel, long quads, uint8_t *to) {
    for (long q = 0; q < quads; q += 2)
        for (long byte = 0; byte < STEP; byte += sizeof(Ints))
            for (long half = 0; half < 2; half++)
                BITS_OF(storeu)((Ints *)(to + (q + half) * STEP + byte), weights_at(panel, q + half, byte, 1));
}

/* A quad of a token, in every lane. */
INLINE Ints quad_at(const int8_t *x) {
    int32_t quad;
    memcpy(&quad, x, sizeof quad);
    return INT(set1_epi32)(quad);
}

#if WIDTH == 16

enum { FEW = 24, ROWS = 6 }; /* tokens that unpack in registers; tokens whose sums are in registers */

/* Adds to sums[rows, 64] the products of `rows` tokens, `stride` bytes apart, with `quads` of a panel. */
INLINE void products(const int rows, const int packed, const uint8_t *panel, long quads, const int8_t *x, long stride,
                     int32_t *sums) {
    Ints sum[ROWS][PARTS];
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < PARTS; v++) sum[t][v] = BITS_OF(loadu)((const Ints *)(sums + t * OUTPUTS + v * WIDTH));
    for (long q = 0; q < quads; q += 2) {
        for (int v = 0; packed && v < PARTS; v++)
            _mm_prefetch((const char *)panel + q / 2 * STEP + v * LINE + AHEAD, _MM_HINT_T0);
        for (int half = 0; half < 2; half++) {
            Ints weight[PARTS];
            for (int v = 0; v < PARTS; v++) weight[v] = weights_at(panel, q + half, v * LINE, packed);
            for (int t = 0; t < rows; t++) {
                const Ints quad = quad_at(x + t * stride + (q + half) * QUAD);
                for (int v = 0; v < PARTS; v++) sum[t][v] = INT(dpbusd_epi32)(sum[t][v], weight[v], quad);
            }
        }
    }
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < PARTS; v++) BITS_OF(storeu)((Ints *)(sums + t * OUTPUTS + v * WIDTH), sum[t][v]);
}

#else

enum { FEW = 2, ROWS = 2, HALF = PARTS / 2 };
enum { SHORT = 8 }; /* quads that 16 bits hold the sums of: 8 · 2 · 15 · 128 */

INLINE void products(const int rows, const int packed, const uint8_t *panel, long quads, const int8_t *x, long stride,
                     int32_t *sums) {
    const Ints ones = INT(set1_epi16)(1);
    for (int part = 0; part < PARTS; part += HALF)
        for (long q = 0; q < quads; q += SHORT) {
            Ints sum[ROWS][HALF];
            for (int t = 0; t < rows; t++)
                for (int v = 0; v < HALF; v++) sum[t][v] = BITS_OF(setzero)();
#pragma GCC unroll 1 /* or all of it is, and sums go through memory */
            for (long at = q; at < q + SHORT; at += 2) {
                if (packed) _mm_prefetch((const char *)panel + at / 2 * STEP + part / HALF * LINE + AHEAD, _MM_HINT_T0);
                for (int half = 0; half < 2; half++)
                    for (int v = 0; v < HALF; v++) {
                        const Ints weight = weights_at(panel, at + half, (part + v) * sizeof(Ints), packed);
                        for (int t = 0; t < rows; t++) {
                            const Ints quad = quad_at(x + t * stride + (at + half) * QUAD);
                            sum[t][v] = INT(add_epi16)(sum[t][v], INT(maddubs_epi16)(weight, quad));
                        }
                    }
            }
            for (int t = 0; t < rows; t++)
                for (int v = 0; v < HALF; v++) {
                    Ints *to = (Ints *)(sums + t * OUTPUTS + (part + v) * WIDTH);
                    BITS_OF(storeu)(to, INT(add_epi32)(BITS_OF(loadu)(to), INT(madd_epi16)(sum[t][v], ones)));
                }
        }
}

#endif

/* The same of up to ROWS tokens; how many is a constant, so that their sums stay in registers. */
INLINE void few_products(long rows, const int packed, const uint8_t *panel, long quads, const int8_t *x, long stride,
                         int32_t *sums) {
    switch (rows) {
#define CASE(N) case N: products(N, packed, panel, quads, x, stride, sums); break;
        CASE(1) CASE(2)
#if WIDTH == 16
        CASE(3) CASE(4) CASE(5) CASE(6)
#endif
    }
}

#if defined(TILES_END)

/* The same of 16 tokens, and a multiple of 16 quads. */
static void tile_products(const uint8_t *panel, long quads, const int8_t *x, long stride, int32_t *sums) {
    enum { ROW = OUTPUTS * sizeof(int32_t) };
    TILES_READ(panel, x, sums);
    TILE_LOAD(0, sums, ROW); TILE_LOAD(1, sums + 16, ROW); TILE_LOAD(2, sums + 32, ROW); TILE_LOAD(3, sums + 48, ROW);
    for (long q = 0; q < quads; q += TILE, panel += TILE * STEP) {
        TILE_LOAD(4, x + q * QUAD, stride);
        TILE_LOAD(5, panel, STEP); TILE_PRODUCT(0, 4, 5);
        TILE_LOAD(6, panel + LINE, STEP); TILE_PRODUCT(1, 4, 6);
        TILE_LOAD(7, panel + 2 * LINE, STEP); TILE_PRODUCT(2, 4, 7);
        TILE_LOAD(5, panel + 3 * LINE, STEP); TILE_PRODUCT(3, 4, 5);
    }
    TILE_STORE(0, sums, ROW); TILE_STORE(1, sums + 16, ROW); TILE_STORE(2, sums + 32, ROW); TILE_STORE(3, sums + 48, ROW);
}

#endif

typedef struct {
    const int8_t *codes;         /* [tokens, stride], less 128; 0 beyond the inputs */
    const float *scales;         /* [tokens] */
    const int32_t *zeros, *sums; /* [tokens], less 128; [tokens, groups], of the codes as they come */
    long stride;
} Activations;

INLINE long least(long one, long other) { return one < other ? one : other; }

/* `depth` inputs of a panel, `codes`, with some tokens; `tiled`: there are tiles. `room` is for what is unpacked. */
INLINE void block_products(const Layer *layer, const uint8_t *codes, long depth, const int8_t *x, long stride,
                           long tokens, int tiled, uint8_t *room, int32_t *sums) {
    const long quads = depth / QUAD, bytes = depth * OUTPUTS * layer->bits / 8;
    const int packed = layer->bits == 4 && tokens <= FEW;
    const char *next = (const char *)codes + bytes; /* what is multiplied after this, on its way meanwhile */
    if (layer->bits == 4 && !packed) unpacked(codes, quads, room), codes = room;
    for (long t = 0, rows; t < tokens; t += rows, x += rows * stride, sums += rows * OUTPUTS) {
        rows = tiled && !packed && tokens - t >= TILE ? TILE : least(tokens - t, ROWS);
        if (packed) {
            few_products(rows, 1, codes, quads, x, stride, sums);
            continue;
        }
        for (const char *end = next + bytes * rows / tokens; next < end; next += LINE) _mm_prefetch(next, _MM_HINT_T1);
#if defined(TILES_END)
        if (rows == TILE) tile_products(codes, quads, x, stride, sums);
        else
#endif
            few_products(rows, 0, codes, quads, x, stride, sums);
    }
}

/* Adds to total[tokens, 64] what the sums of a group stand for, but for the tokens' scales. */
INLINE void add_group(const Layer *layer, long grid, const Activations *x, long first, long tokens, long group,
                      const int32_t *sums, float *total) {
    for (int v = 0; v < OUTPUTS; v += WIDTH) {
        const Floats scale = INT(loadu_ps)(layer->scales + grid + v);
        const Ints zero = BITS_OF(loadu)((const Ints *)(layer->zeros + grid + v));
        const Ints codes = BITS_OF(loadu)((const Ints *)(layer->sums + grid + v));
        for (long t = 0; t < tokens; t++) {
            const Ints x_sum = INT(set1_epi32)(x->sums[(first + t) * layer->groups + group]);
            const Ints x_zero = INT(set1_epi32)(x->zeros[first + t]);
            const Ints off = INT(add_epi32)(INT(mullo_epi32)(zero, x_sum), INT(mullo_epi32)(codes, x_zero));
            const Ints sum = INT(sub_epi32)(BITS_OF(loadu)((const Ints *)(sums + t * OUTPUTS + v)), off);
            const Floats value = INT(mul_ps)(INT(cvtepi32_ps)(sum), scale);
            float *to = total + t * OUTPUTS + v;
            INT(storeu_ps)(to, INT(add_ps)(value, INT(loadu_ps)(to)));
        }
    }
}

static void finish(const Layer *layer, long from, const Activations *x, long first, long tokens, const float *total,
                   float *y) {
    const long count = least(layer->outputs - from, OUTPUTS);
    for (long t = 0; t < tokens; t++, total += OUTPUTS) {
        const Floats scale = INT(set1_ps)(x->scales[first + t]);
        float *to = y + (first + t) * layer->outputs + from, whole[OUTPUTS];
        for (int v = 0; v < OUTPUTS; v += WIDTH) {
            const Floats value = INT(mul_ps)(INT(loadu_ps)(total + v), scale);
            INT(storeu_ps)(count == OUTPUTS ? to + v : whole + v, INT(add_ps)(value, INT(loadu_ps)(layer->bias + from + v)));
        }
        if (count < OUTPUTS) memcpy(to, whole, count * sizeof(float));
    }
}

const char *wna8_instructions(void) {
#if defined(TILES_END)
    if (tiles_begin()) {
        TILES_END();
        return "AVX-512, VNNI and AMX";
    }
#endif
    return WIDTH == 16 ? "AVX-512 and VNNI" : "AVX2";
}

/* Bits of the weights that can be multiplied here: in 16 bits two products of bytes do not fit. */
int wna8_bits(void) { return WIDTH == 16 ? 8 : 4; }

/* Of y[tokens, outputs] that part of all outputs. Returns 0, 1 where there is no memory, 2 where the buffer holds no
   layer of these sizes, or has more bits than can be multiplied. */
int wna8(const void *buffer, long bytes, const int8_t *codes, long stride, const float *scales, const int32_t *zeros,
         const int32_t *sums, long groups, float *y, long outputs, long tokens, long part, long parts) {
    Layer layer;
    if (!layer_of(buffer, bytes, &layer) || layer.groups != groups || layer.outputs != outputs) return 2;
    if (layer.groups * layer.group != stride || layer.bits > wna8_bits()) return 2;
    const long most = least(tokens, TOKENS) * OUTPUTS;
    uint8_t *room = aligned_alloc(LINE, OUTPUTS * DEPTH + most * (sizeof(int32_t) + sizeof(float)));
    if (room == NULL) return 1;
    int32_t *exact = (int32_t *)(room + OUTPUTS * DEPTH);
    float *total = (float *)(exact + most);
    const Activations x = {codes, scales, zeros, sums, stride};
    int tiled = 0;
#if defined(TILES_END)
    tiled = tokens > FEW && layer.group % (TILE * QUAD) == 0 && tiles_begin();
#endif
    for (long at = layer.panels * part / parts; at < layer.panels * (part + 1) / parts; at++)
        for (long first = 0; first < tokens; first += TOKENS) {
            const long here = least(tokens - first, TOKENS);
            memset(total, 0, here * OUTPUTS * sizeof(float));
            for (long g = 0; g < layer.groups; g++) {
                memset(exact, 0, here * OUTPUTS * sizeof(int32_t));
                for (long done = 0; done < layer.group; done += DEPTH) {
                    const long depth = least(layer.group - done, DEPTH);
                    const long input = g * layer.group + done;
                    const uint8_t *panel = layer.codes + (at * stride + input) * OUTPUTS * layer.bits / 8;
                    block_products(&layer, panel, depth, codes + first * stride + input, stride, here, tiled, room, exact);
                }
                add_group(&layer, (at * groups + g) * OUTPUTS, &x, first, here, g, exact, total);
            }
            finish(&layer, at * OUTPUTS, &x, first, here, total, y);
        }
#if defined(TILES_END)
    if (tiled) TILES_END();
#endif
    free(room);
    return 0;
}
