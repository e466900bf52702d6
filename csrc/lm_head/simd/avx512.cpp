// The tile kernels for processors with AVX-512.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // for its target pragma
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own _mm512_max_ps

namespace s2srm::lm_head {
namespace avx512 {

constexpr int kBytes = 64;
constexpr int kRows = 6, kVectors = 4;  // 24 of 32 registers are sums

typedef float F32 __attribute__((vector_size(kBytes)));
typedef double F64 __attribute__((vector_size(kBytes)));
inline F32 fused(F32 a, F32 b, F32 c) {
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline F64 fused(F64 a, F64 b, F64 c) {
  return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
inline F32 larger(F32 a, F32 b) { return (F32)_mm512_max_ps((__m512)a, (__m512)b); }
inline F64 larger(F64 a, F64 b) { return (F64)_mm512_max_pd((__m512d)a, (__m512d)b); }
inline F32 rounded(F32 product) {
  asm("" : "+v"(product));
  return product;
}
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef uint64_t U64 __attribute__((vector_size(kBytes)));
inline U64 even_products(U32 a, U32 b) { return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
constexpr bool kScales = true;
inline F32 scaled(F32 p, F32 n) { return (F32)_mm512_scalef_ps((__m512)p, (__m512)n); }
inline F64 scaled(F64 p, F64 n) { return (F64)_mm512_scalef_pd((__m512d)p, (__m512d)n); }
inline void stream(float* p, F32 v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream(double* p, F64 v) { _mm512_stream_pd(p, (__m512d)v); }
inline void stream_fence() { _mm_sfence(); }

#include "table.h"

}  // namespace avx512

extern const TileKernels<float> kAvx512Float = avx512::table<float>("avx512");
extern const TileKernels<double> kAvx512Double = avx512::table<double>("avx512");

}  // namespace s2srm::lm_head
#pragma GCC pop_options
#endif
