// AMX-INT8 (Sapphire Rapids and its successors): one instruction computes 16 x 16 outputs over 64 k. There are eight
// tile registers of 16 rows x 64 bytes.
//
//   TDPBUSD tmm, tmm, tmm     acc (16 x 16) += u8 (16 x 64) · s8 (64 x 16)    1 cycle per row of codes, at least 10
//   TILELOADD tmm, [p + s]    16 rows of 64 bytes, s bytes apart              8 cycles from L1, 21 from L2
//   TILESTORED                                                                16 cycles
//
// A tile of weights is 16 groups of 4 k of a P16c4 panel, which are 16 rows of 64 bytes as they lie. TDPBUSD neither
// saturates nor rounds, and wraps only past int32, which kMaxDepth excludes.
//
// Registers. For more than 16 rows: 2 x 2 accumulators, 2 tiles of codes, 2 of weights, so that 4 loads feed 4
// products. For up to 16 rows: 1 x 4 accumulators, 1 tile of codes, 3 of weights. For a few more than 32 rows: 3 x 1
// accumulators, 3 tiles of codes, 1 of weights.
//
// Rows are divided evenly, into pairs of tiles that all have the same height, which may be less than 32. Where the
// division leaves a remainder, the last pair begins a few rows early and computes those rows a second time: 65 rows are
// 3 pairs of 22. One tile configuration then serves the whole call.
//
// Depth. From L2, 4 loads take longer than 4 products. So where a pair of panels does not fit in L1, the depth is cut
// into parts. While one part of the panels is in L1, all rows pass over it, and the sums wait in L2 (Block::sums).
//
// Sums can leave a tile register only to memory. They are stored to L1 while the next tile starts to multiply, and the
// epilogue reads them from there.
//
// Outputs. A tile's outputs are stored in one burst, and a store that misses L1 holds back those behind it. So their
// lines are asked for into L2 while the tile multiplies, whose loads would push them out of L1 again, and into L1 a few
// rows before they are written. ms on Zen 4, where tiles load and store but multiply nothing, 1024 rows: 768x3072 with
// GELU 3.9 -> 3.3, 768x768 0.88 -> 0.77; all layers of BERT-base 152 -> 135. With AMX it was not timed.

#include "kernel.h"

