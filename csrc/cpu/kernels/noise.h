// Standard normals of a stream, computed block by block in the L1 cache of the thread that uses
// them.
#pragma once

#include <bit>

#include "vec.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

// ln x for x in (0, 1], Cephes' logf polynomial. m is in [sqrt(1/2), sqrt(2)), x = m 2^e.
template <class V>
inline V log_polynomial(V m, V e) {
  const V f = m - V(1.0f), f2 = f * f;
  V y = V(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                  2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
    y = fmadd(y, f, V(c));
  }
  y = y * f * f2;
  y = fmadd(e, V(-2.12194440e-4f), y);
  y = fmadd(V(-0.5f), f2, y);
  return fmadd(e, V(0.693359375f), f + y);
}

// sin and cos of t in [-pi/4, pi/4].
template <class V>
inline V sin_polynomial(V t) {
  const V t2 = t * t;
  const V y = fmadd(fmadd(V(-1.9515295891e-4f), t2, V(8.3321608736e-3f)), t2, V(-1.6666654611e-1f));
  return fmadd(y * t2, t, t);
}
template <class V>
inline V cos_polynomial(V t) {
  const V t2 = t * t;
  const V y = fmadd(fmadd(V(2.443315711809948e-5f), t2, V(-1.388731625493765e-3f)), t2, V(4.166664568298827e-2f));
  return fmadd(y, t2 * t2, fmadd(V(-0.5f), t2, V(1.0f)));
}
constexpr float kHalfPi = 1.57079632679489662f;

// Two normals from two words: radius sqrt(-2 ln u1), angle 2 pi u2. The angle is split exactly into
// 4 u2 = q + r, with q an integer and |r| <= 1/2.
inline void box_muller(uint32_t word1, uint32_t word2, float* z) {
  const float u1 = static_cast<float>((word1 >> 8) + 1) * 0x1p-24f;
  // Split u1 = m 2^e with m in [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) rounds the
  // exponent.
  const int32_t root = 0x3F3504F3, shifted = std::bit_cast<int32_t>(u1) - root;
  const float m = std::bit_cast<float>((shifted & 0x7FFFFF) + root);
  const float radius = std::sqrt(-2.0f * log_polynomial<float>(m, static_cast<float>(shifted >> 23)));
  const uint32_t turn = word2 >> 8;  // of 2^24
  const uint32_t q = (turn + (1u << 21)) >> 22;
  const float t = static_cast<float>(static_cast<int32_t>(turn) - static_cast<int32_t>(q << 22)) * (0x1p-22f * kHalfPi);
  float c = cos_polynomial<float>(t), s = sin_polynomial<float>(t);
  if (q & 1) std::swap(c, s);
  z[0] = radius * (((q + 1) & 2) ? -c : c);
  z[1] = radius * ((q & 2) ? -s : s);
}

// Each generator below computes kGroup normals of consecutive counters at a time, in the order of
// elements: Normals(stream).group(block, z). All generators give the same numbers up to rounding.

#if defined(CPU_CAPABILITY_AVX2)

// The register operations of the generator, for 512 and for 256 bits.
#ifdef SELFNPO_AVX512

struct Floats {
  __m512 v;
  Floats(__m512 value) : v(value) {}
  Floats(float value) : v(_mm512_set1_ps(value)) {}
};
inline Floats operator*(Floats a, Floats b) { return _mm512_mul_ps(a.v, b.v); }
inline Floats operator+(Floats a, Floats b) { return _mm512_add_ps(a.v, b.v); }
inline Floats operator-(Floats a, Floats b) { return _mm512_sub_ps(a.v, b.v); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Floats sqrt(Floats a) { return _mm512_sqrt_ps(a.v); }

using Ints = __m512i;
inline Ints every32(int value) { return _mm512_set1_epi32(value); }
inline Ints every64(int64_t value) { return _mm512_set1_epi64(value); }
inline Ints evens() { return _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14); }
inline Ints add32(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub32(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints add64(Ints a, Ints b) { return _mm512_add_epi64(a, b); }
inline Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints xor3(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Ints multiply(Ints a, Ints b) { return _mm512_mul_epu32(a, b); }
inline Ints upper(Ints a) { return _mm512_srli_epi64(a, 32); }
inline Ints interleave(Ints even, Ints odd) { return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)); }
template <int N> inline Ints left(Ints a) { return _mm512_slli_epi32(a, N); }
template <int N> inline Ints right(Ints a) { return _mm512_srli_epi32(a, N); }
template <int N> inline Ints right_signed(Ints a) { return _mm512_srai_epi32(a, N); }
inline Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Floats as_float(Ints a) { return _mm512_castsi512_ps(a); }
inline Ints as_int(Floats a) { return _mm512_castps_si512(a.v); }
inline Floats flip_sign(Floats a, Ints sign) { return _mm512_xor_ps(a.v, _mm512_castsi512_ps(sign)); }
inline Floats choose(Floats a, Floats b, Ints top_bit) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(top_bit), a.v, b.v);
}
constexpr int64_t kGroup = 64;

// Stores a0 b0 c0 d0 a1 b1 ...
inline void store_interleaved(Floats a, Floats b, Floats c, Floats d, float* z) {
  const auto pairs = [](__m512 x, __m512 y, bool high) {
    const __m512d p = _mm512_castps_pd(x), q = _mm512_castps_pd(y);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
  };
  const __m512 ab0 = _mm512_unpacklo_ps(a.v, b.v), ab1 = _mm512_unpackhi_ps(a.v, b.v);
  const __m512 cd0 = _mm512_unpacklo_ps(c.v, d.v), cd1 = _mm512_unpackhi_ps(c.v, d.v);
  // r<i> holds counters i, i + 4, i + 8, i + 12 in its quarters.
  const __m512 r0 = pairs(ab0, cd0, false), r1 = pairs(ab0, cd0, true);
  const __m512 r2 = pairs(ab1, cd1, false), r3 = pairs(ab1, cd1, true);
  const __m512 even01 = _mm512_shuffle_f32x4(r0, r1, 0x88), odd01 = _mm512_shuffle_f32x4(r0, r1, 0xDD);
  const __m512 even23 = _mm512_shuffle_f32x4(r2, r3, 0x88), odd23 = _mm512_shuffle_f32x4(r2, r3, 0xDD);
  _mm512_storeu_ps(z, _mm512_shuffle_f32x4(even01, even23, 0x88));
  _mm512_storeu_ps(z + 16, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
  _mm512_storeu_ps(z + 32, _mm512_shuffle_f32x4(even01, even23, 0xDD));
  _mm512_storeu_ps(z + 48, _mm512_shuffle_f32x4(odd01, odd23, 0xDD));
}

#else

using Floats = Vec;
using Ints = __m256i;
inline Ints every32(int value) { return _mm256_set1_epi32(value); }
inline Ints every64(int64_t value) { return _mm256_set1_epi64x(value); }
inline Ints evens() { return _mm256_setr_epi64x(0, 2, 4, 6); }
inline Ints add32(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints sub32(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints add64(Ints a, Ints b) { return _mm256_add_epi64(a, b); }
inline Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints xor3(Ints a, Ints b, Ints c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
inline Ints multiply(Ints a, Ints b) { return _mm256_mul_epu32(a, b); }
inline Ints upper(Ints a) { return _mm256_srli_epi64(a, 32); }
inline Ints interleave(Ints even, Ints odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
template <int N> inline Ints left(Ints a) { return _mm256_slli_epi32(a, N); }
template <int N> inline Ints right(Ints a) { return _mm256_srli_epi32(a, N); }
template <int N> inline Ints right_signed(Ints a) { return _mm256_srai_epi32(a, N); }
inline Floats to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Floats as_float(Ints a) { return _mm256_castsi256_ps(a); }
inline Ints as_int(Floats a) { return _mm256_castps_si256(a); }
inline Floats flip_sign(Floats a, Ints sign) { return _mm256_xor_ps(a, _mm256_castsi256_ps(sign)); }
inline Floats choose(Floats a, Floats b, Ints top_bit) { return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(top_bit)); }
constexpr int64_t kGroup = 32;

// Stores a0 b0 c0 d0 a1 b1 ...
inline void store_interleaved(Floats a, Floats b, Floats c, Floats d, float* z) {
  const auto pairs = [](__m256 x, __m256 y, bool high) {
    const __m256d p = _mm256_castps_pd(x), q = _mm256_castps_pd(y);
    return _mm256_castpd_ps(high ? _mm256_unpackhi_pd(p, q) : _mm256_unpacklo_pd(p, q));
  };
  const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
  const __m256 cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
  // r<i> holds counters i and i + 4 in its halves.
  const __m256 r0 = pairs(ab0, cd0, false), r1 = pairs(ab0, cd0, true);
  const __m256 r2 = pairs(ab1, cd1, false), r3 = pairs(ab1, cd1, true);
  _mm256_storeu_ps(z, _mm256_permute2f128_ps(r0, r1, 0x20));
  _mm256_storeu_ps(z + 8, _mm256_permute2f128_ps(r2, r3, 0x20));
  _mm256_storeu_ps(z + 16, _mm256_permute2f128_ps(r0, r1, 0x31));
  _mm256_storeu_ps(z + 24, _mm256_permute2f128_ps(r2, r3, 0x31));
}

#endif

// `box_muller` above, lane by lane.
inline void box_muller(Ints word1, Ints word2, Floats& z0, Floats& z1) {
  const Floats u1 = to_float(add32(right<8>(word1), every32(1))) * Floats(0x1p-24f);
  const Ints root = every32(0x3F3504F3), shifted = sub32(as_int(u1), root);
  const Floats m = as_float(add32(both(shifted, every32(0x7FFFFF)), root));
  const Floats radius = sqrt(Floats(-2.0f) * log_polynomial<Floats>(m, to_float(right_signed<23>(shifted))));
  const Ints turn = right<8>(word2), q = right<22>(add32(turn, every32(1 << 21)));
  const Floats t = to_float(sub32(turn, left<22>(q))) * Floats(0x1p-22f * kHalfPi);
  const Floats c = cos_polynomial<Floats>(t), s = sin_polynomial<Floats>(t);
  const Ints odd = left<31>(q), two = every32(2);
  z0 = radius * flip_sign(choose(c, s, odd), left<30>(both(add32(q, every32(1)), two)));
  z1 = radius * flip_sign(choose(s, c, odd), left<30>(both(q, two)));
}

// Each 64-bit lane holds a word of one counter in its low half, as the 32 x 32 -> 64 bit
// multiplication takes it; the high half is not read. One register holds even counters, another one
// odd counters. The keys of the rounds are computed once for a block of noise and read from memory.
class Normals {
 public:
  explicit Normals(const Stream& stream)
      : low_(every64(static_cast<uint32_t>(stream.sample_id))),
        high_(every64(static_cast<int64_t>(stream.sample_id >> 32))),
        draw_(every64(stream.draw)) {
    uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = stream.seed >> 32;
    for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
      keys_[round][0] = every64(k0);
      keys_[round][1] = every64(k1);
    }
  }

  void group(uint32_t block, float* z) const {
    const Ints m0 = every64(kMultiplier0), m1 = every64(kMultiplier1), even = add64(every64(block), evens());
    Ints c[2][4] = {{even, low_, high_, draw_}, {add64(even, every64(1)), low_, high_, draw_}};
    for (const auto& key : keys_) {
      for (auto& s : c) {
        const Ints p0 = multiply(s[0], m0), p1 = multiply(s[2], m1);
        s[0] = xor3(upper(p1), s[1], key[0]);
        s[1] = p1;
        s[2] = xor3(upper(p0), s[3], key[1]);
        s[3] = p0;
      }
    }
    Ints words[4];
    for (int j = 0; j < 4; ++j) words[j] = interleave(c[0][j], c[1][j]);
    Floats z0(0.0f), z1(0.0f), z2(0.0f), z3(0.0f);
    box_muller(words[0], words[1], z0, z1);
    box_muller(words[2], words[3], z2, z3);
    store_interleaved(z0, z1, z2, z3, z);
  }

 private:
  Ints low_, high_, draw_, keys_[kRounds][2];
};

#else

constexpr int64_t kGroup = 4;

class Normals {
 public:
  explicit Normals(const Stream& stream) : stream_(stream) {}

  void group(uint32_t block, float* z) const {
    const auto words = philox(stream_, block);
    box_muller(words[0], words[1], z);
    box_muller(words[2], words[3], z + 2);
  }

 private:
  Stream stream_;
};

#endif

// Prefetches the cache lines of kGroup elements from p[i] on; p may be null.
template <class T>
inline void prefetch(const T* p, int64_t i) {
  if (!p) return;
  const char* first = reinterpret_cast<const char*>(p + i);
  for (size_t byte = 0; byte < kGroup * sizeof(T); byte += 64) __builtin_prefetch(first + byte);
}

// The noise of one block. It is filled in whole groups, which may run over the end of the sample.
struct alignas(64) NoiseBlock {
  float z[kBlock];

  // The n normals of a stream from element `offset` (a multiple of 4) of its sample on. The
  // pointers `soon` are what the caller reads next; they are fetched into the cache meanwhile,
  // since drawing noise leaves the memory idle.
  template <class... T>
  const float* draw(const Stream& stream, int64_t offset, int64_t n, const T*... soon) {
    const Normals normals(stream);
    for (int64_t i = 0; i < n; i += kGroup) {
      (prefetch(soon, i), ...);
      normals.group(static_cast<uint32_t>((offset + i) / 4), z + i);
    }
    return z;
  }

  // The elements of a given noise tensor, or drawn normals, or null where the op has no noise.
  template <class... T>
  const float* get(const Array& tensor, const Noise& noise, int64_t b, int64_t sample_offset, int64_t offset, int64_t n,
                   const T*... soon) {
    if (noise.drawn) {
      const int64_t id = noise.draws ? noise.draws[b] : noise.draw;
      const Stream stream{noise.seed, static_cast<uint64_t>(noise.sample_ids[b]), static_cast<uint32_t>(id)};
      return draw(stream, offset, n, soon...);
    }
    if (!tensor) return nullptr;
    if (tensor.type == c10::ScalarType::Float) return at_offset<float>(tensor, sample_offset + offset);
    dispatch(tensor.type, [&](auto type) {
      const auto* p = at_offset<decltype(type)>(tensor, sample_offset + offset);
      each(n, [&](auto tag, int64_t i) {
        using V = decltype(tag);
        store<V>(z + i, load<V>(p + i));
      });
    });
    return z;
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
