// Computes attention on CPUs with AVX2, AVX-512 BF16 or AMX, as XLA custom calls (cpu/attention.py).
//
// CpuAttention does a decode step. It reads each sequence's valid keys and values where they lie in the KV cache: its
// prompt's positions, once for all sequences that continue the prompt, then its own steps around the ring. Scores,
// softmax and sums are computed in that order, so they depend neither on the place in the ring nor on other rows. XLA
// would first copy each block of keys and values out of the KV cache, and run a dozen small operations on it.
//
// CpuCausalAttention does whole prompts: block after block of queries, whose scores stay in the processor's cache.
//
// Both take a sliding window, if they are given one: a token sees its own position and the window - 1 before it.

#include <cmath>
#include <compare>
#include <limits>
#include <optional>
#include <span>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Heads = ffi::Buffer<ffi::BF16, 3>;
using Cache = ffi::AnyBuffer;              // of one layer [rows, kv_heads, positions, dim], or a stack of all layers'
using Prompts = ffi::Buffer<ffi::BF16, 4>;  // queries, keys and values of whole prompts
using Mask = ffi::Buffer<ffi::PRED, 2>;
using Indices = ffi::Buffer<ffi::S32, 1>;
using Index = ffi::Buffer<ffi::S32, 0>;
using Window = std::optional<Index>;  // positions that a token sees at most, its own included

#ifdef CPU_KERNELS

