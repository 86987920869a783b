// torchq._C.call_rotary: rotary position embedding of plain tensors in a plain eager call, else NotImplemented, as
// call_linear in direct.cpp. There is no op: it gives the bits of the torch operations that it takes the place of.

#include "direct.h"
#include "direct_call.h"
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

// y (batch, rows, heads, depth). Null: this is not a plain call.
py::object rotated(PyObject* object, PyObject* cosines, PyObject* sines) {
  dlpack::Tensor x, cos, sin;
  if (!plain_eager() || !read_plain(object, &x) || x.ndim != 4 || !is_contiguous(x)) return {};
  const DTypePair* dtype = find(x.dtype);
  if (!dtype || (dtype->ours != DType::f32 && dtype->ours != DType::bf16)) return {};
  Rotary r{};
  r.dtype = dtype->ours, r.batch = x.shape[0], r.rows = x.shape[1], r.x = data_of(x);
  if (!read_angles(cosines, r, &cos, &r.cos, &r.cos_batch, &r.cos_row) ||
      !read_angles(sines, r, &sin, &r.sin, &r.sin_batch, &r.sin_row))
    return {};
  r.heads = x.shape[2], r.depth = x.shape[3];
  if (cos.shape[2] != r.depth || sin.shape[2] != r.depth || r.depth % 2) return {};
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

PyMethodDef methods[] = {
    {"call_rotary", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_rotary)), METH_FASTCALL,
     "call_rotary(x, cos, sin): x (batch, rows, heads, depth) turned by angles (batch or 1, rows, depth). Or "
     "NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_rotary(py::module_& module) { PyModule_AddFunctions(module.ptr(), methods); }

}  // namespace torchq
