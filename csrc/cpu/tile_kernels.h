// The tile kernels of tiles.h on the vectors of lanes.h. Included like lanes.h, after it; the file
// that includes it has also defined kRows and kVectors, the shape of the block of sums that a
// product keeps in registers.

constexpr double kFloor = -1000;  // e^kFloor is 0 in float and double; see _statistics.py

template <class T>
constexpr int64_t kPanel = kVectors * LanesOf<T>::count;

// A block of rows x vectors sums, kept in registers for the whole depth.
template <class T, int rows, int vectors, bool packed>
inline void product_block(int64_t depth, const T* a, int64_t a_stride, const T* b, T* c,
                          int64_t c_stride, bool accumulate) {
  constexpr int64_t lanes = LanesOf<T>::count;
  Vec<T> sums[rows][vectors] = {};
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

template <class T, int vectors, bool packed, int rows>
void product_rest(int64_t rest, int64_t depth, const T* a, int64_t a_stride, const T* b, T* c,
                  int64_t c_stride, bool accumulate) {
  if constexpr (rows > 0) {
    if (rest == rows)
      return product_block<T, rows, vectors, packed>(depth, a, a_stride, b, c, c_stride,
                                                     accumulate);
    product_rest<T, vectors, packed, rows - 1>(rest, depth, a, a_stride, b, c, c_stride,
                                               accumulate);
  }
}

template <class T, int vectors, bool packed>
void product_panel(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, T* c,
                   int64_t c_stride, bool accumulate) {
  if (packed) a_stride = depth;  // a block of kRows rows takes kRows * depth elements either way
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    product_block<T, kRows, vectors, packed>(depth, a + i * a_stride, a_stride, b,
                                             c + i * c_stride, c_stride, accumulate);
  product_rest<T, vectors, packed, kRows - 1>(rows - i, depth, a + i * a_stride, a_stride, b,
                                              c + i * c_stride, c_stride, accumulate);
}

template <class T, bool packed, int candidate = kVectors>
void product(int64_t rows, int64_t depth, int64_t vectors, const T* a, int64_t a_stride,
             const T* b, T* c, int64_t c_stride, bool accumulate) {
  if constexpr (candidate > 0) {
    if (vectors == candidate)
      return product_panel<T, candidate, packed>(rows, depth, a, a_stride, b, c, c_stride,
                                                 accumulate);
    product<T, packed, candidate - 1>(rows, depth, vectors, a, a_stride, b, c, c_stride,
                                      accumulate);
  }
}

template <class T>
void product_packed(int64_t rows, int64_t depth, int64_t vectors, const T* a, const T* b, T* c,
                    int64_t c_stride, bool accumulate) {
  product<T, true>(rows, depth, vectors, a, 0, b, c, c_stride, accumulate);
}

// Blocks are copied eight elements at a time, one or two moves: what is too much is overwritten by
// the next k of the block, except behind the last.
template <class T>
void pack_transposed(int64_t rows, int64_t depth, const T* a, int64_t a_stride, T* out) {
  constexpr int64_t step = 8;
  static_assert(kRows <= step);
  const int64_t whole = rows < step ? 0 : (rows - step) / kRows * kRows + kRows;
  for (int64_t k = 0; k < depth; ++k, a += a_stride, out += kRows) {
    const int64_t fast = k + 1 < depth ? whole : 0;
    for (int64_t i = 0; i < fast; i += kRows)
      __builtin_memcpy(out + i * depth, a + i, step * sizeof(T));
    for (int64_t i = fast; i < rows; ++i)
      out[i / kRows * kRows * depth + i % kRows] = a[i];
  }
}

template <class T>
inline Vec<T> finish(Vec<T> z, T softcap, T temperature) {
  if (softcap != 0) z = tanh_of<T>(z / softcap) * softcap;
  if (temperature != 1) z = z / temperature;
  return z;
}

template <class T>
void finish_logits(int64_t columns, int64_t vectors, const T* bias, T softcap, T temperature,
                   T* z) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t j = 0; j < vectors; ++j) {
      T* at = z + c * kPanel<T> + j * LanesOf<T>::count;
      const Vec<T> value = bias == nullptr ? load<T>(at) : load<T>(at) + bias[c];
      store<T>(at, finish<T>(value, softcap, temperature));
    }
}

// The statistics of one vector of rows.
template <class T>
struct Sums {
  Vec<T> max, rest, exp_shift, shift, argmax, above;

  static inline Sums read(const T* state, int64_t stride) {
    return {load<T>(state + kMax * stride),      load<T>(state + kRest * stride),
            load<T>(state + kExpShift * stride), load<T>(state + kShift * stride),
            load<T>(state + kArgmax * stride),   load<T>(state + kAbove * stride)};
  }
  inline void write(T* state, int64_t stride) const {
    store<T>(state + kMax * stride, max);
    store<T>(state + kRest * stride, rest);
    store<T>(state + kExpShift * stride, exp_shift);
    store<T>(state + kShift * stride, shift);
    store<T>(state + kArgmax * stride, argmax);
    store<T>(state + kAbove * stride, above);
  }
};

