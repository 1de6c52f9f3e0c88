/* What stands before and behind an integer product: tokens to unsigned codes, and its sums to the values they stand
   for. As harness/quantizer.py's encode_tokens does it, to the bit; each number is read twice and written once. */

#include "lanes.h"

#include <math.h>
#include <stdint.h>

static float value_at(const void *x, long at, int bfloat16) {
    union { uint32_t bits; float value; } one;
    if (bfloat16) one.bits = (uint32_t)((const uint16_t *)x)[at] << 16;
    else one.value = ((const float *)x)[at];
    return one.value;
}

INLINE Floats values_at(const void *x, long at, int bfloat16) {
    return bfloat16 ? BFLOAT16((const uint16_t *)x + at) : INT(loadu_ps)((const float *)x + at);
}

/* Lowest and highest of a token and zero; NaN where there is one. */
INLINE void range(const void *x, long at, long inputs, const int bfloat16, float *low, float *high) {
    Floats lows = INT(setzero_ps)(), highs = lows, sums = lows;
    long i = 0;
    for (; i + WIDTH <= inputs; i += WIDTH) {
        const Floats values = values_at(x, at + i, bfloat16);
        lows = INT(min_ps)(lows, values), highs = INT(max_ps)(highs, values);
        sums = INT(fmadd_ps)(values, INT(setzero_ps)(), sums); /* 0, but NaN where a value is NaN or infinite */
    }
    float each[3][WIDTH], rest = 0;
    INT(storeu_ps)(each[0], lows), INT(storeu_ps)(each[1], highs), INT(storeu_ps)(each[2], sums);
    *low = *high = 0;
    for (int lane = 0; lane < WIDTH; lane++) {
        *low = each[0][lane] < *low ? each[0][lane] : *low;
        *high = each[1][lane] > *high ? each[1][lane] : *high;
        rest += each[2][lane];
    }
    for (; i < inputs; i++) {
        const float value = value_at(x, at + i, bfloat16);
        *low = value < *low ? value : *low;
        *high = value > *high ? value : *high;
        rest += value * 0;
    }
    if (rest != 0 || isnan(rest)) *low = *high = NAN;
}

INLINE void token(const void *x, long at, long inputs, const int bfloat16, float scale, float zero, float levels,
                  uint8_t *codes) {
    const Floats scales = INT(set1_ps)(scale);
    const Ints zeros = INT(set1_epi32)((int)zero), most = INT(set1_epi32)((int)levels);
    long i = 0;
    for (; i + WIDTH <= inputs; i += WIDTH) {
        Ints code = INT(cvtps_epi32)(INT(div_ps)(values_at(x, at + i, bfloat16), scales)); /* half to even */
        code = INT(min_epi32)(INT(max_epi32)(INT(add_epi32)(code, zeros), BITS_OF(setzero)()), most);
        int32_t each[WIDTH];
        BITS_OF(storeu)((Ints *)each, code);
        for (int lane = 0; lane < WIDTH; lane++) codes[i + lane] = (uint8_t)each[lane];
    }
    for (; i < inputs; i++) {
        const float code = rintf(value_at(x, at + i, bfloat16) / scale) + zero;
        codes[i] = (uint8_t)(code < 0 ? 0 : code > levels ? levels : code);
    }
}

INLINE void tokens(const void *x, long inputs, const int bfloat16, int bits, float clip, int symmetric, long first,
                   long last, uint8_t *codes, float *scales, float *zeros) {
    const float levels = (float)((1 << bits) - 1);
    for (long t = first; t < last; t++) {
        float low, high;
        range(x, t * inputs, inputs, bfloat16, &low, &high);
        low *= clip, high *= clip;
        if (symmetric) high = -low > high ? -low : high, low = -high;
        float scale = (high - low) / levels;
        if (scale == 0) scale = 2 / levels;
        zeros[t] = symmetric ? (float)(1 << (bits - 1)) : rintf(-low / scale);
        scales[t] = scale;
        if (isnan(scale)) { /* the token comes out as NaN, whatever its codes are */
            for (long i = 0; i < inputs; i++) codes[t * inputs + i] = 0;
            if (!symmetric) zeros[t] = 0;
        } else token(x, t * inputs, inputs, bfloat16, scale, zeros[t], levels, codes + t * inputs);
    }
}

/* Codes [rows, inputs], scales and zeros [rows] of the tokens from `first` to `last` of x[rows, inputs], float32 or
   bfloat16. */
void encode_tokens(const void *x, long inputs, int bfloat16, int bits, float clip, int symmetric, long first, long last,
                   uint8_t *codes, float *scales, float *zeros) {
    if (bfloat16) tokens(x, inputs, 1, bits, clip, symmetric, first, last, codes, scales, zeros);
    else tokens(x, inputs, 0, bits, clip, symmetric, first, last, codes, scales, zeros);
}

/* y[rows, outputs] = (y − zero · sums) · scale + bias for the tokens from `first` to `last`; bias may be NULL. */
void finish_tokens(float *y, long outputs, const float *sums, const float *bias, const float *scales,
                   const float *zeros, long first, long last) {
    enum { PAGE = 1024, LINE = 16 }; /* numbers */
    for (long t = first; t < last; t++) {
        float *row = y + t * outputs;
        const Floats scale = INT(set1_ps)(scales[t]), zero = INT(set1_ps)(zeros[t]);
        long n = 0;
        for (; n + LINE <= outputs; n += LINE) {
            /* The hardware stops reading ahead where a page ends, and every page would begin with a wait. */
            __builtin_prefetch(row + n + PAGE, 1);
            for (long i = n; i < n + LINE; i += WIDTH) {
                const Floats off = INT(mul_ps)(zero, INT(loadu_ps)(sums + i));
                Floats value = INT(mul_ps)(INT(sub_ps)(INT(loadu_ps)(row + i), off), scale);
                if (bias) value = INT(add_ps)(value, INT(loadu_ps)(bias + i));
                INT(storeu_ps)(row + i, value);
            }
        }
        for (; n < outputs; n++) {
            row[n] = (row[n] - zeros[t] * sums[n]) * scales[t];
            if (bias) row[n] += bias[n];
        }
    }
}
