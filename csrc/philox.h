// Philox4x32-10 and keyed draws, with the numbers of kernels/selfnpo_kernels/rng.py. The key is the
// 64-bit seed; the counter is (element / 4, low word of the sample id, its high word, draw id).
// Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace selfnpo {

// The random numbers of one sample for one purpose.
struct Stream {
  uint64_t seed;
  uint64_t sample_id;
  uint32_t draw;
};

// The purpose of a draw, as rng.Draw. A purpose that recurs along a trajectory adds the grid index.
enum class Draw : int64_t {
  StartNoise = 0,
  StartIndex = 1,
  RenoiseTime = 3,
  Renoise = 4,
  PromptDropout = 6,
};

inline uint32_t draw_id(Draw kind, int64_t grid_index = -1) {
  return static_cast<uint32_t>((grid_index + 1) * 16 + static_cast<int64_t>(kind));
}

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;

inline std::array<uint32_t, 4> philox(const Stream& stream, uint32_t block) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(stream.sample_id), c2 = stream.sample_id >> 32, c3 = stream.draw;
  uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = stream.seed >> 32;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{kMultiplier0} * c0, p1 = uint64_t{kMultiplier1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {c0, c1, c2, c3};
}

// One integer uniform in {0, ..., high - 1}.
inline int64_t randint(const Stream& stream, int64_t high) {
  return static_cast<int64_t>((uint64_t{philox(stream, 0)[0]} * static_cast<uint64_t>(high)) >> 32);
}

// One uniform in [0, 1) with 24 random bits.
inline float uniform(const Stream& stream) {
  return static_cast<float>(philox(stream, 0)[0] >> 8) * 0x1p-24f;
}

// rng.permute: a Feistel network of four rounds over the numbers below the next power of four,
// applied again until the result is below `size`.
inline int64_t permute(int64_t position, int64_t size, uint64_t key, int64_t epoch) {
  int bits = 0;
  for (int64_t last = size > 1 ? size - 1 : 1; last != 0; last >>= 1) ++bits;
  const int half = bits + 1 < 2 ? 1 : (bits + 1) / 2;
  const uint64_t low = (uint64_t{1} << half) - 1;
  const uint32_t turn = static_cast<uint32_t>(epoch) * 0x27D4EB2Fu;
  uint64_t out = static_cast<uint64_t>(position);
  do {
    uint64_t left = out >> half, right = out & low;
    for (uint32_t round = 0; round < 4; ++round) {
      const uint32_t salt = (key >> (16 * round)) & 0xFFFF;
      uint32_t mixed = (static_cast<uint32_t>(right) + salt + (round << 17)) * 0x85EBCA77u + turn;
      mixed = (mixed ^ (mixed >> 15)) * 0x9E3779B1u;
      const uint64_t next = left ^ ((mixed ^ (mixed >> 16)) & low);
      left = right;
      right = next;
    }
    out = (left << half) | right;
  } while (out >= static_cast<uint64_t>(size));
  return static_cast<int64_t>(out);
}

}  // namespace selfnpo
