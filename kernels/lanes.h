#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* A register of 32-bit lanes, and what is done with it. */
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define WIDTH 16
typedef __m512i Ints;
typedef __m512 Floats;
#define INT(name) _mm512_##name
#define BITS_OF(name) _mm512_##name##_si512
#define FLOAT16(at) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(at)))
#define BFLOAT16(at) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(at))), 16))
#define BYTES(at) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(at)))
#define TO_BYTES(at, lanes) _mm_storeu_si128((__m128i *)(at), _mm512_cvtepi32_epi8(lanes))
#define ADD_PAIRS(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
#else
#define WIDTH 8
typedef __m256i Ints;
typedef __m256 Floats;
#define INT(name) _mm256_##name
#define BITS_OF(name) _mm256_##name##_si256
#define FLOAT16(at) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at)))
#define BFLOAT16(at) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(at))), 16))
#define BYTES(at) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at)))
#define TO_WORDS(lanes) _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1))
#define TO_BYTES(at, lanes) _mm_storel_epi64((__m128i *)(at), _mm_packs_epi16(TO_WORDS(lanes), TO_WORDS(lanes)))
#define ADD_PAIRS(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
#endif
