// exp and tanh of a vector. Included like lanes.h, after it.

template <class T>
struct Exp;

// e^r = 1 + r + r^2 q(r) for |r| <= log(2) / 2. float: the q of degree 4 with q(0) = 1/2 that errs
// least, by 2^-28; double: Taylor's series, whose first term left out is below 2^-57.
template <>
struct Exp<float> {
  static constexpr float low = -104.5f, log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  static constexpr uint32_t bias = 127, lift = 64;
  static constexpr float drop = 0x1p-64f;
  static constexpr int mantissa = 23;
  static constexpr float q[] = {0x1.6b6de6p-10f, 0x1.122f5ap-7f, 0x1.555688p-5f, 0x1.5554a4p-3f,
                                0.5f};
};
template <>
struct Exp<double> {
  static constexpr double low = -746.0, log2e = 1.4426950408889634074;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr uint64_t bias = 1023, lift = 512;
  static constexpr double drop = 0x1p-512;
  static constexpr int mantissa = 52;
  static constexpr double q[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800,
                                 1.0 / 3628800,    1.0 / 362880,    1.0 / 40320,
                                 1.0 / 5040,       1.0 / 720,       1.0 / 120,
                                 1.0 / 24,         1.0 / 6,         0.5};
};

// e^(x - n log 2) for the whole n nearest to x / log 2. Its leading part 1 + r is kept in two
// numbers, so that but for the last sum nothing is rounded that matters.
template <class T>
inline Vec<T> exp_reduced(Vec<T> x, Vec<T> n) {
  using C = Exp<T>;
  const Vec<T> high = fused(n, splat<T>(-C::ln2_high), x), low = n * -C::ln2_low;
  const Vec<T> r = high + low;
  Vec<T> q = splat<T>(C::q[0]);
  for (size_t i = 1; i < sizeof(C::q) / sizeof(T); ++i) q = fused(q, r, splat<T>(C::q[i]));
  const Vec<T> sum = high + T(1), lost = high - (sum - T(1));
  return sum + fused(q * r, r, lost + low);
}

// e^x with an error of about half a unit in the last place (in double: of about one), results below
// the normal range included; exactly 1 for 0, 0 for -inf, NaN for NaN. x must not be much above the
// largest with a finite e^x.
template <class T>
inline Vec<T> exp_of(Vec<T> x) {
  using C = Exp<T>;
  using Words = typename LanesOf<T>::Words;
  x = at_least<T>(x, C::low);
  const Vec<T> shifted = fused(x, splat<T>(C::log2e), splat<T>(C::magic));
  const Vec<T> n = shifted - C::magic, p = exp_reduced<T>(x, n);
  if constexpr (kScales) return scaled(p, n);
  // 2^n in two factors: n may lie outside the exponents of a normal number.
  const Words biased = (Words)shifted - (Words)splat<T>(C::magic) + 2 * C::bias;
  const Words half = biased >> 1;
  return p * (Vec<T>)(half << C::mantissa) * (Vec<T>)((biased - half) << C::mantissa);
}

// The same bits for x <= 0, in fewer steps: 2^n is lifted into the exponents of a normal number.
template <class T>
inline Vec<T> exp_of_nonpositive(Vec<T> x) {
  using C = Exp<T>;
  using Words = typename LanesOf<T>::Words;
  if constexpr (kScales) return exp_of<T>(x);
  constexpr T magic = C::magic + T(C::bias + C::lift);  // leaves the biased exponent below
  x = at_least<T>(x, C::low);
  const Vec<T> shifted = fused(x, splat<T>(C::log2e), splat<T>(magic));
  const Vec<T> p = exp_reduced<T>(x, shifted - magic);
  return (p * (Vec<T>)((Words)shifted << C::mantissa)) * splat<T>(C::drop);
}

template <class T>
struct Tanh;

// tanh x = x + x^3 s(x^2) for |x| < 0.625: a polynomial in float, a quotient in double (Cephes).
template <>
struct Tanh<float> {
  static inline Vec<float> small(Vec<float> s) {
    Vec<float> p = splat(-5.70498872745e-3f);
    for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
      p = fused(p, s, splat(c));
    return p;
  }
};
template <>
struct Tanh<double> {
  static inline Vec<double> small(Vec<double> s) {
    Vec<double> p = splat(-9.64399179425052238628e-1), q = splat(1.0);
    for (double c : {-9.92877231001918586564e1, -1.61468768441708447952e3})
      p = fused(p, s, splat(c));
    for (double c :
         {1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3})
      q = fused(q, s, splat(c));
    return p / q;
  }
};

template <class T>
inline Vec<T> tanh_of(Vec<T> x) {
  const Vec<T> magnitude = x < 0 ? -x : x;
  const Vec<T> squared = x * x;
  const Vec<T> small = fused(Tanh<T>::small(squared) * squared, x, x);
  // From 30 on tanh is 1, and e^60 is finite.
  const Vec<T> bounded = magnitude > T(30) ? splat<T>(30) : magnitude;
  const Vec<T> large = T(1) - T(2) / (exp_of<T>(bounded + bounded) + T(1));
  return magnitude < T(0.625) ? small : (x < 0 ? -large : large);
}
