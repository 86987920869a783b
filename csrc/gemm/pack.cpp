// Weights -> panels, and back. The layout is described in gemm.h.

#include <algorithm>
#include <cstring>

#include "gemm.h"

namespace torchq {
namespace {

constexpr uint32_t kMagic = 0x50385154;  // "TQ8P"

uint8_t* panel_at(void* packed, int64_t k, int64_t index) {
  return static_cast<uint8_t*>(packed) + sizeof(PackedHeader) + index * panel_bytes(k);
}

// The three per-column rows at the start of a panel.
struct PanelMeta {
  int32_t colsum[kPanelColumns];
  float scale[kPanelColumns];
  float bias[kPanelColumns];
};
static_assert(sizeof(PanelMeta) == kPanelMeta);

}  // namespace

const PackedHeader* packed_header(const void* packed, int64_t bytes) {
  if (bytes < static_cast<int64_t>(sizeof(PackedHeader))) return nullptr;
  const auto* header = static_cast<const PackedHeader*>(packed);
  const bool ours = header->magic == kMagic && header->layout == Layout::p16c4 && header->n >= 0 && header->k >= 0 &&
                    header->k <= kMaxDepth && header->n <= bytes && bytes == packed_bytes(header->n, header->k);
  return ours ? header : nullptr;
}

void pack_begin(int64_t n, int64_t k, bool has_bias, void* packed) {
  PackedHeader header{};
  header.magic = kMagic;
  header.layout = Layout::p16c4;
  header.n = n;
  header.k = k;
  header.has_bias = has_bias;
  std::memcpy(packed, &header, sizeof(header));
  std::memset(panel_at(packed, k, panel_count(n)), 0, panel_count(n) * kPanelColumns - n);
}

void pack_panels(const int8_t* weight, const float* scale, const float* bias, void* packed, int64_t begin,
                 int64_t end) {
  PackedHeader header;
  std::memcpy(&header, packed, sizeof(header));
  const int64_t k = header.k, whole = k / 4;
  for (int64_t p = begin; p < end; ++p) {
    uint8_t* panel = panel_at(packed, k, p);
    std::memset(panel, 0, panel_bytes(k));
    PanelMeta meta{};
    const int64_t columns = std::min(kPanelColumns, header.n - p * kPanelColumns);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t n = p * kPanelColumns + c;
      const int8_t* row = weight + n * k;
      uint8_t* column = panel + kPanelMeta + 4 * c;
      for (int64_t g = 0; g < whole; ++g) std::memcpy(column + 64 * g, row + 4 * g, 4);
      if (k % 4) std::memcpy(column + 64 * whole, row + 4 * whole, k % 4);
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += row[i];
      meta.colsum[c] = sum;
      meta.scale[c] = scale[n];
      meta.bias[c] = bias ? bias[n] : 0.0f;
    }
    std::memcpy(panel, &meta, sizeof(meta));
  }
}

void unpack(const void* packed, int8_t* weight, float* scale, float* bias) {
  PackedHeader header;
  std::memcpy(&header, packed, sizeof(header));
  const int64_t k = header.k, whole = k / 4;
  for (int64_t n = 0; n < header.n; ++n) {
    const int64_t c = n % kPanelColumns;
    const uint8_t* panel = panel_at(const_cast<void*>(packed), k, n / kPanelColumns);
    const uint8_t* column = panel + kPanelMeta + 4 * c;
    int8_t* row = weight + n * k;
    for (int64_t g = 0; g < whole; ++g) std::memcpy(row + 4 * g, column + 64 * g, 4);
    if (k % 4) std::memcpy(row + 4 * whole, column + 64 * whole, k % 4);
    PanelMeta meta;
    std::memcpy(&meta, panel, sizeof(meta));
    scale[n] = meta.scale[c];
    if (bias) bias[n] = meta.bias[c];
  }
}

}  // namespace torchq
