// Logits from products, and their gradients. Included like lanes.h, after exp_tanh.h.

template <class T>
void finish_logits(int64_t columns, int64_t vectors, const T* bias, T softcap, T temperature,
                   T* z) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t j = 0; j < vectors; ++j) {
      T* at = z + c * kPanel<T> + j * LanesOf<T>::count;
      Vec<T> value = bias == nullptr ? load<T>(at) : load<T>(at) + bias[c];
      if (softcap != 0)
        value = tanh_of<T>(value / softcap);
      else if (temperature != 1)
        value = value / temperature;
      store<T>(at, value);
    }
}

template <class T>
inline Vec<T> logit_of_share(Vec<T> share, T softcap, T temperature) {
  const Vec<T> z = share * softcap;
  return temperature == 1 ? z : z / temperature;
}

template <class T>
void scale_shares(int64_t columns, int64_t vectors, T softcap, T temperature, T* z) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t j = 0; j < vectors; ++j) {
      T* at = z + c * kPanel<T> + j * LanesOf<T>::count;
      store<T>(at, logit_of_share<T>(load<T>(at), softcap, temperature));
    }
}

template <class T, bool entropic, bool capped>
inline void column_gradients(int64_t vectors, const RowCoefficients<T>& rows, T* z, T* ahead) {
  for (int64_t at = 0; at < vectors * LanesOf<T>::count; at += LanesOf<T>::count) {
    __builtin_prefetch(ahead + at, 1);
    const Vec<T> kept = load<T>(z + at);
    const Vec<T> value = capped ? logit_of_share<T>(kept, rows.softcap, rows.temperature) : kept;
    // The lse is not subtracted: that would round z - lse, whose digits are those of e^(z - lse).
    const Vec<T> shifted = value - load<T>(rows.max_logit + at);
    Vec<T> factor = load<T>(rows.linear + at);
    if (entropic) {
      const Vec<T> logp = at_least<T>(shifted - load<T>(rows.log_sum + at), T(kFloor));
      factor -= load<T>(rows.entropic + at) * (logp + load<T>(rows.entropy + at));
    }
    Vec<T> dz = fused(exp_of_nonpositive<T>(shifted), factor, load<T>(rows.uniform + at));
    if (capped) dz *= fused(-kept, kept, splat<T>(1));
    store<T>(z + at, dz);
  }
}

template <class T>
void gradients(int64_t columns, int64_t vectors, const RowCoefficients<T>& rows, T* z,
               int64_t stride) {
  const bool entropic = rows.entropic != nullptr, capped = rows.softcap != 0;
  for (int64_t c = 0; c < columns; ++c, z += stride) {
    T* ahead = z + std::min<int64_t>(4, columns - 1 - c) * stride;
    if (!entropic && !capped)
      column_gradients<T, false, false>(vectors, rows, z, ahead);
    else if (!capped)
      column_gradients<T, true, false>(vectors, rows, z, ahead);
    else if (!entropic)
      column_gradients<T, false, true>(vectors, rows, z, ahead);
    else
      column_gradients<T, true, true>(vectors, rows, z, ahead);
  }
}