namespace {

constexpr int64_t kAlone = 1 << 17;  // fewer multiplications are not worth a second thread
constexpr int64_t kEverything = int64_t{1} << 40;  // a window that no text is longer than

int64_t SizeOf(const Window& window) {
  return window ? std::max<int64_t>(*window->typed_data(), 1) : kEverything;
}

struct Attention {
  const uint16_t *q, *prompt_k, *prompt_v, *step_k, *step_v;
  const int32_t *length, *start;
  const int32_t* prompt_row;  // which prompt each sequence continues, -1: none; null: sequence / samples
  uint16_t* out;
  int64_t sequences, prompts, samples, kv_heads, group, dim, prompt_capacity, ring, layer, index, window;
  Instructions instructions;
};

// The product that computes scores: q [rows, dim] times keys [keys, dim], whose address `w` the caller sets.
Product ScoresOf(const uint16_t* q, int64_t rows, int64_t dim, std::vector<float>& scores, int64_t keys,
                 Instructions instructions) {
  scores.resize(rows * keys);
  return {.x = q,
          .w = nullptr,
          .out = scores.data(),
          .rows = rows,
          .inputs = dim,
          .outputs = keys,
          .x_stride = dim,
          .out_stride = keys,
          .transposed = true,
          .instructions = instructions};
}

// The product that sums weights [rows, keys] times values [keys, dim]. The sums begin at zero; AddValues adds to them.
Product SumsOf(const uint16_t* weights, int64_t rows, int64_t keys, std::vector<float>& sums, int64_t dim,
               Instructions instructions) {
  sums.assign(rows * dim, 0);
  return {.x = weights,
          .w = nullptr,
          .out = sums.data(),
          .rows = rows,
          .inputs = 0,
          .outputs = dim,
          .x_stride = keys,
          .out_stride = dim,
          .transposed = false,
          .instructions = instructions,
          .add = true};
}

// Adds the weights of `keys` consecutive keys, times their values, to the sums of p.
void AddValues(Product p, const uint16_t* values, int64_t keys) {
  const bool pairs = p.rows == 1 || !p.tiles();  // whether values are read in pairs
  p.w = values;
  p.inputs = pairs ? keys / 2 * 2 : keys;
  MultiplyOutputs(p, 0, p.outputs);
  if (p.inputs == keys) return;
  // What follows the last key must not be read.
  thread_local std::vector<uint16_t> last;
  last.assign(2 * (p.rows + p.outputs), 0);
  uint16_t* pair = last.data() + 2 * p.rows;
  std::copy_n(values + p.inputs * p.outputs, p.outputs, pair);
  for (int64_t r = 0; r < p.rows; ++r) last[2 * r] = p.x[r * p.x_stride + p.inputs];
  p.x = last.data();
  p.w = pair;
  p.inputs = p.x_stride = 2;
  MultiplyOutputs(p, 0, p.outputs);
}

float ScaleOf(int64_t dim) { return 1 / std::sqrt(static_cast<float>(dim)); }

// What a sequence sees of the prompts: positions begin .. end of one row.
struct Seen {
  int64_t prompt, begin, end;
  auto operator<=>(const Seen&) const = default;
};

Seen SeenBy(const Attention& a, int64_t row) {
  const int64_t prompt = a.prompt_row ? std::min<int64_t>(a.prompt_row[row], a.prompts - 1) : row / a.samples;
  if (prompt < 0) return {0, 0, 0};
  const int64_t length = std::clamp<int64_t>(a.length[prompt], 0, a.prompt_capacity);
  const int64_t position = length + a.index - a.start[row];
  return {prompt, std::clamp<int64_t>(position - a.window + 1, 0, length), length};
}

// The steps of its own that a sequence sees, from `from` on around the ring.
struct Steps {
  int64_t from, count;
};

Steps StepsOf(const Attention& a, int64_t row) {
  const int64_t oldest = std::max<int64_t>({a.start[row], a.index - a.ring + 1, a.index - a.window + 1, 0});
  return {oldest % a.ring, std::max<int64_t>(a.index - oldest + 1, 0)};
}

// Computes all queries that share one head's keys, of sequences that see the same of the same prompt: its keys and
// values are read once for all of them.
void Attend(const Attention& a, std::span<const int64_t> sequences, int64_t head) {
  const int64_t dim = a.dim, group = a.group, rows = sequences.size() * group;
  const Seen seen = SeenBy(a, sequences[0]);
  const int64_t prompt = seen.end - seen.begin;
  const int64_t at_prompt =
      (((a.layer * a.prompts + seen.prompt) * a.kv_heads + head) * a.prompt_capacity + seen.begin) * dim;
  const auto at_heads = [&](int64_t i) { return (sequences[i] * a.kv_heads + head) * group * dim; };  // in q and out
  const auto at_steps = [&](int64_t i) {
    return ((a.layer * a.sequences + sequences[i]) * a.kv_heads + head) * a.ring * dim;
  };
  int64_t keys = prompt;  // of the sequence with the most
  for (const int64_t row : sequences) keys = std::max(keys, prompt + StepsOf(a, row).count);

  const Vectors& vectors = VectorsOf(a.instructions);
  thread_local std::vector<float> scores, totals, sums;
  thread_local std::vector<uint16_t> queries, weights;
  queries.resize(rows * dim);
  weights.resize(rows * keys);
  totals.resize(rows);
  for (size_t i = 0; i < sequences.size(); ++i) {
    std::copy_n(a.q + at_heads(i), group * dim, queries.data() + i * group * dim);
  }
  // A row of scores and weights is one of the queries. It begins with the prompt; the sequence's own steps follow.
  const Product all = ScoresOf(queries.data(), rows, dim, scores, keys, a.instructions);
  Product p = all;
  p.w = a.prompt_k + at_prompt;
  p.outputs = prompt;
  MultiplyOutputs(p, 0, p.outputs);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Steps steps = StepsOf(a, sequences[i]);
    const int64_t before_end = std::min(steps.count, a.ring - steps.from), first = i * group;
    const uint16_t* k = a.step_k + at_steps(i);
    p = all;
    p.rows = group;
    p.x += first * dim;
    p.out += first * keys + prompt;
    p.w = k + steps.from * dim;
    p.outputs = before_end;
    MultiplyOutputs(p, 0, p.outputs);
    p.out += before_end;
    p.w = k;
    p.outputs = steps.count - before_end;
    MultiplyOutputs(p, 0, p.outputs);
    for (int64_t r = first; r < first + group; ++r) {
      totals[r] =
          vectors.softmax(scores.data() + r * keys, prompt + steps.count, ScaleOf(dim), weights.data() + r * keys);
    }
  }

