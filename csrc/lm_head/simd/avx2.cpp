// The tile kernels for processors with AVX2 and FMA.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // for its target pragma
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#pragma GCC diagnostic ignored "-Wpsabi"

namespace s2srm::lm_head {
namespace avx2 {

constexpr int kBytes = 32;
constexpr int kRows = 6, kVectors = 2;  // 12 of 16 registers are sums

typedef float F32 __attribute__((vector_size(kBytes)));
typedef double F64 __attribute__((vector_size(kBytes)));
inline F32 fused(F32 a, F32 b, F32 c) {
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline F64 fused(F64 a, F64 b, F64 c) {
  return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
inline F32 larger(F32 a, F32 b) { return (F32)_mm256_max_ps((__m256)a, (__m256)b); }
inline F64 larger(F64 a, F64 b) { return (F64)_mm256_max_pd((__m256d)a, (__m256d)b); }
inline F32 rounded(F32 product) {
  asm("" : "+v"(product));
  return product;
}
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef uint64_t U64 __attribute__((vector_size(kBytes)));
inline U64 even_products(U32 a, U32 b) { return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
constexpr bool kScales = false;
inline void stream(float* p, F32 v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream(double* p, F64 v) { _mm256_stream_pd(p, (__m256d)v); }
inline void stream_fence() { _mm_sfence(); }

#include "table.h"

}  // namespace avx2

extern const TileKernels<float> kAvx2Float = avx2::table<float>("avx2");
extern const TileKernels<double> kAvx2Double = avx2::table<double>("avx2");

}  // namespace s2srm::lm_head
#pragma GCC pop_options
#endif
