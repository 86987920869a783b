// torch.ops.torchq.embedding: rows of an int8 table as floats. Its schema and its checks.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;
using torchq::Table;

constexpr const char* kOp = "torchq::embedding";

// A matrix of rows with their scales, or a packed weight, whose rows are those of the weight.
Table table_of(const Tensor& packed, int64_t dim) {
  check_cpu(kOp, "packed", packed);
  CHECK(packed.scalar_type() == ScalarType::Byte && (packed.dim() == 1 || packed.dim() == 2) && packed.is_contiguous(),
        kOp, ": packed must be what torchq.ops.lookup.pack_table() or torchq.ops.pack() returned, got ",
        name_of(packed.scalar_type()), ' ', shape_of(packed), '.');
  const auto* data = static_cast<const uint8_t*>(packed.const_data_ptr());
  if (packed.dim() == 2) {
    CHECK(packed.size(1) == dim + 4, kOp, ": rows of ", dim, " codes and a scale take ", dim + 4,
          " bytes, but packed is ", shape_of(packed), '.');
    return {packed.size(0), dim, data, nullptr};
  }
  const torchq::PackedHeader* header = torchq::packed_header(data, packed.numel());
  CHECK(header && header->k == dim, kOp, ": packed holds no packed weights of ", dim, " columns (", packed.numel(),
        " bytes). Make it with torchq.ops.pack().");
  return {header->n, dim, nullptr, header};
}

// The bytes of the residuals of a table (rows, dim), or null for none.
const uint8_t* residuals_of(const std::optional<Tensor>& residual, int64_t rows, int64_t dim) {
  if (!residual) return nullptr;
  check_cpu(kOp, "residual", *residual);
  const int64_t width = (dim + 1) / 2;
  CHECK(residual->scalar_type() == ScalarType::Byte && residual->dim() == 2 && residual->size(0) == rows &&
            residual->size(1) == width && residual->is_contiguous(),
        kOp, ": residual must be what torchq.ops.lookup.pack_residuals() returned for this table, uint8 (", rows, ", ",
        width, "), got ", name_of(residual->scalar_type()), ' ', shape_of(*residual), '.');
  return static_cast<const uint8_t*>(residual->const_data_ptr());
}

template <class Index>
void check_ids(const Index* ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)  // torchq/ops/lookup.py makes an IndexError of these words
    CHECK(ids[i] >= 0 && ids[i] < rows, kOp, ": index out of range: ", ids[i], " of a table of ", rows, " rows.");
}

Tensor embedding(const Tensor& packed, const Tensor& ids, int64_t dim, ScalarType dtype,
                 const std::optional<Tensor>& residual) {
  const auto y_dtype = float_dtype(dtype);
  CHECK(y_dtype.has_value(), kOp, ": dtype must be float32, bfloat16 or float16, got ", name_of(dtype), '.');
  CHECK(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int, kOp,
        ": indices must be int64 or int32, got ", name_of(ids.scalar_type()), ". Convert them first: ids.long().");
  CHECK(ids.dim() < kMaxDims, kOp, ": indices may have up to ", kMaxDims - 1, " dimensions, got ", ids.dim(), '.');
  CHECK(dim >= 0, kOp, ": dim must not be negative, got ", dim, '.');
  check_cpu(kOp, "indices", ids);
  Table table = table_of(packed, dim);
  table.residuals = residuals_of(residual, table.rows, dim);
  const Tensor held = ids.is_contiguous() ? ids : contiguous(kOp, ids);
  const int64_t count = held.numel();
  int64_t sizes[kMaxDims];
  *std::copy(ids.sizes().begin(), ids.sizes().end(), sizes) = dim;
  if (held.scalar_type() == ScalarType::Int) {
    const auto* narrow = static_cast<const int32_t*>(held.const_data_ptr());
    check_ids(narrow, count, table.rows);
    Tensor y = empty(kOp, sizes, ids.dim() + 1, dtype);
    const auto wide = with_scratch(kOp, [&] { return std::vector<int64_t>(narrow, narrow + count); });
    torchq::look_up(table, wide.data(), count, *y_dtype, y.mutable_data_ptr());
    return y;
  }
  const auto* wide = static_cast<const int64_t*>(held.const_data_ptr());
  check_ids(wide, count, table.rows);
  Tensor y = empty(kOp, sizes, ids.dim() + 1, dtype);
  torchq::look_up(table, wide, count, *y_dtype, y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def("embedding(Tensor packed, Tensor indices, int dim, ScalarType dtype, Tensor? residual=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("embedding", TORCH_BOX(&embedding)); }
