// torchq._C.call_rotary: rotary position embedding of plain tensors in a plain eager call, else NotImplemented, as
// call_linear in direct.cpp. There is no op: it gives the bits of the torch operations that it takes the place of.
// call_heads is the same behind the products that give queries and keys, together with that of the values.

#include <memory>
#include <utility>

#include "direct.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "plain_tensor.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

bool read_plain(PyObject* object, dlpack::Tensor* out) {
  return view(object, out) && !wants_gradient(object) && !is_negated(object);
}

// Cosines or sines (batch or 1, rows, depth) with the columns side by side.
bool read_angles(PyObject* object, const Rotary& r, dlpack::Tensor* t, const void** data, int64_t* batch,
                 int64_t* row) {
  if (!read_plain(object, t) || t->ndim != 3 || find(t->dtype) == nullptr || find(t->dtype)->ours != r.dtype)
    return false;
  const bool fits = (t->shape[0] == r.batch || t->shape[0] == 1) && t->shape[1] == r.rows;
  if (!fits || t->strides[2] != 1) return false;
  *data = data_of(*t);
  *batch = t->shape[0] == 1 ? 0 : t->strides[0];
  *row = t->strides[1];
  return true;
}

// Cosines and sines of these rows, heads and columns.
bool read_angles(PyObject* cosines, PyObject* sines, Rotary* r) {
  dlpack::Tensor cos, sin;
  return read_angles(cosines, *r, &cos, &r->cos, &r->cos_batch, &r->cos_row) &&
         read_angles(sines, *r, &sin, &r->sin, &r->sin_batch, &r->sin_row) && cos.shape[2] == r->depth &&
         sin.shape[2] == r->depth && r->depth % 2 == 0;
}

bool may_be_turned(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16; }

// y (batch, rows, heads, depth). Null: this is not a plain call.
py::object rotated(PyObject* object, PyObject* cosines, PyObject* sines) {
  dlpack::Tensor x;
  if (!plain_eager() || !read_plain(object, &x) || x.ndim != 4 || !is_contiguous(x)) return {};
  const DTypePair* dtype = find(x.dtype);
  if (!dtype || !may_be_turned(dtype->ours)) return {};
  Rotary r{};
  r.dtype = dtype->ours, r.batch = x.shape[0], r.rows = x.shape[1], r.x = data_of(x);
  r.heads = x.shape[2], r.depth = x.shape[3];
  if (!read_angles(cosines, sines, &r)) return {};
  const int64_t shape[] = {r.batch, r.rows, r.heads, r.depth};
  auto y = py::reinterpret_steal<py::object>(new_output(shape, 4, r.depth, *dtype, &r.y));
  if (!y) return {};
  {
    const Unlocked unlocked(r.batch * r.rows * r.heads * r.depth >= kKeepGilBelowValues);
    run(r);
  }
  return y;
}

PyObject* call_rotary(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    if (count != 3) Py_RETURN_NOTIMPLEMENTED;
    return or_not_implemented(rotated(args[0], args[1], args[2]));
  });
}

// Products of x (batch, rows, k) as (batch, heads, rows, size), of which the first kTurned are turned.
constexpr int kHeads = 3, kTurned = 2;

// Null: this is not a plain call.
py::object heads_of(const Together& layers, int64_t size, PyObject* cosines, PyObject* sines) {
  py::tuple found(kHeads);
  Rotary rotary[kHeads] = {};
  void* products[kHeads];
  for (int i = 0; i < kHeads; ++i) {
    const PlainInput& in = layers.inputs[i];
    const int64_t n = in.weights->n;
    if (in.x.ndim != 3 || n % size || !may_be_turned(in.dtype->ours)) return {};
    const int64_t shape[] = {in.x.shape[0], in.x.shape[1], n / size, size};
    Rotary& r = rotary[i];
    r.dtype = in.dtype->ours, r.batch = shape[0], r.rows = shape[1], r.heads = shape[2], r.depth = shape[3];
    if (i < kTurned && !read_angles(cosines, sines, &r)) return {};
    auto y = py::reinterpret_steal<py::object>(new_heads(shape, *in.dtype, &r.y));
    if (!y) return {};
    found[i] = y;
    products[i] = r.y;
  }
  {
    const Unlocked unlocked(layers.work() >= kKeepGilBelow);
    std::unique_ptr<uint8_t[]> rooms[kTurned];
    for (int i = 0; i < kTurned; ++i) {
      rooms[i].reset(
          new uint8_t[layers.inputs[i].count * layers.inputs[i].weights->n * element_bytes(rotary[i].dtype)]);
      rotary[i].x = products[i] = rooms[i].get();
    }
    layers.multiply(products);
    for (int i = 0; i < kTurned; ++i) run(rotary[i]);
  }
  return std::move(found);
}

PyObject* call_heads(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=]() -> PyObject* {
    PyObject* modules = count == 6 ? args[0] : nullptr;
    if (!modules || !PyTuple_Check(modules) || PyTuple_GET_SIZE(modules) != kHeads) Py_RETURN_NOTIMPLEMENTED;
    const long size = PyLong_Check(args[3]) ? PyLong_AsLong(args[3]) : 0;
    if (size <= 0) return or_not_implemented({});
    Together layers;
    for (int i = 0; i < kHeads; ++i)
      if (!layers.add(PyTuple_GET_ITEM(modules, i), args[1], args[2])) return or_not_implemented({});
    return or_not_implemented(heads_of(layers, size, args[4], args[5]));
  });
}

PyMethodDef methods[] = {
    {"call_rotary", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_rotary)), METH_FASTCALL,
     "call_rotary(x, cos, sin): x (batch, rows, heads, depth) turned by angles (batch or 1, rows, depth). Or "
     "NotImplemented."},
    {"call_heads", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_heads)), METH_FASTCALL,
     "call_heads(layers, cls, x, size, cos, sin): what three QuantizedLinears give for x (batch, rows, k), each as "
     "(batch, heads, rows, size), the first two turned by these angles. Or NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_rotary(py::module_& module) { PyModule_AddFunctions(module.ptr(), methods); }

}  // namespace torchq
