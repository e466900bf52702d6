// Statistics of a tile of logits and their merge. Included like lanes.h, after exp_tanh.h.

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
  const auto takes_b = b.max > a.max;
  const Vec<T> max = takes_b ? b.max : a.max;
  const Vec<T> fall_a = a.max - max, fall_b = b.max - max;
  const Vec<T> below_a = at_least<T>(fall_a, T(kFloor)), below_b = at_least<T>(fall_b, T(kFloor));
  const Vec<T> scale_a = exp_of_nonpositive<T>(below_a);
  const Vec<T> scale_b = exp_of_nonpositive<T>(below_b);
  return {max,
          fused(a.rest, scale_a, b.rest * scale_b) + (takes_b ? scale_a : scale_b),
          scale_a * fused(a.rest + T(1), below_a, a.exp_shift) +
              scale_b * fused(b.rest + T(1), below_b, b.exp_shift),
          fused(fall_a, splat<T>(before), a.shift) + fused(fall_b, splat<T>(after), b.shift),
          takes_b ? b.argmax : a.argmax,
          a.above + b.above};
}

template <class T>
struct Maximum {
  Vec<T> value, column;
};

// Of `vectors` vectors of rows side by side: alone, each would wait for its own comparisons.
template <class T, int vectors>
inline void tile_maxima(int64_t columns, const T* z, Maximum<T>* out) {
  // A tile whose logits are all -inf must not subtract -inf from -inf.
  Vec<T> max[vectors], argmax[vectors], column = {};
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j) {
    max[j] = splat<T>(std::numeric_limits<T>::lowest());
    argmax[j] = Vec<T>{};
  }
  for (int64_t c = 0; c < columns; ++c) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      const Vec<T> value = load<T>(z + c * kPanel<T> + j * LanesOf<T>::count);
      argmax[j] = value > max[j] ? column : argmax[j];
      max[j] = value > max[j] ? value : max[j];
    }
    column += T(1);
  }
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j) out[j] = {max[j], argmax[j]};
}

// What some columns add to rest, exp_shift and shift.
template <class T>
struct Terms {
  Vec<T> rest, exp_shift, shift;

  inline Terms operator+(const Terms& later) const {
    return {rest + later.rest, exp_shift + later.exp_shift, shift + later.shift};
  }
};

// The sums of one vector of rows against the maximum that a first pass has found; the tile lies in
// a near cache.
template <class T, int wanted>
class TileSums {
 public:
  TileSums(const T* z, const Maximum<T>& maximum, Vec<T> target_logit)
      : z_(z), maximum_(maximum), target_logit_(target_logit) {}

  // Columns are added in pairs, pairs in pairs and so on, which rounds a sum of many alike terms a
  // few times only: pending_[i] holds the sum of a block, each twice as long as the next at least.
  inline Sums<T> run(int64_t columns) {
    int64_t height = 0, block = 0;
    for (; block < columns / kLeaf; ++block) {
      Terms<T> sum = leaf();
      for (int64_t pairs = block; pairs & 1; pairs >>= 1) sum = pending_[--height] + sum;
      pending_[height++] = sum;
    }
    Terms<T> sum = {};
    for (int64_t c = block * kLeaf; c < columns; ++c) sum = sum + term();
    while (height > 0) sum = pending_[--height] + sum;
    return {maximum_.value, sum.rest, sum.exp_shift, sum.shift, maximum_.column, above_};
  }

 private:
  static constexpr int64_t kLeaf = 4, kHeight = 7;
  static_assert(kLeaf << (kHeight - 1) >= kTileColumns);

  inline Terms<T> leaf() {
    const Terms<T> a = term(), b = term(), c = term(), d = term();
    return (a + b) + (c + d);
  }

  // Of the next column. The maximum's own term is left out of the rest.
  inline Terms<T> term() {
    const Vec<T> value = load<T>(z_), shifted = value - maximum_.value;
    const Vec<T> exponential =
        column_ == maximum_.column ? Vec<T>{} : exp_of_nonpositive<T>(shifted);
    z_ += kPanel<T>;
    column_ += T(1);
    if (wanted & kWantedCounts) above_ += value > target_logit_ ? splat<T>(1) : Vec<T>{};
    return {exponential,
            wanted & kWantedEntropy ? exponential * at_least<T>(shifted, T(kFloor)) : Vec<T>{},
            wanted & kWantedMean ? shifted : Vec<T>{}};
  }

  const T* z_;
  const Maximum<T> maximum_;
  const Vec<T> target_logit_;
  Vec<T> column_ = {}, above_ = {};
  Terms<T> pending_[kHeight];
};

template <class T, int wanted>
void panel_statistics(int64_t columns, int64_t vectors, const T* z, const T* target_logits,
                      int64_t first_column, int64_t merged, T* state, int64_t stride, T* own) {
  Maximum<T> maxima[kVectors];
  if (vectors == kVectors) tile_maxima<T, kVectors>(columns, z, maxima);
  for (int64_t j = 0; j < vectors; ++j) {
    const int64_t at = j * LanesOf<T>::count;
    if (vectors < kVectors) tile_maxima<T, 1>(columns, z + at, maxima + j);
    const Vec<T> target_logit = target_logits == nullptr ? Vec<T>{} : load<T>(target_logits + at);
    Sums<T> sums = TileSums<T, wanted>(z + at, maxima[j], target_logit).run(columns);
    sums.argmax += T(first_column);
    if (own != nullptr) sums.write(own + at, kPanel<T>);
    if (merged > 0)
      sums = merged_sums<T>(Sums<T>::read(state + at, stride), T(merged), sums, T(columns));
    sums.write(state + at, stride);
  }
}

template <class T, int candidate = kWantedAll>
void statistics(int64_t columns, int64_t vectors, const T* z, int wanted, const T* target_logits,
                int64_t first_column, int64_t merged, T* state, int64_t stride, T* own) {
  if constexpr (candidate >= 0) {
    if (wanted == candidate)
      return panel_statistics<T, candidate>(columns, vectors, z, target_logits, first_column,
                                            merged, state, stride, own);
    statistics<T, candidate - 1>(columns, vectors, z, wanted, target_logits, first_column, merged,
                                 state, stride, own);
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
