// Sums bfloat16 products with TDPBF16PS (AMX, Intel Xeons since Sapphire Rapids). One instruction multiplies 16 rows by
// 32 inputs with 32 inputs by 16 outputs. Tiles must first be configured for the number of rows.

#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#define AMX_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")))

namespace {

constexpr int64_t kTileRows = 16, kTileInputs = 32, kTileOutputs = 16;
constexpr int64_t kMostTileRows = 2 * kTileRows;  // at once; by two tiles of outputs that makes four tiles of sums

// Whether the processor has tiles, and Linux permits this process to use their registers; asks for the permission.
inline bool MayUseTiles() {
  static const bool may = [] {
    unsigned a, b, c, d = 0;
    constexpr unsigned kBf16AndTile = 1u << 22 | 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16AndTile) != kBf16AndTile) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return may;
}

// The calling thread's tiles; released when this object is destroyed.
class Tiles {
 public:
  AMX_BF16 ~Tiles() {
    if (rows_) _tile_release();
  }

  // Multiplies x [rows, depth] by a panel [depth / 2, outputs, 2] with `outputs` <= 32. Adds the product to `out` or,
  // if not `add`, stores it there. The panel is padded with zeros to 32 outputs and a multiple of 32 inputs.
  AMX_BF16 void Multiply(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t depth, const void* panel,
                         float* out, int64_t out_stride, int64_t outputs, bool add) {
    if (rows != rows_) Configure(rows);
    alignas(64) float part[kMostTileRows * 2 * kTileOutputs];
    float* sums = out;
    int64_t sums_stride = out_stride;
    const bool whole = outputs == 2 * kTileOutputs;
    if (!whole) {
      sums = part;
      sums_stride = 2 * kTileOutputs;
      for (int64_t r = 0; add && r < rows; ++r) std::copy_n(out + r * out_stride, outputs, part + r * sums_stride);
    }
    rows > kTileRows ? Sum<true>(x, x_stride, rows, depth, panel, sums, sums_stride, add)
                     : Sum<false>(x, x_stride, rows, depth, panel, sums, sums_stride, add);
    for (int64_t r = 0; !whole && r < rows; ++r) std::copy_n(part + r * sums_stride, outputs, out + r * out_stride);
  }

 private:
  // Tiles 0 to 3 are sums, [first rows, second rows] x [first outputs, second outputs]. Tiles 4 and 5 are rows of x, 6
  // and 7 weights.
  AMX_BF16 void Configure(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int64_t first = std::min(rows, kTileRows), second = rows - first;
    for (const int tile : {0, 1, 4}) config.rows[tile] = static_cast<uint8_t>(first);
    for (const int tile : {2, 3, 5}) config.rows[tile] = static_cast<uint8_t>(second);
    for (const int tile : {6, 7}) config.rows[tile] = kTileInputs / 2;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = config.rows[tile] ? 64 : 0;
    _tile_loadconfig(&config);
    rows_ = rows;
  }

  template <bool kSecond>
  AMX_BF16 void Sum(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t depth, const void* panel, float* sums,
                    int64_t sums_stride, bool add) {
    const int64_t row_bytes = 4 * sums_stride;
    const auto* weights = static_cast<const char*>(panel);
    float* second = sums + kTileRows * sums_stride;
    // The compiler does not know what memory the tile instructions read and write.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (add) {
      _tile_loadd(0, sums, row_bytes);
      _tile_loadd(1, sums + kTileOutputs, row_bytes);
      if constexpr (kSecond) {
        _tile_loadd(2, second, row_bytes);
        _tile_loadd(3, second + kTileOutputs, row_bytes);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kSecond) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    const int64_t whole = depth / kTileInputs * kTileInputs;
    for (int64_t i = 0; i < whole; i += kTileInputs) Step<kSecond>(x + i, x_stride, weights + i * 64);
    if (whole < depth) {  // what follows the last input of x is not ours to read
      alignas(64) uint16_t last[kMostTileRows * kTileInputs] = {};
      for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * x_stride + whole, depth - whole, last + r * kTileInputs);
      std::atomic_signal_fence(std::memory_order_seq_cst);
      Step<kSecond>(last, kTileInputs, weights + whole * 64);
    }
    _tile_stored(0, sums, row_bytes);
    _tile_stored(1, sums + kTileOutputs, row_bytes);
    if constexpr (kSecond) {
      _tile_stored(2, second, row_bytes);
      _tile_stored(3, second + kTileOutputs, row_bytes);
    }
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }

  // Adds the products of 32 inputs.
  template <bool kSecond>
  AMX_BF16 static void Step(const uint16_t* x, int64_t x_stride, const char* weights) {
    constexpr int64_t kPanelBytes = 4 * 2 * kTileOutputs;
    _tile_loadd(6, weights, kPanelBytes);
    _tile_loadd(4, x, 2 * x_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + kPanelBytes / 2, kPanelBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSecond) {
      _tile_loadd(5, x + kTileRows * x_stride, 2 * x_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  int64_t rows_ = 0;
};

}  // namespace
