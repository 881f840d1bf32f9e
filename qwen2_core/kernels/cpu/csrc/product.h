// What the kernels of all instruction sets share: a product of matrices, and the panels that weights are packed in.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace {

// What a product is computed with, as cpu/library.py numbers it. A CPU with a later one has the earlier ones too.
enum class Instructions : int64_t { kNone = -1, kAvx2, kAvx512Bf16, kAmx };

constexpr int64_t kWidth = 32;  // outputs of a stripe, whose weights are packed into a panel

// Lines of 64 bytes that will be read soon, to be prefetched while something else is computed: some lines of each row
// of a matrix, in the order of memory.
struct Ahead {
  const char* line = nullptr;       // the first one
  int64_t left = 0;                 // lines
  int64_t column = 0, columns = 0;  // lines until the end of the row, and of a whole row
  int64_t gap = 0;                  // bytes from there to the next row

  // Prefetches some of them. Inlined, or a call would spill the sums that are in vector registers.
  [[gnu::always_inline]] void Prefetch(int64_t lines) {
    for (int64_t i = std::min(lines, left); i > 0; --i) {
      _mm_prefetch(line, _MM_HINT_T0);
      line += 64;
      --left;
      if (--column == 0) {
        line += gap;
        column = columns;
      }
    }
  }
  // How many to prefetch at each of `steps`.
  int64_t each(int64_t steps) const { return (left + steps - 1) / std::max<int64_t>(steps, 1); }
};

struct Product {
  const uint16_t* x;  // [rows, inputs], rows x_stride apart
  const uint16_t* w;  // [inputs, outputs] or, transposed, [outputs, inputs]
  float* out;         // [rows, outputs], rows out_stride apart
  int64_t rows, inputs, outputs, x_stride, out_stride;
  bool transposed;
  Instructions instructions;
  bool add = false;             // add to what `out` holds; not for a single row times w [outputs, inputs]
  uint16_t* rounded = nullptr;  // instead of `out`: the result in bfloat16 [rows, outputs]
  int64_t out_begin = 0;        // the output that `out` begins with
  const float* wide = nullptr;  // what Vectors::widen made of x
  Ahead ahead;

  float* sums(int64_t output) const { return out + output - out_begin; }
  bool tiles() const { return instructions == Instructions::kAmx; }
};

struct alignas(64) Line {
  char bytes[64];
};

// Adds the first rows of x[:, k .. k + depth] times the weights to the sums of outputs first .. first + kWidth.
using MultiplyRows = void (*)(const Product&, int64_t k, int64_t depth, int64_t first, Line* panel);

// The largest of some values, and where it is first; NaN and 0 where any is not a number.
struct Peak {
  float value;
  int64_t first;
};

// The vector code of one instruction set.
struct Vectors {
  int64_t rows;                           // that are multiplied at once, at most
  int64_t few_rows;                       // up to so many, reading the weights takes longer than summing
  int64_t few_inputs, many_inputs;        // at a time, where few rows are multiplied by w [inputs, outputs]; where many
  const MultiplyRows* multiply;           // for each number of rows, from 1: by weights from the panel
  const MultiplyRows* pack_and_multiply;  // the same, and packs the panel of w [inputs, outputs]; null: `pack` does it
  void (*pack)(const Product&, int64_t k, int64_t depth, int64_t first, Line* panel);  // null: there are no panels
  int64_t (*panel_lines)(int64_t depth);  // from one panel to the next
  void (*widen)(const Product&, int64_t k, int64_t depth, int64_t rows, float* wide);  // null: x is taken as it is
  int64_t wide_stride;                    // from one row of what `widen` makes to the next
  // Up to most_along rows times w [inputs, outputs], and one row times w [outputs, inputs], without a panel.
  void (*multiply_along)(const Product&, int64_t begin, int64_t end);
  int64_t most_along;
  void (*dot_row)(const Product&, int64_t begin, int64_t end);
  void (*round)(const float* sums, int64_t sums_stride, int64_t rows, int64_t outputs, uint16_t* out,
                int64_t out_stride);
  // Stores exp(scale * (score - the largest)) of `keys` scores, in bfloat16. Returns their sum before rounding.
  float (*softmax)(const float* scores, int64_t keys, float scale, uint16_t* weights);
  Peak (*peak)(const float* values, int64_t count);
  // Divides sums of weighted values by the sum of the weights. Zero where there was nothing to attend to.
  void (*divide)(const float* sums, float total, int64_t dim, uint16_t* out);
};

}  // namespace
