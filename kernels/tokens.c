/* Tokens to codes, as harness/quantizer.py's encode_tokens makes them, to the bit; each number is read twice. */

#include "lanes.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

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

/* values / scales, correctly rounded wherever that decides a code. `fast`, which is for scales that are neither very
   large nor very small: from the reciprocal, by a correction that rounds correctly once a quotient is within a unit
   (Markstein), as a first one makes it. Far below a half the last bit may differ, as what is left of a value
   underflows. */
INLINE Floats divided(Floats values, Floats scales, Floats reciprocals, const int fast) {
    if (!fast) return INT(div_ps)(values, scales);
    Floats quotient = INT(mul_ps)(values, reciprocals);
    for (int i = 0; i < 2; i++)
        quotient = INT(fmadd_ps)(INT(fnmadd_ps)(quotient, scales, values), reciprocals, quotient);
    return quotient;
}

/* Codes less 128 of the inputs from `first` to `last`, and their sum. */
INLINE int32_t codes_of(const void *x, long at, long first, long last, const int bfloat16, float scale, float zero,
                        float levels, const int fast, long ahead, int8_t *codes) {
    const Floats scales = INT(set1_ps)(scale), reciprocals = INT(set1_ps)(1 / scale);
    const Ints zeros = INT(set1_epi32)((int)zero - 128);
    const Ints least = INT(set1_epi32)(-128), most = INT(set1_epi32)((int)levels - 128);
    Ints sums = BITS_OF(setzero)();
    long i = first;
    for (; i + WIDTH <= last; i += WIDTH) {
        _mm_prefetch((const char *)x + (at + i + ahead) * (bfloat16 ? 2 : 4), _MM_HINT_T0);
        Floats steps = divided(values_at(x, at + i, bfloat16), scales, reciprocals, fast);
        steps = INT(min_ps)(INT(max_ps)(steps, INT(set1_ps)(-0x1p20f)), INT(set1_ps)(0x1p20f)); /* or it is no int */
        Ints code = INT(add_epi32)(INT(cvtps_epi32)(steps), zeros); /* half to even */
        code = INT(min_epi32)(INT(max_epi32)(code, least), most);
        sums = INT(add_epi32)(sums, code);
        TO_BYTES(codes + i, code);
    }
    int32_t each[WIDTH], sum = 0;
    BITS_OF(storeu)((Ints *)each, sums);
    for (int lane = 0; lane < WIDTH; lane++) sum += each[lane];
    for (; i < last; i++) {
        const float code = rintf(value_at(x, at + i, bfloat16) / scale) + zero;
        codes[i] = (int8_t)((code < 0 ? 0 : code > levels ? levels : code) - 128);
        sum += codes[i];
    }
    return sum;
}

INLINE void tokens(const void *x, long inputs, const int bfloat16, int bits, float clip, int symmetric, long group,
                   long groups, long first, long last, int8_t *codes, float *scales, int32_t *zeros, int32_t *sums) {
    const float levels = (float)((1 << bits) - 1);
    for (long t = first; t < last; t++) {
        float low, high;
        range(x, t * inputs, inputs, bfloat16, &low, &high);
        low *= clip, high *= clip;
        if (symmetric) high = -low > high ? -low : high, low = -high;
        float scale = (high - low) / levels;
        if (scale == 0) scale = 2 / levels;
        const int finite = !isnan(scale); /* or the token comes out as NaN, whatever its codes are */
        const float zero = symmetric ? (float)(1 << (bits - 1)) : finite ? rintf(-low / scale) : 0;
        const int fast = scale > 0x1p-96f && scale < 0x1p96f;
        int8_t *to = codes + t * groups * group;
        for (long g = 0; g < groups; g++) {
            const long from = g * group, end = from + group < inputs ? from + group : inputs;
            int32_t *sum = sums + t * groups + g;
            if (!finite) *sum = 0, memset(to + from, 0, end - from);
            else if (fast) *sum = codes_of(x, t * inputs, from, end, bfloat16, scale, zero, levels, 1, inputs, to);
            else *sum = codes_of(x, t * inputs, from, end, bfloat16, scale, zero, levels, 0, inputs, to);
            memset(to + end, 0, from + group - end);
        }
        scales[t] = scale, zeros[t] = (int32_t)zero - 128;
    }
}

/* Codes int8 [rows, groups · group], less 128 and 0 beyond the inputs, scales and zeros [rows], the latter less 128,
   and sums of codes as they come [rows, groups] of the tokens from `first` to `last` of x[rows, inputs], float32 or
   bfloat16. `group`: a multiple of 32. */
void encode_tokens(const void *x, long inputs, int bfloat16, int bits, float clip, int symmetric, long group,
                   long groups, long first, long last, int8_t *codes, float *scales, int32_t *zeros, int32_t *sums) {
    if (bfloat16)
        tokens(x, inputs, 1, bits, clip, symmetric, group, groups, first, last, codes, scales, zeros, sums);
    else tokens(x, inputs, 0, bits, clip, symmetric, group, groups, first, last, codes, scales, zeros, sums);
}