  const Product sum = SumsOf(weights.data(), rows, keys, sums, dim, a.instructions);
  AddValues(sum, a.prompt_v + at_prompt, prompt);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Steps steps = StepsOf(a, sequences[i]);
    const int64_t before_end = std::min(steps.count, a.ring - steps.from), first = i * group;
    const uint16_t* v = a.step_v + at_steps(i);
    const uint16_t* values = v + steps.from * dim;
    // The steps' values in one piece, wherever the ring ends, because tiles sum blocks of 32.
    if (before_end < steps.count) {
      thread_local std::vector<uint16_t> unrolled;
      unrolled.resize(steps.count * dim);
      std::copy_n(values, before_end * dim, unrolled.data());
      std::copy_n(v, (steps.count - before_end) * dim, unrolled.data() + before_end * dim);
      values = unrolled.data();
    }
    p = sum;
    p.rows = group;
    p.x += first * keys + prompt;
    p.out += first * dim;
    AddValues(p, values, steps.count);
    for (int64_t r = 0; r < group; ++r) {
      vectors.divide(sums.data() + (first + r) * dim, totals[first + r], dim, a.out + at_heads(i) + r * dim);
    }
  }
}

// Sequences that are computed together: indices first .. first + count of an order of all sequences.
struct Sharers {
  int64_t first, count;
};

// Orders the sequences by what they see, and parts them so that there is work for `threads` and that the scores of a
// part stay in the processor's cache.
std::vector<Sharers> PartBySeen(const Attention& a, int64_t threads, std::vector<int64_t>& order) {
  std::vector<std::pair<Seen, int64_t>> seen(a.sequences);
  for (int64_t row = 0; row < a.sequences; ++row) seen[row] = {SeenBy(a, row), row};
  std::sort(seen.begin(), seen.end());
  std::vector<Sharers> parts;
  for (int64_t i = 0; i < a.sequences; ++i) {
    const Seen& own = seen[i].first;
    const int64_t fit = std::min(a.sequences * a.kv_heads / threads, (1 << 17) / (a.group * (own.end - own.begin + 1)));
    // A single row is summed in another order than several. So where a sequence has but one, each stays alone.
    const bool joins = i && own == seen[i - 1].first && parts.back().count < fit && a.group > 1;
    if (!joins) parts.push_back({i, 0});
    ++parts.back().count;
    order.push_back(seen[i].second);
  }
  return parts;
}

// Attention of the last `tokens` of `positions`; each sees the valid positions of its window up to its own.
struct Causal {
  const uint16_t *q, *k, *v;
  const bool* valid;
  uint16_t* out;
  int64_t tokens, positions, kv_heads, group, dim, window;
  Instructions instructions;

  // Queries at once: with more, keys are read less often; with fewer, scores stay in the processor's cache.
  int64_t block() const { return std::clamp<int64_t>((1 << 17) / (group * positions), 1, 32); }
};

// Computes a block of one sequence's queries, those that share one head's keys.
void AttendCausally(const Causal& a, int64_t sequence, int64_t head, int64_t first) {
  const int64_t queries = std::min(a.block(), a.tokens - first), rows = queries * a.group, dim = a.dim;
  const int64_t own_position = a.positions - a.tokens + first;  // of the first query
  const bool* valid = a.valid + sequence * a.positions;
  int64_t keys = own_position + queries;
  while (keys > 0 && !valid[keys - 1]) --keys;
  const bool holes = std::find(valid, valid + keys, false) != valid + keys;
  const auto first_seen = [&](int64_t position) {  // a window counts tokens, not padding
    int64_t key = std::min(position + 1, keys);
    if (!holes || position < a.window) return std::max<int64_t>(key - a.window, 0);
    for (int64_t left = a.window; key > 0 && left > 0;) left -= valid[--key];
    return key;
  };
  // No query sees a key before this one. A multiple of 32, because tiles sum blocks of 32: which queries share a block
  // must not change a bit.
  const int64_t begin = std::min(first_seen(own_position) / 32 * 32, keys);
  const auto at = [&](int64_t row) {  // in q and out
    const int64_t token = sequence * a.tokens + first + row / a.group;
    return ((token * a.kv_heads + head) * a.group + row % a.group) * dim;
  };

  const Vectors& vectors = VectorsOf(a.instructions);
  thread_local std::vector<float> scores, totals, sums;
  thread_local std::vector<uint16_t> gathered, weights;
  const int64_t read = keys - begin;
  weights.assign(rows * read, 0);
  gathered.resize(rows * dim);
  totals.assign(rows, 0);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(a.q + at(r), dim, gathered.data() + r * dim);

  const int64_t at_keys = ((sequence * a.kv_heads + head) * a.positions + begin) * dim;
  Product p = ScoresOf(gathered.data(), rows, dim, scores, read, a.instructions);
  p.w = a.k + at_keys;
  MultiplyOutputs(p, 0, read);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = own_position + r / a.group;
    const int64_t first = first_seen(position), end = std::min(keys, position + 1);
    if (std::find(valid + first, valid + std::max(first, end), true) >= valid + end) continue;  // no valid key
    const int64_t at_first = r * read + first - begin;
    for (int64_t key = first; holes && key < end; ++key) {
      if (!valid[key]) scores[at_first + key - first] = -std::numeric_limits<float>::infinity();
    }
    totals[r] = vectors.softmax(scores.data() + at_first, end - first, ScaleOf(dim), weights.data() + at_first);
  }
  p = SumsOf(weights.data(), rows, read, sums, dim, a.instructions);
  AddValues(p, a.v + at_keys, read);
  for (int64_t r = 0; r < rows; ++r) vectors.divide(sums.data() + r * dim, totals[r], dim, a.out + at(r));
}

