// torchq._C.call_together: what several QuantizedLinears give for one x in a plain eager call, else NotImplemented, as
// call_linear in direct.cpp. Layers that make the same codes of x are one job (run.h): its rows are quantized once.

#include <algorithm>

#include "direct.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {

bool Together::add(PyObject* module, PyObject* cls, PyObject* x) {
  if (count == kMost) return false;
  Layer& layer = layers[count];
  PlainInput& input = inputs[count];
  return read_layer_alone(module, cls, &layer) && read_input(x, layer, &input) && ++count;
}

int64_t Together::work() const {
  int64_t sum = 0;
  for (int i = 0; i < count; ++i) sum += inputs[i].work();
  return sum;
}

void Together::multiply(void* const* y) const {
  Problem problems[kMost];
  for (int i = 0; i < count; ++i) {
    const PlainInput& in = inputs[i];
    problems[i] = linear_problem(layers[i].numbers, in.rows(), *in.weights, y[i], in.dtype->ours);
  }
  const bool alike =
      std::all_of(inputs, inputs + count, [&](const PlainInput& in) { return in.kernel == inputs->kernel; });
  if (alike) return run(*inputs->kernel, problems, count);
  for (int i = 0; i < count; ++i) run(*inputs[i].kernel, problems[i]);
}

namespace {

PyObject* call_together(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=]() -> PyObject* {
    if (count != 3 || !PyTuple_Check(args[0])) Py_RETURN_NOTIMPLEMENTED;
    Together together;
    const Py_ssize_t layers = PyTuple_GET_SIZE(args[0]);
    py::tuple found(layers);
    void* y[Together::kMost];
    for (Py_ssize_t i = 0; i < layers; ++i) {
      if (!together.add(PyTuple_GET_ITEM(args[0], i), args[1], args[2])) return or_not_implemented({});
      const PlainInput& in = together.inputs[i];
      auto one = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, in.weights->n, *in.dtype, &y[i]));
      if (!one) return or_not_implemented({});
      found[i] = one;
    }
    {
      const Unlocked unlocked(together.work() >= kKeepGilBelow);
      together.multiply(y);
    }
    return found.release().ptr();
  });
}

PyMethodDef methods[] = {
    {"call_together", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_together)), METH_FASTCALL,
     "call_together(layers, cls, x): a tuple of what up to four QuantizedLinears give for x. Or NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_together(py::module_& module) { PyModule_AddFunctions(module.ptr(), methods); }

}  // namespace torchq
