/* Tiles of AMX, 16 rows of 64 bytes: what a processor has, or the same in plain C for those that have none. */

#include <stdint.h>
#include <string.h>

enum { TILE = 16 };

#if defined(__AMX_INT8__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_PRODUCT(sums, x, weights) _tile_dpbsud(sums, x, weights) /* of signed and unsigned bytes */
#define TILES_END() _tile_release()
/* Compilers do not know that tiles, and what they are like, are loaded from memory. */
#define TILES_READ(a, b, c) __asm__ volatile("" ::"r"(a), "r"(b), "r"(c) : "memory")

/* Whether there are tiles for this thread; all eight are of full size then. The system has to be asked for them. */
static int tiles_begin(void) {
    enum { ASK = 0x1023, TILE_DATA = 18 };
    if (syscall(SYS_arch_prctl, ASK, TILE_DATA) != 0) return 0;
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 64, config.rows[tile] = TILE;
    TILES_READ(&config, 0, 0);
    _tile_loadconfig(&config);
    return 1;
}

#elif defined(PRETENDED_TILES)

#define TILE_LOAD(tile, from, stride) tile_load(tiles[tile], from, stride)
#define TILE_STORE(tile, to, stride) tile_store(tiles[tile], to, stride)
#define TILE_PRODUCT(sums, x, weights) tile_product(tiles[sums], tiles[x], tiles[weights])
#define TILES_END()
#define TILES_READ(a, b, c)

static _Thread_local uint8_t tiles[8][TILE][64];

static int tiles_begin(void) { return 1; }

static void tile_load(uint8_t (*tile)[64], const void *from, long stride) {
    for (int row = 0; row < TILE; row++) memcpy(tile[row], (const char *)from + row * stride, 64);
}

static void tile_store(uint8_t (*tile)[64], void *to, long stride) {
    for (int row = 0; row < TILE; row++) memcpy((char *)to + row * stride, tile[row], 64);
}

static void tile_product(uint8_t (*sums)[64], uint8_t (*x)[64], uint8_t (*weights)[64]) {
    for (int m = 0; m < TILE; m++)
        for (int n = 0; n < TILE; n++) {
            int32_t sum;
            memcpy(&sum, sums[m] + 4 * n, 4);
            for (int k = 0; k < 64; k++) sum += (int8_t)x[m][k] * weights[k / 4][4 * n + k % 4];
            memcpy(sums[m] + 4 * n, &sum, 4);
        }
}

#endif
