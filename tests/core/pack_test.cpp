// Packed weights: every byte where gemm.h says, back again exactly, and no stranger's bytes accepted.

#include <algorithm>

#include "problem.h"

namespace torchq::test {
namespace {

// The packed form by its description: [colsum][scale][bias][weights], zero-padded, zeros after the last panel,
// then the channel scale.
std::vector<uint8_t> oracle_panels(const Weights& w, Layout layout) {
  const int64_t panels = panel_count(w.n), bytes = 192 + (w.k + 7) / 8 * 128, depth = layout == Layout::p16c8 ? 8 : 4;
  const int64_t room = 192 + (w.k + 63) / 64 * 1024 - bytes;  // a last panel of whole steps of 64 k would end there
  const int64_t lines = w.channel_scale.empty() ? 0 : (w.k + 15) / 16;
  std::vector<uint8_t> out(panels * bytes + room + lines * 64 + 16 * panels - w.n);
  if (lines) std::memcpy(out.data() + panels * bytes + room, w.channel_scale.data(), w.k * 4);
  for (int64_t n = 0; n < w.n; ++n) {
    uint8_t* panel = out.data() + n / 16 * bytes;
    int32_t colsum = 0;
    for (int64_t k = 0; k < w.k; ++k) {
      colsum += w.codes[n * w.k + k];
      panel[192 + k / depth * 16 * depth + n % 16 * depth + k % depth] = static_cast<uint8_t>(w.codes[n * w.k + k]);
    }
    std::memcpy(panel + n % 16 * 4, &colsum, 4);
    std::memcpy(panel + 64 + n % 16 * 4, &w.scale[n], 4);
    if (!w.bias.empty()) std::memcpy(panel + 128 + n % 16 * 4, &w.bias[n], 4);
  }
  return out;
}

const float* channel_scale(const Weights& w) { return w.channel_scale.empty() ? nullptr : w.channel_scale.data(); }

int64_t packed_bytes(const Weights& w) { return torchq::packed_bytes(w.n, w.k, channel_scale(w)); }

void pack(Layout layout, const Weights& w, uint8_t* packed, const std::vector<std::pair<int64_t, int64_t>>& pieces) {
  pack_begin(layout, w.n, w.k, !w.bias.empty(), channel_scale(w), packed);
  for (const auto& [begin, end] : pieces)
    pack_panels(w.codes.data(), w.scale.data(), w.bias.empty() ? nullptr : w.bias.data(), packed, begin, end);
}

template <class T>
bool equal(const T* a, const std::vector<T>& b) {
  return b.empty() || std::memcmp(a, b.data(), b.size() * sizeof(T)) == 0;
}

// unpack() into memory that ends where the weights end.
void check_unpack(const uint8_t* packed, const Weights& w) {
  static Guarded weight_memory, scale_memory, bias_memory, channel_memory;
  auto* weight = reinterpret_cast<int8_t*>(weight_memory.place(w.n * w.k, Side::end));
  auto* scale = reinterpret_cast<float*>(scale_memory.place(w.n * 4, Side::end));
  auto* bias = reinterpret_cast<float*>(bias_memory.place(w.n * 4, Side::end));
  auto* channels = reinterpret_cast<float*>(channel_memory.place(w.channel_scale.size() * 4, Side::end));
  unpack(packed, weight, scale, bias, channels);
  check("core", equal(weight, w.codes) && equal(scale, w.scale), "unpack() gave other weights or scales");
  check("core", equal(bias, w.bias.empty() ? std::vector<float>(w.n) : w.bias), "unpack() gave another bias");
  check("core", equal(channels, w.channel_scale), "unpack() gave another channel scale");
  std::fill(weight, weight + w.n * w.k, int8_t{85});
  unpack(packed, weight, scale, nullptr, nullptr);
  check("core", equal(weight, w.codes), "unpack() of the weight alone gave other weights");
}

// Rows as floats, out of packed weights and out of a matrix of rows with their scales, into memory that ends with them;
// alone, and with residuals that end with their memory too.
void check_rows(const PackedHeader& header, const Weights& w) {
  static Guarded row_memory, residual_memory;
  auto* y = reinterpret_cast<float*>(row_memory.place(w.k * 4, Side::end));
  std::vector<uint8_t> matrix;
  for (int64_t n = 0; n < w.n; ++n) {
    const auto *codes = reinterpret_cast<const uint8_t*>(w.codes.data() + n * w.k),
               *scale = reinterpret_cast<const uint8_t*>(&w.scale[n]);
    matrix.insert(matrix.end(), codes, codes + w.k);
    matrix.insert(matrix.end(), scale, scale + sizeof(float));
  }
  const int64_t width = (w.k + 1) / 2;
  auto* residuals = residual_memory.place(w.n * width, Side::end);
  for (int64_t i = 0; i < w.n * width; ++i) residuals[i] = static_cast<uint8_t>(random_source.below(256));
  const Table tables[] = {{w.n, w.k, nullptr, &header},
                          {w.n, w.k, matrix.data(), nullptr},
                          {w.n, w.k, nullptr, &header, residuals},
                          {w.n, w.k, matrix.data(), nullptr, residuals}};
  for (int64_t n = 0; n < w.n; ++n)
    for (const Table& table : tables) {
      write_rows(table, &n, 0, 1, DType::f32, y);
      for (int64_t k = 0; k < w.k; ++k) {
        const int bits = residuals[n * width + k / 2] >> (k % 2 ? 4 : 0) & 15;
        const int more = table.residuals ? bits - (bits > 7 ? 16 : 0) : 0;
        const float value = static_cast<float>(w.codes[n * w.k + k] + more / 16.0) * w.scale[n];
        const float expected = table.packed && !w.channel_scale.empty() ? value * w.channel_scale[k] : value;
        check("core", std::memcmp(y + k, &expected, sizeof(float)) == 0, "write_rows() gave another value at %d",
              static_cast<int>(k));
      }
    }
}

void check_pack(Layout layout, int64_t n, int64_t k, bool scaled, Side side) {
  static Guarded memory;
  Weights w = random_weights(n, k);
  if (scaled) w.channel_scale = random_channel_scale(k);
  now("pack layout=%d n=%d k=%d bias=%d channel_scale=%d side=%s", static_cast<int>(layout), static_cast<int>(n),
      static_cast<int>(k), !w.bias.empty(), scaled, side == Side::end ? "end" : "start");
  const int64_t panels = panel_count(n), bytes = packed_bytes(w), lines = scaled ? (k + 15) / 16 : 0;
  check("core", bytes == 64 + panels * panel_bytes(k) + padding_bytes(k) + 64 * lines + 16 * panels - n,
        "packed_bytes is %d", static_cast<int>(bytes));

  uint8_t* packed = memory.place(bytes, side);
  std::memset(packed, kCanary, bytes);
  pack(layout, w, packed, {{panels / 2, panels}, {0, panels / 2}});  // panels in any order, as threads may pack them
  const std::vector<uint8_t> want = oracle_panels(w, layout);
  check("core", equal(packed + sizeof(PackedHeader), want), "the panels are not as gemm.h describes them");

  const std::vector<uint8_t> aligned(packed, packed + bytes);  // the guarded one may start at any byte
  const PackedHeader* header = packed_header(aligned.data(), bytes);
  check("core",
        header && header->n == n && header->k == k && header->has_bias == !w.bias.empty() && header->layout == layout &&
            header->has_channel_scale == (channel_scale(w) != nullptr),
        "packed_header() does not give back layout, n, k, has_bias and has_channel_scale");
  const float* scale = channel_scale_of(*header);
  check("core",
        scale ? equal(scale, w.channel_scale) && (scale - reinterpret_cast<const float*>(header)) % 16 == 0
              : w.channel_scale.empty(),
        "channel_scale_of() is not where the channel scale lies");
  check_unpack(packed, w);
  check_rows(*header, w);
}

void expect_rejected(const std::vector<uint8_t>& bytes, int64_t length, const char* what) {
  check("core", packed_header(bytes.data(), length) == nullptr, "packed_header() accepted a buffer with %s", what);
}

void test_strangers() {
  const Weights w = random_weights(21, 10);
  std::vector<uint8_t> good(packed_bytes(w));
  pack(Layout::p16c4, w, good.data(), {{0, 2}});
  now("packed_header of n=21 k=10");
  const auto length = static_cast<int64_t>(good.size());
  check("core", packed_header(good.data(), length) != nullptr, "the untouched buffer was rejected");

  expect_rejected(good, 0, "no bytes");
  expect_rejected(good, 63, "less than a header");
  expect_rejected(good, 64, "a header only");
  expect_rejected(good, length - 1, "one byte too few");
  std::vector<uint8_t> longer = good;
  longer.resize(length + 64);
  for (int64_t more = 1; more <= 64; ++more)  // 64: as long as with a channel scale
    expect_rejected(longer, length + more, "bytes too many");

  const auto damaged = [&](void (*damage)(PackedHeader&), const char* what) {
    std::vector<uint8_t> bytes = good;
    damage(*reinterpret_cast<PackedHeader*>(bytes.data()));
    expect_rejected(bytes, length, what);
  };
  damaged([](PackedHeader& h) { h.magic ^= 1; }, "another magic");
  damaged([](PackedHeader& h) { h.magic = 0; }, "no magic");
  damaged([](PackedHeader& h) { h.layout = static_cast<Layout>(3); }, "an unknown layout");
  damaged([](PackedHeader& h) { h.n = 22; }, "another n");
  damaged([](PackedHeader& h) { h.has_channel_scale = 1; }, "a channel scale that it has no room for");
  damaged([](PackedHeader& h) { h.has_channel_scale = 2; }, "an unknown flag");
  damaged([](PackedHeader& h) { h.n = -1; }, "a negative n");
  damaged([](PackedHeader& h) { h.n = INT64_MAX; }, "an n that overflows");
  damaged([](PackedHeader& h) { h.k = 65; }, "another k");
  damaged([](PackedHeader& h) { h.k = -4; }, "a negative k");
  damaged([](PackedHeader& h) { h.k = INT64_MAX; }, "a k that overflows");
  expect_rejected(std::vector<uint8_t>(length), length, "zeros");

  std::vector<uint8_t> deep(torchq::packed_bytes(1, kMaxDepth + 1, false));
  pack_begin(Layout::p16c4, 1, kMaxDepth + 1, false, nullptr, deep.data());
  expect_rejected(deep, static_cast<int64_t>(deep.size()), "a k past kMaxDepth");
}

}  // namespace

void test_pack() {
  for (Layout layout : {Layout::p16c4, Layout::p16c8}) {
    for (int64_t n : {0, 1, 15, 16, 17, 31, 32, 33, 48, 100})
      for (int64_t k : {0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 63, 64, 65})
        for (bool scaled : {false, true})
          for (Side side : {Side::end, Side::start}) check_pack(layout, n, k, scaled, side);
    check_pack(layout, 1, kMaxDepth, true, Side::end);
  }
  test_strangers();
}

}  // namespace torchq::test
