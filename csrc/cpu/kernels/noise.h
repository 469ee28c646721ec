// Standard normals of a stream, block by block, in the L1 cache of the thread that uses them.
#pragma once

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

// Two normals of two words: radius sqrt(-2 ln u1), angle 2 pi u2. 4 u2 = q + r with q whole and |r| <= 1/2, exactly.
inline void box_muller(uint32_t word1, uint32_t word2, float* z) {
  const float u1 = static_cast<float>((word1 >> 8) + 1) * 0x1p-24f;
  int e;
  float m = std::frexp(u1, &e);
  if (m < 0.70710678f) {
    m *= 2;
    --e;
  }
  const float radius = std::sqrt(-2.0f * log_polynomial<float>(m, static_cast<float>(e)));
  const uint32_t turn = word2 >> 8;  // of 2^24
  const uint32_t q = (turn + (1u << 21)) >> 22;
  const float t = static_cast<float>(static_cast<int32_t>(turn) - static_cast<int32_t>(q << 22)) * (0x1p-22f * kHalfPi);
  float c = cos_polynomial<float>(t), s = sin_polynomial<float>(t);
  if (q & 1) std::swap(c, s);
  z[0] = radius * (((q + 1) & 2) ? -c : c);
  z[1] = radius * ((q & 2) ? -s : s);
}

#ifdef CPU_CAPABILITY_AVX2

struct Words {
  __m256i w[4];  // word j of 8 counters
};

// Ten rounds for 8 consecutive counters. Each 64-bit lane holds one counter's word in its low half (the high half is
// never looked at), which is what the 32 x 32 -> 64 multiplication wants: even counters in one vector, odd in the other.
inline Words philox8(const Stream& stream, uint32_t block) {
  const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
  const __m256i base = _mm256_add_epi64(_mm256_set1_epi64x(block), _mm256_setr_epi64x(0, 2, 4, 6));
  const __m256i low = _mm256_set1_epi64x(static_cast<uint32_t>(stream.sample_id));
  const __m256i high = _mm256_set1_epi64x(static_cast<int64_t>(stream.sample_id >> 32));
  const __m256i draw = _mm256_set1_epi64x(stream.draw);
  __m256i c[2][4] = {{base, low, high, draw}, {_mm256_add_epi64(base, _mm256_set1_epi64x(1)), low, high, draw}};
  uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = stream.seed >> 32;
  for (int round = 0; round < kRounds; ++round) {
    const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
    for (auto& s : c) {
      const __m256i p0 = _mm256_mul_epu32(s[0], m0), p1 = _mm256_mul_epu32(s[2], m1);
      s[0] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(s[1], key0));
      s[1] = p1;
      s[2] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(s[3], key1));
      s[3] = p0;
    }
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  Words out;
  for (int j = 0; j < 4; ++j) out.w[j] = _mm256_blend_epi32(c[0][j], _mm256_slli_epi64(c[1][j], 32), 0xAA);
  return out;
}