// Of `before` and `after` columns; of equal maxima the first keeps the argmax. The maximum that
// loses brings its own term, which its rest leaves out, into the rest of the winner.
template <class T>
inline Sums<T> merged_sums(const Sums<T>& a, T before, const Sums<T>& b, T after) {
  const Vec<T> floor = splat<T>(kFloor);
  const auto takes_b = b.max > a.max;
  const Vec<T> max = takes_b ? b.max : a.max;
  const Vec<T> fall_a = a.max - max, fall_b = b.max - max;
  const Vec<T> below_a = at_least<T>(fall_a, T(kFloor)), below_b = at_least<T>(fall_b, T(kFloor));
  const Vec<T> scale_a = exp_of<T>(below_a), scale_b = exp_of<T>(below_b);
  (void)floor;
  return {max,
          fused(a.rest, scale_a, b.rest * scale_b) + (takes_b ? scale_a : scale_b),
          scale_a * fused(a.rest + T(1), below_a, a.exp_shift) +
              scale_b * fused(b.rest + T(1), below_b, b.exp_shift),
          fused(fall_a, splat<T>(before), a.shift) + fused(fall_b, splat<T>(after), b.shift),
          takes_b ? b.argmax : a.argmax,
          a.above + b.above};
}

// Two passes over the tile, which lies in a near cache: the maximum, then the sums against it.
template <class T>
inline Sums<T> tile_sums(int64_t columns, const T* z, Vec<T> target, bool counts) {
  // A tile whose logits are all -inf must not subtract -inf from -inf.
  Vec<T> max = splat<T>(std::numeric_limits<T>::lowest());
  Vec<T> argmax = {}, column = {};
  for (int64_t c = 0; c < columns; ++c) {
    const Vec<T> value = load<T>(z + c * kPanel<T>);
    argmax = value > max ? column : argmax;
    max = value > max ? value : max;
    column += T(1);
  }
  Sums<T> sums = {max, {}, {}, {}, argmax, {}};
  column = Vec<T>{};
  for (int64_t c = 0; c < columns; ++c) {
    const Vec<T> value = load<T>(z + c * kPanel<T>);
    const Vec<T> shifted = value - max;
    const Vec<T> exponential = column == argmax ? Vec<T>{} : exp_of<T>(shifted);
    sums.rest += exponential;
    sums.exp_shift = fused(exponential, at_least<T>(shifted, T(kFloor)), sums.exp_shift);
    sums.shift += shifted;
    if (counts) sums.above += value > target ? splat<T>(1) : Vec<T>{};
    column += T(1);
  }
  return sums;
}

template <class T>
void statistics(int64_t columns, int64_t vectors, const T* z, const T* target,
                int64_t first_column, int64_t merged, T* state, int64_t stride, T* own) {
  for (int64_t j = 0; j < vectors; ++j) {
    const int64_t at = j * LanesOf<T>::count;
    const bool counts = target != nullptr;
    Sums<T> sums = tile_sums<T>(columns, z + at, counts ? load<T>(target + at) : Vec<T>{}, counts);
    sums.argmax += T(first_column);
    if (own != nullptr) sums.write(own + at, kPanel<T>);
    if (merged > 0)
      sums = merged_sums<T>(Sums<T>::read(state + at, stride), T(merged), sums, T(columns));
    sums.write(state + at, stride);
  }
}

template <class T>
void merge(int64_t vectors, int64_t merged, T* state, int64_t added, const T* later,
           int64_t stride) {
  for (int64_t j = 0; j < vectors; ++j) {
    const int64_t at = j * LanesOf<T>::count;
    merged_sums<T>(Sums<T>::read(state + at, stride), T(merged), Sums<T>::read(later + at, stride),
                   T(added))
        .write(state + at, stride);
  }
}

template <class T>
void gradients(int64_t columns, int64_t vectors, const RowCoefficients<T>& rows, T* z) {
  const T cap_factor = rows.softcap == 0 ? 0 : rows.temperature / rows.softcap;
  for (int64_t j = 0; j < vectors; ++j) {
    const int64_t at = j * LanesOf<T>::count;
    const Vec<T> max = load<T>(rows.max_logit + at), log_sum = load<T>(rows.log_sum + at);
    const Vec<T> constant = load<T>(rows.constant + at), zero = {};
    const bool entropic = rows.entropy_slope != nullptr;
    const Vec<T> slope = entropic ? load<T>(rows.entropy_slope + at) : zero;
    const Vec<T> entropy = entropic ? load<T>(rows.entropy + at) : zero;
    const Vec<T> uniform = rows.uniform == nullptr ? zero : load<T>(rows.uniform + at);
    for (int64_t c = 0; c < columns; ++c) {
      T* place = z + c * kPanel<T> + at;
      const Vec<T> value = load<T>(place);
      // lse itself is not subtracted: max and log_sum apart keep their digits under a large offset.
      const Vec<T> logp = (value - max) - log_sum;
      Vec<T> factor = constant;
      if (entropic) factor -= slope * (at_least<T>(logp, T(kFloor)) + entropy);
      Vec<T> dz = fused(exp_of<T>(logp), factor, uniform);
      if (rows.softcap != 0) {
        const Vec<T> capped = value * cap_factor;
        dz *= T(1) - capped * capped;
      }
      if (rows.temperature != 1) dz = dz / rows.temperature;
      store<T>(place, dz);
    }
  }
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
          product<T, false>,
          product_packed<T>,
          pack_transposed<T>,
          finish_logits<T>,
          statistics<T>,
          merge<T>,
          gradients<T>,
          elementwise<T, exp_of<T>>,
          elementwise<T, tanh_of<T>>};
}

static_assert(kPanel<float> <= kMaxPanel && kBlockRows % kPanel<float> == 0);
static_assert(kBlockRows % kPanel<double> == 0);
