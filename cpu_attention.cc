// Attention of a decode step on CPUs with AVX-512 BF16, as an XLA custom call (cpu_attention.py).
//
// Each sequence's keys and values are read where they lie, as far as they are valid: its prompt's slots, then its
// own steps around the ring. Scores, softmax and sums are made in that order and know nothing of the place in the
// ring or of other rows. XLA copies each block of keys and values out of the cache first, and runs a dozen small
// operations on it.

#include <cmath>
#include <limits>

#include "cpu_kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Heads = ffi::Buffer<ffi::BF16, 3>;
using Cache = ffi::Buffer<ffi::BF16, 4>;
using Indices = ffi::Buffer<ffi::S32, 1>;
using Index = ffi::Buffer<ffi::S32, 0>;

#ifdef CPU_KERNELS

namespace {

constexpr int64_t kAlone = 1 << 17;  // multiplications not worth a second thread

struct Attention {
  const uint16_t *q, *prompt_k, *prompt_v, *step_k, *step_v;
  const int32_t *length, *start;
  uint16_t* out;
  int64_t prompts, samples, kv_heads, group, dim, prompt_slots, ring, layer, index;
  bool tiles;
};

// Consecutive slots of one sequence and head.
struct Segment {
  const uint16_t *k, *v;
  int64_t slots;
};

// exp(x) for x <= 0, to two units in the last place; NaN stays NaN. Cody and Waite's reduction, then the series.
AVX512_BF16 inline __m512 Exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
  }
  return _mm512_scalef_ps(sum, n);
}

// exp(scale * (score - the largest)) of `keys` scores, rounded to bfloat16; returns their sum before rounding.
AVX512_BF16 float Softmax(const float* scores, int64_t keys, float scale, uint16_t* weights) {
  __m512 peaks = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < keys; i += 16) {
    peaks = _mm512_mask_max_ps(peaks, Lanes16(keys - i), peaks, _mm512_maskz_loadu_ps(Lanes16(keys - i), scores + i));
  }
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(peaks));
  for (int64_t i = 0; i < keys; i += 16) {
    const __mmask16 lanes = Lanes16(keys - i);
    const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, scores + i), peak);
    const __m512 weight = Exp(_mm512_mul_ps(below, _mm512_set1_ps(scale)));
    sums = _mm512_mask_add_ps(sums, lanes, sums, weight);
    const __m256bh rounded = _mm512_cvtneps_pbh(weight);
    _mm256_mask_storeu_epi16(weights + i, lanes, reinterpret_cast<__m256i>(rounded));
  }
  return _mm512_reduce_add_ps(sums);
}

// All queries of one sequence that share one head's keys.
AVX512_BF16 void Attend(const Attention& a, int64_t row, int64_t head) {
  const int64_t prompt = row / a.samples, rows = a.group, dim = a.dim;
  const int64_t at_prompt = ((a.layer * a.prompts + prompt) * a.kv_heads + head) * a.prompt_slots * dim;
  const int64_t at_steps = ((a.layer * a.prompts * a.samples + row) * a.kv_heads + head) * a.ring * dim;
  const int64_t oldest = std::max<int64_t>({a.start[row], a.index - a.ring + 1, 0});
  const int64_t steps = std::max<int64_t>(a.index - oldest + 1, 0), from = oldest % a.ring;
  const int64_t before_end = std::min(steps, a.ring - from);
  const Segment segments[] = {
      {a.prompt_k + at_prompt, a.prompt_v + at_prompt, std::clamp<int64_t>(a.length[prompt], 0, a.prompt_slots)},
      {a.step_k + at_steps + from * dim, a.step_v + at_steps + from * dim, before_end},
      {a.step_k + at_steps, a.step_v + at_steps, steps - before_end},
  };
  int64_t keys = 0;
  for (const Segment& segment : segments) keys += segment.slots;

  thread_local std::vector<float> scores, totals, sums;
  thread_local std::vector<uint16_t> weights, last;
  scores.resize(rows * keys);
  weights.resize(rows * keys);
  sums.assign(rows * dim, 0);
  last.resize(2 * (rows + dim));

  Product p = {.x = a.q + (row * a.kv_heads + head) * rows * dim,
               .w = nullptr,
               .out = scores.data(),
               .rows = rows,
               .inputs = dim,
               .outputs = 0,
               .x_stride = dim,
               .out_stride = keys,
               .transposed = true,
               .tiles = a.tiles};
  for (const Segment& segment : segments) {
    p.w = segment.k;
    p.outputs = segment.slots;
    MultiplyOutputs(p, 0, p.outputs);
    p.out += segment.slots;
  }

  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  totals.resize(rows);
  for (int64_t r = 0; r < rows; ++r) {
    totals[r] = Softmax(scores.data() + r * keys, keys, scale, weights.data() + r * keys);
  }

  p = {.x = weights.data(),
       .w = nullptr,
       .out = sums.data(),
       .rows = rows,
       .inputs = 0,
       .outputs = dim,
       .x_stride = keys,
       .out_stride = dim,
       .transposed = false,
       .tiles = a.tiles,
       .add = true};
  for (const Segment& segment : segments) {
    p.w = segment.v;
    p.inputs = segment.slots / 2 * 2;
    MultiplyOutputs(p, 0, dim);
    if (segment.slots % 2) {  // values are read in pairs: the last one's neighbour must not be
      uint16_t* pair = last.data() + 2 * rows;
      std::copy_n(segment.v + p.inputs * dim, dim, pair);
      std::fill_n(pair + dim, dim, uint16_t{0});
      for (int64_t r = 0; r < rows; ++r) {
        last[2 * r] = p.x[r * keys + p.inputs];
        last[2 * r + 1] = 0;
      }
      Product one = p;
      one.x = last.data();
      one.w = pair;
      one.inputs = one.x_stride = 2;
      MultiplyOutputs(one, 0, dim);
    }
    p.x += segment.slots;
  }

  uint16_t* out = a.out + (row * a.kv_heads + head) * rows * dim;
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 total = _mm512_set1_ps(std::max(std::numeric_limits<float>::min(), totals[r]));
    for (int64_t i = 0; i < dim; i += 16) {
      const __mmask16 lanes = Lanes16(dim - i);
      const __m512 mean = _mm512_div_ps(_mm512_maskz_loadu_ps(lanes, sums.data() + r * dim + i), total);
      const __m256bh rounded = _mm512_cvtneps_pbh(mean);
      _mm256_mask_storeu_epi16(out + r * dim + i, lanes, reinterpret_cast<__m256i>(rounded));
    }
  }
}

