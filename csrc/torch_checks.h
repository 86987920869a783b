// What the files with torch's ops share: the words of errors, allocation, and checks of tensors. Errors are thrown
// without STD_TORCH_CHECK, which puts the build machine's file name and line in front of the user's message.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "gemm/gemm.h"
#include "linear.h"

// Why the latest call of torch's C interface failed. Torch has this from 2.13; before, it writes the reason to stderr.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace torchq {
namespace ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// It is a macro so that the parts of a message are computed only if it is needed: shape_of() alone takes half a
// microsecond.
#define CHECK(ok, ...)            \
  do {                            \
    if (!(ok)) fail(__VA_ARGS__); \
  } while (false)

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "another dtype";
  }
}

inline std::optional<DType> float_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return std::nullopt;
  }
}

// The dtypes of x and y of an op that also takes and gives u8 codes.
struct Dtypes {
  DType x, y;
};

inline Dtypes dtypes_of(const char* op, const Tensor& x, ScalarType out_dtype) {
  const auto of = [](ScalarType type) {
    return type == ScalarType::Byte ? std::optional(DType::u8) : float_dtype(type);
  };
  const auto x_dtype = of(x.scalar_type()), y_dtype = of(out_dtype);
  CHECK(x_dtype.has_value(), op, ": x must be float32, bfloat16, float16, or uint8 codes, got ",
        name_of(x.scalar_type()), '.');
  CHECK(y_dtype.has_value(), op, ": out_dtype must be float32, bfloat16, float16 or uint8, got ", name_of(out_dtype),
        '.');
  return {*x_dtype, *y_dtype};
}

inline Activation activation_of(const char* op, int64_t activation) {
  CHECK(is_activation(activation), op, ": activation must be a torchq.ops.Activation, 0 (none) to ", kActivations - 1,
        " (relu6), got ", activation, '.');
  return static_cast<Activation>(activation);
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ')';
  return out.str();
}

constexpr int64_t kMaxDims = 64;  // torch's own limit for most ops, so that shapes fit on the stack

// torchq/modules/quantized_linear.py makes a MemoryError of these words.
constexpr const char* kOutOfMemory = ": out of memory";

// Beside it torch can only have found no memory: all arguments have been checked.
[[noreturn]] inline void fail_in_torch(const char* op, const char* what) {
  const auto reason = torch_exception_get_what_without_backtrace;
  fail(op, kOutOfMemory, " for ", what, reason ? ": " : ".", reason ? reason() : "");
}

inline Tensor empty_strided(const char* op, const int64_t* sizes, const int64_t* strides, int64_t dims,
                            ScalarType type) {
  AtenTensorHandle handle;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  if (aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle))
    fail_in_torch(op, "its output");
  return Tensor(handle);
}

inline Tensor empty(const char* op, const int64_t* sizes, int64_t dims, ScalarType type) {
  int64_t strides[kMaxDims], stride = 1;
  for (int64_t i = dims; i-- > 0; stride *= sizes[i]) strides[i] = stride;
  return empty_strided(op, sizes, strides, dims, type);
}

inline Tensor empty(const char* op, std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty(op, sizes.begin(), sizes.size(), type);
}

inline Tensor contiguous(const char* op, const Tensor& t) {
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {  // its message is a line of torch's source
    fail_in_torch(op, "a contiguous copy");
  }
}

// What `f` returns, which allocates scratch space.
template <class F>
auto with_scratch(const char* op, const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    fail(op, kOutOfMemory, " for its scratch space.");
  }
}

// On the CPU, and with all its elements in memory: a storage may have been resized since.
inline void check_cpu(const char* op, const char* argument, const Tensor& t) {
  CHECK(t.is_cpu(), op, ": ", argument, " must be on the CPU. Move it there with .cpu().");
  if (t.numel() == 0) return;
  int64_t storage_bytes, last = t.storage_offset();
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  CHECK(!aoti_torch_get_storage_size(t.get(), &storage_bytes), op, ": ", argument,
        " has no storage. Pass a dense tensor.");
  CHECK((last + 1) * static_cast<int64_t>(t.element_size()) <= storage_bytes, op, ": the storage of ", argument, " (",
        shape_of(t), ") holds only ", storage_bytes,
        " bytes: it was resized, as sharding and offloading do to free memory. Restore it before the call.");
}

// ---- Packed weights ----

inline const PackedHeader& header_of(const char* op, const char* argument, const Tensor& packed) {
  check_cpu(op, argument, packed);
  CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(), op, ": ", argument,
        " must be the uint8 vector that torchq.ops.pack() returned, got ", name_of(packed.scalar_type()), ' ',
        shape_of(packed), '.');
  const auto* header = packed_header(packed.const_data_ptr(), packed.numel());
  CHECK(header, op, ": ", argument, " holds no packed weights (", packed.numel(),
        " bytes without a valid header). Make it with torchq.ops.pack().");
  return *header;
}

inline const char* name_of(Layout layout) { return layout == Layout::p16c8 ? "P16c8" : "P16c4"; }

inline const Kernel& kernel_for(const char* op, Layout layout) {
  const Kernel *kernel = torchq::kernel_for(layout), &active = active_kernel();
  CHECK(kernel, op, ": the weight was packed in layout ", name_of(layout),
        " while another kernel was active; the kernel active now, ", active.name, ", reads ", name_of(active.layout),
        ". Pack it again under this one: torchq.ops.pack(*torchq.ops.unpack(packed)), or for a model copy.deepcopy().");
  return *kernel;
}

}  // namespace ops
}  // namespace torchq
