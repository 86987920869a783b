// torchq._C.call_attention: the call of torchq::attention without the dispatcher's share of it, and without the views
// that give each head a dimension of its own. As call_linear in direct.cpp it answers NotImplemented wherever anything
// could stand between the call and the arithmetic. The op computes the same.

#include <algorithm>

#include "attention_band.h"
#include "direct.h"
#include "direct_call.h"
#include "plain_tensor.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

using attention::band_of;
using attention::default_scale;
using attention::kFar;
using attention::kMostKeys;
using attention::kSchemes;
using attention::Scheme;
using attention::View;

constexpr dlpack::DataType kBool{6, 8, 1};

constexpr int64_t kJoined = -1;  // for `heads`: q, k and v have a dimension of heads, and y has none

// q, k, v or a mask, as (batch, heads, rows, columns).
struct Operand {
  int64_t batch, heads, rows, columns;
  View view;
};

bool read_plain(PyObject* object, dlpack::Tensor* out) {
  return view(object, out) && !wants_gradient(object) && !is_negated(object);
}

// (batch, heads, rows, columns), or (batch, rows, heads * columns) with `heads` of them.
bool read_operand(PyObject* object, int64_t heads, DType dtype, Operand* out) {
  dlpack::Tensor t;
  if (!read_plain(object, &t) || t.ndim != (heads ? 3 : 4)) return false;
  const DTypePair* found = find(t.dtype);
  if (!found || found->ours != dtype) return false;
  const int64_t bytes = element_bytes(dtype), *s = t.shape;
  const auto stride = [&](int i) { return t.shape[i] == 1 ? 0 : t.strides[i] * bytes; };
  if (!heads) {
    *out = {s[0], s[1], s[2], s[3], {data_of(t), dtype, stride(0), stride(1), stride(2), t.strides[3] * bytes}};
    return true;
  }
  if (s[2] % heads || t.strides[2] != 1) return false;
  const int64_t columns = s[2] / heads;
  *out = {s[0], heads, s[1], columns, {data_of(t), dtype, stride(0), columns * bytes, stride(1), bytes}};
  return true;
}

// A mask that broadcasts to (batch, heads, rows, keys), in four dimensions.
bool read_mask(PyObject* object, const attention::Problem& p, View* out) {
  dlpack::Tensor t;
  if (!read_plain(object, &t) || t.ndim != 4) return false;
  const bool is_bool = t.dtype.code == kBool.code && t.dtype.bits == kBool.bits && t.dtype.lanes == 1;
  const DTypePair* found = is_bool ? kU8 : find(t.dtype);
  if (!found || (found == kU8) != is_bool) return false;
  const int64_t sizes[] = {p.batch, p.heads, p.rows, p.keys}, bytes = element_bytes(found->ours);
  int64_t strides[4];
  for (int i = 0; i < 4; ++i) {
    if (t.shape[i] != 1 && t.shape[i] != sizes[i]) return false;
    strides[i] = t.shape[i] == 1 ? 0 : t.strides[i] * bytes;
  }
  if (t.shape[3] == 1 && p.keys == 1) strides[3] = bytes;
  *out = {data_of(t), found->ours, strides[0], strides[1], strides[2], strides[3]};
  return true;
}

struct Arguments {
  PyObject *q, *k, *v, *mask, *heads, *is_causal, *scale, *scheme;

  bool read(int64_t* head_count, attention::Problem* p) const {
    if (!PyLong_CheckExact(heads) || !PyBool_Check(is_causal) || !PyLong_CheckExact(scheme)) return false;
    if (scale != Py_None && !PyFloat_CheckExact(scale)) return false;
    *head_count = PyLong_AsLongLong(heads);
    const long number = PyLong_AsLong(scheme);
    p->scheme = static_cast<Scheme>(number);
    return *head_count >= kJoined && number >= 0 && number < kSchemes;
  }
};

// y (batch, rows, heads, columns), or (batch, rows, heads * columns) if q is. Null: this is not a plain call.
py::object attended(const Arguments& given) {
  attention::Problem p{};
  int64_t heads;
  dlpack::Tensor first;
  if (!plain_eager() || !given.read(&heads, &p) || !view(given.q, &first)) return {};
  const bool joined = heads != 0;
  heads = std::max<int64_t>(heads, 0);
  const DTypePair* dtype = find(first.dtype);
  if (!dtype || dtype == kU8) return {};
  Operand q, k, v;
  if (!read_operand(given.q, heads, dtype->ours, &q) || !read_operand(given.k, heads, dtype->ours, &k) ||
      !read_operand(given.v, heads, dtype->ours, &v))
    return {};
  p.batch = q.batch, p.heads = q.heads, p.kv_heads = k.heads;
  p.rows = q.rows, p.keys = k.rows, p.depth = q.columns, p.columns = v.columns;
  if (k.batch != q.batch || v.batch != q.batch || v.heads != k.heads || v.rows != k.rows || k.columns != q.columns)
    return {};
  if (!p.batch || !p.rows || !p.keys || !p.depth || !p.columns || !k.heads || !q.heads || q.heads % k.heads) return {};
  if (p.scheme == Scheme::codes && p.keys > kMostKeys) return {};
  p.q = q.view, p.k = k.view, p.v = v.view;
  if (given.mask != Py_None && !read_mask(given.mask, p, &p.mask)) return {};
  p.band = band_of(given.is_causal == Py_True, 0, kFar / 2);
  p.scale = given.scale == Py_None ? default_scale(p.depth) : static_cast<float>(PyFloat_AS_DOUBLE(given.scale));
  const int64_t row = p.heads * p.columns, bytes = element_bytes(dtype->ours);
  const int64_t shape[] = {p.batch, p.rows, p.heads, p.columns};
  auto y = py::reinterpret_steal<py::object>(joined ? new_output(shape, 3, row, *dtype, &p.y)
                                                    : new_output(shape, 4, p.columns, *dtype, &p.y));
  if (!y) return {};
  p.y_dtype = dtype->ours;
  p.y_batch = p.rows * row * bytes, p.y_row = row * bytes, p.y_head = p.columns * bytes;
  {
    const Unlocked unlocked(p.batch * p.heads * (p.rows + p.keys) * p.depth >= kKeepGilBelowValues);
    run(active_kernel(), p);
  }
  return y;
}

PyObject* call_attention(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    if (count != 8) Py_RETURN_NOTIMPLEMENTED;
    return or_not_implemented(attended({args[0], args[1], args[2], args[3], args[4], args[5], args[6], args[7]}));
  });
}

PyMethodDef methods[] = {
    {"call_attention", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_attention)), METH_FASTCALL,
     "call_attention(q, k, v, mask, heads, is_causal, scale, scheme): torchq::attention of q, k and v (batch, heads, "
     "rows, columns), as (batch, rows, heads, columns), if heads is 0, and as (batch, rows, heads * columns) if it is "
     "-1; else of (batch, rows, heads * columns), as the same. Or NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_attention(py::module_& module) { PyModule_AddFunctions(module.ptr(), methods); }

}  // namespace torchq
