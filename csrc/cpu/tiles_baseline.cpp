// The tile kernels for every processor, and the choice among what was compiled.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "tiles.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace s2srm::cpu {
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

#include "lanes.h"
#include "product_kernels.h"
#include "draw_kernels.h"
#include "tile_kernels.h"

const TileKernels<float> kFloat = table<float>("baseline");
const TileKernels<double> kDouble = table<double>("baseline");

}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
extern const TileKernels<float> kAvx512Float, kAvx2Float;
extern const TileKernels<double> kAvx512Double, kAvx2Double;

static bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
template <class T>
static const TileKernels<T>* find(const char* name, const TileKernels<T>* avx512,
                                  const TileKernels<T>* avx2, const TileKernels<T>* baseline) {
  const auto wanted = [&](const char* other) {
    return name == nullptr || std::strcmp(name, other) == 0;
  };
  if (runs_avx512() && wanted("avx512")) return avx512;
  if (runs_avx2() && wanted("avx2")) return avx2;
  return wanted("baseline") ? baseline : nullptr;
}
template <>
const TileKernels<float>* tile_kernels(const char* name) {
  return find(name, &kAvx512Float, &kAvx2Float, &baseline::kFloat);
}
template <>
const TileKernels<double>* tile_kernels(const char* name) {
  return find(name, &kAvx512Double, &kAvx2Double, &baseline::kDouble);
}
#else
template <>
const TileKernels<float>* tile_kernels(const char* name) {
  return name == nullptr || std::strcmp(name, "baseline") == 0 ? &baseline::kFloat : nullptr;
}
template <>
const TileKernels<double>* tile_kernels(const char* name) {
  return name == nullptr || std::strcmp(name, "baseline") == 0 ? &baseline::kDouble : nullptr;
}
#endif

}  // namespace s2srm::cpu
