#include "problem.h"

#include <algorithm>
#include <cmath>

namespace torchq::test {
namespace {

constexpr int32_t kZeroPoints[] = {0, 128, 255, 3, 200};

// One of each for the whole program: mapping memory for every problem would take longer than computing it.
Guarded x_memory, packed_memory[2], y_memory, scratch_memory;

std::string number(const uint8_t* at, DType dtype) {
  char text[64];
  if (dtype == DType::u8) {
    std::snprintf(text, sizeof(text), "%d", *at);
  } else if (dtype == DType::i32) {
    int32_t v;
    std::memcpy(&v, at, 4);
    std::snprintf(text, sizeof(text), "%d", v);
  } else {
    uint32_t bits = 0;
    std::memcpy(&bits, at, element_bytes(dtype));
    std::snprintf(text, sizeof(text), "%.9g (0x%X)", element(at, dtype, 0), bits);
  }
  return text;
}

}  // namespace

Weights random_weights(int64_t n, int64_t k) {
  Random& r = random_source;
  Weights w{n, k, std::vector<int8_t>(n * k), std::vector<float>(n), {}};
  for (int8_t& code : w.codes) code = static_cast<int8_t>(r.between(-128, 127));
  const bool wide = r.below(2);
  for (float& s : w.scale) s = std::ldexp(r.uniform(0.5f, 1.0f), static_cast<int>(wide ? r.between(-28, 6) : -7));
  if (r.below(4) == 0) return w;
  w.bias.resize(n);
  for (float& b : w.bias) b = r.below(8) ? r.uniform(-4.0f, 4.0f) : -0.0f;
  return w;
}

std::vector<float> random_channel_scale(int64_t k) {
  std::vector<float> scale(k);
  for (float& c : scale)
    c = std::ldexp(random_source.uniform(0.5f, 1.0f), static_cast<int>(random_source.between(-6, 6)));
  return scale;
}

Rows rows_of(const std::vector<float>& values, int64_t m, int64_t k, Kind kind) {
  Random& r = random_source;
  float largest = 0.0f;
  for (float v : values) largest = std::isfinite(v) ? std::max(largest, std::fabs(v)) : largest;
  const float scale = largest > 1e-30f ? largest / r.uniform(60.0f, 250.0f) : 0.01f;
  return {m, k, kind.dtype, kind.per_token, {scale, r.pick(kZeroPoints)}, encode(values, kind.dtype)};
}

Rows random_rows(int64_t m, int64_t k, Kind kind) {
  Random& r = random_source;
  if (element_bytes(kind.dtype) == 1) {
    Rows rows{m, k, kind.dtype, false, {r.uniform(0.001f, 0.1f), r.pick(kZeroPoints)}, std::vector<uint8_t>(m * k)};
    if (kind.dtype == DType::i8) rows.q.zero_point -= 128;
    for (uint8_t& code : rows.bytes) code = static_cast<uint8_t>(r.below(256));
    return rows;
  }
  std::vector<float> values;
  for (int64_t row = 0; row < m; ++row) {
    const float size = std::ldexp(1.0f, static_cast<int>(r.between(-10, 10)));
    const float lo = r.pick({-1.0f, -1.0f, 0.0f, 0.25f}) * size, hi = r.pick({1.0f, 1.0f, 2.0f, -0.125f}) * size;
    for (int64_t i = 0; i < k; ++i) values.push_back(r.uniform(lo, hi));
  }
  return rows_of(values, m, k, kind);
}

QParams output_qparams(const Sums& sums, const Weights& weights) {
  float largest = 0.0f;
  for (int64_t r = 0; r < static_cast<int64_t>(sums.row_scale.size()); ++r)
    for (int64_t c = 0; c < weights.n; ++c) {
      const float y = std::fabs(oracle_value(sums, weights, Activation::none, r, c));
      if (std::isfinite(y)) largest = std::max(largest, y);
    }
  const float scale = largest > 1e-30f ? largest / random_source.uniform(60.0f, 250.0f) : 1.0f;
  return {scale, random_source.pick(kZeroPoints)};
}

// Without the bytes that encode N, which no kernel reads. What is in the room that some do read is no matter.
std::vector<uint8_t> packed_of(const Weights& w, Layout layout) {
  const float* channel_scale = w.channel_scale.empty() ? nullptr : w.channel_scale.data();
  std::vector<uint8_t> packed(packed_bytes(w.n, w.k, channel_scale), kCanary);
  pack_begin(layout, w.n, w.k, !w.bias.empty(), channel_scale, packed.data());
  pack_panels(w.codes.data(), w.scale.data(), w.bias.empty() ? nullptr : w.bias.data(), packed.data(), 0,
              panel_count(w.n));
  packed.resize(packed.size() - (16 * panel_count(w.n) - w.n));
  const int64_t scale_bytes = channel_scale ? channel_scale_bytes(w.k) : 0;
  std::memset(packed.data() + packed.size() - scale_bytes - padding_bytes(w.k), kCanary, padding_bytes(w.k));
  return packed;
}

std::string describe(const Rows& rows, const Weights& weights, const Out& out, const char* fill) {
  char text[256];
  std::snprintf(text, sizeof(text), "m=%d n=%d k=%d x=%s %s zp=%d y=%s %s bias=%s channel_scale=%s fill=%s",
                static_cast<int>(rows.m), static_cast<int>(weights.n), static_cast<int>(rows.k), name_of(rows.dtype),
                rows.per_token ? "per token" : "static", rows.per_token ? -1 : rows.q.zero_point, name_of(out.dtype),
                name_of(out.activation), weights.bias.empty() ? "no" : "yes",
                weights.channel_scale.empty() ? "no" : "yes", fill);
  return text;
}

Stage::Stage(const Rows& rows, const Weights& weights, Side side, int64_t pad)
    : rows_(rows), weights_(weights), side_(side), pad_(pad) {
  const int64_t size = element_bytes(rows.dtype), row_bytes = rows.k * size, stride = row_bytes + pad * size;
  uint8_t* x = x_memory.place(rows.m > 0 ? (rows.m - 1) * stride + row_bytes : 0, side);
  for (int64_t r = 0; r < rows.m; ++r)
    if (row_bytes > 0) std::memcpy(x + r * stride, rows.bytes.data() + r * row_bytes, row_bytes);
  for (int i : {0, 1}) {
    const std::vector<uint8_t> bytes = packed_of(weights, i ? Layout::p16c8 : Layout::p16c4);
    uint8_t* packed = packed_memory[i].place(bytes.size(), side);
    std::memcpy(packed, bytes.data(), bytes.size());
    packed_[i] = packed;
  }
  x_ = x;
}

int64_t Stage::y_bytes(const Out& out) const {
  return rows_.m > 0 ? (rows_.m - 1) * y_stride(out) + weights_.n * element_bytes(out.dtype) : 0;
}

Problem Stage::problem(const Out& out, Layout layout) {
  Problem p{};
  p.m = rows_.m;
  p.x = {x_, (rows_.k + pad_) * element_bytes(rows_.dtype), rows_.dtype, rows_.per_token, rows_.q};
  p.weights = reinterpret_cast<const PackedHeader*>(packed_[layout == Layout::p16c8]);
  uint8_t* y = y_memory.place(y_bytes(out) + kMargin, side_) + y_offset();
  p.y = {y, y_stride(out), out.dtype, out.q};
  p.activation = out.activation;
  return p;
}

std::vector<uint8_t> Stage::blank(const Out& out) const {
  return std::vector<uint8_t>(y_bytes(out) + kMargin, kCanary);
}

std::vector<uint8_t> Stage::expected(const Out& out, const Sums& sums) const {
  std::vector<uint8_t> region = blank(out);
  for (int64_t r = 0; r < rows_.m; ++r)
    for (int64_t c = 0; c < weights_.n; ++c) {
      uint8_t* at = region.data() + y_offset() + r * y_stride(out) + c * element_bytes(out.dtype);
      oracle_store(sums, weights_, out, r, c, at);
    }
  return region;
}

std::vector<uint8_t> Stage::run(const Kernel& kernel, const Out& out, const std::vector<int>& parts, int count,
                                Layout layout) {
  const Problem p = problem(out, layout);
  uint8_t* region = static_cast<uint8_t*>(p.y.data) - y_offset();
  const size_t region_bytes = y_bytes(out) + kMargin;
  std::memset(region, kCanary, region_bytes);
  Job job = schedule(kernel, p);
  job.parts = count;
  for (int part : parts) {
    uint8_t* memory = scratch_memory.place(job.scratch_bytes, side_);
    std::memset(memory, kCanary, job.scratch_bytes);  // nothing may be read before it is written
    torchq::run(job, part, memory);
    if (last_kernel() != job.kernel) check(kernel.name, false, "last_kernel() is another one");
  }
  return {region, region + region_bytes};
}

std::vector<uint8_t> Stage::run(const Kernel& kernel, const Out& out, const std::vector<int>& parts, int count) {
  return run(kernel, out, parts, count, kernel.layout);
}

std::vector<uint8_t> Stage::run(const Kernel& kernel, const Out& out) { return run(kernel, out, {0}, 1); }

bool Stage::compare(const char* who, const Out& out, const std::vector<uint8_t>& got,
                    const std::vector<uint8_t>& want) const {
  if (std::memcmp(got.data(), want.data(), want.size()) == 0) return check(who, true, "%s", "");
  const int64_t at = std::mismatch(want.begin(), want.end(), got.begin()).first - want.begin();
  const int64_t byte = at - y_offset(), size = element_bytes(out.dtype);
  const bool inside = byte >= 0 && byte < y_bytes(out);
  const int64_t row = inside ? byte / y_stride(out) : 0, column = inside ? byte % y_stride(out) / size : 0;
  if (!inside || column >= weights_.n)
    return check(who, false, "byte %d outside y was written, near row %d: expected 0x%02X, got 0x%02X",
                 static_cast<int>(byte), static_cast<int>(row), want[at], got[at]);
  const int64_t start = y_offset() + row * y_stride(out) + column * size;
  return check(who, false, "at (%d, %d): expected %s, got %s", static_cast<int>(row), static_cast<int>(column),
               number(&want[start], out.dtype).c_str(), number(&got[start], out.dtype).c_str());
}

}  // namespace torchq::test
