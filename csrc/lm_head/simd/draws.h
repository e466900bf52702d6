// Gumbel noise, and the largest perturbed logit of a tile. Included like lanes.h, after it.
//
// The noise is that of lm_head/noise.py to the last bit: Philox-4x32-10, then float arithmetic in
// which no product is fused with a sum. The including file has defined for its vectors
//
//     even_products(a, b)    64-bit products of the elements 0, 2, ... of two vectors of uint32_t
//     rounded(product)       the product, which the compiler must not fuse with what follows

using Floats = Vec<float>;
using Words32 = typename LanesOf<float>::Words;
using Words64 = typename LanesOf<double>::Words;
typedef int32_t Integers __attribute__((vector_size(kBytes)));

constexpr int64_t kBlockIds = 64, kBlockCounters = 16, kNoiseLanes = LanesOf<float>::count;
static_assert(kBlockCounters % kNoiseLanes == 0);

inline void multiply(Words32 x, uint32_t factor, Words32& high, Words32& low) {
  const Words32 factors = Words32{} + factor;
  const Words64 even = even_products(x, factors);
  const Words64 odd = even_products((Words32)((Words64)x >> 32), factors);
  constexpr auto is_odd = [](int64_t) {
    Words32 odd = {};
    for (int64_t i = 1; i < kNoiseLanes; i += 2) odd[i] = ~uint32_t(0);
    return odd;
  };
  const Words32 odd_lanes = is_odd(0);
  low = odd_lanes ? (Words32)(odd << 32) : (Words32)even;
  high = odd_lanes ? (Words32)odd : (Words32)(even >> 32);
}

struct Philox {
  Words32 word[4];

  inline Philox(Words32 counter, uint64_t position, uint64_t seed) {
    Words32 a = counter, b = Words32{} + (uint32_t)position;
    Words32 c = Words32{} + (uint32_t)(position >> 32), d = {};
    uint32_t first = (uint32_t)seed, second = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      Words32 high_a, low_a, high_c, low_c;
      multiply(a, 0xD2511F53, high_a, low_a);
      multiply(c, 0xCD9E8D57, high_c, low_c);
      a = high_c ^ b ^ first;
      b = low_c;
      c = high_a ^ d ^ second;
      d = low_a;
      first += 0x9E3779B9;
      second += 0xBB67AE85;
    }
    word[0] = a, word[1] = b, word[2] = c, word[3] = d;
  }
};

// x > 0 as (1 + fraction) * 2^exponent.
inline void split(Floats x, Floats& fraction, Floats& exponent) {
  const Integers bits = (Integers)x + (0x3F800000 - 0x3F3504F3);
  exponent = __builtin_convertvector((bits >> 23) - 127, Floats);
  fraction = (Floats)((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
}

inline Floats log_of_parts(Floats fraction, Floats exponent) {
  const Floats square = rounded(fraction * fraction);
  Floats series = splat(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                  -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    series = rounded(series * fraction) + c;
  const Floats rest =
      rounded(rounded(series * fraction) * square) + rounded(exponent * -2.12194440e-4f);
  return (fraction + (rest - rounded(square * 0.5f))) + rounded(exponent * 0.693359375f);
}

inline Floats gumbel(Words32 word) {
  const Integers k = (Integers)(word >> 1);
  const Floats from_zero = rounded((__builtin_convertvector(k, Floats) + 0.5f) * 0x1p-31f);
  const Floats from_one =
      rounded((__builtin_convertvector(0x7FFFFFFF - k, Floats) + 0.5f) * 0x1p-31f);
  Floats fraction, exponent;
  split(from_one, fraction, exponent);
  const Integers near_zero = k < (1 << 29);
  fraction = near_zero ? -from_zero : fraction;
  exponent = near_zero ? Floats{} : exponent;
  split(-log_of_parts(fraction, exponent), fraction, exponent);
  return -log_of_parts(fraction, exponent);
}

// Noise of the ids of one block of 64, whatever part of it is wanted: out[i * stride] for id i.
inline void block_noise(int64_t seed, int64_t position, int64_t block, float* out,
                        int64_t stride) {
  constexpr auto lanes = [] {
    Words32 count = {};
    for (int64_t i = 0; i < kNoiseLanes; ++i) count[i] = i;
    return count;
  };
  for (int64_t first = 0; first < kBlockCounters; first += kNoiseLanes) {
    const Words32 counter = lanes() + (uint32_t)(block * kBlockCounters + first);
    const Philox philox(counter, position, seed);
#pragma GCC unroll 4
    for (int64_t w = 0; w < 4; ++w) {
      const Floats noise = gumbel(philox.word[w]);
      float* at = out + (w * kBlockCounters + first) * stride;
      for (int64_t i = 0; i < kNoiseLanes; ++i) at[i * stride] = noise[i];
    }
  }
}

template <class T>
inline Vec<T> load_noise(const float* noise) {
  if constexpr (sizeof(T) == 4) {
    return load<T>(noise);
  } else {
    Vec<T> wide;
    for (int64_t i = 0; i < LanesOf<T>::count; ++i) wide[i] = noise[i];
    return wide;
  }
}

template <class T>
void draw(int64_t columns, int64_t rows, const T* z, const int64_t* seeds,
          const int64_t* positions, int64_t first_id, int64_t first_column,
          const bool* suppressed, T* best, int64_t stride) {
  constexpr int64_t lanes = LanesOf<T>::count;
  // Rows behind the last have no noise, and nobody reads what they draw.
  float noise[kBlockIds * kPanel<T>] = {};
  for (int64_t begin = 0; begin < columns;) {
    const int64_t place = (first_id + begin) % kBlockIds;
    const int64_t end = std::min(begin + kBlockIds - place, columns);
    if (seeds != nullptr)
      for (int64_t r = 0; r < rows; ++r)
        block_noise(seeds[r], positions[r], (first_id + begin) / kBlockIds, noise + r, kPanel<T>);
    for (int64_t at = 0; at < rows; at += lanes) {
      Vec<T> largest = load<T>(best + at), logit = load<T>(best + stride + at);
      Vec<T> column = load<T>(best + 2 * stride + at);
      for (int64_t c = begin; c < end; ++c) {
        if (suppressed != nullptr && suppressed[first_column + c]) continue;
        const Vec<T> value = load<T>(z + c * kPanel<T> + at);
        const Vec<T> perturbed =
            value + load_noise<T>(noise + (place + c - begin) * kPanel<T> + at);
        const auto larger_here = perturbed > largest;
        largest = larger_here ? perturbed : largest;
        logit = larger_here ? value : logit;
        column = larger_here ? splat(T(first_column + c)) : column;
      }
      store<T>(best + at, largest);
      store<T>(best + stride + at, logit);
      store<T>(best + 2 * stride + at, column);
    }
    begin = end;
  }
}

inline void noise(int64_t seed, int64_t position, int64_t first_id, int64_t count, float* out) {
  for (int64_t i = 0; i < count;) {
    float block[kBlockIds];
    block_noise(seed, position, (first_id + i) / kBlockIds, block, 1);
    const int64_t place = (first_id + i) % kBlockIds;
    const int64_t length = std::min(kBlockIds - place, count - i);
    std::copy_n(block + place, length, out + i);
    i += length;
  }
}