#if defined(__x86_64__) && TORCHQ_HAS_AMX
#include <float.h>
#include <immintrin.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace torchq {
namespace amx_int8 {

using Code = uint8_t;
#include "vec512.inc"

#include "rows_x86.inc"
#include "rows.inc"
#include "rows_together.inc"

constexpr bool kZeroPointFirst = false;

#include "epilogue.inc"
#include "cell.inc"

// Products of tiles are of no use where channels do not mix.
inline Ints dot(Ints acc, Ints a, Ints w) { return _mm512_dpbusd_epi32(acc, a, w); }
#include "depthwise_codes.inc"
#include "depthwise.inc"
#include "gather.inc"
#include "normalize.inc"

constexpr int kTileRows = 16, kTileDepth = 64, kTileBytes = kTileRows * 64, kGroups = kTileDepth / 4;
// A step is 64 k. A pair of panels and two tiles of codes of kStepsInL1 steps fit in L1, 48 KiB. Deeper problems are
// cut into parts of about kStepsPerPart steps. Shorter parts would load and store the sums more often.
constexpr int64_t kStepsInL1 = 12, kStepsPerPart = 8;
// Where the depth is not cut, a tile of rows passes over this many panels, up to 400 KB in L2, before the next tile of
// rows does. It then writes long stretches of each row of y, and so needs fewer TLB entries at a time.
// 1024x3072x768: 2.5 -> 2.0 ms.
constexpr int kPanelsTogether = 32;
// From 33 to this many rows, and where the depth is not cut, three tiles of rows are faster than two pairs: the tiles
// of the pairs would be so low that each product takes the minimum of 10 cycles. 33x768x768: 14.8 -> 13.7 us. Where the
// depth is cut, pairs win, since they need fewer loads.
constexpr int kThreeTilesUpTo = 39;
constexpr int64_t kWeightsInL2 = 3 << 19;  // bytes of weights that stay in an L2 of 2 MiB beside codes and outputs

// ---- Tile registers ---------------------------------------------------------------------------------------------

#ifdef TORCHQ_TILES  // registers in memory, for CPUs without AMX: tests/core
#include TORCHQ_TILES
#else
#include "tiles.inc"
#endif
#include "tile_step.inc"

// ---- The epilogue -----------------------------------------------------------------------------------------------

constexpr int kRowsAhead = 12;  // before a row is written, its lines are asked for into L1

// Rows of complete sums, and what the epilogue needs to turn them into outputs.
struct Waiting {
  const int32_t* sums;
  int rows;
  const uint8_t* panel;
  const float* scale;
  const int32_t* zero_point;
  uint8_t* out;
  const uint8_t* residual;
};

template <int kWide>
TORCHQ_INLINE void finish_by(const Epilogue& e, const Block& b, Waiting w) {
  const int64_t panel_stride = b.panel_stride, out_stride = b.out_stride, residual_stride = b.residual.stride;
  const Residual& summand = b.residual;
  const int64_t row_bytes = kWide * kLanes * element_bytes(e.dtype);
  for (; w.rows; --w.rows, w.sums += kWide * kLanes, w.out += out_stride) {
    if (w.rows > kRowsAhead)  // behind the tile's own rows may lie those of another thread
      for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(w.out + kRowsAhead * out_stride + i, 1);
    const Ints zero_point = splat(*w.zero_point++);
    const Floats row_scale = splat(*w.scale++);
    TORCHQ_UNROLL
    for (int c = 0; c < kWide; ++c)
      finish(e, summand, load(w.sums + c * kLanes), zero_point, row_scale, w.panel + c * panel_stride, w.out,
             w.residual, c * kLanes, c * kLanes);
    if (e.curved && e.dtype != DType::i32) finish_curved(e, 1, kWide * kLanes, w.out, 0);
    if (w.residual) w.residual += residual_stride;
  }
}

// The commonest output gets code without branches.
template <int kWide>
__attribute__((noinline)) void finish_rows(const Epilogue& e, const Block& b, const Waiting& w) {
  if (e.dtype == DType::f32 && e.activation == Activation::none && !w.residual)
    return finish_by<kWide>({DType::f32, Activation::none, e.inv_scale, e.map, nullptr}, b, w);
  finish_by<kWide>(e, b, w);
}

// ---- Multiplying ------------------------------------------------------------------------------------------------

// Up to kTall x 16 rows and kWide panels of outputs, over one part of the depth: what the accumulators hold at once.
struct OutputTile {
  const uint8_t *codes, *weights;
  int64_t steps;
  bool from_zero;  // the first part of the depth; else the sums continue from those in `sums`
  bool complete;   // the last part of the depth, after which the epilogue takes `waiting`
  int32_t* sums;   // rows x kWide x 16, where the accumulators are stored
  Waiting waiting;
};

// The accumulators, one per tile of rows and panel, and where each is stored.
template <int kTall, int kWide>
struct Accumulators {
  static constexpr int64_t kStride = kWide * 64;  // bytes between rows of sums
  int64_t second_row;                             // where the second tile of rows begins; the third at twice that

  template <int kIndex>
  int32_t* place(const OutputTile& t) const {
    constexpr int kRow = kIndex / (4 / kTall), kPanel = kIndex % (4 / kTall);
    return t.sums + (kRow * second_row * kWide + kPanel) * 16;
  }
  // Stores the old sums and starts the new ones. Callers put it between the products of the first step. Four stores in
  // a row would take longer than the step: in a loop of 32 x 32 x 64 in L1, 47 % of peak instead of 69 %.
  template <int kIndex>
  TORCHQ_INLINE void exchange(const OutputTile& before, const OutputTile& now) const {
    store_tile<kIndex>(place<kIndex>(before), kStride);
    now.from_zero ? zero_tile<kIndex>() : load_tile<kIndex>(place<kIndex>(now), kStride);
  }
  void store_all(const OutputTile& t) const {
    store_tile<0>(place<0>(t), kStride);
    if constexpr (kTall == 3 || kWide > 1) store_tile<1>(place<1>(t), kStride);
    if constexpr (kTall > 1 || kWide > 2) store_tile<2>(place<2>(t), kStride);
    if constexpr (kTall == 2 ? kWide > 1 : kWide > 3) store_tile<3>(place<3>(t), kStride);
  }
};

template <int kTall, int kWide>
struct FirstExchange {
  Accumulators<kTall, kWide> accumulators;
  const OutputTile &before, &now;
  template <int kIndex>
  TORCHQ_INLINE void at() const {
    accumulators.template exchange<kIndex>(before, now);
  }
};

// The weights needed next, prefetched into L2 while several tiles of rows multiply by the present ones.
// 512x4096x4096, whose weights are in L3: 5.7 -> 5.4 ms. With a single tile of rows the hardware's prefetcher does
// better alone.
struct Prefetch {
  const uint8_t *next, *end;  // in the first panel; the other panels lie panel_stride further
  int64_t panel_stride;
  int lines;  // cache lines of each panel, at every step
};

template <int kWide>
TORCHQ_INLINE void prefetch(Prefetch& a) {
  if (a.next >= a.end) return;
  for (int i = 0; i < a.lines; ++i, a.next += 64) {
    TORCHQ_UNROLL
    for (int c = 0; c < kWide; ++c) _mm_prefetch(a.next + c * a.panel_stride, _MM_HINT_T1);
  }
}

// The lines of a tile's outputs, which its steps after the first ask for, into L2.
struct OutputLines {
  const uint8_t* row;
  int64_t stride, bytes;  // of a row's outputs
  int rows, each;         // how many are left, and how many a step asks for