ffi::Error Run(ffi::ThreadPool pool, Heads q, Cache prompt_k, Cache prompt_v, Indices length, Cache step_k,
               Cache step_v, Indices start, Index index, Index layer, ffi::Result<Heads> out, bool tiles) {
  const auto queries = q.dimensions(), prompt = prompt_k.dimensions(), step = step_k.dimensions();
  const int64_t rows = queries[0], prompts = length.dimensions()[0], kv_heads = step[1];
  if (rows * prompts * kv_heads == 0) return ffi::Error::InvalidArgument("cpu_attention: nothing to attend to");
  const int64_t layers = step[0] / rows;
  const bool fits = rows % prompts == 0 && start.dimensions()[0] == rows && queries[1] % kv_heads == 0 &&
                    queries[2] == step[3] && queries[2] % 2 == 0 && step[0] == layers * rows &&
                    prompt[0] == layers * prompts && prompt[1] == kv_heads && prompt[3] == step[3] &&
                    prompt_v.dimensions() == prompt && step_v.dimensions() == step &&
                    out->dimensions() == queries;
  if (!fits) return ffi::Error::InvalidArgument("cpu_attention: shapes do not fit, or an odd head_dim");
  const auto bits = [](const void* values) { return static_cast<const uint16_t*>(values); };
  const Attention a = {.q = bits(q.untyped_data()),
                       .prompt_k = bits(prompt_k.untyped_data()),
                       .prompt_v = bits(prompt_v.untyped_data()),
                       .step_k = bits(step_k.untyped_data()),
                       .step_v = bits(step_v.untyped_data()),
                       .length = length.typed_data(),
                       .start = start.typed_data(),
                       .out = static_cast<uint16_t*>(out->untyped_data()),
                       .prompts = prompts,
                       .samples = rows / prompts,
                       .kv_heads = kv_heads,
                       .group = queries[1] / kv_heads,
                       .dim = queries[2],
                       .prompt_slots = prompt[2],
                       .ring = step[2],
                       .layer = std::clamp<int64_t>(*layer.typed_data(), 0, layers - 1),
                       .index = *index.typed_data(),
                       .tiles = tiles && MayUseTiles()};
  int64_t keys = 0;
  for (int64_t row = 0; row < rows; ++row) {
    keys += a.length[row / a.samples] + std::min(a.index - a.start[row] + 1, a.ring);
  }
  const bool alone = keys * queries[1] * a.dim < kAlone;
  Share(pool, alone ? 1 : Threads(pool), rows * kv_heads,
        [=](int64_t i) { Attend(a, i / kv_heads, i % kv_heads); });
  return ffi::Error::Success();
}

}  // namespace

#else

namespace {

ffi::Error Run(ffi::ThreadPool, Heads, Cache, Cache, Indices, Cache, Cache, Indices, Index, Index,
               ffi::Result<Heads>, bool) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "cpu_attention: only for x86 with AVX-512 BF16");
}

}  // namespace

#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(CpuAttention, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Heads>()
                                  .Arg<Cache>()
                                  .Arg<Cache>()
                                  .Arg<Indices>()
                                  .Arg<Cache>()
                                  .Arg<Cache>()
                                  .Arg<Indices>()
                                  .Arg<Index>()
                                  .Arg<Index>()
                                  .Ret<Heads>()
                                  .Attr<bool>("tiles"));
