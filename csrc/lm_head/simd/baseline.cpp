// The tile kernels for every processor.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace s2srm::lm_head {
namespace baseline {

constexpr int kBytes = 16;
constexpr int kRows = 6, kVectors = 2;  // 12 of 16 registers are sums

typedef float F32 __attribute__((vector_size(kBytes)));
typedef double F64 __attribute__((vector_size(kBytes)));
inline F32 fused(F32 a, F32 b, F32 c) { return a * b + c; }
inline F64 fused(F64 a, F64 b, F64 c) { return a * b + c; }
inline F32 larger(F32 a, F32 b) { return a > b ? a : b; }
inline F64 larger(F64 a, F64 b) { return a > b ? a : b; }
inline F32 rounded(F32 product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef uint64_t U64 __attribute__((vector_size(kBytes)));
inline U64 even_products(U32 a, U32 b) {
  return ((U64)a & 0xffffffff) * ((U64)b & 0xffffffff);
}
constexpr bool kScales = false;
inline void stream(float* p, F32 v) { *reinterpret_cast<F32*>(p) = v; }
inline void stream(double* p, F64 v) { *reinterpret_cast<F64*>(p) = v; }
inline void stream_fence() {}

#include "table.h"

}  // namespace baseline

extern const TileKernels<float> kBaselineFloat = baseline::table<float>("baseline");
extern const TileKernels<double> kBaselineDouble = baseline::table<double>("baseline");

}  // namespace s2srm::lm_head