ffi::Error RunCausal(ffi::ThreadPool pool, Prompts q, Prompts k, Prompts v, Mask valid, Window window,
                     ffi::Result<Prompts> out, int64_t instructions) {
  const auto queries = q.dimensions(), keys = k.dimensions(), mask = valid.dimensions();
  const bool fits = keys[0] == queries[0] && keys[1] > 0 && queries[2] % keys[1] == 0 && keys[2] >= queries[1] &&
                    keys[3] == queries[3] && queries[3] % 2 == 0 && v.dimensions() == keys &&
                    mask[0] == keys[0] && mask[1] == keys[2] && out->dimensions() == queries;
  if (!fits) return ffi::Error::InvalidArgument("cpu_attention_causal: shapes do not fit, or an odd head_dim");
  if (q.element_count() == 0) return ffi::Error::Success();
  const auto bits = [](const void* values) { return static_cast<const uint16_t*>(values); };
  const Causal a = {.q = bits(q.untyped_data()),
                    .k = bits(k.untyped_data()),
                    .v = bits(v.untyped_data()),
                    .valid = valid.typed_data(),
                    .out = static_cast<uint16_t*>(out->untyped_data()),
                    .tokens = queries[1],
                    .positions = keys[2],
                    .kv_heads = keys[1],
                    .group = queries[2] / keys[1],
                    .dim = queries[3],
                    .window = SizeOf(window),
                    .instructions = Choose(instructions)};
  const int64_t blocks = (a.tokens + a.block() - 1) / a.block(), heads = queries[0] * a.kv_heads;
  const bool alone = heads * a.group * a.tokens * a.positions * a.dim < kAlone;
  Share(pool, alone ? 1 : Threads(pool), heads * blocks, [=](int64_t i) {
    const int64_t block = blocks - 1 - i / heads;  // those with the most keys first
    AttendCausally(a, i % heads / a.kv_heads, i % a.kv_heads, block * a.block());
  });
  return ffi::Error::Success();
}

