// One grid step of every slot of a continuous rollout, the pair of the state before the step (Eq.
// 16, 17), and a new sample where one has ended. ops.tdft_step holds the contract;
// reference.tdft_step draws the same numbers.
#include <vector>

#include "guided.h"
#include "noise.h"

namespace selfnpo {
inline namespace CPU_CAPABILITY {

// The draws and table rows of one slot, computed once, before the slot's blocks.
struct Slot {
  bool no_room, ended;
  const float* k;            // guided step
  const float* r;            // re-noising
  const float* start;        // forward diffusion of a restart from data
  int64_t latent;            // prompt index of a restart from data
  Stream renoise, fresh;
};

int64_t prompt_index(const TdftStepArgs& a, int64_t id, uint64_t order) {
  const int64_t below = id % a.num_prompts < 0;  // quotients of negative ids are rounded down
  const int64_t position = id % a.num_prompts + below * a.num_prompts, epoch = id / a.num_prompts - below;
  return permute(position, a.num_prompts, a.seed + order, epoch);
}

// Computes slot b, and writes its columns of next_slots, pairs and weight.
Slot decide(const TdftStepArgs& a, int64_t b) {
  const int64_t index = a.slots[b], id = a.slots[a.B + b], left = a.slots[2 * a.B + b], top = a.grid_rows - 2;
  const bool from_noise = !a.latents;
  Slot slot{};
  // No timestep s lies above the last grid index: there the pair is that of the final state of the
  // slot's previous sample, at t = 0.
  slot.no_room = from_noise && index == top;
  slot.ended = left == 0;
  slot.k = a.step + kStepColumns * (index + 1);
  const int64_t at = slot.no_room ? -1 : index, pair_id = slot.no_room ? id - a.stride : id;
  const auto stream = [&](Draw kind, int64_t sample, int64_t grid_index = -1) {
    return Stream{a.seed, static_cast<uint64_t>(sample), draw_id(kind, grid_index)};
  };
  const int64_t t = a.timesteps[at + 1];
  const int64_t s = t + 1 + randint(stream(Draw::RenoiseTime, pair_id, at), a.T - 1 - t);
  slot.renoise = stream(Draw::Renoise, pair_id, at);
  slot.r = a.renoise + 2 * ((at + 1) * a.T + s);
  const bool dropped = uniform(stream(Draw::PromptDropout, pair_id, at)) < a.dropout;
  a.pairs[b] = t;
  a.pairs[a.B + b] = s;
  a.pairs[2 * a.B + b] = pair_id;
  a.pairs[3 * a.B + b] = dropped ? 0 : prompt_index(a, pair_id, a.shuffled) + 1;
  a.weight[b] = a.weights[at + 1];

  const int64_t new_id = slot.ended ? id + a.stride : id, prompt = prompt_index(a, new_id, 0);
  int64_t next_index = index - 1, next_left = left - 1;
  if (slot.ended) {
    slot.fresh = stream(Draw::StartNoise, new_id);
    next_index = next_left = top;
    if (!from_noise) {
      next_index = randint(stream(Draw::StartIndex, new_id), top);
      next_left = std::min(next_index + 1, a.max_steps);
      slot.start = a.start + 2 * (next_index + 1);
      slot.latent = prompt;
    }
  }
  a.next_slots[b] = next_index;
  a.next_slots[a.B + b] = new_id;
  a.next_slots[2 * a.B + b] = next_left;
  a.next_slots[3 * a.B + b] = prompt + 1;
  return slot;
}

template <class S, class P, bool Both>
void tdft_block(const TdftStepArgs& a, const Slot& slot, int64_t b, int64_t offset, int64_t n, bool stream) {
  const int64_t at = b * a.N + offset;
  const P* pos = at_offset<P>(a.pos ? a.pos : a.neg, at);
  const P* neg = at_offset<P>(a.neg, at);
  S *x = at_offset<S>(a.x, at), *final = at_offset<S>(a.final, at);
  S *target = at_offset<S>(a.target, at), *x_s = at_offset<S>(a.x_s, at);
  NoiseBlock renoise, fresh;
  const float* z = renoise.draw(slot.renoise, offset, n, x, pos, neg);
  const float* first = slot.ended ? fresh.draw(slot.fresh, offset, n, final) : nullptr;
  const float *k = slot.k, *r = slot.r;
  const Guidance<Both> guided{k[6], 1.0f};
  const auto loop = [&](auto special, auto start) {
    each(n, [&](auto tag, int64_t i) {
      using V = decltype(tag);
      const V p = guided.template operator()<V>(pos, neg, i), now = load<V>(x + i);
      const V moved = fmadd(V(k[2]), now, V(k[3]) * p);
      V state = now, clean = fmadd(V(k[0]), now, V(k[1]) * p), next = moved;
      if constexpr (decltype(special)::value) {
        if (slot.no_room) state = clean = load<V>(final + i);
        if (slot.ended) {
          next = start(tag, i);
          if (final) store<V>(final + i, moved);
        }
      }
      store<V>(target + i, clean, stream);
      store<V>(x_s + i, fmadd(V(r[0]), a.naive ? clean : state, V(r[1]) * load<V>(z + i)), stream);
      store<V>(x + i, next);
    });
  };
  const auto from_noise = [&](auto tag, int64_t i) { return load<decltype(tag)>(first + i); };
  if (!slot.ended && !slot.no_room) {
    loop(std::false_type(), from_noise);
  } else if (!a.latents || !slot.ended) {
    loop(std::true_type(), from_noise);
  } else {
    dispatch(a.latents.type, [&](auto type) {
      const auto* data = at_offset<decltype(type)>(a.latents, slot.latent * a.N + offset);
      loop(std::true_type(), [&](auto tag, int64_t i) {
        using V = decltype(tag);
        return fmadd(V(slot.start[0]), load<V>(data + i), V(slot.start[1]) * load<V>(first + i));
      });
    });
  }
}

void tdft_step(const TdftStepArgs& a) {
  std::vector<Slot> slots(a.B);
  for (int64_t b = 0; b < a.B; ++b) slots[b] = decide(a, b);
  const bool stream = streams(a.B * a.N * 16, a.N);
  branches(a.pos, a.neg, [&](auto p, auto both) {
    dispatch(a.x.type, [&](auto s) {
      blocks(a.B, a.N, [&](int64_t b, int64_t offset, int64_t n) {
        tdft_block<decltype(s), decltype(p), decltype(both)::value>(a, slots[b], b, offset, n, stream);
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace selfnpo
