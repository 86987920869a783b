// libFuzzer on the face of the core, under ASan and UBSan. The first byte of an input chooses what the others are:
//
//   strangers   a packed buffer and what was changed of it: if packed_header() takes it, it is unpacked and multiplied,
//               whatever comes of it
//   problems    sizes, types, strides, scales and the bytes of all tensors of a problem, and its number of parts
//   rows        a row to quantize
//   steps       a step of a recurrent cell
//
// Each buffer is as long as gemm.h says, to the byte. Of problems and rows every kernel must give the bits of
// `reference`. To fuzz more of the core, write a function of Bytes and add it to kPrograms.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/attention/attention.h"
#include "../../csrc/linear.h"

namespace torchq::fuzz {
namespace {

// Reads numbers off an input; zeros behind its end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <class T>
  T take() {
    T value{};
    const size_t bytes = std::min(sizeof(T), size_);
    if (bytes > 0) std::memcpy(&value, data_, bytes);
    data_ += bytes, size_ -= bytes;
    return value;
  }
  int64_t below(int64_t n) { return take<uint16_t>() % n; }
  template <class T, size_t n>
  T pick(const T (&from)[n]) {
    return from[take<uint8_t>() % n];
  }
  // The rest of the input again and again, so that short inputs fill large tensors.
  void fill(void* to, size_t bytes) const {
    for (size_t at = 0; size_ > 0 && at < bytes; at += size_)
      std::memcpy(static_cast<uint8_t*>(to) + at, data_, std::min(size_, bytes - at));
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// Zeros, in memory of exactly this many bytes; for none it is null, as torch's.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : data_(bytes ? std::calloc(bytes, 1) : nullptr), bytes_(bytes) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T = uint8_t>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_;
};

[[noreturn]] void wrong(const char* what, const Kernel& kernel) {
  std::fprintf(stderr, "wrong: %s, kernel %s\n", what, kernel.name);
  std::abort();
}

float widened(DType dtype, const uint8_t* at) {
  uint32_t bits = 0;
  std::memcpy(&bits, at, element_bytes(dtype));
  if (dtype == DType::f16) return (bits & 0x7FFF) > 0x7C00 ? NAN : 0.0f;  // all that is asked of it: whether it is NaN
  if (dtype == DType::bf16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The same bits; where two NaNs met, either may have survived.
bool same(DType dtype, const Buffer& one, const Buffer& other) {
  if (one.bytes() == 0 || std::memcmp(one.as(), other.as(), one.bytes()) == 0) return true;
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16) return false;
  for (size_t at = 0; at < one.bytes(); at += element_bytes(dtype)) {
    const bool differ = std::memcmp(one.as() + at, other.as() + at, element_bytes(dtype)) != 0;
    if (differ && !(std::isnan(widened(dtype, one.as() + at)) && std::isnan(widened(dtype, other.as() + at))))
      return false;
  }
  return true;
}

QParams any_qparams(Bytes& in) {
  const float scale = in.take<float>();
  return {is_scale(scale) ? scale : 0.02f, in.take<uint8_t>()};
}

// Any product with these weights.
struct Product {
  const PackedHeader& weights;
  const int64_t m, x_stride;
  const DType x_dtype, y_dtype;
  const int parts;  // 0: as many as schedule() says
  LayerNumbers layer;
  const Buffer x;

  Product(Bytes& in, const PackedHeader& packed)
      : weights(packed),
        m(in.below(40) + 1),
        // As of a view: rows may have gaps, overlap, or be the same row.
        x_stride(in.pick({weights.k, weights.k, weights.k + in.below(9), in.below(weights.k + 1)})),
        x_dtype(weights.has_channel_scale ? in.pick({DType::f32, DType::bf16, DType::f16})
                                          : in.pick({DType::f32, DType::bf16, DType::f16, DType::u8, DType::i8})),
        y_dtype(in.pick({DType::f32, DType::bf16, DType::f16, DType::u8, DType::i32})),
        parts(static_cast<int>(in.below(6))),
        x(weights.k ? ((m - 1) * x_stride + weights.k) * element_bytes(x_dtype) : 0) {
    layer.per_token = in.take<uint8_t>() % 2 && x_dtype != DType::u8 && x_dtype != DType::i8;
    layer.x = any_qparams(in);
    layer.y = any_qparams(in);
    if (y_dtype != DType::i32) layer.activation = static_cast<Activation>(in.below(kActivations));
    in.fill(x.as(), x.bytes());
  }
  size_t y_bytes() const { return m * weights.n * element_bytes(y_dtype); }

  void run_on(const Kernel& kernel, const Buffer& y) const {
    const Rows rows{x.as(), m, x_stride, x_dtype};
    const Problem problem = linear_problem(layer, rows, weights, y.as(), y_dtype);
    Job job = schedule(kernel, problem);
    if (parts > 0) job.parts = parts;
    const Buffer scratch(job.scratch_bytes);
    std::memset(scratch.as(), 0xA5, job.scratch_bytes);
    for (int i = 0; i < job.parts; ++i) run(job, i, scratch.as());
  }
};

// Calls f with each kernel that can run and reads this layout; the reference comes last.
template <class F>
void for_each_kernel(Layout layout, const F& f) {
  for (int i = 0; i < kernel_count(); ++i)
    if (can_run(kernel_at(i)) && reads(kernel_at(i), layout)) f(kernel_at(i));
}

struct Unpacked {
  Buffer weight, scale, bias, channel_scale;
  explicit Unpacked(const PackedHeader& weights)
      : weight(weights.n * weights.k),
        scale(weights.n * 4),
        bias(weights.n * 4),
        channel_scale(weights.has_channel_scale ? weights.k * 4 : 0) {
    unpack(&weights, weight.as<int8_t>(), scale.as<float>(), bias.as<float>(), channel_scale.as<float>());
  }
};

// A buffer as pack_begin() leaves it, its header and its length changed by the input, and then anything for panels.
void strangers(Bytes& in) {
  const int64_t n = in.below(50), k = in.below(140);
  const bool scaled = in.take<uint8_t>() % 2;
  const Buffer channel_scale(k * 4), whole(packed_bytes(n, k, scaled));
  const Buffer packed(std::max<int64_t>(static_cast<int64_t>(whole.bytes()) + in.take<int8_t>(), 0));
  pack_begin(in.pick({Layout::p16c4, Layout::p16c8}), n, k, true, scaled ? channel_scale.as<float>() : nullptr,
             whole.as());
  for (int changes = static_cast<int>(in.below(4)); changes > 0; --changes) {
    uint8_t* at = whole.as() + in.below(sizeof(PackedHeader) - 7);
    uint64_t value;
    std::memcpy(&value, at, 8);
    value ^= in.take<uint64_t>();
    std::memcpy(at, &value, 8);
  }
  in.fill(whole.as() + sizeof(PackedHeader), whole.bytes() - sizeof(PackedHeader));
  if (packed.bytes() > 0) std::memcpy(packed.as(), whole.as(), std::min(whole.bytes(), packed.bytes()));
  const PackedHeader* header = packed_header(packed.as(), packed.bytes());
  if (!header) return;
  const Unpacked all(*header);
  if (header->n == 0) return;
  const Product product(in, *header);
  for_each_kernel(header->layout, [&](const Kernel& kernel) { product.run_on(kernel, Buffer(product.y_bytes())); });
}

void problems(Bytes& in) {
  const int64_t n = in.below(70) + 1, k = in.below(300);
  const bool has_bias = in.take<uint8_t>() % 2, scaled = in.take<uint8_t>() % 2 && k > 0;
  const Buffer weight(n * k), scale(n * 4), bias(n * 4), channel_scale(scaled ? k * 4 : 0);
  const Buffer packed(packed_bytes(n, k, scaled));
  in.fill(weight.as(), weight.bytes());
  in.fill(scale.as(), scale.bytes());
  if (has_bias) in.fill(bias.as(), bias.bytes());
  in.fill(channel_scale.as(), channel_scale.bytes());
  for (size_t i = 0; i < channel_scale.bytes() / 4; ++i)
    if (!is_scale(channel_scale.as<float>()[i])) channel_scale.as<float>()[i] = 1.5f;
  pack_begin(in.pick({Layout::p16c4, Layout::p16c8}), n, k, has_bias, channel_scale.as<float>(), packed.as());
  const int64_t panels = panel_count(n), middle = in.below(panels + 1);
  for (const auto& [begin, end] : {std::pair(middle, panels), std::pair(int64_t{0}, middle)})
    pack_panels(weight.as<int8_t>(), scale.as<float>(), has_bias ? bias.as<float>() : nullptr, packed.as(), begin, end);
  const PackedHeader* header = packed_header(packed.as(), packed.bytes());
  if (!header || header->n != n || header->k != k) wrong("packed_header() refuses what was packed", kernel_reference);
  const Unpacked all(*header);
  const bool back = same(DType::i8, all.weight, weight) && same(DType::i32, all.scale, scale) &&
                    same(DType::i32, all.bias, bias) && same(DType::i32, all.channel_scale, channel_scale);
  if (!back) wrong("unpack() gives other weights", kernel_reference);
  const Product product(in, *header);
  const Buffer expected(product.y_bytes());
  product.run_on(kernel_reference, expected);
  for_each_kernel(header->layout, [&](const Kernel& kernel) {
    const Buffer y(product.y_bytes());
    product.run_on(kernel, y);
    if (!same(product.y_dtype, expected, y)) wrong("another y than the reference's", kernel);
  });
}

void rows(Bytes& in) {
  const int64_t k = in.below(700);
  const DType dtype = in.pick({DType::f32, DType::bf16, DType::f16});
  const Buffer x(k * element_bytes(dtype)), expected(k);
  in.fill(x.as(), x.bytes());
  const auto quantize = [&](const Kernel& kernel, const Buffer& codes) {
    const Buffer scratch(row_scratch_bytes(k));
    return quantize_row(kernel, x.as(), dtype, k, codes.as(), scratch.as());
  };
  const QParams want = quantize(kernel_reference, expected);
  for (int i = 0; i < kernel_count(); ++i) {
    const Kernel& kernel = kernel_at(i);
    if (!can_run(kernel)) continue;
    const Buffer codes(k);
    const QParams got = quantize(kernel, codes);
    const bool scale = got.scale == want.scale || (std::isnan(got.scale) && std::isnan(want.scale));
    if (!scale || got.zero_point != want.zero_point || !same(DType::u8, expected, codes))
      wrong("other codes than the reference's", kernel);
  }
}

// A step of a recurrent cell.
void steps(Bytes& in) {
  const auto cell = static_cast<Cell>(in.below(kCells));
  const int64_t size = in.below(100), floats = (2 * gates_of(cell) + 2) * size;
  const Buffer values(floats * sizeof(float)), expected(2 * size * sizeof(float));
  in.fill(values.as(), values.bytes());
  const auto step = [&](const Kernel& kernel, const Buffer& state) {
    const float *input = values.as<float>(), *recurrent = input + gates_of(cell) * size;
    if (size > 0) std::memcpy(state.as(), recurrent + gates_of(cell) * size, state.bytes());
    kernel.cell(cell, {size, input, recurrent, state.as<float>(), state.as<float>() + size});
  };
  step(kernel_reference, expected);
  for (int i = 0; i < kernel_count(); ++i) {
    const Kernel& kernel = kernel_at(i);
    if (!can_run(kernel)) continue;
    const Buffer state(expected.bytes());
    step(kernel, state);
    if (!same(DType::f32, expected, state)) wrong("another state than the reference's", kernel);
  }
}

// A tensor (batch, heads, rows, columns) in an order of its own, or one row for all rows, or one head for all heads.
struct Operand {
  const int64_t rows, columns;
  const bool transposed, one_row, one_head;
  const DType dtype;
  const Buffer data;

  Operand(Bytes& in, DType type, int64_t heads, int64_t r, int64_t c)
      : rows(r),
        columns(c),
        transposed(in.take<uint8_t>() % 2),
        one_row(in.take<uint8_t>() % 8 == 0),
        one_head(in.take<uint8_t>() % 8 == 0),
        dtype(type),
        data((one_head ? 1 : heads) * (one_row ? 1 : rows) * columns * element_bytes(type)) {
    in.fill(data.as(), data.bytes());
  }
  attention::View view(int64_t heads_of_batch) const {
    const int64_t size = element_bytes(dtype), stored = one_row ? 1 : rows,
                  head = one_head ? 0 : stored * columns * size;
    const int64_t row = one_row ? 0 : transposed ? size : columns * size;
    return {data.as(), dtype, heads_of_batch * head, head, row, transposed ? stored * size : size};
  }
};

// Attention by every kernel. Kernels agree to rounding only (tests/test_attention.py), but the number of parts changes
// no bit of one.
void attend(Bytes& in) {
  attention::Problem p{};
  p.scheme = static_cast<attention::Scheme>(in.below(attention::kSchemes));
  p.batch = in.below(2) + 1, p.kv_heads = in.below(2) + 1, p.heads = p.kv_heads * (in.below(2) + 1);
  p.rows = in.below(60) + 1, p.keys = in.below(90), p.depth = in.below(40), p.columns = in.below(40) + 1;
  p.band = {in.pick({INT64_MIN, INT64_MIN, in.below(9) - 4}), in.pick({INT64_MAX, INT64_MAX, in.below(9)})};
  p.band.first = p.band.first == INT64_MIN ? -p.rows - p.keys : p.band.first;
  p.band.last = p.band.last == INT64_MAX ? p.rows + p.keys : p.band.last;
  p.scale = 1.0f / (1 + in.take<uint8_t>());
  const int parts = static_cast<int>(in.below(5)) + 1;
  const DType dtype = in.pick({DType::f32, DType::bf16, DType::f16});
  const bool masked = in.take<uint8_t>() % 2;
  const Operand q(in, dtype, p.batch * p.heads, p.rows, p.depth), k(in, dtype, p.batch * p.kv_heads, p.keys, p.depth),
      v(in, dtype, p.batch * p.kv_heads, p.keys, p.columns);
  const Operand mask(in, in.pick({DType::u8, DType::f32, DType::bf16}), p.batch * p.heads, p.rows, p.keys);
  p.q = q.view(p.heads), p.k = k.view(p.kv_heads), p.v = v.view(p.kv_heads);
  if (masked) p.mask = mask.view(p.heads);
  const size_t y_bytes = p.batch * p.heads * p.rows * p.columns * 4;
  const auto compute = [&](const Kernel& gemm, int count, const Buffer& y) {
    p.y = y.as(), p.y_dtype = DType::f32;
    p.y_row = p.columns * 4, p.y_head = p.rows * p.y_row, p.y_batch = p.heads * p.y_head;
    attention::Job job = attention::schedule(attention::kernel_beside(gemm), gemm, p);
    job.parts = static_cast<int>(std::min<int64_t>(count, p.batch * p.heads * job.blocks));
    const Buffer scratch(job.scratch_bytes);
    std::memset(scratch.as(), 0xA5, job.scratch_bytes);
    for (int i = 0; i < job.parts; ++i) run(job, i, scratch.as());
  };
  for (int i = 0; i < kernel_count(); ++i) {
    const Kernel& kernel = kernel_at(i);
    if (!can_run(kernel)) continue;
    const Buffer whole(y_bytes), in_parts(y_bytes);
    compute(kernel, 1, whole);
    compute(kernel, parts, in_parts);
    if (!same(DType::f32, whole, in_parts)) wrong("other bits in parts, attention", kernel);
  }
}

void (*const kPrograms[])(Bytes&) = {strangers, problems, rows, steps, attend};

}  // namespace
}  // namespace torchq::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  torchq::fuzz::Bytes in(data, size);
  in.pick(torchq::fuzz::kPrograms)(in);
  return 0;
}
