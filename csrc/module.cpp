// torchq._C: CPU features, the kernel table, forcing a kernel, huge pages, and the direct calls of direct.cpp.
// Importing it also registers the ops of torch_ops.cpp, which live in the same library.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "classes.h"
#include "direct.h"
#include "gemm/gemm.h"
#include "lines.h"
#include "run.h"

namespace py = pybind11;

namespace {

std::vector<std::string> feature_names(uint32_t bits) {
  std::vector<std::string> names;
  if (bits & torchq::kAvx2) names.push_back("avx2");
  if (bits & torchq::kAvxVnni) names.push_back("avx_vnni");
  if (bits & torchq::kAvx512Vnni) names.push_back("avx512_vnni");
  if (bits & torchq::kAvx512Bf16) names.push_back("avx512_bf16");
  if (bits & torchq::kAmxInt8) names.push_back("amx_int8");
  if (bits & torchq::kAmxBf16) names.push_back("amx_bf16");
  if (bits & torchq::kAsimd) names.push_back("asimd");
  if (bits & torchq::kAsimdDp) names.push_back("asimddp");
  if (bits & torchq::kI8mm) names.push_back("i8mm");
  return names;
}

// One row of the kernel table.
struct Row {
  std::string name;
  std::vector<std::string> needs;
  std::tuple<int, int, int> tile;
  bool runnable;
};

std::vector<Row> table() {
  std::vector<Row> rows;
  for (int i = 0; i < torchq::kernel_count(); ++i) {
    const torchq::Kernel& k = torchq::kernel_at(i);
    rows.push_back(
        {k.name, feature_names(k.needs), {k.tiling.tile.m, k.tiling.tile.n, k.tiling.tile.k}, torchq::can_run(k)});
  }
  return rows;
}

std::optional<std::string> name_or_none(const torchq::Kernel* kernel) {
  return kernel ? std::optional<std::string>(kernel->name) : std::nullopt;
}

// The caller (torchq/kernels.py) has checked the name.
void force(const std::optional<std::string>& name) {
  const torchq::Kernel* kernel = name ? torchq::find_kernel(name->c_str()) : nullptr;
  if (name && (!kernel || !torchq::can_run(*kernel))) throw py::value_error("kernel " + *name + " cannot run here");
  torchq::force_kernel(kernel);
}

PyObject* kernel_of_context_function = nullptr;

// The kernel that torchq.kernels.use() forces in the calling thread's context, or null. The thread may hold the GIL, or
// not, or be none of Python's, which has an empty context.
const torchq::Kernel* kernel_of_context() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const torchq::Kernel* kernel = nullptr;
  PyObject* name = PyObject_CallNoArgs(kernel_of_context_function);
  const char* text = name && name != Py_None ? PyUnicode_AsUTF8(name) : nullptr;
  if (text) kernel = torchq::find_kernel(text);
  if (PyErr_Occurred()) PyErr_WriteUnraisable(kernel_of_context_function);
  Py_XDECREF(name);
  PyGILState_Release(state);
  return kernel;
}

void set_kernel_of_context(py::object function) { kernel_of_context_function = function.release().ptr(); }

void ask_for_kernel(bool yes) { torchq::force_kernel_of(yes ? &kernel_of_context : nullptr); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "torchq's compiled part: CPU features, the kernel table, forcing a kernel.";
  m.attr("MAX_DEPTH") = torchq::kMaxDepth;
  py::class_<Row>(m, "Kernel", "One row of the kernel table.")
      .def_readonly("name", &Row::name)
      .def_readonly("needs", &Row::needs, "CPU features it needs")
      .def_readonly("tile", &Row::tile, "rows, columns and k of one tile")
      .def_readonly("runnable", &Row::runnable, "whether this CPU can run it");
  m.def("table", &table, "The kernels compiled in, best first.");
  m.def(
      "cpu_features", [] { return feature_names(torchq::cpu_features()); }, "What this CPU has of what kernels need.");
  m.def(
      "is_kernel_name", [](const std::string& name) { return torchq::is_kernel_name(name.c_str()); },
      "Whether a kernel of this name exists, compiled in here or not.");
  m.def(
      "known_names",
      [] {
        std::vector<std::string> names;
        while (const char* name = torchq::kernel_name_at(static_cast<int>(names.size()))) names.push_back(name);
        return names;
      },
      "Every kernel's name, compiled in here or not.");
  m.def("active", [] { return std::string(torchq::active_kernel().name); }, "The kernel the ops use now.");
  m.def(
      "active_attention", [] { return std::string(torchq::attention::kernel_beside(torchq::active_kernel()).name); },
      "The attention kernel that runs beside the active one.");
  m.def(
      "codes_pay_from", [] { return torchq::attention::kernel_beside(torchq::active_kernel()).codes_pay_from; },
      "For fewer keys that kernel takes no more time in bfloat16 than in int8; 0: int8 always pays.");
  m.def("forced", [] { return name_or_none(torchq::forced_kernel()); }, "The forced kernel, if any.");
  m.def("force", &force, py::arg("name").none(true), "Forces a kernel for the process; None gives the choice back.");
  m.def("set_kernel_of_context", &set_kernel_of_context,
        "Takes the function that gives the name of the kernel forced in the caller's context, or None. For good.");
  m.def("ask_for_kernel", &ask_for_kernel, "Whether any context forces a kernel, so that the function must be asked.");
  m.def("last_used", [] { return name_or_none(torchq::last_kernel()); }, "The kernel that ran in the latest op call.");
  m.def(
      "gather_into_huge_pages",
      [](uintptr_t data, int64_t bytes) { torchq::gather_into_huge_pages(reinterpret_cast<void*>(data), bytes); },
      "Asks the system for huge pages under packed weights that a layer keeps, and around them.");
  torchq::add_classes(m);
  torchq::add_direct_calls(m);
  torchq::add_direct_norm(m);
  torchq::add_direct_residual(m);
  torchq::add_direct_attention(m);
  torchq::add_direct_gated(m);
  torchq::add_direct_embedding(m);
  torchq::add_direct_rotary(m);
  torchq::add_direct_together(m);
  torchq::add_direct_conv(m);
  torchq::add_direct_fine(m);
  torchq::add_direct_steps(m);
  torchq::add_lines(m);
}

// libstdc++'s shared_ptr asks a variable of glibc whether the process has one thread only. glibc has it from 2.32 on.
// Ours says no, so that what is built on a newer Linux loads on an older one too: wheels are manylinux_2_28.
#if defined(__GLIBC__)
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif
