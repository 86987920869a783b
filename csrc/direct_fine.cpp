// torchq._C.call_fine: the call of a FineLinear, and of the activation behind it in an Int8Sequential, without
// nn.Module's and the dispatcher's shares of it, as call_fused in direct.cpp: NotImplemented wherever anything could
// stand between the call and the arithmetic. The op, torchq::linear_fine, computes the same.

#include "direct.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "nn_module.h"
#include "plain_tensor.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

PyObject* scope_name;

// y. Null without an error set: this is not a plain call.
py::object multiply(PyObject* object, const Layer& layer) {
  PlainInput in;
  if (!layer.numbers.per_token || !read_input(object, layer, &in) || in.dtype->ours != DType::f32) return {};
  void* data;
  auto y = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, in.weights->n, *in.dtype, &data));
  if (!y) return {};
  const FineRows rows{in.count, reinterpret_cast<const float*>(data_of(in.x)), static_cast<float*>(data)};
  {
    const Unlocked unlocked(2 * in.work() >= kKeepGilBelow);
    run_fine(*in.kernel, rows, *in.weights, layer.numbers.activation);
  }
  return y;
}

PyObject* call_fine(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* state = count == 6 ? plain_state(args[0], args[1]) : nullptr;
    PyObject* scope = state ? PyDict_GetItemWithError(state, scope_name) : nullptr;
    Layer layer;
    if (!state || (scope && scope != Py_None) || !read_layer(state, &layer) ||
        !read_activation(args[3], &layer.numbers.activation) || !are_plain(args[4], args[5]))
      return or_not_implemented({});
    return or_not_implemented(multiply(args[2], layer));
  });
}

PyMethodDef methods[] = {
    {"call_fine", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_fine)), METH_FASTCALL,
     "call_fine(module, cls, x, activation, between, settings): cls.forward(module, x) of a FineLinear with an "
     "activation, in place of the modules `between`; NotImplemented where only the usual calls will do."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_fine(py::module_& module) {
  scope_name = name("scope");
  PyModule_AddFunctions(module.ptr(), methods);
}

}  // namespace torchq