inline void box_muller8(__m256i word1, __m256i word2, Vec& z0, Vec& z1) {
  const __m256i one = _mm256_set1_epi32(1);
  const __m256 u1 = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_srli_epi32(word1, 8), one)),
                                  _mm256_set1_ps(0x1p-24f));
  // Split u1 = m 2^e with m in [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) rounds the exponent.
  const __m256i root = _mm256_set1_epi32(0x3F3504F3);
  const __m256i shifted = _mm256_sub_epi32(_mm256_castps_si256(u1), root);
  const __m256i e = _mm256_srai_epi32(shifted, 23);
  const __m256i mantissa = _mm256_and_si256(shifted, _mm256_set1_epi32(0x7FFFFF));
  const Vec m = _mm256_castsi256_ps(_mm256_add_epi32(mantissa, root));
  const Vec radius = (Vec(-2.0f) * log_polynomial<Vec>(m, _mm256_cvtepi32_ps(e))).sqrt();
  const __m256i turn = _mm256_srli_epi32(word2, 8);
  const __m256i q = _mm256_srli_epi32(_mm256_add_epi32(turn, _mm256_set1_epi32(1 << 21)), 22);
  const Vec t = Vec(_mm256_cvtepi32_ps(_mm256_sub_epi32(turn, _mm256_slli_epi32(q, 22)))) * Vec(0x1p-22f * kHalfPi);
  const __m256 c = cos_polynomial<Vec>(t), s = sin_polynomial<Vec>(t);
  const __m256 swap = _mm256_castsi256_ps(_mm256_slli_epi32(q, 31));
  const __m256i two = _mm256_set1_epi32(2);
  const __m256i minus_c = _mm256_slli_epi32(_mm256_and_si256(_mm256_add_epi32(q, one), two), 30);
  const __m256i minus_s = _mm256_slli_epi32(_mm256_and_si256(q, two), 30);
  z0 = radius * Vec(_mm256_xor_ps(_mm256_blendv_ps(c, s, swap), _mm256_castsi256_ps(minus_c)));
  z1 = radius * Vec(_mm256_xor_ps(_mm256_blendv_ps(s, c, swap), _mm256_castsi256_ps(minus_s)));
}

// 32 normals of 8 consecutive counters, in element order.
inline void normals32(const Stream& stream, uint32_t block, float* z) {
  const Words words = philox8(stream, block);
  Vec a, b, c, d;
  box_muller8(words.w[0], words.w[1], a, b);
  box_muller8(words.w[2], words.w[3], c, d);
  const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
  const __m256 cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
  const auto join = [](__m256 x, __m256 y, bool upper) {
    const __m256d p = _mm256_castps_pd(x), q = _mm256_castps_pd(y);
    return _mm256_castpd_ps(upper ? _mm256_unpackhi_pd(p, q) : _mm256_unpacklo_pd(p, q));
  };
  // Each holds counters (i, i + 4) as its two halves.
  const __m256 r0 = join(ab0, cd0, false), r1 = join(ab0, cd0, true);
  const __m256 r2 = join(ab1, cd1, false), r3 = join(ab1, cd1, true);
  _mm256_storeu_ps(z, _mm256_permute2f128_ps(r0, r1, 0x20));
  _mm256_storeu_ps(z + 8, _mm256_permute2f128_ps(r2, r3, 0x20));
  _mm256_storeu_ps(z + 16, _mm256_permute2f128_ps(r0, r1, 0x31));
  _mm256_storeu_ps(z + 24, _mm256_permute2f128_ps(r2, r3, 0x31));
}

#else

inline void normals32(const Stream& stream, uint32_t block, float* z) {
  for (uint32_t i = 0; i < 8; ++i) {
    const auto w = philox(stream, block + i);
    box_muller(w[0], w[1], z + 4 * i);
    box_muller(w[2], w[3], z + 4 * i + 2);
  }
}

#endif

// A buffer of one block's noise; filled in whole groups of 32, so it may run over the sample's end.
struct alignas(64) NoiseBlock {
  float z[kBlock];

  // The n normals of a stream from element `offset` (a multiple of 4) of its sample on.
  const float* draw(const Stream& stream, int64_t offset, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) normals32(stream, static_cast<uint32_t>((offset + i) / 4), z + i);
    return z;
  }

  // A given noise tensor's elements, or drawn ones, or null where an op has no noise.
  const float* get(const Array& tensor, const Noise& noise, int64_t b, int64_t sample_offset, int64_t offset,
                   int64_t n) {
    if (noise.drawn) {
      const int64_t id = noise.draws ? noise.draws[b] : noise.draw;
      const Stream stream{noise.seed, static_cast<uint64_t>(noise.sample_ids[b]), static_cast<uint32_t>(id)};
      return draw(stream, offset, n);
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
