// Plain tensors in plain eager calls. A torch.Tensor is read where it lies, through DLPack's exchange table: a C struct
// which torch publishes for this purpose. It needs no torch header of unstable ABI, counts no references and copies no
// shape. All of this needs the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"
#include "gemm/types.h"

namespace torchq {

struct DTypePair {
  DType ours;
  dlpack::DataType dl;
};
extern const DTypePair* const kU8;
extern const DTypePair* const kF32;

// Null for a dtype that no op takes.
const DTypePair* find(const dlpack::DataType& type);
const DTypePair* find(PyObject* torch_dtype);

// Of the CPU, in this thread.
bool autocast();

// How many modes see the calls of torch's functions in this thread, without default devices: these only tell functions
// that make tensors where to make them. Negative where that is unknown.
long function_modes();

// Whether forward-mode derivatives are computed.
bool in_forward_mode();

// Whether nothing but the operation itself wants to know of a call: no mode, transform, tracing, autocast or profiler.
// False as well where torch publishes no exchange table.
bool plain_eager();
// The same with so many dispatch modes that are torchq's own, and see nothing of what is called past them.
bool plain_eager(long own_modes);

// The tensor as it lies in memory, if it is dense and on the CPU. Inside a transform such as vmap a wrapped tensor
// fails here, since it has no memory of its own, and a plain one may be read like any other.
bool view(PyObject* object, dlpack::Tensor* out);
// The same of an nn.Parameter.
bool view_parameter(PyObject* object, dlpack::Tensor* out);

inline const uint8_t* data_of(const dlpack::Tensor& t) { return static_cast<const uint8_t*>(t.data) + t.byte_offset; }

// Whether torch negates the values lazily, when they are read: as of the imaginary part of a conjugate. DLPack does not
// say it.
bool is_negated(PyObject* x);

// Whether autograd wants to know of a product with x.
bool wants_gradient(PyObject* x);

// Whether autograd may want to know of a product with x, a tensor of any kind, or a transform such as vmap.
bool may_want_gradient(PyObject* x);

// The torch.dtype of a tensor of any kind, or null. Borrowed.
PyObject* dtype_of(PyObject* x);
PyObject* dtype_of(const DTypePair& dtype);

// Every stride must be exactly that of a contiguous tensor, even in a dimension of size 1, where any would do.
bool is_contiguous(const dlpack::Tensor& t);

constexpr int kMostDims = 64;

// A new torch.Tensor on the CPU with the leading dimensions of this shape and n columns, and where its data lies. On
// failure null, with a Python error set.
PyObject* new_output(const int64_t* shape, int ndim, int64_t n, const DTypePair& dtype, void** data);

// The same of this shape (n, size..., channels), read as (n, channels, size...) with the channels last in memory.
PyObject* new_channels_last(const int64_t* shape, int ndim, const DTypePair& dtype, void** data);

// The same of this shape (batch, rows, heads, columns), read as (batch, heads, rows, columns).
PyObject* new_heads(const int64_t (&shape)[4], const DTypePair& dtype, void** data);

// To be called once, before all others.
void watch_torch();

}  // namespace torchq
