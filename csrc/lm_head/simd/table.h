// Everything that is compiled for an instruction set, and the table of it. lanes.h says what the
// including file has defined.
#include "lanes.h"

#include "draws.h"
#include "exp_tanh.h"
#include "logits.h"
#include "products.h"
#include "statistics.h"

template <class T>
void copy_far(int64_t count, int64_t width, const T* in, int64_t in_stride, T* out,
              int64_t out_stride) {
  constexpr int64_t lanes = LanesOf<T>::count;
  const bool aligned = (reinterpret_cast<uintptr_t>(out) | (out_stride * sizeof(T))) % kBytes == 0;
  const int64_t streamed = aligned ? width / lanes * lanes : 0;
  for (int64_t i = 0; i < count; ++i, in += in_stride, out += out_stride) {
    for (int64_t j = 0; j < streamed; j += lanes) stream(out + j, load<T>(in + j));
    if (streamed < width) std::copy_n(in + streamed, width - streamed, out + streamed);
  }
  stream_fence();
}

template <class T, Vec<T> (*function)(Vec<T>)>
void elementwise(int64_t count, const T* x, T* y) {
  constexpr int64_t lanes = LanesOf<T>::count;
  for (int64_t i = 0; i < count; i += lanes) {
    T buffer[lanes] = {};
    const int64_t length = std::min(lanes, count - i);
    std::copy_n(x + i, length, buffer);
    store<T>(buffer, function(load<T>(buffer)));
    std::copy_n(buffer, length, y + i);
  }
}

template <class T>
constexpr TileKernels<T> table(const char* name) {
  return {name,
          LanesOf<T>::count,
          kPanel<T>,
          kRows,
          product<T, false>,
          product_packed<T>,
          pack_transposed<T>,
          finish_logits<T>,
          scale_shares<T>,
          statistics<T>,
          merge<T>,
          draw<T>,
          gradients<T>,
          copy_far<T>,
          noise,
          elementwise<T, exp_of<T>>,
          elementwise<T, tanh_of<T>>};
}

static_assert(kPanel<float> <= kMaxPanel && kBlockRows % kPanel<float> == 0);
static_assert(kBlockRows % kPanel<double> == 0);
