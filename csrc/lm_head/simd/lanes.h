// Vectors of float and double in GCC's and Clang's vector extension.
//
// Included, through table.h, inside a namespace of its own by every file of an instruction set, so
// that nothing here is shared between files that are compiled for different ones. That file has
// defined kBytes, the size of a vector, and for the vectors of both types
//
//     fused(a, b, c)      a * b + c
//     larger(a, b)        a > b ? a : b, so b where one of them is NaN
//     scaled(p, n)        p * 2^n, n whole; only where kScales says that there is an instruction
//     stream(p, v)        a store past the caches; stream_fence() ends a series of them
//
// and kRows and kVectors, the shape of the block of sums that a product keeps in registers.

template <class T>
struct LanesOf {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef T Vector __attribute__((vector_size(kBytes)));
  typedef T Unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
  typedef Word Words __attribute__((vector_size(kBytes)));
  static constexpr int64_t count = kBytes / sizeof(T);
};
template <class T>
using Vec = typename LanesOf<T>::Vector;
template <class T>
constexpr int64_t kPanel = kVectors * LanesOf<T>::count;  // rows

// e^kFloor is 0 in float and double, and 0 * kFloor is 0 where 0 * -inf would be NaN: FLOOR in
// s2srm_kernels/lm_head/engine.py.
constexpr double kFloor = -1000;

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename LanesOf<T>::Unaligned*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename LanesOf<T>::Unaligned*>(p) = v;
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // x + 0 would be an addition: -0 + 0 is not -0
}

// A NaN in x stays.
template <class T>
inline Vec<T> at_least(Vec<T> x, T low) {
  return larger(splat<T>(low), x);
}
