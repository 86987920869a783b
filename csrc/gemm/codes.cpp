// Rows of codes: quantized here, or copied.

#include "codes.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "divide.h"

namespace torchq {
namespace {

// Rows are quantized in batches of up to kBatchRows, as long as the batch, which is read twice, stays in L1.
constexpr int64_t kBatchRows = 32, kBatchBytes = 16 * 1024;
// Fewer do not pay for what Kernel::quantize_own() does for 16 at once.
constexpr int64_t kLeastTogether = 4;

#include "qparams.inc"

std::atomic<const Kernel*> last{nullptr};

// Where code k of a row lies, k a multiple of 8. stride: bytes between rows. See CodeFormat::interleaved_rows.
uint8_t* code_at(const CodeFormat& format, uint8_t* codes, int64_t row, int64_t k, int64_t stride) {
  if (format.interleaved_rows == 1) return codes + row * stride + k * format.bytes;
  return codes + row / 2 * 2 * stride + row % 2 * 8 + k * 2;
}

// ---- Codes that arrive ready made -------------------------------------------------------------------------------

// flip: 0x80 where signed codes become unsigned or the reverse, else 0.
template <class Code>
void copy_codes(const uint8_t* x, uint8_t flip, int64_t k, Code* codes) {
  if (sizeof(Code) == 1 && !flip && k > 0) return void(std::memcpy(codes, x, k));  // without k, x may be null
  for (int64_t i = 0; i < k; ++i) codes[i] = static_cast<uint8_t>(x[i] ^ flip);
}

// Every 8 codes, to every other 8 bytes.
void copy_interleaved(const uint8_t* x, uint8_t flip, int64_t k, uint8_t* codes) {
  for (int64_t i = 0; i < k; i += 8) copy_codes(x + i, flip, std::min<int64_t>(k - i, 8), codes + 2 * i);
}

void copy_rows(const Job& job, const uint8_t* x, int64_t count, const CodeRows& to) {
  const Input& input = job.problem->x;
  const CodeFormat& format = job.kernel->codes;
  const int64_t k = job.problem->weights->k;
  const bool is_signed = input.dtype == DType::i8;
  const uint8_t flip = is_signed != (format.shift == 128) ? 0x80 : 0;
  for (int64_t r = 0; r < count; ++r, x += input.stride) {
    uint8_t* codes = code_at(format, to.codes, r, 0, job.codes_stride);
    if (format.interleaved_rows == 2)
      copy_interleaved(x, flip, k, codes);
    else if (format.bytes == 1)
      copy_codes(x, flip, k, codes);
    else
      copy_codes(x, flip, k, reinterpret_cast<int16_t*>(codes));
    to.scale[r] = input.qparams.scale;
    to.zero_point[r] = input.qparams.zero_point + (is_signed ? 128 : 0) - format.shift;
  }
}

// ---- Floats -----------------------------------------------------------------------------------------------------

// A batch: the range of every row, then the scale of every row, then the codes. In this order the divisions that give
// one row's scale overlap with those of other rows instead of waiting for the row's range. At K = 64 it saves a third
// of the time.
void quantize_batch(const Job& job, const uint8_t* x, int64_t count, const CodeRows& to) {
  const Input& input = job.problem->x;
  const Kernel& kernel = *job.kernel;
  const PackedHeader& weights = *job.problem->weights;
  // Only its pointer is stored for each row: what is stored in pairs and loaded one by one, the CPU cannot forward.
  FloatRow row{x, input.dtype, weights.k, channel_scale_of(weights)};
  RowRange ranges[kBatchRows];
  for (int64_t r = 0; input.per_token && r < count; ++r) {
    row.x = x + r * input.stride;
    ranges[r] = kernel.range(row);
  }
  for (int64_t r = 0; r < count; ++r) {
    const QParams q = input.per_token ? choose_qparams(ranges[r]) : input.qparams;
    to.scale[r] = q.scale;
    to.zero_point[r] = q.zero_point;
  }
  for (int64_t r = 0; r < count; ++r) {
    row.x = x + r * input.stride;
    kernel.quantize(row, 1.0f / to.scale[r], to.zero_point[r], code_at(kernel.codes, to.codes, r, 0, job.codes_stride),
                    input.per_token);
    to.zero_point[r] -= kernel.codes.shift;
  }
}

// The same by the kernel, which takes rows of their own ranges together.
void quantize_own(const Job& job, const uint8_t* x, int64_t count, const CodeRows& to) {
  const Input& input = job.problem->x;
  const PackedHeader& weights = *job.problem->weights;
  const FloatRow first{x, input.dtype, weights.k, channel_scale_of(weights)};
  job.kernel->quantize_own({first, count, input.stride, to.codes, job.codes_stride, to.scale, to.zero_point});
}

void quantize_rows(const Job& job, const uint8_t* x, int64_t count, const CodeRows& to) {
  const Input& input = job.problem->x;
  const int64_t row_bytes = std::max<int64_t>(job.problem->weights->k * element_bytes(input.dtype), 1);
  int64_t batch = std::min(std::max<int64_t>(kBatchBytes / row_bytes, 1), kBatchRows);
  const bool together = job.kernel->quantize_own && input.per_token && std::min(batch, count) >= kLeastTogether;
  batch = together ? std::min(batch, kRowsTogether) : round_up(batch, job.kernel->codes.interleaved_rows);
  for (int64_t r = 0; r < count; r += batch)
    (together ? quantize_own : quantize_batch)(job, x + r * input.stride, std::min(batch, count - r),
                                               {to.codes + r * job.codes_stride, to.scale + r, to.zero_point + r});
}

// ---- The bytes behind a row's last code -------------------------------------------------------------------------

// Clears the last group of 8 codes where K fills it only partly. The weights there are 0, so any codes would do, but
// they must have been written before a kernel reads them. It comes before the codes.
void clear_last_groups(const Job& job, int64_t count, const CodeRows& to) {
  const CodeFormat& format = job.kernel->codes;
  const int64_t k = job.problem->weights->k;
  for (int64_t r = 0; k % 8 && r < count; ++r)
    std::memset(code_at(format, to.codes, r, k / 8 * 8, job.codes_stride), 0, 8 * format.bytes);
}

// Zeros the codes from K to the next multiple of depth_multiple, whose weights may be anything. quantize() writes whole
// vectors, so values of this call or of an earlier one lie there. It comes after the codes.
void clear_beyond_depth(const Job& job, int64_t count, const CodeRows& to) {
  const int64_t k = job.problem->weights->k, rest = round_up(k, job.kernel->codes.depth_multiple) - k;
  for (int64_t r = 0; rest && r < count; ++r) std::memset(to.codes + r * job.codes_stride + k, 0, rest);
}

}  // namespace

void load_rows(const Job& job, int64_t row, int64_t count, const CodeRows& to) {
  const Input& input = job.problem->x;
  const auto* x = static_cast<const uint8_t*>(input.data) + row * input.stride;
  const bool ready_made = input.dtype == DType::u8 || input.dtype == DType::i8;
  clear_last_groups(job, count, to);
  ready_made ? copy_rows(job, x, count, to) : quantize_rows(job, x, count, to);
  clear_beyond_depth(job, count, to);
}

// A kernel may read whole tiles, and so rows that do not exist.
size_t ready_bytes(const Job& job) {
  return 64 + (job.problem->m + job.tile.m) * (job.codes_stride + sizeof(float) + sizeof(int32_t));
}

CodeRows ready_rows(const Job& job, void* memory) {
  const int64_t rows = job.problem->m + job.tile.m;
  auto* codes = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<intptr_t>(memory), 64));
  auto* scale = reinterpret_cast<float*>(codes + rows * job.codes_stride);
  return {codes, scale, reinterpret_cast<int32_t*>(scale + rows)};
}

