// The tile kernels for processors with AVX-512.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "tiles.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#pragma GCC diagnostic ignored "-Wpsabi"

namespace s2srm::cpu {
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

#include "lanes.h"
#include "tile_kernels.h"

}  // namespace avx512

extern const TileKernels<float> kAvx512Float = avx512::table<float>("avx512");
extern const TileKernels<double> kAvx512Double = avx512::table<double>("avx512");

}  // namespace s2srm::cpu
#pragma GCC pop_options
#endif
