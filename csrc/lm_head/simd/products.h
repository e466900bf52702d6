// Products of a left-hand side, read from memory as it lies or packed, and a packed panel. Included
// like lanes.h, after it.

// A block of rows x vectors sums of `depth` terms, kept in registers.
template <class T, int rows, int vectors, bool packed>
inline void product_run(int64_t depth, const T* a, int64_t a_stride, const T* b, T* c,
                          int64_t c_stride, bool accumulate) {
  constexpr int64_t lanes = LanesOf<T>::count;
  Vec<T> sums[rows][vectors] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) right[j] = load<T>(b + k * kPanel<T> + j * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec<T> left = splat<T>(packed ? a[k * kRows + i] : a[i * a_stride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sums[i][j] = fused(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      T* out = c + i * c_stride + j * lanes;
      store<T>(out, accumulate ? load<T>(out) + sums[i][j] : sums[i][j]);
    }
  }
}

template <class T, int rows, int vectors, bool packed>
inline void product_block(int64_t depth, int64_t run, const T* a, int64_t a_stride, const T* b,
                          T* c, int64_t c_stride, bool accumulate) {
  int64_t k = 0;
  do {  // once for a depth of 0
    product_run<T, rows, vectors, packed>(std::min(run, depth - k), a + (packed ? k * kRows : k),
                                          a_stride, b + k * kPanel<T>, c, c_stride,
                                          accumulate || k > 0);
    k += run;
  } while (k < depth);
}

template <class T, int vectors, bool packed, int rows>
void product_rest(int64_t rest, int64_t depth, int64_t run, const T* a, int64_t a_stride,
                  const T* b, T* c, int64_t c_stride, bool accumulate) {
  if constexpr (rows > 0) {
    if (rest == rows)
      return product_block<T, rows, vectors, packed>(depth, run, a, a_stride, b, c, c_stride,
                                                     accumulate);
    product_rest<T, vectors, packed, rows - 1>(rest, depth, run, a, a_stride, b, c, c_stride,
                                               accumulate);
  }
}

template <class T, int vectors, bool packed>
void product_panel(int64_t rows, int64_t depth, int64_t run, const T* a, int64_t a_stride,
                   const T* b, T* c, int64_t c_stride, bool accumulate, Prefetch& prefetch) {
  // As many sums whatever the vectors are: a few of them would wait for each other.
  constexpr int times = packed ? 1 : std::min(kVectors / vectors, 16 / kRows);
  constexpr int block = kRows * times;
  if (packed) a_stride = depth;  // a block of kRows rows takes kRows * depth elements either way
  int64_t i = 0;
  for (; i + block <= rows; i += block) {
    for (int t = 0; t < times; ++t) prefetch.advance();
    product_block<T, block, vectors, packed>(depth, run, a + i * a_stride, a_stride, b,
                                             c + i * c_stride, c_stride, accumulate);
  }
  product_rest<T, vectors, packed, block - 1>(rows - i, depth, run, a + i * a_stride, a_stride, b,
                                              c + i * c_stride, c_stride, accumulate);
}

template <class T, bool packed, int candidate = kVectors>
void product(int64_t rows, int64_t depth, int64_t run, int64_t vectors, const T* a,
             int64_t a_stride, const T* b, T* c, int64_t c_stride, bool accumulate,
             Prefetch& prefetch) {
  if constexpr (candidate > 0) {
    if (vectors == candidate)
      return product_panel<T, candidate, packed>(rows, depth, run, a, a_stride, b, c, c_stride,
                                                 accumulate, prefetch);
    product<T, packed, candidate - 1>(rows, depth, run, vectors, a, a_stride, b, c, c_stride,
                                      accumulate, prefetch);
  }
}

template <class T>
void product_packed(int64_t rows, int64_t depth, int64_t run, int64_t vectors, const T* a,
                    const T* b, T* c, int64_t c_stride, bool accumulate, Prefetch& prefetch) {
  product<T, true>(rows, depth, run, vectors, a, 0, b, c, c_stride, accumulate, prefetch);
}

// Blocks are copied eight elements at a time, one or two moves: what is too much is overwritten by
// the next k of the block, except behind the last.
template <class T>
void pack_transposed(int64_t rows, int64_t depth, const T* a, int64_t a_stride, T* out) {
  constexpr int64_t step = 8;
  static_assert(kRows <= step);
  for (int64_t i = 0; i < rows; i += kRows, out += kRows * depth) {
    const int64_t fast = i + step <= rows ? depth - 1 : 0;
    for (int64_t k = 0; k < fast; ++k)
      __builtin_memcpy(out + k * kRows, a + k * a_stride + i, step * sizeof(T));
    for (int64_t k = fast; k < depth; ++k)
      for (int64_t j = 0; j < std::min<int64_t>(kRows, rows - i); ++j)
        out[k * kRows + j] = a[k * a_stride + i + j];
  }
}