  OutputLines(const Block& b, const OutputTile& t, int columns)
      : row(t.waiting.out), stride(b.out_stride), bytes(columns * element_bytes(b.out_dtype)) {
    rows = t.complete ? t.waiting.rows : 0;
    each = static_cast<int>((rows + t.steps) / (t.steps > 1 ? t.steps - 1 : 1));
  }
  TORCHQ_INLINE void fetch() {
    for (int r = rows < each ? rows : each; r > 0; --r, --rows, row += stride)
      for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(row + i, _MM_HINT_T1);
  }
};

// Multiplies a tile. Its first step stores the sums of the tile before, which go through the epilogue if they are
// complete. (To spread the epilogue over the steps, a row or two after each, is no faster.)
template <int kTall, int kWide>
__attribute__((noinline)) void multiply(const Epilogue& e, const Block& b, int64_t second_row, const OutputTile& before,
                                        const OutputTile& t, Prefetch& ahead) {
  const int64_t codes_stride = b.codes_stride, panel_stride = b.panel_stride, second = second_row * codes_stride;
  const uint8_t *codes = t.codes, *weights = t.weights;
  step<DotCodes, kTall, kWide>(codes, codes_stride, second, weights, panel_stride,
                               FirstExchange<kTall, kWide>{{second_row}, before, t});
  prefetch<kWide>(ahead);
  if (before.complete) finish_rows<kWide>(e, b, before.waiting);
  OutputLines lines(b, t, kWide * kLanes);
  for (int64_t s = 1; s < t.steps; ++s) {
    lines.fetch();
    codes += kTileDepth, weights += kTileBytes;
    step<DotCodes, kTall, kWide>(codes, codes_stride, second, weights, panel_stride, NoExchange());
    prefetch<kWide>(ahead);
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The loops over a block: rows in tiles of up to kTall x 16, columns in groups of kWide panels, the depth in parts.
template <int kTall, int kWide>
struct Sweep {
  const Block& b;
  int64_t tiles, height;  // how many tiles of up to kTall x 16 rows, and the rows of each
  int64_t first_rows;     // the rows of each tile register but the last, which may have fewer
  int64_t steps, parts;
  int group;  // panels that a tile of rows passes over before the next tile of rows does

  explicit Sweep(const Block& block) : b(block) {
    tiles = ceil_div(b.m, kTall * kTileRows), height = ceil_div(b.m, tiles), first_rows = ceil_div(height, kTall);
    steps = ceil_div(b.k_groups, kGroups);
    parts = tiles > 1 && steps > kStepsInL1 ? (steps + kStepsPerPart / 2) / kStepsPerPart : 1;
    group = parts == 1 ? kPanelsTogether : kWide;
  }
  void configure_tiles() const {
    const int first = static_cast<int>(first_rows), second = static_cast<int>(height) - first;
    if (kTall == 3)  // the fourth is not used
      configure({first, first, second - first, first, first, first, second - first, kTileRows});
    else if (kTall == 2)
      configure({first, first, second, second, first, second, kTileRows, kTileRows});
    else
      configure({first, first, first, first, first, kTileRows, kTileRows, kTileRows});
  }
  int64_t step_of(int64_t part) const { return steps * part / parts; }
  int64_t steps_of(int64_t part) const { return step_of(part + 1) - step_of(part); }
  const uint8_t* weights(int panel, int64_t part) const {
    return b.panel + panel * b.panel_stride + kPanelMeta + step_of(part) * kTileBytes;
  }
  // The index-th tile's share of the weights that are needed next: those of the next part of the depth, or after the
  // last part those of the next group of panels.
  Prefetch ahead_of(int panel, int64_t part, int64_t index, int end_panel) const {
    const bool same = part + 1 < parts;
    const int next_panel = same ? panel : panel + group;
    const int64_t next_part = same ? part + 1 : 0;
    if (tiles == 1 || next_panel >= end_panel || b.panels * b.panel_stride < kWeightsInL2) return {};
    const int lines = static_cast<int>(ceil_div(kTileRows, tiles));
    const uint8_t *begin = weights(next_panel, next_part), *end = begin + steps_of(next_part) * kTileBytes;
    return {begin + index * lines * steps_of(part) * 64, end, b.panel_stride, lines};
  }
  OutputTile tile(int panel, int64_t part, int64_t index, int32_t* complete) const {
    const int64_t row = smaller(index * height, b.m - height);
    OutputTile t;
    t.codes = static_cast<const uint8_t*>(b.codes) + row * b.codes_stride + step_of(part) * kTileDepth;
    t.weights = weights(panel, part);
    t.steps = steps_of(part);
    t.from_zero = part == 0;
    t.complete = part == parts - 1;
    t.sums = parts == 1 ? complete : b.sums + index * height * kWide * 16;  // by index: a row in two tiles has two sums
    uint8_t* out = static_cast<uint8_t*>(b.out) + row * b.out_stride;
    out += panel * kPanelColumns * element_bytes(b.out_dtype);
    const uint8_t* meta = b.panel + panel * b.panel_stride;
    const auto* residual = static_cast<const uint8_t*>(b.residual.at(panel * kPanelColumns));
    if (residual) residual += row * b.residual.stride;
    t.waiting = {t.sums, static_cast<int>(height), meta, b.scale + row, b.zero_point + row, out, residual};
    return t;
  }
};

template <int kTall, int kWide>
void sweep(const Epilogue& e, const Block& b, int first_panel, int end_panel) {
  if (first_panel == end_panel) return;
  const Sweep<kTall, kWide> s(b);
  s.configure_tiles();
  alignas(64) int32_t complete[kTall * kTileRows * kWide * 16];
  OutputTile before{};
  before.sums = complete;  // the first exchange stores here what the registers happen to hold
  for (int group = first_panel; group < end_panel; group += s.group)
    for (int64_t part = 0; part < s.parts; ++part)
      for (int64_t i = 0; i < s.tiles; ++i)
        for (int panel = group; panel < smaller(group + s.group, end_panel); panel += kWide) {
          const OutputTile t = s.tile(panel, part, i, complete);
          Prefetch ahead = s.ahead_of(panel, part, i, end_panel);
          multiply<kTall, kWide>(e, b, s.first_rows, before, t, ahead);
          before = t;
        }
  Accumulators<kTall, kWide>{s.first_rows}.store_all(before);
  finish_rows<kWide>(e, b, before.waiting);
  release_tiles();
}

void run(const Block& b) {
  alignas(64) float curved[4 * kLanes];  // of one row
  const Epilogue e{b.out_dtype, b.activation, splat(b.out_inv_scale), code_map(b.out_zero_point),
                   b.activation > Activation::relu ? curved : nullptr};
  const bool three = b.m > 2 * kTileRows && b.m <= kThreeTilesUpTo && b.k_groups <= kStepsInL1 * kGroups;
  if (three) return sweep<3, 1>(e, b, 0, b.panels);
  if (b.m > kTileRows) {
    sweep<2, 2>(e, b, 0, b.panels & ~1);
    return sweep<2, 1>(e, b, b.panels & ~1, b.panels);
  }
  sweep<1, 4>(e, b, 0, b.panels & ~3);
  switch (b.panels & 3) {
    case 3: return sweep<1, 3>(e, b, b.panels & ~3, b.panels);
    case 2: return sweep<1, 2>(e, b, b.panels & ~3, b.panels);
    default: return sweep<1, 1>(e, b, b.panels & ~3, b.panels);
  }
}

}  // namespace amx_int8

constexpr Kernel kernel_amx_int8 = [] {
  Kernel k;
  k.name = "amx_int8";
  k.needs = kAvx512Vnni | kAmxInt8;
  k.tiling.tile = {2 * amx_int8::kTileRows, 2 * amx_int8::kTileRows, 4};
  k.range = amx_int8::range;
  k.quantize = amx_int8::quantize;
  k.quantize_own = amx_int8::quantize_own;
  k.run = amx_int8::run;
  k.activate = amx_int8::activate;
  k.cell = amx_int8::cell;
  k.gather = amx_int8::gather;
  k.interleave = amx_int8::interleave;
  k.depthwise = amx_int8::depthwise;
  k.normalize = amx_int8::normalize;
  k.tiling.own_loops = true;
  k.codes.depth_multiple = 64;
  k.small = {&kernel_avx512_vnni, 3, 8, 1 << 16};
  k.tiling.codes_budget = 1 << 20;
  k.threading.work_per_thread = 4 << 20;
  k.threading.min_rows = 16;
  k.threading.max_rows_by_columns_beyond_l2 = 128;  // a thread then reads only its own weights, which take longest
  return k;
}();

}  // namespace torchq

#pragma GCC pop_options
#endif
