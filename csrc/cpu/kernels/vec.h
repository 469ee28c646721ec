// Loads, stores and loops shared by the kernels. The namespace CPU_CAPABILITY names the instruction
// set, so that the linker does not merge code that was compiled with different flags.
//
// A loop body is written once for a vector of 8 lanes (Vec) and for a single float (tails); it
// takes a tag of the type. Both forms fuse products where the instruction set can, so that the
// value of an element does not depend on whether it falls into the tail.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../../philox.h"
#include "../ops.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
static_assert(Vec::size() == 8, "the kernels are written for vectors of eight floats");

// Elements of a unit of work: their noise (8 KiB) stays in the L1 cache.
constexpr int64_t kBlock = 2048;

template <class V>
constexpr int64_t width = std::is_same_v<V, Vec> ? 8 : 1;

inline float fmadd(float a, float b, float c) {
#ifdef __FMA__
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}
inline Vec fmadd(Vec a, Vec b, Vec c) { return at::vec::fmadd(a, b, c); }
inline float sqrt(float a) { return std::sqrt(a); }
inline Vec sqrt(Vec a) { return a.sqrt(); }

template <class V, class T>
inline V load(const T* p) {
  if constexpr (!std::is_same_v<V, Vec>) {
    return static_cast<float>(*p);
  } else if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(p);
  } else {
#ifdef CPU_CAPABILITY_AVX2
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (std::is_same_v<T, c10::Half>) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
    float wide[8];
    for (int i = 0; i < 8; ++i) wide[i] = static_cast<float>(p[i]);
    return Vec::loadu(wide);
#endif
  }
}

// Rounds to the nearest even value of T.
template <class V, class T>
inline void store(T* p, V v) {
  if constexpr (!std::is_same_v<V, Vec>) {
    *p = static_cast<T>(v);
  } else if constexpr (std::is_same_v<T, float>) {
    v.store(p);
  } else {
#ifdef CPU_CAPABILITY_AVX2
    __m128i bits;
    if constexpr (std::is_same_v<T, c10::Half>) {
      bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m256i wide = _mm256_castps_si256(v);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
      __m256i rounded = _mm256_add_epi32(wide, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
      rounded = _mm256_srli_epi32(rounded, 16);
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xD8);
      bits = _mm256_castsi256_si128(packed);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
#else
    float wide[8];
    v.store(wide);
    for (int i = 0; i < 8; ++i) p[i] = static_cast<T>(wide[i]);
#endif
  }
}

// With `stream`, writes around the cache: the cache line is not read first, and nothing is evicted.
template <class V, class T>
inline void store(T* p, V v, bool stream) {
#ifdef CPU_CAPABILITY_AVX2
  if constexpr (std::is_same_v<T, float> && std::is_same_v<V, Vec>) {
    if (stream) {
      _mm256_stream_ps(p, v);
      return;
    }
  }
#endif
  store<V>(p, v);
}

// Calls body(tag, i) for i in [0, n): whole vectors first, then single elements.
template <class Body>
inline void each(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) body(Vec(), i);
  for (; i < n; ++i) body(float(), i);
}

template <class F>
inline void dispatch(c10::ScalarType type, const F& f) {
  if (type == c10::ScalarType::BFloat16) {
    f(c10::BFloat16());
  } else if (type == c10::ScalarType::Half) {
    f(c10::Half());
  } else {
    f(float());
  }
}

template <class T>
inline T* at_offset(const Array& a, int64_t offset) {
  return a ? static_cast<T*>(a.data) + offset : nullptr;
}

// Runs body(b, offset, n) over the blocks of all samples, in parallel. The number of threads has no
// effect on which elements share a block.
template <class Body>
inline void blocks(int64_t B, int64_t N, const Body& body) {
  const int64_t per_sample = (N + kBlock - 1) / kBlock;
  at::parallel_for(0, B * per_sample, std::max<int64_t>(1, kBlock * 4 / std::max<int64_t>(N, 1)),
                   [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t b = unit / per_sample, offset = unit % per_sample * kBlock;
      body(b, offset, std::min(kBlock, N - offset));
    }
#ifdef CPU_CAPABILITY_AVX2
    _mm_sfence();  // other threads see streaming stores only after it
#endif
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
