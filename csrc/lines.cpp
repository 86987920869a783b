// torchq._C.lines_of and fetch_lines: the Python objects that a call of a layer reads, asked for at once.
//
// Where a model reads more weights than the caches hold, the objects of a layer are in none of them when its turn comes
// again: modules, their dicts, the dicts of their hooks, several hundred cache lines. Each names the next one, so they
// come from memory one after the other: to look at a layer of BERT-base took 20 us of its 700 at 16 rows, and 2 where
// the caches had it. Their addresses are noted once. They may be stale by then, and that is no error: a prefetch of
// what is freed faults nowhere, and nothing but time depends on it.

#include "lines.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include "direct_call.h"
#include "nn_module.h"

namespace py = pybind11;

namespace torchq {
namespace {

constexpr size_t kMostObjects = 1024;  // of what leads to a whole model
constexpr int64_t kLine = 64;
constexpr int64_t kBeforeObject = 3 * sizeof(void*);  // where CPython keeps the address of an instance's dict
constexpr int64_t kMostOfObject = 256, kMostOfDict = 1024;

using Lines = std::vector<const char*>;
constexpr const char* kLines = "torchq._C.Lines";

PyTypeObject* module_class = nullptr;

// Objects in the order in which they are found from a root, each once.
struct Found {
  std::vector<PyObject*> objects;
  std::unordered_set<PyObject*> seen;
};

int note(PyObject* object, void* found) {
  auto* all = static_cast<Found*>(found);
  const bool shared = PyType_Check(object) || PyModule_Check(object) || PyCode_Check(object) ||
                      PyUnicode_Check(object) || object == Py_None || PyBool_Check(object);  // of all layers
  if (!shared && all->objects.size() < kMostObjects && all->seen.insert(object).second) all->objects.push_back(object);
  return 0;
}

// Whether what an object refers to belongs to the layer, too.
bool leads_on(PyObject* object) {
  return PyTuple_Check(object) || PyDict_Check(object) || PyList_Check(object) || PyCell_Check(object) ||
         PyMethod_Check(object) || PyObject_TypeCheck(object, module_class);
}

void add(const void* begin, int64_t bytes, Lines* lines) {
  const auto first = reinterpret_cast<uintptr_t>(begin) / kLine * kLine;
  for (uintptr_t at = first; at < reinterpret_cast<uintptr_t>(begin) + bytes; at += kLine)
    lines->push_back(reinterpret_cast<const char*>(at));
}

void add_table(PyObject* dict, Lines* lines) {
  const auto* own = reinterpret_cast<PyDictObject*>(dict);
  const auto size = py::reinterpret_steal<py::object>(PyObject_CallMethod(dict, "__sizeof__", nullptr));
  const int64_t bytes = size ? PyLong_AsLongLong(size.ptr()) - static_cast<int64_t>(sizeof(PyDictObject)) : 0;
  add(own->ma_keys, std::clamp(bytes, kLine, kMostOfDict), lines);
  if (own->ma_values) add(own->ma_values, kMostOfObject, lines);
}

void forget(PyObject* capsule) { delete static_cast<Lines*>(PyCapsule_GetPointer(capsule, kLines)); }

void add_object(PyObject* object, Lines* lines) {
  const PyTypeObject* type = Py_TYPE(object);
  const int64_t bytes = type->tp_basicsize + (PyTuple_Check(object) ? Py_SIZE(object) * type->tp_itemsize : 0);
  add(reinterpret_cast<char*>(object) - kBeforeObject, std::min(bytes, kMostOfObject) + kBeforeObject, lines);
}

PyObject* lines_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=]() -> PyObject* {
    if (count != 2 || !PyTuple_Check(args[1])) {
      PyErr_SetString(PyExc_TypeError, "torchq: lines_of() takes an object and a tuple");
      return nullptr;
    }
    Found found;
    Lines lines;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); ++i) add_object(PyTuple_GET_ITEM(args[1], i), &lines);
    note(args[0], &found);
    for (size_t i = 0; i < found.objects.size(); ++i) {
      PyObject* object = found.objects[i];
      const PyTypeObject* type = Py_TYPE(object);
      add_object(object, &lines);
      if (PyDict_CheckExact(object) || PyODict_CheckExact(object)) add_table(object, &lines);  // no code of the user
      if (PyFunction_Check(object) && PyFunction_GET_CLOSURE(object)) note(PyFunction_GET_CLOSURE(object), &found);
      if (leads_on(object) && type->tp_traverse) type->tp_traverse(object, note, &found);
    }
    PyErr_Clear();
    std::unique_ptr<Lines> kept(new Lines(std::move(lines)));
    PyObject* capsule = PyCapsule_New(kept.get(), kLines, forget);
    if (capsule) kept.release();
    return capsule;
  });
}

PyObject* fetch_lines(PyObject*, PyObject* capsule) {
  const auto* lines = static_cast<const Lines*>(PyCapsule_GetPointer(capsule, kLines));
  if (!lines) return nullptr;
  for (const char* line : *lines) __builtin_prefetch(line, 0, 2);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"lines_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(lines_of)), METH_FASTCALL,
     "lines_of(root, others): where the objects lie that a tuple, a dict or a module leads to, and those of a tuple "
     "without what they lead to, for fetch_lines."},
    {"fetch_lines", fetch_lines, METH_O, "fetch_lines(lines): asks for them all, from memory into L2."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_lines(py::module_& module) {
  const py::object kind = py::module_::import("torch.nn").attr("Module");
  module_class = reinterpret_cast<PyTypeObject*>(forever(kind));
  PyModule_AddFunctions(module.ptr(), methods);
}

}  // namespace torchq
