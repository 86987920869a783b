#include "nn_module.h"

#include <string>

#include "classes.h"

namespace py = pybind11;

namespace torchq {
namespace {

struct NnModule {
  PyObject* own_hooks[4];     // names of attributes, which are dicts of the module's hooks
  PyObject* replacements[2];  // names of attributes that hold what is called in place of forward(), if anything
  PyObject* global_hooks[4];  // dicts of the hooks on all modules
} nn_module;

bool is_empty(PyObject* hooks) { return PyDict_Check(hooks) ? PyDict_GET_SIZE(hooks) == 0 : falsy(Py_NewRef(hooks)); }

// Whether hooks are nothing but methods of this function.
bool are_methods(PyObject* hooks, PyObject* function) {
  if (!function || !PyDict_Check(hooks)) return false;
  PyObject *key, *hook;
  Py_ssize_t at = 0;
  while (PyDict_Next(hooks, &at, &key, &hook))
    if (!PyMethod_Check(hook) || PyMethod_GET_FUNCTION(hook) != function) return false;
  return true;
}

}  // namespace

void watch_nn_module() {
  const char* hooks[] = {"_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"};
  const py::module_ nn = py::module_::import("torch.nn.modules.module");
  for (int i = 0; i < 4; ++i) {
    nn_module.own_hooks[i] = name(hooks[i]);
    nn_module.global_hooks[i] = forever(nn.attr((std::string("_global") + hooks[i]).c_str()));
  }
  nn_module.replacements[0] = name("_compiled_call_impl");
  nn_module.replacements[1] = name("forward");
}

PyObject* plain_state(PyObject* module, PyObject* cls) { return plain_state(module, cls, nullptr, nullptr); }

PyObject* plain_state(PyObject* module, PyObject* cls, PyObject* pre_hook, PyObject* hook) {
  PyObject* const allowed[] = {pre_hook, hook, nullptr, nullptr};
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != cls || !is_as_known(Py_TYPE(module))) return nullptr;
  PyObject* state = PyObject_GenericGetDict(module, nullptr);
  if (!state) return PyErr_Clear(), nullptr;
  Py_DECREF(state);  // the module keeps it alive
  for (int i = 0; i < 4; ++i) {
    PyObject* hooks = PyDict_GetItemWithError(state, nn_module.own_hooks[i]);
    if (!hooks || !(is_empty(hooks) || are_methods(hooks, allowed[i]))) return nullptr;
  }
  for (PyObject* name : nn_module.replacements) {
    PyObject* replacement = PyDict_GetItemWithError(state, name);
    if (replacement && replacement != Py_None) return nullptr;
  }
  for (PyObject* hooks : nn_module.global_hooks)
    if (!is_empty(hooks)) return nullptr;
  return state;
}

}  // namespace torchq
