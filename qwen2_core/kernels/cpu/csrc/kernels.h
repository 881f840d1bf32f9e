// The parts that matmul.cc and attention.cc share: sums of bfloat16 products, and threads that share work.
//
// Several rows: the weights are read in stripes of kWidth outputs and packed as the instructions want them. Such a
// panel is kept while block after block of rows is multiplied by it: by tiles (amx_tiles.h) or, where the machine has
// none, by vectors (avx512.h, avx2.h). By vectors the first block is multiplied while the panel is made. A single row
// is multiplied without a panel.
//
// Sums run over the inputs in order, whatever the number of rows, so a row's result does not depend on the other
// rows. There are two exceptions: a single row is summed in another order than several rows by tiles, and than
// several rows times w [outputs, inputs]. Tiles sum each 32 inputs in an order of their own (even and odd ones
// apart). For equal bits, two products must therefore begin at the same input.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define CPU_KERNELS 1

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "amx_tiles.h"
#include "avx2.h"
#include "avx512.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace {

constexpr int64_t kTileDepth = 256;  // inputs that tiles take at a time: 16 KiB of x stay in the first-level cache

// The best that this machine can run.
inline Instructions Supported() {
  static const Instructions best = [] {
    if (MayUseTiles()) return Instructions::kAmx;
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) return Instructions::kAvx512Bf16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Instructions::kAvx2;
    return Instructions::kNone;
  }();
  return best;
}

// What is asked for, or the best that there is.
inline Instructions Choose(int64_t asked) {
  return static_cast<Instructions>(std::min(asked, static_cast<int64_t>(Supported())));
}

inline const Vectors& VectorsOf(Instructions instructions) {
  return instructions == Instructions::kAvx2 ? avx2::kPanels : avx512::kVectors;
}
inline const Vectors& VectorsOf(const Product& p) {
  return p.instructions == Instructions::kAvx2 && avx2::UsesDots(p) ? avx2::kDots : VectorsOf(p.instructions);
}

// How many weights are packed at a time, and how many rows they are multiplied by at once.
struct Blocking {
  int64_t rows, inputs, outputs;
  bool few;  // with few rows, reading the weights takes the time; with many, summing

  explicit Blocking(const Product& p) {
    const Vectors& vectors = VectorsOf(p);
    few = p.rows <= vectors.few_rows;
    // Rows of w [outputs, inputs] are read whole.
    inputs = few && !p.transposed ? vectors.few_inputs : few ? 1024 : vectors.many_inputs;
    if (p.tiles()) {
      rows = kMostTileRows;
      outputs = (1 << 18) / inputs;  // panels of 512 KiB stay in the second-level cache
    } else {
      // With few rows, a panel of 16 KiB stays in the first-level cache while the weights stream by. With many, panels
      // stay in the second-level cache while x streams by.
      rows = vectors.rows;
      outputs = kWidth * (few ? 1 : 8);
    }
  }
};

// Memory of this thread, valid until the thread asks again for the same use.
enum class Use { kPanels, kSums, kWide };
template <Use>
void* Scratch(int64_t bytes) {
  thread_local std::vector<Line> lines;
  lines.resize(std::max<size_t>(lines.size(), (bytes + 63) / 64));
  return lines.data();
}

// What to prefetch while the stripe at `first` is computed in `parts` parts: with each a share of the stripes that come
// next, or of the first ones of the next inputs. Processors prefetch along rows by themselves, but a stripe is a small
// part of many rows. Of w [inputs, outputs] two stripes are asked for together, since they lie beside each other.
inline Ahead AheadOf(const Product& p, const Blocking& most, int64_t k, int64_t begin, int64_t end, int64_t first,
                     int64_t part, int64_t parts) {
  const int64_t together = p.transposed ? 1 : 2, in_group = (first - begin) / kWidth % together;
  const int64_t group = first - in_group * kWidth;
  const auto outputs_from = [&](int64_t output) { return std::min(together * kWidth, end - output); };
  int64_t next = group + together * kWidth;
  if (next >= end) {
    next = begin;
    k += most.inputs;
  }
  const int64_t inputs = std::clamp<int64_t>(p.inputs - k, 0, most.inputs), outputs = outputs_from(next);
  const int64_t rows = p.transposed ? outputs : inputs, stride = p.transposed ? p.inputs : p.outputs;
  const int64_t columns = ((p.transposed ? inputs : outputs) + 31) / 32, all = rows * columns;
  if (all == 0) return {};
  part += in_group * parts;
  parts *= (outputs_from(group) + kWidth - 1) / kWidth;
  const int64_t from = all * part / parts, row = from / columns, column = from % columns;
  const uint16_t* w = p.w + (p.transposed ? next * p.inputs + k : k * p.outputs + next);
  return {.line = reinterpret_cast<const char*>(w + row * stride + 32 * column),
          .left = all * (part + 1) / parts - from,
          .column = columns - column,
          .columns = columns,
          .gap = 2 * stride - 64 * columns};
}

// Computes several rows of outputs begin .. end. If `once`, each block of rows uses the same memory for its sums.
inline void MultiplyBlocks(const Product& p, const Blocking& most, bool once, int64_t begin, int64_t end) {
  const Vectors& vectors = VectorsOf(p);
  const int64_t panel_bytes = vectors.panel_lines(most.inputs) * most.outputs / kWidth * sizeof(Line);
  Line* const panels = static_cast<Line*>(Scratch<Use::kPanels>(panel_bytes));
  const int64_t widened = most.few ? p.rows : most.rows;  // at once
  float* const wide = static_cast<float*>(Scratch<Use::kWide>(widened * vectors.wide_stride * sizeof(float)));
  const int64_t blocks = (p.rows + most.rows - 1) / most.rows;
  const bool packs_along = vectors.pack_and_multiply && !p.transposed, packs_apart = vectors.pack && !packs_along;
  Tiles tiles;
  for (int64_t k = 0; k < p.inputs; k += most.inputs) {
    const int64_t depth = std::min(most.inputs, p.inputs - k), panel_lines = vectors.panel_lines(depth);
    if (vectors.widen && most.few) vectors.widen(p, k, depth, p.rows, wide);
    for (int64_t group = begin; group < end; group += most.outputs) {
      const int64_t group_end = std::min(group + most.outputs, end);
      if (p.tiles() && !p.transposed) avx512::PackRows(p, k, depth, group, group_end, panels);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = p.rows * block / blocks, rows = p.rows * (block + 1) / blocks - row;
        Product part = p;
        part.x += row * p.x_stride;
        part.out += once ? 0 : row * p.out_stride;
        if (p.tiles()) {
          for (int64_t first = group; p.transposed && block == 0 && first < group_end; first += kWidth) {
            part.ahead = AheadOf(p, most, k, begin, end, first, 0, 1);
            vectors.pack(part, k, depth, first, panels + (first - group) / kWidth * panel_lines);
          }
          for (int64_t i = 0; i < depth; i += kTileDepth) {
            const Line* panel = panels + i;
            for (int64_t first = group; first < group_end; first += kWidth, panel += panel_lines) {
              tiles.Multiply(part.x + k + i, p.x_stride, rows, std::min(kTileDepth, depth - i), panel, part.sums(first),
                             p.out_stride, std::min(kWidth, p.outputs - first), k || i || p.add);
            }
          }
        } else {
          if (vectors.widen && !most.few) vectors.widen(part, k, depth, rows, wide);
          part.wide = wide + (most.few ? row * vectors.wide_stride : 0);
          const bool both = block == 0 && packs_along;
          const bool pack = block == 0 && packs_apart;
          const MultiplyRows* multiply = both ? vectors.pack_and_multiply : vectors.multiply;
          Line* panel = panels;
          for (int64_t first = group; first < group_end; first += kWidth, panel += panel_lines) {
            const auto ahead = [&](int64_t step, int64_t steps) {
              if (most.few) part.ahead = AheadOf(p, most, k, begin, end, first, step, steps);
            };
            if (pack) {
              ahead(0, blocks + 1);
              vectors.pack(part, k, depth, first, panel);
            }
            ahead(block + packs_apart, blocks + packs_apart);
            multiply[rows - 1](part, k, depth, first, panel);
          }
        }
        if (p.rounded && k + depth == p.inputs) {
          vectors.round(part.sums(group), p.out_stride, rows, std::min(group_end, p.outputs) - group,
                        p.rounded + row * p.outputs + group, p.outputs);
        }
      }
    }
  }
}

// Computes all rows of outputs begin .. end. `begin` is a multiple of kWidth.
inline void MultiplyOutputs(Product p, int64_t begin, int64_t end) {
  const Vectors& vectors = VectorsOf(p);
  const Blocking most(p);
  const bool blocks = p.rows > (p.transposed ? 1 : vectors.most_along);
  const bool once = blocks && p.rounded && p.inputs <= most.inputs;  // each block is rounded before the next one begins
  if (p.rounded) {
    p.out_stride = (end - begin + kWidth - 1) / kWidth * kWidth;
    p.out_begin = begin;
    const int64_t rows = once ? std::min(p.rows, most.rows) : p.rows;
    p.out = static_cast<float*>(Scratch<Use::kSums>(rows * p.out_stride * sizeof(float)));
  }
  if (blocks) return MultiplyBlocks(p, most, once, begin, end);
  p.transposed ? vectors.dot_row(p, begin, end) : vectors.multiply_along(p, begin, end);
  end = std::min(end, p.outputs);
  if (p.rounded) vectors.round(p.sums(begin), p.out_stride, p.rows, end - begin, p.rounded + begin, p.outputs);
}

// Work that threads share piece by piece. A free thread claims the next piece, so the caller never waits for a thread
// that has not started. Calls that run at the same time in one pool therefore cannot block each other.
struct Claims {
  std::function<void(int64_t)> work;
  int64_t pieces;
  std::atomic<int64_t> next{0}, done{0};

  void Work() {
    for (int64_t piece; (piece = next.fetch_add(1)) < pieces;) {
      work(piece);
      done.fetch_add(1);
      done.notify_all();
    }
  }
};

inline int64_t Threads(const xla::ffi::ThreadPool& pool) { return std::max<int64_t>(pool.num_threads(), 1); }

// Calls work(0) .. work(pieces - 1), on the caller's and up to `threads` - 1 other threads. Returns when all are done.
inline void Share(xla::ffi::ThreadPool& pool, int64_t threads, int64_t pieces,
                  std::function<void(int64_t)> work) {
  auto claims = std::make_shared<Claims>();
  claims->work = std::move(work);
  claims->pieces = pieces;
  for (int64_t i = 1; i < std::min(threads, pieces); ++i) pool.Schedule([claims] { claims->Work(); });
  claims->Work();
  for (int64_t done; (done = claims->done.load()) < pieces;) claims->done.wait(done);
}

}  // namespace

#endif
