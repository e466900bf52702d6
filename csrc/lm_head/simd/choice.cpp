// The choice among the instruction sets that were compiled.
#include <cstring>

#include "kernels.h"

namespace s2srm::lm_head {

extern const TileKernels<float> kBaselineFloat;
extern const TileKernels<double> kBaselineDouble;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
extern const TileKernels<float> kAvx512Float, kAvx2Float;
extern const TileKernels<double> kAvx512Double, kAvx2Double;
#endif

namespace {

// Of kernels from the best to the worst, the first that runs here and is called `name`, if given.
template <class T>
struct Candidate {
  bool runs;
  const TileKernels<T>* kernels;
};

template <class T, int count>
const TileKernels<T>* first_of(const Candidate<T> (&candidates)[count], const char* name) {
  for (const auto& [runs, kernels] : candidates)
    if (runs && (name == nullptr || std::strcmp(name, kernels->name) == 0)) return kernels;
  return nullptr;
}

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
static bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}

template <>
const TileKernels<float>* tile_kernels(const char* name) {
  return first_of<float>({{runs_avx512(), &kAvx512Float},
                          {runs_avx2(), &kAvx2Float},
                          {true, &kBaselineFloat}},
                         name);
}
template <>
const TileKernels<double>* tile_kernels(const char* name) {
  return first_of<double>({{runs_avx512(), &kAvx512Double},
                           {runs_avx2(), &kAvx2Double},
                           {true, &kBaselineDouble}},
                          name);
}
#else
template <>
const TileKernels<float>* tile_kernels(const char* name) {
  return first_of<float>({{true, &kBaselineFloat}}, name);
}
template <>
const TileKernels<double>* tile_kernels(const char* name) {
  return first_of<double>({{true, &kBaselineDouble}}, name);
}
#endif

}  // namespace s2srm::lm_head
