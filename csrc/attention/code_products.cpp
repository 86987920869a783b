// The products in int8 codes, by the kernels of the GEMM: keys and values are packed as its weights are, into panels of
// 16 keys, or of 16 columns of v.

#include "products.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../gemm/codes.h"
#include "ahead.h"
#include "operands.h"

namespace torchq {
namespace attention {
namespace {

// The start of a panel: what the GEMM's kernels expect there (gemm.h).
struct PanelMeta {
  int32_t colsum[kPanel];
  float scale[kPanel];
  float bias[kPanel];
};
static_assert(sizeof(PanelMeta) == kPanelMeta);

PanelMeta& meta_of(const CodePanels& panels, int64_t panel) {
  return *reinterpret_cast<PanelMeta*>(panels.data + panel * panels.stride);
}

uint8_t* groups_of(const CodePanels& panels, int64_t panel) { return panels.data + panel * panels.stride + kPanelMeta; }

// From groups of 16 columns x 4 codes to groups of 16 x 8, for a kernel that reads these: two become one.
void pair_groups(uint8_t* groups, int64_t pairs) {
  uint32_t from[2 * kPanel], to[2 * kPanel];
  for (int64_t g = 0; g < pairs; ++g, groups += sizeof(from)) {
    std::memcpy(from, groups, sizeof(from));
    for (int64_t i = 0; i < kPanel; ++i) to[2 * i] = from[i], to[2 * i + 1] = from[kPanel + i];
    std::memcpy(groups, to, sizeof(to));
  }
}

void arrange(const Job& job, const CodePanels& panels, int64_t panel, int64_t depth) {
  if (job.gemm->layout == Layout::p16c8) pair_groups(groups_of(panels, panel), ceil_div(depth, 8));
}

// Rows in the format of the GEMM's kernel: floats are quantized, codes copied.
void to_code_rows(const Job& job, const Input& input, int64_t m, int64_t depth, const CodeMatrix& to) {
  PackedHeader header{};
  header.layout = job.gemm->layout;
  header.k = depth;
  torchq::Problem problem{};
  problem.m = m;
  problem.x = input;
  problem.weights = &header;
  torchq::Job rows{};
  rows.problem = &problem;
  rows.kernel = job.gemm;
  rows.codes_stride = to.stride;
  torchq::load_rows(rows, 0, m, to.rows);
}

// y (m, 16 · panels) = codes · panels from `first` on: gemm.cpp's loops over tiles.
void multiply(const Job& job, const CodeMatrix& a, int64_t m, int64_t depth, const CodePanels& b, int64_t first,
              int64_t panels, const Output& y, int32_t* sums, Ahead& ahead, Ahead::Stage stage) {
  const torchq::Kernel& gemm = *job.gemm;
  const Tiling& tiling = gemm.tiling;
  const bool narrow = tiling.tall.m && m > tiling.tile.m && panels * kPanel <= tiling.tall.n;
  const TileShape& tile = narrow ? tiling.tall : tiling.tile;
  torchq::Block block{};
  block.layout = gemm.layout;
  block.k_groups = ceil_div(depth, layout_depth(gemm.layout));
  block.codes_stride = a.stride;
  block.panel_stride = b.stride;
  block.out_stride = y.stride;
  block.out_dtype = y.dtype;
  block.sums = sums;
  const int64_t unit = gemm.codes.interleaved_rows, units = ceil_div(m, unit);
  const bool whole = tiling.own_loops;
  const int64_t tiles = whole ? 1 : ceil_div(m, tile.m), group = whole ? panels : tile.n / kPanel;
  ahead.begin(stage, ceil_div(panels, group) * tiles);
  for (int64_t panel = 0; panel < panels; panel += group)
    for (int64_t t = 0, row = 0, end; t < tiles; ++t, row = end) {
      end = std::min(piece(units, t + 1, tiles) * unit, m);
      block.m = static_cast<int>(end - row);
      block.panels = static_cast<int>(std::min(group, panels - panel));
      block.codes = a.rows.codes + row * a.stride;
      block.scale = a.rows.scale + row;
      block.zero_point = a.rows.zero_point + row;
      block.panel = b.data + (first + panel) * b.stride;
      block.out = static_cast<uint8_t*>(y.data) + row * y.stride + panel * kPanel * element_bytes(y.dtype);
      gemm.run(block);
      ahead.step();
    }
}

// The mean of all keys, in s.middle. A column whose sum is not finite gets 0.
void find_mean(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t n = round_up(p.depth, kPanel);
  std::fill_n(s.middle, n, 0.0f);
  for (int64_t key = 0; key < p.keys; key += kPanel) {
    const int64_t count = std::min(kPanel, p.keys - key);
    const FloatRows rows = load_rows(job, {p.k, batch, head, key}, count, p.depth, s);
    job.kernel->add_rows(rows.x, rows.stride, count, n, s.middle);
  }
  const float inverse = 1.0f / static_cast<float>(p.keys);
  for (int64_t i = 0; i < n; ++i) s.middle[i] = std::isfinite(s.middle[i]) ? s.middle[i] * inverse : 0.0f;
}

// The middle of the range of each column of v, in s.middle, and (hi - lo) / 2 / 127, in s.scale. Both are halved before
// they are added, so neither overflows. A scale below FLT_MIN is 1, as everywhere.
void find_scales(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t n = round_up(p.columns, kPanel);
  std::fill_n(s.lo, n, kMaxScale), std::fill_n(s.hi, n, -kMaxScale), std::fill_n(s.zero, n, 0.0f);
  for (int64_t key = 0; key < p.keys; key += kPanel) {
    const int64_t count = std::min(kPanel, p.keys - key);
    const FloatRows rows = load_rows(job, {p.v, batch, head, key}, count, p.columns, s);
    job.kernel->extend_ranges(rows.x, rows.stride, count, n, {s.lo, s.hi, s.zero});
  }
  for (int64_t i = 0; i < n; ++i) {
    const float half = (s.hi[i] * 0.5f - s.lo[i] * 0.5f) / 127.0f, scale = half >= kMinScale ? half : 1.0f;
    s.middle[i] = s.lo[i] * 0.5f + s.hi[i] * 0.5f;
    s.inv_scale[i] = 1.0f / scale;
    s.scale[i] = scale + s.zero[i];
  }
}

void pack_key_codes(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t n = round_up(p.depth, kPanel);
  find_mean(job, batch, head, s);
  for (int64_t key = 0; key < p.keys; key += kPanel) {
    const FloatRows rows = load_rows(job, {p.k, batch, head, key}, std::min(kPanel, p.keys - key), p.depth, s);
    const int64_t panel = key / kPanel;
    PanelMeta& meta = meta_of(s.code_keys, panel);
    job.kernel->quantize_keys(rows.x, rows.stride, s.middle, n, groups_of(s.code_keys, panel), meta.scale, meta.colsum);
    std::fill_n(meta.bias, kPanel, 0.0f);
    arrange(job, s.code_keys, panel, p.depth);
  }
}

void pack_value_codes(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t n = round_up(p.columns, kPanel);
  find_scales(job, batch, head, s);
  std::fill_n(s.colsum, n, 0);
  for (int64_t key = 0; key < p.keys; key += kPanel) {
    const int64_t count = std::min(kPanel, p.keys - key);
    const FloatRows rows = load_rows(job, {p.v, batch, head, key}, count, p.columns, s);
    for (int64_t r = count; r < kPanel; ++r)  // s.rows then: keys that do not exist get code 0
      std::memcpy(s.rows + r * rows.stride, s.middle, n * sizeof(float));
    job.kernel->quantize_values(rows.x, rows.stride, n, s.middle, s.inv_scale,
                                groups_of(s.code_values, 0) + key * kPanel, s.code_values.stride, s.colsum);
  }
  for (int64_t panel = 0; panel < n / kPanel; ++panel) {
    PanelMeta& meta = meta_of(s.code_values, panel);
    std::memcpy(meta.colsum, s.colsum + panel * kPanel, sizeof(meta.colsum));
    std::memcpy(meta.scale, s.scale + panel * kPanel, sizeof(meta.scale));
    std::memcpy(meta.bias, s.middle + panel * kPanel, sizeof(meta.bias));
    arrange(job, s.code_values, panel, p.keys);
  }
}

void multiply_key_codes(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t m = block.rows();
  Input input{};
  input.per_token = true;
  if (p.q.column == element_bytes(p.q.dtype)) {
    input.data = p.q.at(block.batch, block.head, block.begin), input.stride = p.q.row, input.dtype = p.q.dtype;
  } else {
    for (int64_t r = 0; r < m; ++r)
      load_row(job, {p.q, block.batch, block.head, block.begin + r}, p.depth, 1.0f, s, s.queries + r * s.depth_stride);
    input.data = s.queries, input.stride = s.depth_stride * 4, input.dtype = DType::f32;
  }
  to_code_rows(job, input, m, p.depth, s.query_codes);
  for (int64_t r = 0; r < m; ++r) s.query_codes.rows.scale[r] *= p.scale;
  multiply(job, s.query_codes, m, p.depth, s.code_keys, keys.begin / kPanel, keys.count() / kPanel,
           {s.scores, s.score_stride * 4, DType::f32, {}}, s.code_sums, *block.ahead, Ahead::keys);
}

// Keys outside get weight 0, up to the last that a kernel reads. Mostly there are none, and a call of memset() for
// nothing, for each row, takes 4 % of the time of 64 rows of 32.
void weigh_codes(const Job& job, int64_t row, int64_t count, const Keys& keys, const Scratch& s) {
  uint8_t* codes = s.weights + row * s.weight_stride;
  const int64_t read = round_up(job.problem->keys, 64);
  for (int64_t r = 0; r < count && keys.begin > 0; ++r) std::memset(codes + r * s.weight_stride, 0, keys.begin);
  for (int64_t r = 0; r < count && read > keys.end; ++r)
    std::memset(codes + r * s.weight_stride + keys.end, 0, read - keys.end);
  job.kernel->weigh_codes(scores_of(row, count, keys, s), s.largest + row, codes + keys.begin, s.weight_stride,
                          s.sums + row);
}

void multiply_value_codes(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t m = block.rows();
  CodeMatrix a = s.weight_codes;
  const bool as_they_are = reads_plain_codes(*job.gemm);
  if (as_they_are) {
    a.rows.codes = s.weights, a.stride = s.weight_stride;
    std::fill_n(a.rows.zero_point, m, 0);
  } else {
    Input input{};
    input.data = s.weights, input.stride = s.weight_stride, input.dtype = DType::u8, input.qparams = {1.0f, 0};
    to_code_rows(job, input, m, p.keys, a);
  }
  for (int64_t r = 0; r < m; ++r) a.rows.scale[r] = 1.0f / s.sums[r];
  // The sums of the codes of v are over all keys, so a kernel that needs them, for codes less 128, takes all.
  const int64_t depth = as_they_are ? std::min(keys.end, p.keys) : p.keys, panels = ceil_div(p.columns, kPanel);
  if (p.columns % kPanel == 0) {  // whole panels go straight to y
    const Output y{output_row(p, block, block.begin), p.y_row, p.y_dtype, {}};
    return multiply(job, a, m, depth, s.code_values, 0, panels, y, s.code_sums, *block.ahead, Ahead::values);
  }
  multiply(job, a, m, depth, s.code_values, 0, panels, {s.out, s.column_stride * 4, DType::f32, {}}, s.code_sums,
           *block.ahead, Ahead::values);
  write_rows(job, block, false, s);
}

}  // namespace

const KeyProduct keys_in_codes = {pack_key_codes, multiply_key_codes};
const ValueProduct values_in_codes = {pack_value_codes, weigh_codes, multiply_value_codes};

}  // namespace attention
}  // namespace torchq
