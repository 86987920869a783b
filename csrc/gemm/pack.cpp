// Weights -> panels, and back. The layout is described in gemm.h.

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "gemm.h"

namespace torchq {
namespace {

constexpr uint32_t kMagic = 0x50385154;  // "TQ8P"

uint8_t* panel_at(void* packed, int64_t k, int64_t index) {
  return static_cast<uint8_t*>(packed) + sizeof(PackedHeader) + index * panel_bytes(k);
}

// Where the channel scale starts.
const uint8_t* scale_at(const void* packed, const PackedHeader& header) {
  return panel_at(const_cast<void*>(packed), header.k, panel_count(header.n)) + padding_bytes(header.k);
}

// The start of a panel: three numbers per column.
struct PanelMeta {
  int32_t colsum[kPanelColumns];
  float scale[kPanelColumns];
  float bias[kPanelColumns];
};
static_assert(sizeof(PanelMeta) == kPanelMeta);

// A column of a panel is every 16th run of kDepth bytes. kDepth is a constant so that its copies are single moves.
template <int kDepth>
void scatter(const int8_t* row, int64_t k, uint8_t* column) {
  const int64_t whole = k / kDepth;
  for (int64_t g = 0; g < whole; ++g) std::memcpy(column + g * kDepth * kPanelColumns, row + g * kDepth, kDepth);
  if (k % kDepth) std::memcpy(column + whole * kDepth * kPanelColumns, row + whole * kDepth, k % kDepth);
}

template <int kDepth>
void gather(const uint8_t* column, int64_t k, int8_t* row) {
  const int64_t whole = k / kDepth;
  for (int64_t g = 0; g < whole; ++g) std::memcpy(row + g * kDepth, column + g * kDepth * kPanelColumns, kDepth);
  if (k % kDepth) std::memcpy(row + whole * kDepth, column + whole * kDepth * kPanelColumns, k % kDepth);
}

}  // namespace

const PackedHeader* packed_header(const void* packed, int64_t bytes) {
  if (bytes < static_cast<int64_t>(sizeof(PackedHeader))) return nullptr;
  const auto* header = static_cast<const PackedHeader*>(packed);
  const bool known = header->layout == Layout::p16c4 || header->layout == Layout::p16c8;
  const bool ours = header->magic == kMagic && known && header->n >= 0 && header->k >= 0 && header->k <= kMaxDepth &&
                    header->n <= bytes && header->has_channel_scale <= 1 &&
                    bytes == packed_bytes(header->n, header->k, header->has_channel_scale);
  return ours ? header : nullptr;
}

void pack_begin(Layout layout, int64_t n, int64_t k, bool has_bias, const float* channel_scale, void* packed) {
  PackedHeader header{};
  header.magic = kMagic;
  header.layout = layout;
  header.n = n;
  header.k = k;
  header.has_bias = has_bias;
  header.has_channel_scale = channel_scale != nullptr;
  std::memcpy(packed, &header, sizeof(header));
  uint8_t *rest = panel_at(packed, k, panel_count(n)), *end = static_cast<uint8_t*>(packed);
  end += packed_bytes(n, k, channel_scale != nullptr);
  std::memset(rest, 0, end - rest);
  if (channel_scale) std::memcpy(rest + padding_bytes(k), channel_scale, k * sizeof(float));
}

void pack_panels(const int8_t* weight, const float* scale, const float* bias, void* packed, int64_t begin,
                 int64_t end) {
  PackedHeader header;
  std::memcpy(&header, packed, sizeof(header));
  const int64_t k = header.k, depth = layout_depth(header.layout);
  for (int64_t p = begin; p < end; ++p) {
    uint8_t* panel = panel_at(packed, k, p);
    std::memset(panel, 0, panel_bytes(k));
    PanelMeta meta{};
    const int64_t columns = std::min(kPanelColumns, header.n - p * kPanelColumns);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t n = p * kPanelColumns + c;
      const int8_t* row = weight + n * k;
      (depth == 8 ? scatter<8> : scatter<4>)(row, k, panel + kPanelMeta + depth * c);
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += row[i];
      meta.colsum[c] = sum;
      meta.scale[c] = scale[n];
      meta.bias[c] = bias ? bias[n] : 0.0f;
    }
    std::memcpy(panel, &meta, sizeof(meta));
  }
}

void unpack(const void* packed, int8_t* weight, float* scale, float* bias, float* channel_scale) {
  PackedHeader header;
  std::memcpy(&header, packed, sizeof(header));
  const int64_t k = header.k, depth = layout_depth(header.layout);
  for (int64_t n = 0; n < header.n; ++n) {
    const int64_t c = n % kPanelColumns;
    const uint8_t* panel = panel_at(const_cast<void*>(packed), k, n / kPanelColumns);
    (depth == 8 ? gather<8> : gather<4>)(panel + kPanelMeta + depth * c, k, weight + n * k);
    PanelMeta meta;
    std::memcpy(&meta, panel, sizeof(meta));
    scale[n] = meta.scale[c];
    if (bias) bias[n] = meta.bias[c];
  }
  if (channel_scale && header.has_channel_scale)
    std::memcpy(channel_scale, scale_at(packed, header), k * sizeof(float));
}

float unpack_piece(const PackedHeader& weights, int64_t n, int64_t k, int64_t count, int8_t* codes) {
  const int64_t c = n % kPanelColumns, depth = layout_depth(weights.layout);
  const uint8_t* panel = panel_at(const_cast<PackedHeader*>(&weights), weights.k, n / kPanelColumns);
  (depth == 8 ? gather<8> : gather<4>)(panel + kPanelMeta + depth * c + k * kPanelColumns, count, codes);
  PanelMeta meta;
  std::memcpy(&meta.scale, panel + offsetof(PanelMeta, scale), sizeof(meta.scale));
  return meta.scale[c];
}

const float* channel_scale_of(const PackedHeader& weights) {
  return weights.has_channel_scale ? reinterpret_cast<const float*>(scale_at(&weights, weights)) : nullptr;
}

}  // namespace torchq