ffi::Error Run(ffi::ThreadPool pool, Heads q, Cache prompt_k, Cache prompt_v, Indices length, Cache step_k,
               Cache step_v, Indices start, Index index, Index layer, ffi::RemainingArgs more,
               ffi::Result<Heads> out, int64_t instructions) {
  const auto queries = q.dimensions(), prompt_dims = prompt_k.dimensions(), step_dims = step_k.dimensions();
  const int64_t stacked = static_cast<int64_t>(step_dims.size()) - 4, layers = stacked == 1 ? step_dims[0] : 1;
  const auto is_cache = [](const Cache& k, const Cache& v) {
    return k.element_type() == ffi::BF16 && v.element_type() == ffi::BF16 && v.dimensions() == k.dimensions();
  };
  if ((stacked != 0 && stacked != 1) || prompt_dims.size() != step_dims.size() || !is_cache(prompt_k, prompt_v) ||
      !is_cache(step_k, step_v)) {
    return ffi::Error::InvalidArgument("cpu_attention: keys and values do not fit");
  }
  const int64_t *prompt = prompt_dims.begin() + stacked, *step = step_dims.begin() + stacked;  // of a layer
  const int64_t rows = queries[0], prompts = length.dimensions()[0], kv_heads = step[1];
  if (rows * prompts * kv_heads * layers == 0) {
    return ffi::Error::InvalidArgument("cpu_attention: nothing to attend to");
  }
  Window window;
  const int32_t* prompt_row = nullptr;
  bool known = true;
  for (size_t i = 0; i < more.size(); ++i) {
    if (const auto one = more.get<Index>(i)) {
      window = *one;
    } else if (const auto of_rows = more.get<Indices>(i); of_rows && of_rows->dimensions()[0] == rows) {
      prompt_row = of_rows->typed_data();
    } else {
      known = false;
    }
  }
  const bool fits = known && (rows % prompts == 0 || prompt_row) && start.dimensions()[0] == rows &&
                    queries[1] % kv_heads == 0 && queries[2] == step[3] && queries[2] % 2 == 0 && step[0] == rows &&
                    prompt[0] == prompts && prompt[1] == kv_heads && prompt[3] == step[3] &&
                    (!stacked || prompt_dims[0] == layers) && out->dimensions() == queries;
  if (!fits) return ffi::Error::InvalidArgument("cpu_attention: shapes do not fit, or an odd head_dim");
  const auto bits = [](const void* values) { return static_cast<const uint16_t*>(values); };
  const Attention a = {.q = bits(q.untyped_data()),
                       .prompt_k = bits(prompt_k.untyped_data()),
                       .prompt_v = bits(prompt_v.untyped_data()),
                       .step_k = bits(step_k.untyped_data()),
                       .step_v = bits(step_v.untyped_data()),
                       .length = length.typed_data(),
                       .start = start.typed_data(),
                       .prompt_row = prompt_row,
                       .out = static_cast<uint16_t*>(out->untyped_data()),
                       .sequences = rows,
                       .prompts = prompts,
                       .samples = rows / prompts,
                       .kv_heads = kv_heads,
                       .group = queries[1] / kv_heads,
                       .dim = queries[2],
                       .prompt_capacity = prompt[2],
                       .ring = step[2],
                       .layer = std::clamp<int64_t>(*layer.typed_data(), 0, layers - 1),
                       .index = *index.typed_data(),
                       .window = SizeOf(window),
                       .instructions = Choose(instructions)};
  int64_t keys = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Seen seen = SeenBy(a, row);
    keys += seen.end - seen.begin + StepsOf(a, row).count;
  }
  const int64_t threads = keys * queries[1] * a.dim < kAlone ? 1 : Threads(pool);
  std::vector<int64_t> order;
  const std::vector<Sharers> parts = PartBySeen(a, threads, order);
  Share(pool, threads, parts.size() * kv_heads, [&](int64_t i) {
    const Sharers& part = parts[i / kv_heads];
    Attend(a, std::span(order).subspan(part.first, part.count), i % kv_heads);
  });
  return ffi::Error::Success();
}

}  // namespace

#else

namespace {

ffi::Error Run(ffi::ThreadPool, Heads, Cache, Cache, Indices, Cache, Cache, Indices, Index, Index,
               ffi::RemainingArgs, ffi::Result<Heads>, int64_t) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "cpu_attention: only for x86 with AVX2");
}

ffi::Error RunCausal(ffi::ThreadPool, Prompts, Prompts, Prompts, Mask, Window, ffi::Result<Prompts>, int64_t) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "cpu_attention_causal: only for x86 with AVX2");
}

}  // namespace

#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(CpuCausalAttention, RunCausal,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Prompts>()
                                  .Arg<Prompts>()
                                  .Arg<Prompts>()
                                  .Arg<Mask>()
                                  .OptionalArg<Index>()
                                  .Ret<Prompts>()
                                  .Attr<int64_t>("instructions"));

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
                                  .RemainingArgs()
                                  .Ret<Heads>()
                                  .Attr<int64_t>("instructions"));