CodeRows rows_from(const Job& job, const CodeRows& rows, int64_t row) {
  return {rows.codes + row * job.codes_stride, rows.scale + row, rows.zero_point + row};
}

void quantize(const Job& job, int64_t begin, int64_t end, const CodeRows& to) {
  load_rows(job, begin, end - begin, rows_from(job, to, begin));
}

QParams choose_qparams(const RowRange& range) {
  QParams q;
  choose(range, q.scale, q.zero_point);
  return q;
}

size_t row_scratch_bytes(int64_t k) { return round_up(k, 64) * 2; }

QParams quantize_row(const Kernel& kernel, const void* x, DType dtype, int64_t k, uint8_t* codes, void* scratch) {
  remember(kernel);
  const FloatRow row{x, dtype, k, nullptr};
  const QParams q = choose_qparams(kernel.range(row));
  kernel.quantize(row, 1.0f / q.scale, q.zero_point, scratch, true);
  auto* from = static_cast<uint8_t*>(scratch);
  const CodeFormat& format = kernel.codes;
  const uint8_t flip = format.shift == 128 ? 0x80 : 0;
  if (format.interleaved_rows == 2)
    for (int64_t i = 0; i < k; ++i) codes[i] = code_at(format, from, 0, i / 8 * 8, 0)[i % 8] ^ flip;
  else if (format.bytes == 1)
    copy_codes(from, flip, k, codes);
  else
    for (int64_t i = 0; i < k; ++i) codes[i] = static_cast<uint8_t>(static_cast<const int16_t*>(scratch)[i]);
  return q;
}

void remember(const Kernel& kernel) { last.store(&kernel, std::memory_order_relaxed); }

const Kernel* last_kernel() { return last.load(std::memory_order_relaxed); }

}  // namespace torchq
