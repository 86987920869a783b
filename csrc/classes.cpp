#include "classes.h"

#include <unordered_map>

#include "nn_module.h"

namespace py = pybind11;

namespace torchq {
namespace {

// What a state of a class is known by: its version tag. CPython gives each state of each class a number of its own, and
// takes it away (0) when the class or one of its bases is changed.
using Tag = unsigned int;

// What the comparison (classes.py) gave for a state.
struct State {
  bool holds;           // else the class has changed since it was noted
  PyObject* forward;    // borrowed from the class, which has it for as long as it is in this state
  PyObject* code;       // its code, which may be replaced in it
  PyObject* functions;  // those of torch that it calls: a tuple of (dict, name, value)

  static State of(PyObject* known) {
    if (known == Py_None) return {false, nullptr, nullptr, nullptr};
    return {true, PyTuple_GET_ITEM(known, 0), Py_NewRef(PyTuple_GET_ITEM(known, 1)),
            Py_NewRef(PyTuple_GET_ITEM(known, 2))};
  }

  void forget() const {
    Py_XDECREF(code);
    Py_XDECREF(functions);
  }

  bool has_code() const {
    return holds && (forward == Py_None || (PyFunction_Check(forward) && PyFunction_GET_CODE(forward) == code));
  }

  bool has_functions() const {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(functions); ++i) {
      PyObject* each = PyTuple_GET_ITEM(functions, i);
      PyObject* now = PyDict_GetItemWithError(PyTuple_GET_ITEM(each, 0), PyTuple_GET_ITEM(each, 1));
      if (now != PyTuple_GET_ITEM(each, 2)) return false;
    }
    return true;
  }
};

constexpr size_t kMostStates = 1 << 16;
std::unordered_map<Tag, State> states;

PyObject* comparison = nullptr;
PyObject* forward_name = nullptr;

// Compares a class. Null: it has no number, or the comparison failed.
const State* compared(PyTypeObject* cls) {
  auto* object = reinterpret_cast<PyObject*>(cls);
  Py_XDECREF(PyObject_GetAttr(object, forward_name));  // a class gets its number when it is asked for something
  const Tag tag = cls->tp_version_tag;
  const auto known = py::reinterpret_steal<py::object>(comparison ? PyObject_CallOneArg(comparison, object) : nullptr);
  PyErr_Clear();
  if (!known || !tag || cls->tp_version_tag != tag) return nullptr;
  if (states.size() >= kMostStates) {  // of classes that change all the time
    for (const auto& each : states) each.second.forget();
    states.clear();
  }
  const auto at = states.find(tag);  // another thread may have been here
  return at != states.end() ? &at->second : &states.emplace(tag, State::of(known.ptr())).first->second;
}

const State* state_of(PyTypeObject* cls) {
  const auto at = states.find(cls->tp_version_tag);
  return at != states.end() ? &at->second : compared(cls);
}

PyObject* computes(PyObject*, PyObject* cls) {
  return PyBool_FromLong(PyType_Check(cls) && computes_as_known(reinterpret_cast<PyTypeObject*>(cls)));
}

PyObject* set_comparison(PyObject*, PyObject* function) {
  Py_XSETREF(comparison, Py_NewRef(function));
  Py_RETURN_NONE;
}

// Whether reading a fact again, (read, of, name, value), gives the same. What is read of a dict is an item.
bool holds(PyObject* fact, PyObject* missing) {
  PyObject *read = PyTuple_GET_ITEM(fact, 0), *of = PyTuple_GET_ITEM(fact, 1), *name = PyTuple_GET_ITEM(fact, 2);
  PyObject* value = PyTuple_GET_ITEM(fact, 3);
  if (PyDict_CheckExact(of)) {
    PyObject* now = PyDict_GetItemWithError(of, name);
    return (now || PyErr_Occurred() ? now : missing) == value;
  }
  PyObject* arguments[] = {of, name, missing};
  PyObject* now = PyObject_Vectorcall(read, arguments, 3, nullptr);
  Py_XDECREF(now);  // it is only compared
  return now == value;
}

PyObject* facts_hold(PyObject*, PyObject* const* args, Py_ssize_t count) {
  bool yes = count == 2 && PyTuple_Check(args[0]);
  for (Py_ssize_t i = 0; yes && i < PyTuple_GET_SIZE(args[0]); ++i) {
    PyObject* fact = PyTuple_GET_ITEM(args[0], i);
    yes = PyTuple_Check(fact) && PyTuple_GET_SIZE(fact) == 4 && holds(fact, args[1]);
  }
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(yes);
}

PyMethodDef methods[] = {
    {"computes_as_known", computes, METH_O,
     "computes_as_known(cls): whether a class has what it had when it was noted (modules/classes.py), its forward the "
     "same code, and torch the functions that this calls."},
    {"facts_hold", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(facts_hold)), METH_FASTCALL,
     "facts_hold(facts, missing): whether each fact (modules/flow.py), read again, gives the same. A dict is asked for "
     "an "
     "item, whatever reads it."},
    {"set_comparison", set_comparison, METH_O,
     "set_comparison(function): what compares a class, once for each of its states."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool is_as_known(PyTypeObject* cls) {
  const State* state = state_of(cls);
  return state && state->has_code();
}

bool computes_as_known(PyTypeObject* cls) {
  const State* state = state_of(cls);
  return state && state->has_code() && state->has_functions();
}

void add_classes(py::module_& module) {
  forward_name = name("forward");
  PyModule_AddFunctions(module.ptr(), methods);
}

}  // namespace torchq
